//! Headers made by hand: what is right is read, and whatever else is refused with a sentence.

use std::path::{Path, PathBuf};

use bytes::Bytes;
use proptest::prelude::*;

use super::header::{self, Header};
use crate::checkpoint::Shard;
use crate::error::CheckpointError;
use crate::seeds::properties;

/// A file under construction.
#[derive(Clone, Default)]
struct File(Vec<u8>);

/// Numbers of value types.
const U8: u32 = 0;
const U32: u32 = 4;
const BOOL: u32 = 7;
const TEXT: u32 = 8;
const LIST: u32 = 9;
/// Numbers of tensor types.
const F32: u32 = 0;
const Q4_K: u32 = 12;

impl File {
    fn new(version: u32, tensors: i64, keys: i64) -> Self {
        let mut file = Self(b"GGUF".to_vec());
        file.u32(version).u64(tensors as u64).u64(keys as u64);
        file
    }

    fn bytes(&mut self, bytes: &[u8]) -> &mut Self {
        self.0.extend_from_slice(bytes);
        self
    }

    fn u32(&mut self, n: u32) -> &mut Self {
        self.bytes(&n.to_le_bytes())
    }

    fn u64(&mut self, n: u64) -> &mut Self {
        self.bytes(&n.to_le_bytes())
    }

    fn text(&mut self, text: &str) -> &mut Self {
        self.u64(text.len() as u64).bytes(text.as_bytes())
    }

    fn key(&mut self, key: &str, kind: u32) -> &mut Self {
        self.text(key).u32(kind)
    }

    fn tensor(&mut self, name: &str, sizes: &[i64], kind: u32, offset: u64) -> &mut Self {
        self.text(name).u32(sizes.len() as u32);
        for size in sizes {
            self.u64(*size as u64);
        }
        self.u32(kind).u64(offset)
    }

    /// Pads to the data and appends so many bytes of it.
    fn data(&mut self, bytes: usize) -> &mut Self {
        let length = self.0.len().next_multiple_of(32) + bytes;
        self.0.resize(length, 0);
        self
    }

    /// The header, which is the same from as few bytes as it takes as from all.
    fn parse(&self) -> Result<Header, CheckpointError> {
        let (path, length) = (Path::new("x.gguf"), self.0.len());
        let shard = Shard::derived(path.to_owned(), Bytes::from(self.0.clone()));
        let whole = header::parse(path, &shard.bytes, length);
        let part = shard.header(16, |bytes| header::parse(path, bytes, length));
        let shown = |header: &Result<Header, CheckpointError>| {
            let header = header.as_ref();
            let read = header.map(|header| format!("{:?}", header.tensors));
            read.map_err(ToString::to_string)
        };
        assert_eq!(shown(&part), shown(&whole));
        part
    }

    /// The message that refuses it.
    #[track_caller]
    fn refused(&self, parts: &[&str]) {
        let message = match self.parse() {
            Ok(_) => panic!("it is read: {parts:?}"),
            Err(error) => error.to_string(),
        };
        assert!(message.starts_with("x.gguf: "), "{message}");
        for part in parts {
            assert!(message.contains(part), "no {part:?} in: {message}");
        }
    }
}

/// A whole file: keys of several types, a list of each kind, three tensors.
fn whole() -> File {
    let mut file = File::new(3, 3, 8);
    file.key("general.architecture", TEXT).text("kimi-linear");
    file.key("general.alignment", U32).u32(32);
    file.key("flag", BOOL).bytes(&[1]);
    file.key("small", U8).bytes(&[200]);
    file.key("below", 1).bytes(&[0xff]);
    file.key("float", 6).bytes(&1e-5_f32.to_le_bytes());
    file.key("words", LIST)
        .u32(TEXT)
        .u64(2)
        .text("a")
        .text("bc");
    file.key("numbers", LIST).u32(5).u64(3).u32(1).u32(2).u32(3);
    file.tensor("a", &[4, 2], F32, 0);
    file.tensor("b", &[256, 3], Q4_K, 32);
    file.tensor("c", &[8, 1, 2], 30, 480);
    file.data(512);
    file
}

