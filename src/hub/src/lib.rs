//! Models of the Hugging Face hub: pulls the files of one that this program reads, finds them again, and reads their headers alone.
//!
//! The files are kept in the cache of Python's `huggingface_hub`, with its folders and locks, so that each finds what the other downloaded:
//!
//! ```text
//! models--ORG--NAME/blobs/HASH              a file's content, named by its SHA-256 (large files) or its hash in git (small ones)
//! models--ORG--NAME/blobs/HASH.incomplete   one whose download has not ended
//! models--ORG--NAME/snapshots/COMMIT/PATH   a link to its blob
//! models--ORG--NAME/refs/main               the commit of a branch
//! .locks/models--ORG--NAME/HASH.lock        locked while the blob is downloaded
//! ```
//!
//! A blob gets its name once its hash is right, links are made once every blob of the model is there, and the branch is written last: a
//! model that was only partly downloaded is never found. A download that was interrupted, at whatever point, goes on where it stopped.
//!
//! The crate knows nothing of the library that reads the files, and that library does not depend on it.

mod cache;
mod choose;
mod client;
mod download;
mod error;
mod gguf;
mod headers;
mod listing;
mod name;
mod pull;
mod settings;

pub use cache::find;
pub use choose::Quantisation;
pub use error::HubError;
pub use headers::headers;
pub use name::ModelName;
pub use pull::{Event, Pulled, Watch, pull};
pub use settings::{Settings, Token};
