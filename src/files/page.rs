//! The files of a page: those that are in memory, and those whose ranges are read when they are needed, from files that the user
//! has chosen or from a server.
//!
//! A range that is read is in memory for as long as somebody holds it: [`Held`]. What is not in memory is noted, and the read
//! fails with [`ErrorKind::WouldBlock`].

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::io::{Error, ErrorKind, Result};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::rc::{Rc, Weak};

use bytes::Bytes;

use crate::checkpoint::SAMPLE;
use crate::error::CheckpointError;

/// Something that is waited for in the event loop.
type Wait<T> = Pin<Box<dyn Future<Output = Result<T>>>>;

/// Starts to read a range of a file, into [`aligned`] bytes.
pub type Read = Rc<dyn Fn(Range<usize>) -> Wait<Bytes>>;

/// Starts to look for a file in a folder of a server; `None` if it is not there.
pub type Find = Rc<dyn Fn(&Path) -> Wait<Option<Found>>>;

/// A file of a server.
pub struct Found {
    /// Size in bytes.
    pub length: u64,
    /// Its first bytes, [`aligned`].
    pub first: Bytes,
    /// Reads other bytes.
    pub read: Read,
}

enum File {
    Whole(Bytes),
    Ranged(Ranged),
    /// It has this many bytes, 4 GiB or more.
    TooLarge(u64),
    /// The server does not have it.
    Absent,
}

struct Ranged {
    length: usize,
    read: Read,
    windows: Vec<Weak<Window>>,
    /// Both ends of every range that was read, by their first byte: the fingerprint is made of those of tensors.
    ends: BTreeMap<usize, Bytes>,
}

/// A range of a file in memory.
struct Window {
    start: usize,
    bytes: Bytes,
}

/// Ranges of files, which stay in memory as long as this lives.
#[derive(Default)]
pub struct Held(Vec<Rc<Window>>);

#[derive(PartialEq, Eq, PartialOrd, Ord)]
enum Missed {
    /// Whether a server has the file.
    File(PathBuf),
    Range(PathBuf, usize, usize),
}

thread_local! {
    /// The files, by their paths. A folder is there as long as a file is in it.
    static FILES: RefCell<BTreeMap<PathBuf, File>> = const { RefCell::new(BTreeMap::new()) };
    /// Folders of servers.
    static FOLDERS: RefCell<BTreeMap<PathBuf, Find>> = const { RefCell::new(BTreeMap::new()) };
    static MISSED: RefCell<Vec<Missed>> = const { RefCell::new(Vec::new()) };
}

/// Number of reads that are under way at the same time.
const AT_ONCE: usize = 6;
/// Bytes between two ranges that are read along with them: the padding between tensors.
const GAP: usize = 4096;
/// Size up to which ranges are read together.
const TOGETHER: usize = 16 << 20;

/// Puts a file at a path, instead of the one that is there.
pub fn put(path: impl Into<PathBuf>, bytes: impl Into<Bytes>) {
    let file = File::Whole(bytes.into());
    FILES.with_borrow_mut(|files| files.insert(path.into(), file));
}

/// Puts a file of `length` bytes at a path, whose ranges are read by `read`. A file of 4 GiB or more cannot be opened.
pub fn put_ranged(path: impl Into<PathBuf>, length: u64, read: Read) {
    let file = match usize::try_from(length) {
        Ok(length) => File::Ranged(Ranged {
            length,
            read,
            windows: Vec::new(),
            ends: BTreeMap::new(),
        }),
        Err(_) => File::TooLarge(length),
    };
    FILES.with_borrow_mut(|files| files.insert(path.into(), file));
}

/// Makes a folder of a server readable, unless it is: `find` looks for its files when they are needed.
pub fn serve(folder: impl Into<PathBuf>, find: Find) {
    FOLDERS.with_borrow_mut(|folders| {
        folders.entry(folder.into()).or_insert(find);
    });
}

