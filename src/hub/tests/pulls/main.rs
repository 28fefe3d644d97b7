//! Pulls from a hub on the loopback interface, which fails in every way that a hub or the network before it can.

#![allow(clippy::unwrap_used, reason = "tests")]

mod faults;
#[path = "../loopback/mod.rs"]
mod loopback;

use std::fs;
use std::path::Path;
use std::sync::Mutex;
use std::time::Duration;

use kimi_linear_hub::{Event, HubError, ModelName, Pulled, Settings, Token, find, headers, pull};
use loopback::{COMMIT, Fault, Hub, hash};

const REPOSITORY: &str = "someone/Kimi-Linear";
const FOLDER: &str = "models--someone--Kimi-Linear";

/// Bytes that are nowhere the same, so that bytes in a wrong place are seen.
fn bytes(count: usize, seed: u32) -> Vec<u8> {
    let mut state = seed.wrapping_mul(2_654_435_761).max(1);
    let next = |_| {
        state ^= state << 13;
        state ^= state >> 17;
        state ^= state << 5;
        state.to_le_bytes()[1]
    };
    (0..count).map(next).collect()
}

const SHARD: &str = "model-00001-of-00002.safetensors";
const SECOND: &str = "model-00002-of-00002.safetensors";

fn checkpoint() -> Vec<(&'static str, Vec<u8>)> {
    let index = format!(r#"{{"weight_map": {{"a": "{SHARD}", "b": "{SECOND}"}}}}"#);
    vec![
        ("README.md", b"# Kimi".to_vec()),
        ("config.json", b"{}".to_vec()),
        ("tiktoken.model", bytes(9000, 1)),
        ("tokenizer_config.json", b"{\"a\": 1}".to_vec()),
        ("model.safetensors.index.json", index.into_bytes()),
        (SHARD, bytes(3_000_000, 2)),
        (SECOND, bytes(2_000_000, 3)),
        ("original/consolidated.safetensors", bytes(5000, 4)),
        ("pytorch_model.bin", bytes(5000, 5)),
    ]
}

const GGUF: &str = "Kimi-Linear-Q4_K_M.gguf";

fn quantised() -> Vec<(&'static str, Vec<u8>)> {
    vec![
        (GGUF, bytes(300_000, 6)),
        (
            "Q8_0/Kimi-Linear-Q8_0-00001-of-00002.gguf",
            bytes(400_000, 7),
        ),
        (
            "Q8_0/Kimi-Linear-Q8_0-00002-of-00002.gguf",
            bytes(200_000, 8),
        ),
        ("mmproj-Q8_0.gguf", bytes(5000, 9)),
    ]
}

struct Place {
    hub: Hub,
    home: tempfile::TempDir,
    settings: Settings,
}

/// A hub, and a cache that waits briefly.
fn place(files: Vec<(&'static str, Vec<u8>)>) -> Place {
    let hub = Hub::with(REPOSITORY, files);
    let home = tempfile::tempdir().unwrap();
    let settings = Settings {
        endpoint: hub.url.parse().unwrap(),
        cache: home.path().join("hub"),
        token: None,
        offline: false,
        certificates: None,
        timeout: Duration::from_millis(500),
        attempts: 4,
        pause: Duration::from_millis(2),
        jobs: 3,
    };
    Place {
        hub,
        home,
        settings,
    }
}

fn name(text: &str) -> ModelName {
    text.parse().unwrap()
}

impl Place {
    fn pull(&self, model: &str) -> Result<Pulled, HubError> {
        pull(&self.settings, &name(model), None, &|_| {})
    }

    fn find(&self, model: &str) -> Option<std::path::PathBuf> {
        find(&self.settings, &name(model)).unwrap()
    }

    fn root(&self) -> std::path::PathBuf {
        self.settings.cache.join(FOLDER)
    }

    /// Requests for a file's content since the last call, by their ranges.
    fn ranges(&self, file: &str) -> Vec<String> {
        let asked = self.hub.asked();
        let of_file = asked
            .iter()
            .filter(|asked| !asked.is_hub && asked.path.contains(file));
        of_file
            .map(|asked| asked.headers.get("range").cloned().unwrap_or_default())
            .collect()
    }

    /// The files of the cache that are not finished.
    fn unfinished(&self) -> Vec<String> {
        let entries = fs::read_dir(self.root().join("blobs"))
            .into_iter()
            .flatten()
            .flatten();
        let names = entries.map(|entry| entry.file_name().into_string().unwrap());
        names.filter(|name| name.ends_with(".incomplete")).collect()
    }

    /// Pulls the GGUF, and checks that it is right and that nothing else is left.
    fn pulls_the_gguf(&self) -> Pulled {
        let pulled = self.pull(REPOSITORY).unwrap();
        assert!(
            fs::read(&pulled.path).unwrap() == quantised()[0].1,
            "the file's bytes"
        );
        assert_eq!(self.unfinished(), [""; 0]);
        pulled
    }
}

#[test]
fn a_checkpoint_is_pulled_into_the_cache_of_python() {
    let mut place = place(checkpoint());
    place.hub.require("hf_secret", false);
    place.hub.set_page(4);
    place.settings.token = Some(Token::new("hf_secret").unwrap());
    let events = Mutex::new((Vec::new(), 0));
    let pulled = pull(
        &place.settings,
        &name(REPOSITORY),
        None,
        &|event| match event {
            Event::Done { path, .. } => events.lock().unwrap().0.push(path.to_owned()),
            Event::Bytes(count) => events.lock().unwrap().1 += count,
            _ => {}
        },
    );
    let pulled = pulled.unwrap();
    assert_eq!(pulled.path, place.root().join("snapshots").join(COMMIT));
    assert_eq!(pulled.commit.as_deref(), Some(COMMIT));
    assert_eq!(
        fs::read_to_string(place.root().join("refs/main")).unwrap(),
        COMMIT
    );
    let mut there: Vec<String> = fs::read_dir(&pulled.path)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    there.sort();
    let expected = [
        "config.json",
        SHARD,
        SECOND,
        "model.safetensors.index.json",
        "tiktoken.model",
        "tokenizer_config.json",
    ];
    assert_eq!(there, expected, "no other file");
    for (file, content) in checkpoint()
        .into_iter()
        .filter(|(file, _)| expected.contains(file))
    {
        let path = pulled.path.join(file);
        assert!(fs::read(&path).unwrap() == content, "{file}");
        #[cfg(unix)]
        assert_eq!(
            fs::read_link(&path).unwrap(),
            Path::new("../../blobs").join(hash(&content)),
            "{file}"
        );
    }
    let (done, counted) = events.into_inner().unwrap();
    assert_eq!(counted as u64, pulled.bytes);
    assert!(
        expected
            .iter()
            .all(|file| done.iter().any(|done| done == file))
    );
    assert_eq!(place.find(REPOSITORY), Some(pulled.path));

    let asked = place.hub.asked();
    assert!(asked.iter().any(|asked| !asked.is_hub));
    for asked in &asked {
        assert_eq!(
            asked.headers.contains_key("authorization"),
            asked.is_hub,
            "the token is for the hub alone: {asked:?}"
        );
    }
    place.pull(REPOSITORY).unwrap();
    let again = place.hub.asked();
    assert!(
        again.iter().all(|asked| asked.path.starts_with("/api/")),
        "what is there is not asked for again: {again:?}"
    );
    let moved = place.home.path().join("elsewhere");
    fs::rename(place.home.path().join("hub"), &moved).unwrap();
    assert!(
        fs::read(
            moved
                .join(FOLDER)
                .join("snapshots")
                .join(COMMIT)
                .join(SHARD)
        )
        .is_ok(),
        "links are relative"
    );
}

#[test]
fn a_quantisation_is_pulled_alone_and_whole() {
    let place = place(quantised());
    let asked = Mutex::new(None);
    let pulled = pull(&place.settings, &name(REPOSITORY), None, &|event| {
        if let Event::Chosen {
            quantisation,
            others,
            ..
        } = event
        {
            *asked.lock().unwrap() = Some((quantisation.map(str::to_owned), others.len()));
        }
    });
    let snapshot = place.root().join("snapshots").join(COMMIT);
    assert_eq!(pulled.unwrap().path, snapshot.join(GGUF));
    assert_eq!(
        asked.into_inner().unwrap(),
        Some((Some("Q4_K_M".to_owned()), 1))
    );
    assert_eq!(place.find("someone/Kimi-Linear:q8_0"), None);
    let split = place.pull("someone/Kimi-Linear:q8_0").unwrap();
    assert_eq!(
        split.path,
        snapshot.join("Q8_0/Kimi-Linear-Q8_0-00001-of-00002.gguf")
    );
    assert_eq!((split.files, split.bytes), (2, 600_000));
    for (file, content) in &quantised()[1..3] {
        assert!(fs::read(snapshot.join(file)).unwrap() == *content, "{file}");
    }
    assert_eq!(
        place.find("someone/Kimi-Linear:Q8_0"),
        Some(split.path.clone())
    );
    assert_eq!(
        place.find(REPOSITORY),
        Some(snapshot.join(GGUF)),
        "the default of two"
    );
    let wrong = place
        .pull("someone/Kimi-Linear:Q5_K_M")
        .unwrap_err()
        .to_string();
    assert!(
        wrong.contains(
            "no single quantisation `Q5_K_M`: name one of Q4_K_M (0.0 GB), Q8_0 (0.0 GB)"
        ),
        "{wrong}"
    );
    fs::remove_file(snapshot.join("Q8_0/Kimi-Linear-Q8_0-00002-of-00002.gguf")).unwrap();
    assert_eq!(
        place.find("someone/Kimi-Linear:Q8_0"),
        None,
        "a part is missing"
    );
}

#[test]
fn refusals_say_what_to_do() {
    let mut place = place(quantised());
    let missing = place.pull("someone/else").unwrap_err().to_string();
    assert!(
        missing.contains("has no model someone/else that a visitor without a token may see"),
        "{missing}"
    );
    for unknown in ["v9", "../../main"] {
        let revision = pull(&place.settings, &name(REPOSITORY), Some(unknown), &|_| {});
        assert_eq!(
            revision.unwrap_err().to_string(),
            format!(
                "someone/Kimi-Linear has no revision `{unknown}`: expected a branch, a tag or a commit"
            )
        );
    }
    place.hub.require("hf_right", true);
    let gated = place.pull(REPOSITORY).unwrap_err().to_string();
    let terms = format!(
        "is gated: accept its terms at {}/someone/Kimi-Linear, then set HF_TOKEN",
        place.hub.url
    );
    assert!(gated.contains(&terms), "{gated}");
    place.settings.token = Some(Token::new("hf_wrong").unwrap());
    let token = place.pull(REPOSITORY).unwrap_err().to_string();
    assert!(
        token.contains("does not accept the token of HF_TOKEN") && !token.contains("hf_wrong"),
        "{token}"
    );
    place.settings.token = Some(Token::new("hf_right").unwrap());
    place.pulls_the_gguf();
    let revision = pull(
        &place.settings,
        &name(REPOSITORY),
        Some("refs/pr/1"),
        &|_| {},
    );
    assert!(revision.unwrap().path.ends_with(GGUF));
    assert!(place.root().join("refs/refs/pr/1").exists());

    let none = self::place(vec![
        ("pytorch_model.bin", bytes(9, 1)),
        ("README.md", bytes(9, 1)),
    ]);
    let error = none.pull(REPOSITORY).unwrap_err().to_string();
    assert!(
        error.contains("no model that this program reads")
            && error.contains("2 files, such as README.md"),
        "{error}"
    );
    let error = self::place(checkpoint())
        .pull("someone/Kimi-Linear:Q8_0")
        .unwrap_err()
        .to_string();
    assert!(error.contains("has no .gguf file"), "{error}");
    place.settings.endpoint = "http://127.0.0.1:9".parse().unwrap();
    place.settings.attempts = 2;
    let error = place.pull(REPOSITORY).unwrap_err().to_string();
    assert!(error.contains("after 2 attempts"), "{error}");
    place.settings.offline = true;
    assert!(
        place.pull(REPOSITORY).unwrap().path.ends_with(GGUF),
        "offline, the cache is enough"
    );
    let error = place.pull("someone/else").unwrap_err().to_string();
    assert!(error.starts_with("HF_HUB_OFFLINE is set"), "{error}");
}

#[test]
fn a_renamed_model_is_found_by_its_old_name() {
    let mut place = place(quantised());
    place.hub.require("hf_secret", false);
    place.settings.token = Some(Token::new("hf_secret").unwrap());
    let pulled = place.pull("old/name").unwrap();
    assert!(fs::read(pulled.path).unwrap() == quantised()[0].1);
    place.hub.fail(GGUF, [Fault::Etag("0".repeat(64))]);
    let error = place.pull(REPOSITORY).unwrap_err();
    assert!(
        matches!(error, HubError::Changed { .. }),
        "etags are those of the last answer of the hub: {error}"
    );
}

#[test]
fn a_hub_cannot_write_outside_its_folder() {
    let place = place(checkpoint());
    for path in [
        "../../../escaped-Q4_0.gguf",
        "/escaped-Q4_0.gguf",
        "a\\..\\escaped-Q4_0.gguf",
    ] {
        place.hub.list(
            serde_json::json!({"type": "file", "path": path, "size": 3, "oid": "0".repeat(40)}),
        );
    }
    place.hub.list(serde_json::json!({"type": "file", "path": "odd-Q8_0.gguf", "size": 3, "oid": "../../escaped"}));
    let error = place.pull("someone/Kimi-Linear:Q4_0").unwrap_err();
    assert!(matches!(error, HubError::NoGguf { .. }), "{error}");
    place.pull(REPOSITORY).unwrap();
    assert_eq!(fs::read_dir(place.home.path()).unwrap().count(), 1);
}

#[test]
fn a_disk_that_is_too_small_is_seen_before_a_byte() {
    let place = place(vec![("a-Q8_0.gguf", bytes(9000, 1))]);
    place.hub.list(serde_json::json!({
        "type": "file", "path": "b-Q4_0.gguf", "size": 134, "oid": "0".repeat(40), "lfs": {"oid": "0".repeat(64), "size": 900_000_000_000_000u64},
    }));
    let error = place.pull("someone/Kimi-Linear:Q4_0").unwrap_err();
    let text = error.to_string();
    assert!(
        matches!(error, HubError::Space { .. }) && text.contains("900000.0 GB are needed"),
        "{text}"
    );
    assert!(
        place
            .hub
            .asked()
            .iter()
            .all(|asked| asked.path.starts_with("/api/"))
    );
    place.pull("someone/Kimi-Linear:Q8_0").unwrap();
}

#[test]
fn two_pulls_at_the_same_time_download_once() {
    let place = place(quantised());
    place.hub.fail(GGUF, [Fault::Stall(100_000)]);
    let waited = Mutex::new(0);
    let watch = |event: Event<'_>| {
        if let Event::Waiting { .. } = event {
            *waited.lock().unwrap() += 1;
        }
    };
    std::thread::scope(|scope| {
        let pulls: Vec<_> = (0..2)
            .map(|_| scope.spawn(|| pull(&place.settings, &name(REPOSITORY), None, &watch)))
            .collect();
        for pulled in pulls {
            assert!(fs::read(pulled.join().unwrap().unwrap().path).unwrap() == quantised()[0].1);
        }
    });
    assert_eq!(*waited.lock().unwrap(), 1);
    assert_eq!(place.hub.sent(GGUF), 300_000);
}

/// A GGUF header with a long vocabulary, as far as its length is concerned.
fn gguf(vocabulary: usize, size: usize) -> (Vec<u8>, usize) {
    let mut file = [
        b"GGUF".as_slice(),
        &3u32.to_le_bytes(),
        &0u64.to_le_bytes(),
        &1u64.to_le_bytes(),
    ]
    .concat();
    file.extend(6u64.to_le_bytes());
    file.extend(b"tokens");
    file.extend([9u32.to_le_bytes(), 8u32.to_le_bytes()].concat());
    file.extend((vocabulary as u64).to_le_bytes());
    for i in 0..vocabulary {
        file.extend(8u64.to_le_bytes());
        file.extend((i as u64).to_be_bytes());
    }
    let header = file.len();
    file.extend(bytes(size - header, 3));
    (file, header)
}

#[test]
fn headers_are_read_without_the_weights() {
    let (file, header) = gguf(100_000, 20_000_000);
    let place = place(vec![("sub/K-Q8_0.gguf", file.clone())]);
    place.hub.fail(
        "sub/K-Q8_0.gguf",
        [
            Fault::Cut(1000),
            Fault::Status(503, Vec::new()),
            Fault::Whole,
        ],
    );
    let folder = tempfile::tempdir().unwrap();
    let path = headers(
        &place.settings,
        &name("someone/Kimi-Linear:Q8_0"),
        folder.path(),
        &|_| {},
    )
    .unwrap();
    assert_eq!(path, folder.path().join("K-Q8_0.gguf"));
    let read = fs::read(&path).unwrap();
    assert_eq!(read.len(), file.len());
    assert!(read[..header] == file[..header]);
    assert_eq!(
        place.ranges("Q8_0").last().unwrap(),
        "bytes=1048576-2097151"
    );
    assert!(!place.root().exists(), "the cache has nothing of it");

    let entry = |from: usize, to: usize| serde_json::json!({"dtype": "U8", "shape": [to - from], "data_offsets": [from, to]});
    let text = serde_json::json!({"a": entry(0, 2_000_000), "b.weight_shape": entry(2_000_000, 2_000_016)}).to_string();
    let shard = [
        &(text.len() as u64).to_le_bytes(),
        text.as_bytes(),
        &bytes(2_000_016, 1),
    ]
    .concat();
    let mut files = checkpoint();
    files.retain(|(file, _)| *file != SHARD);
    files.push((SHARD, shard));
    let place = self::place(files);
    let folder = tempfile::tempdir().unwrap();
    assert_eq!(
        headers(&place.settings, &name(REPOSITORY), folder.path(), &|_| {}).unwrap(),
        folder.path()
    );
    let mut there: Vec<_> = fs::read_dir(folder.path())
        .unwrap()
        .map(|entry| entry.unwrap().file_name())
        .collect();
    there.sort();
    assert_eq!(
        there,
        ["config.json", SHARD, SECOND, "model.safetensors.index.json"]
    );
    let read = fs::read(folder.path().join(SHARD)).unwrap();
    assert!(
        read.ends_with(&[0; 2_000_000])
            && !String::from_utf8_lossy(&read[..200]).contains("weight_shape")
    );
    assert_eq!(
        fs::metadata(folder.path().join(SECOND)).unwrap().len(),
        2_000_000
    );
    assert!(place.hub.sent(SHARD) <= 1 << 20);
}