#[test]
fn a_whole_header_is_read() {
    for version in [2, 3] {
        let mut file = whole();
        file.0[4] = version;
        let Header { metadata, tensors } = file.parse().unwrap();
        let architecture = metadata.text("general.architecture").unwrap();
        assert_eq!(architecture, Some("kimi-linear"));
        assert_eq!(metadata.flag("flag").unwrap(), Some(true));
        assert_eq!(metadata.whole("small").unwrap(), Some(200));
        assert_eq!(metadata.number("float").unwrap(), Some(f64::from(1e-5_f32)));
        assert_eq!(metadata.texts("words").unwrap(), Some(vec!["a", "bc"]));
        assert_eq!(metadata.wholes("numbers").unwrap(), Some(vec![1, 2, 3]));
        assert_eq!(metadata.text("absent").unwrap(), None);
        assert_eq!(metadata.keys().count(), 8);
        for (key, shown) in [("below", "-1"), ("words", "a list of 2 strings")] {
            assert_eq!(metadata.show(key), shown);
            let message = metadata.whole(key).unwrap_err().to_string();
            assert!(message.contains(shown), "{message}");
        }
        let start = tensors[0].range.start;
        assert!(start.is_multiple_of(32));
        assert_eq!(tensors[0].shape, [2, 4]);
        assert_eq!(tensors[0].range, start..start + 32);
        assert_eq!(tensors[1].range, start + 32..start + 32 + 3 * 144);
        assert_eq!(tensors[2].shape, [2, 1, 8]);
        assert_eq!(tensors[2].range, start + 480..start + 512);
    }
}

#[test]
fn other_files_and_versions() {
    File(b"PK\x03\x04".to_vec()).refused(&["GGUF", "PK\\x03\\x04"]);
    File(Vec::new()).refused(&["GGUF", "the end of the file at byte 0"]);
    File::new(1, 0, 0).refused(&["version 2 or 3", "version 1"]);
    File::new(4, 0, 0).refused(&["version 4"]);
    File::new(0, 0, 0).refused(&["version 0"]);
    File::new(3_u32.swap_bytes(), 0, 0).refused(&["big-endian file of version 3"]);
}

#[test]
fn counts() {
    File::new(3, -1, 0).refused(&["number of tensors", "found -1"]);
    File::new(3, 0, i64::MIN).refused(&["number of keys", "found -9223372036854775808"]);
    File::new(3, i64::MAX, 0).refused(&["from 0 to 1000000"]);
    File::new(3, 0, 100_001).refused(&["from 0 to 100000"]);
    File::new(3, 0, 100_000).refused(&["a key", "the end of the file"]);
    File::new(3, 1_000_000, 0).refused(&["the name of a tensor", "the end of the file"]);
}

#[test]
fn keys() {
    File::new(3, 0, 1)
        .u64(0)
        .refused(&["a key at byte 24", "0 bytes"]);
    File::new(3, 0, 1)
        .u64(65_536)
        .refused(&["1 to 65535 bytes"]);
    File::new(3, 0, 1)
        .u64(u64::MAX)
        .refused(&["1 to 65535 bytes"]);
    File::new(3, 0, 1)
        .u64(2)
        .bytes(&[0xff, 0xfe])
        .refused(&["in UTF-8"]);
    File::new(3, 0, 1)
        .key("k", 13)
        .refused(&["type from 0 to 12 for k", "type 13"]);
    File::new(3, 0, 1)
        .key("k", u32::MAX)
        .refused(&["type 4294967295"]);
    File::new(3, 0, 1)
        .key("k", BOOL)
        .bytes(&[2])
        .refused(&["0 or 1 for the boolean k"]);
    let mut twice = File::new(3, 0, 2);
    twice.key("k", U8).bytes(&[1]).key("k", U8).bytes(&[1]);
    twice.refused(&["each key once, \"k\" at byte"]);
}

#[test]
fn strings_and_lists() {
    let text = |length| File::new(3, 0, 1).key("k", TEXT).u64(length).clone();
    text(1).refused(&["k from byte", "the end of the file"]);
    text(u64::MAX).refused(&["k at byte", "fits in memory", "18446744073709551615"]);
    let list = |of, length| {
        File::new(3, 0, 1)
            .key("k", LIST)
            .u32(of)
            .u64(length)
            .clone()
    };
    list(LIST, 1).refused(&["a list of plain values for k", "a list of lists"]);
    list(13, 1).refused(&["type 13"]);
    list(U32, 1 << 40).refused(&["k from byte", "the end of the file"]);
    list(10, u64::MAX / 4).refused(&["fits in memory"]);
    // As many strings as anyone likes to say: the first that is not there ends it.
    list(TEXT, u64::MAX).refused(&["k from byte", "the end of the file"]);
}

#[test]
fn alignments() {
    for alignment in [0, 3, 33, u32::MAX] {
        let mut file = File::new(3, 0, 1);
        file.key("general.alignment", U32).u32(alignment);
        file.refused(&["general.alignment", "power of two", &alignment.to_string()]);
    }
    let mut text = File::new(3, 0, 1);
    text.key("general.alignment", TEXT).text("32");
    text.refused(&["general.alignment", "whole number", "\"32\""]);
    let mut far = File::new(3, 1, 1);
    far.key("general.alignment", U32).u32(1 << 31);
    far.tensor("a", &[8], F32, 0).data(64);
    far.refused(&["tensor a", "inside the file"]);
}