/// Forgets a folder of a server and what was known of its files.
pub fn forget(folder: &Path) {
    FOLDERS.with_borrow_mut(|folders| folders.remove(folder));
    FILES.with_borrow_mut(|files| files.retain(|path, _| path.parent() != Some(folder)));
}

/// The result of `read`, which reads files: it is run again whenever what it missed has been read. The ranges that it needed stay
/// in memory as long as the second result.
///
/// # Errors
/// Those of `read`, and a file that cannot be read.
pub async fn reading<T, E: From<CheckpointError>>(
    read: impl Fn() -> std::result::Result<T, E>,
) -> std::result::Result<(T, Held), E> {
    let mut held = Held::default();
    loop {
        MISSED.take();
        let result = read();
        let mut missed = MISSED.take();
        if missed.is_empty() {
            return result.map(|result| (result, held));
        }
        missed.sort();
        missed.dedup();
        let windows = fetch(missed).await;
        let windows = windows.map_err(|(file, source)| CheckpointError::Read { file, source })?;
        held.0.extend(windows);
    }
}

/// Reads what was missed, sorted.
async fn fetch(missed: Vec<Missed>) -> std::result::Result<Vec<Rc<Window>>, (PathBuf, Error)> {
    let mut windows = Vec::new();
    let mut ranges: Vec<(PathBuf, Vec<Range<usize>>)> = Vec::new();
    let mut files = Vec::new();
    for missed in missed {
        match missed {
            Missed::File(path) => files.push(path),
            Missed::Range(path, start, end) => match ranges.last_mut() {
                Some((last, ranges))
                    if *last == path
                        && ranges
                            .first()
                            .is_some_and(|first| end - first.start <= TOGETHER)
                        && ranges.iter().any(|range| start <= range.end + GAP) =>
                {
                    ranges.push(start..end);
                }
                _ => ranges.push((path, std::iter::once(start..end).collect())),
            },
        }
    }
    for files in files.chunks(AT_ONCE) {
        let found: Vec<_> = files.iter().map(|path| (path, find(path))).collect();
        for (path, found) in found {
            let window = match found.await {
                Ok(found) => found_file(path, found),
                Err(error) => Err(error),
            };
            windows.extend(window.map_err(|error| (path.clone(), error))?);
        }
    }
    for reads in ranges.chunks(AT_ONCE) {
        let started = reads.iter();
        let started: Vec<_> = started
            .filter_map(|(path, ranges)| Some((path, ranges, start(path, ranges)?)))
            .collect();
        for (path, ranges, (first, read)) in started {
            let window = read
                .await
                .and_then(|bytes| put_window(path, first, bytes, ranges));
            windows.push(window.map_err(|error| (path.clone(), error))?);
        }
    }
    Ok(windows)
}

fn find(path: &Path) -> Wait<Option<Found>> {
    let folder = path.parent().unwrap_or(path);
    let find = FOLDERS.with_borrow(|folders| folders.get(folder).cloned());
    find.map_or_else(
        || Box::pin(async { Ok(None) }) as Wait<_>,
        |find| find(path),
    )
}

/// Puts a file that a server has, or notes that it does not have it.
fn found_file(path: &Path, found: Option<Found>) -> Result<Option<Rc<Window>>> {
    let Some(found) = found else {
        FILES.with_borrow_mut(|files| files.insert(path.to_owned(), File::Absent));
        return Ok(None);
    };
    put_ranged(path, found.length, found.read);
    let first = 0..found.first.len();
    let asked = std::slice::from_ref(&first);
    put_window(path, first.clone(), found.first, asked).map(Some)
}

/// Starts to read adjacent ranges of a file as one. A file that has been forgotten meanwhile is looked for again.
fn start(path: &Path, ranges: &[Range<usize>]) -> Option<(Range<usize>, Wait<Bytes>)> {
    let end = ranges.iter().map(|range| range.end).max();
    // So that a number is aligned in memory as it is in the file.
    let start = ranges.first().map_or(0, |range| range.start) & !7;
    let range = start..end.unwrap_or_default();
    let read = FILES.with_borrow(|files| match files.get(path) {
        Some(File::Ranged(file)) => Some(Rc::clone(&file.read)),
        _ => None,
    });
    read.map(|read| (range.clone(), read(range)))
}

