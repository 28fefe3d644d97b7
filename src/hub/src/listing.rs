//! The files of a repository, as the hub lists them.

use std::path::{Component, Path};

use serde::Deserialize;

use crate::client::{Client, wrong};
use crate::error::HubError;

/// The most pages of a list; a page has a thousand files.
const MOST_PAGES: usize = 100;

/// A file of a repository.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct RemoteFile {
    /// From the root of the repository, with `/`.
    pub(crate) path: String,
    pub(crate) size: u64,
    pub(crate) hash: Hash,
}

/// The hash of a file's content, in hexadecimal digits; it is also the name of its blob in the cache.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Hash {
    /// SHA-256 of the content, of files in Git LFS.
    Sha256(String),
    /// SHA-1 of git's header of a blob and the content, of all others.
    Git(String),
}

impl Hash {
    pub(crate) fn hex(&self) -> &str {
        match self {
            Self::Sha256(hex) | Self::Git(hex) => hex,
        }
    }
}

#[derive(Deserialize)]
struct Revision {
    sha: String,
}

#[derive(Deserialize)]
struct Entry {
    #[serde(rename = "type")]
    kind: String,
    path: String,
    #[serde(default)]
    size: u64,
    #[serde(default)]
    oid: String,
    lfs: Option<Lfs>,
}

#[derive(Deserialize)]
struct Lfs {
    oid: String,
    size: u64,
}

/// The commit that a revision names.
pub(crate) fn commit(
    client: &Client<'_>,
    repository: &str,
    revision: &str,
) -> Result<String, HubError> {
    let url = client.api(["revision", revision]);
    let unknown = || HubError::NoSuchRevision {
        repository: repository.to_owned(),
        revision: revision.to_owned(),
    };
    // It becomes the name of a file in the cache.
    if !is_inside(revision) {
        return Err(unknown());
    }
    let found: Result<(Revision, _), HubError> = client.json(&url);
    match found {
        Ok((Revision { sha }, _)) if is_commit(&sha) => Ok(sha),
        Ok((Revision { sha }, _)) => Err(wrong(&url, "a commit of 40 hexadecimal digits", &sha)),
        // With the repository itself missing the hub names that.
        Err(HubError::Status { status: 404, .. }) => Err(unknown()),
        Err(error) => Err(error),
    }
}

/// All files of a commit. One whose path or hash cannot be written to the cache is not in the list.
pub(crate) fn files(client: &Client<'_>, commit: &str) -> Result<Vec<RemoteFile>, HubError> {
    let mut url = client.api(["tree", commit]);
    url.set_query(Some("recursive=true"));
    let mut files = Vec::new();
    for _ in 0..MOST_PAGES {
        let (page, next): (Vec<Entry>, _) = client.json(&url)?;
        files.extend(page.into_iter().filter_map(remote));
        match next {
            Some(next) => url = next,
            None => return Ok(files),
        }
    }
    Err(wrong(
        &url,
        &format!("a list of at most {MOST_PAGES} pages"),
        "more",
    ))
}

fn remote(entry: Entry) -> Option<RemoteFile> {
    let (size, hash) = match entry.lfs {
        Some(Lfs { oid, size }) => (size, Hash::Sha256(oid)),
        None => (entry.size, Hash::Git(entry.oid)),
    };
    let digits = match hash {
        Hash::Sha256(_) => 64,
        Hash::Git(_) => 40,
    };
    let valid = entry.kind == "file" && is_hex(hash.hex(), digits) && is_inside(&entry.path);
    valid.then_some(RemoteFile {
        path: entry.path,
        size,
        hash,
    })
}

/// Whether a path stays below the folder that it is joined to, on every system.
fn is_inside(path: &str) -> bool {
    let normal = |part: Component<'_>| matches!(part, Component::Normal(_));
    let allowed = |c: char| !c.is_control() && !"\\:".contains(c);
    !path.is_empty()
        && path.chars().all(allowed)
        && Path::new(path).components().all(normal)
        && path.split('/').all(|part| !part.is_empty() && part != ".")
}

pub(crate) fn is_commit(text: &str) -> bool {
    is_hex(text, 40)
}

fn is_hex(text: &str, digits: usize) -> bool {
    let lower = |b: u8| b.is_ascii_digit() || (b'a'..=b'f').contains(&b);
    text.len() == digits && text.bytes().all(lower)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_stays_in_the_cache() {
        for inside in ["a", "a/b.gguf", "..a", "a.."] {
            assert!(is_inside(inside), "{inside}");
        }
        for outside in [
            "",
            "/a",
            "..",
            "a/../../b",
            "a\\b",
            "C:a",
            "a//b",
            "./a",
            "a/./b",
            "a/",
            "a\nb",
        ] {
            assert!(!is_inside(outside), "{outside}");
        }
    }
}