#[test]
fn tensors() {
    let one = |name: &str, sizes: &[i64], kind, offset| {
        let mut file = File::new(3, 1, 0);
        file.tensor(name, sizes, kind, offset).data(64);
        file
    };
    one("a", &[], F32, 0).refused(&["tensor a", "1 to 4 dimensions", "found 0"]);
    one("a", &[1; 5], F32, 0).refused(&["1 to 4 dimensions", "found 5"]);
    one("a", &[-1, 2], F32, 0).refused(&["sizes of 0 or more", "[-1, 2]"]);
    one("a", &[i64::MAX, 2], F32, 0).refused(&["fits in memory"]);
    one("a", &[1 << 62, 1], F32, 0).refused(&["fits in memory"]);
    one("a", &[0, 1 << 32, 1 << 32], F32, 0).refused(&["fits in memory"]);
    one("a", &[8], 4, 0).refused(&["a type that ggml has", "type 4"]);
    one("a", &[8], 1000, 0).refused(&["type 1000"]);
    one("a", &[255], Q4_K, 0).refused(&["whole blocks of 256 (Q4_K)", "rows of 255"]);
    one("a", &[8], F32, 4).refused(&["a multiple of 32", "offset 4"]);
    one("a", &[8], F32, 64).refused(&["inside the file", "offset 64"]);
    one("a", &[8], F32, u64::MAX - 31).refused(&["inside the file"]);
    one("a", &[17], F32, 0).refused(&["68 bytes inside the file"]);
    one(&"a".repeat(64), &[8], F32, 0).refused(&["name of a tensor", "64 bytes"]);
    one("", &[8], F32, 0).refused(&["name of a tensor", "0 bytes"]);
    let mut twice = File::new(3, 2, 0);
    twice
        .tensor("a", &[8], F32, 0)
        .tensor("a", &[8], F32, 32)
        .data(64);
    twice.refused(&["tensor a", "one entry, found two"]);
    let mut over = File::new(3, 2, 0);
    over.tensor("a", &[9], F32, 0)
        .tensor("b", &[8], F32, 32)
        .data(64);
    over.refused(&["tensor b", "where a ends", "overlap"]);
}

#[test]
fn cut_anywhere() {
    let file = whole();
    let mut cuts: Vec<usize> = (0..file.0.len()).step_by(100).collect();
    cuts.extend(0..200);
    cuts.push(file.0.len() - 1);
    for cut in cuts {
        let mut part = file.clone();
        part.0.truncate(cut);
        part.refused(&["expected", "found"]);
    }
}

#[test]
fn what_is_no_header_is_no_model() {
    let dir = tempfile::tempdir().unwrap();
    let open = |bytes: &[u8]| {
        let path: PathBuf = dir.path().join("x.gguf");
        std::fs::write(&path, bytes).unwrap();
        super::Gguf::open(&path).unwrap_err().to_string()
    };
    assert!(open(b"").contains("the end of the file at byte 0"));
    assert!(open(&File::new(3, 0, 0).0).contains("no general.architecture"));
}

/// Whatever a header says, it is read or refused with a sentence; what it says of tensors and lists can then be looked at.
fn look(bytes: Vec<u8>) {
    let length = bytes.len();
    let Ok(Header { metadata, tensors }) = File(bytes).parse() else {
        return;
    };
    for tensor in tensors {
        assert!(tensor.range.end <= length);
    }
    for key in metadata.keys() {
        let shown = metadata.show(key);
        assert!(shown.len() < 1000);
        let _ = metadata.texts(key);
        let _ = metadata.wholes(key);
        let _ = metadata.text(key);
    }
}

properties! { mutated, crate::seeds::fuzz_cases(200_000),
    #[test]
    fn headers_with_other_bytes_are_read_or_refused(
        changes in prop::collection::vec((0..640_usize, any::<u8>()), 1..12),
    ) {
        let mut file = whole().0;
        for (at, byte) in changes {
            let at = at % file.len();
            file[at] = byte;
        }
        look(file);
    }

    #[test]
    fn headers_with_other_numbers_are_read_or_refused(
        at in 0..640_usize,
        number in prop_oneof![any::<u64>(), 0..2000_u64, Just(u64::MAX), Just(1 << 63), Just(i64::MAX as u64)],
        cut in 0..2000_usize,
    ) {
        let mut file = whole().0;
        let at = at % (file.len() - 8);
        file[at..at + 8].copy_from_slice(&number.to_le_bytes());
        file.truncate(cut.max(24));
        look(file);
    }

    #[test]
    fn any_bytes_after_the_magic_are_read_or_refused(rest in prop::collection::vec(any::<u8>(), 0..400)) {
        let mut file = File::new(3, 2, 2).0;
        file.extend(rest);
        look(file);
    }
}