/// Puts bytes that were read into memory, with the ends of the ranges that were asked for.
fn put_window(
    path: &Path,
    range: Range<usize>,
    bytes: Bytes,
    asked: &[Range<usize>],
) -> Result<Rc<Window>> {
    if bytes.len() != range.len() {
        let (found, length) = (bytes.len(), range.len());
        let reason = format!("{found} bytes came, where {length} were asked for");
        return Err(Error::new(ErrorKind::UnexpectedEof, reason));
    }
    let start = range.start;
    let window = Rc::new(Window { start, bytes });
    FILES.with_borrow_mut(|files| {
        let Some(File::Ranged(file)) = files.get_mut(path) else {
            return;
        };
        file.windows.retain(|window| window.strong_count() > 0);
        file.windows.push(Rc::downgrade(&window));
        for asked in asked {
            let most = SAMPLE.min(asked.len());
            for end in [asked.start..asked.start + most, asked.end - most..asked.end] {
                if let Some(bytes) = window.slice(&end) {
                    file.ends.insert(end.start, Bytes::copy_from_slice(&bytes));
                }
            }
        }
    });
    Ok(window)
}

/// So many bytes, which `fill` writes, aligned for every number.
pub fn aligned(length: usize, fill: impl FnOnce(&mut [u8])) -> Bytes {
    let mut words = vec![0_u64; length.div_ceil(8)];
    fill(&mut bytemuck::cast_slice_mut(&mut words)[..length]);
    Bytes::from_owner(Words(words)).slice(..length)
}

/// Bytes that are aligned as u64.
struct Words(Vec<u64>);

impl AsRef<[u8]> for Words {
    fn as_ref(&self) -> &[u8] {
        bytemuck::cast_slice(&self.0)
    }
}

impl Window {
    fn slice(&self, range: &Range<usize>) -> Option<Bytes> {
        let start = range.start.checked_sub(self.start)?;
        let end = range.end.checked_sub(self.start)?;
        (start <= end && end <= self.bytes.len()).then(|| self.bytes.slice(start..end))
    }
}

impl Ranged {
    fn range(&self, range: &Range<usize>) -> Option<Bytes> {
        if range.is_empty() {
            return Some(Bytes::new());
        }
        let end = self.ends.get(&range.start);
        let end = end.filter(|end| range.len() <= end.len());
        end.map(|end| end.slice(..range.len())).or_else(|| {
            let mut windows = self.windows.iter().rev().filter_map(Weak::upgrade);
            windows.find_map(|window| window.slice(range))
        })
    }
}

/// A known file; if nothing is known of it yet, a server is to be asked.
fn look<T>(path: &Path, found: impl FnOnce(&File) -> Result<T>) -> Result<T> {
    let known = FILES.with_borrow(|files| match files.get(path) {
        Some(File::Absent) => Some(Err(ErrorKind::NotFound.into())),
        Some(File::TooLarge(length)) => Some(Err(too_large(*length))),
        known => known.map(found),
    });
    known.unwrap_or_else(|| {
        let folder = path.parent().unwrap_or(path);
        if !FOLDERS.with_borrow(|folders| folders.contains_key(folder)) {
            return Err(ErrorKind::NotFound.into());
        }
        MISSED.with_borrow_mut(|missed| missed.push(Missed::File(path.to_owned())));
        Err(ErrorKind::WouldBlock.into())
    })
}

fn too_large(length: u64) -> Error {
    let size = length as f64 / f64::from(1 << 30);
    let reason = format!(
        "it has {size:.1} GiB, and a page reads files below 4 GiB; a model may have several (a split GGUF, shards)"
    );
    Error::new(ErrorKind::FileTooLarge, reason)
}

/// Size of a file in bytes.
pub(crate) fn length(path: &Path) -> Result<usize> {
    look(path, |file| {
        Ok(match file {
            File::Whole(bytes) => bytes.len(),
            File::Ranged(file) => file.length,
            File::TooLarge(_) | File::Absent => 0,
        })
    })
}

/// A range of a file, without a copy.
pub(crate) fn range(path: &Path, range: Range<usize>) -> Result<Bytes> {
    look(path, |file| match file {
        File::Whole(bytes) if range.end <= bytes.len() => Ok(bytes.slice(range)),
        File::Ranged(file) if range.end <= file.length => file.range(&range).ok_or_else(|| {
            let missed = Missed::Range(path.to_owned(), range.start, range.end);
            MISSED.with_borrow_mut(|all| all.push(missed));
            Error::new(ErrorKind::WouldBlock, "it is not in memory any more")
        }),
        _ => Err(ErrorKind::UnexpectedEof.into()),
    })
}

/// A copy of the bytes of a file.
///
/// # Errors
/// A path without a file.
pub fn read(path: &Path) -> Result<Vec<u8>> {
    range(path, 0..length(path)?).map(Vec::from)
}

pub(crate) fn read_to_string(path: &Path) -> Result<String> {
    String::from_utf8(read(path)?).map_err(|error| Error::new(ErrorKind::InvalidData, error))
}

pub(crate) fn begins_with(path: &Path, start: &[u8]) -> bool {
    range(path, 0..start.len()).is_ok_and(|bytes| bytes == start)
}

pub(crate) fn exists(path: &Path) -> bool {
    is_file(path) || is_dir(path)
}

pub(crate) fn is_file(path: &Path) -> bool {
    !length(path)
        .is_err_and(|error| matches!(error.kind(), ErrorKind::NotFound | ErrorKind::WouldBlock))
}

pub(crate) fn is_dir(path: &Path) -> bool {
    FOLDERS.with_borrow(|folders| folders.contains_key(path)) || !entries(path).is_empty()
}

pub(crate) fn entries(dir: &Path) -> Vec<PathBuf> {
    FILES.with_borrow(|files| {
        let there = files
            .iter()
            .filter(|(_, file)| !matches!(file, File::Absent));
        let inside = there.filter(|(path, _)| path.parent() == Some(dir));
        inside.map(|(path, _)| path.clone()).collect()
    })
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::single_range_in_vec_init)]
mod tests {
    use super::*;

    /// What was read of a file.
    type Reads = Rc<RefCell<Vec<Range<usize>>>>;

    /// A file whose bytes are the lowest bits of their positions.
    fn counting() -> (Read, Reads) {
        let reads = Reads::default();
        let log = Rc::clone(&reads);
        let read = move |range: Range<usize>| {
            log.borrow_mut().push(range.clone());
            let bytes = aligned(range.len(), |bytes| {
                bytes
                    .iter_mut()
                    .zip(range)
                    .for_each(|(byte, at)| *byte = at as u8);
            });
            Box::pin(async { Ok(bytes) }) as Wait<Bytes>
        };
        (Rc::new(read), reads)
    }

    fn read_all(
        path: &Path,
        ranges: &[Range<usize>],
    ) -> std::result::Result<(Vec<Bytes>, Held), CheckpointError> {
        let read = || {
            let all: Vec<Result<Bytes>> = ranges.iter().map(|it| range(path, it.clone())).collect();
            let all: Result<Vec<Bytes>> = all.into_iter().collect();
            all.map_err(|source| CheckpointError::Read {
                file: path.to_owned(),
                source,
            })
        };
        pollster::block_on(reading(read))
    }

    #[test]
    fn ranges_are_read_together_held_and_dropped() {
        let (path, (read, reads)) = (Path::new("/a/x"), counting());
        put_ranged(path, 1 << 30, read);
        let ranges = [10_000..20_000, 20_032..30_001, 500_004..500_100];
        let (all, held) = read_all(path, &ranges).unwrap();
        assert_eq!(reads.take(), [10_000..30_001, 500_000..500_100]);
        for (bytes, range) in all.iter().zip(&ranges) {
            assert!(
                bytes
                    .iter()
                    .zip(range.clone())
                    .all(|(byte, at)| *byte == at as u8)
            );
            assert_eq!(bytes.len(), range.len());
            // A number is aligned in memory as it is in the file.
            let alignment = 1 << range.start.trailing_zeros().min(3);
            assert_eq!(bytes.as_ptr() as usize % alignment, 0);
        }
        // In memory as long as they are held; their ends beyond that.
        read_all(path, &ranges).unwrap();
        assert!(reads.borrow().is_empty());
        drop((all, held));
        read_all(
            path,
            &[10_000..10_256, 30_001 - 256..30_001, 500_004..500_100],
        )
        .unwrap();
        assert!(reads.borrow().is_empty());
        read_all(path, &[10_000..10_257]).unwrap();
        assert_eq!(reads.take(), [10_000..10_257]);
        let beyond = read_all(path, &[(1 << 30) - 1..(1 << 30) + 1]);
        assert!(beyond.is_err() && reads.borrow().is_empty());
    }

    #[test]
    fn far_and_large_ranges_are_read_by_themselves() {
        let (path, (read, reads)) = (Path::new("/b/x"), counting());
        put_ranged(path, 1 << 30, read);
        let ranges = [
            0..TOGETHER - 8,
            TOGETHER - 8..TOGETHER + 8,
            100_000_000..100_000_008,
        ];
        read_all(path, &ranges).unwrap();
        assert_eq!(reads.take(), ranges);
    }

    #[test]
    fn files_of_a_server_are_looked_for_once_and_can_be_forgotten() {
        let (folder, looked) = (Path::new("https://h/m"), Rc::new(RefCell::new(0)));
        let count = Rc::clone(&looked);
        let find: Find = Rc::new(move |path| {
            *count.borrow_mut() += 1;
            let found = path.ends_with("there").then(|| Found {
                length: 5,
                first: Bytes::from_static(b"hello"),
                read: counting().0,
            });
            Box::pin(async { Ok(found) })
        });
        let look = || {
            let both = [folder.join("there"), folder.join("absent")];
            let both = both.map(|path| (exists(&path), read_to_string(&path).ok()));
            Ok::<_, CheckpointError>(both)
        };
        let there = [(true, Some("hello".to_owned())), (false, None)];
        for (forgets, lookups) in [(false, 2), (false, 2), (true, 4)] {
            if forgets {
                forget(folder);
                let (found, _) = pollster::block_on(reading(look)).unwrap();
                assert_eq!(found, [(false, None), (false, None)]);
            }
            serve(folder, Rc::clone(&find));
            assert!(is_dir(folder) && !is_file(folder));
            let (found, _) = pollster::block_on(reading(look)).unwrap();
            assert_eq!(found, there);
            assert_eq!(*looked.borrow(), lookups);
        }
        assert_eq!(entries(folder), [folder.join("there")]);
    }

    #[test]
    fn a_read_that_fails_or_gives_too_little_is_an_error() {
        let path = Path::new("/c/x");
        put_ranged(
            path,
            100,
            Rc::new(|_| Box::pin(async { Err(Error::other("it is gone")) })),
        );
        let error = read_all(path, &[0..10]).err().unwrap().to_string();
        assert_eq!(error, "/c/x: cannot be read: it is gone");
        put_ranged(
            path,
            100,
            Rc::new(|_| Box::pin(async { Ok(Bytes::from_static(b"abc")) })),
        );
        let error = read_all(path, &[0..10]).err().unwrap().to_string();
        assert_eq!(
            error,
            "/c/x: cannot be read: 3 bytes came, where 10 were asked for"
        );
    }
}
