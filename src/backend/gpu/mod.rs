//! The host code that both GPU backends share: the buffers behind handles, batch metadata, and the results of a submission.

pub(super) mod answers;
pub(super) mod batch_metadata;
pub(super) mod draw_metadata;
pub(super) mod layout;
pub(super) mod memory;

use self::batch_metadata::BatchMetadata;
use super::{MaybeSend, Result, Ticket};
use crate::checkpoint::{FORMATS, Format};
use crate::error::BackendError;

/// The `FORMAT_*` id of a weight's format in shaders and kernels.
///
/// # Errors
/// A format that shaders and kernels do not read.
pub(super) fn format_word(backend: &'static str, name: &str, format: Format) -> Result<u32> {
    format.id().ok_or_else(|| {
        let known: Vec<String> = FORMATS.iter().map(Format::to_string).collect();
        BackendError::Unsupported {
            backend,
            what: format!(
                "{name} in {format}; it reads {}, and the CPU backend reads every format",
                known.join(", ")
            ),
        }
    })
}

/// Checks that a batch's words fit the buffer that a step has for them.
///
/// # Errors
/// A pool with longer blocks that was created after the step.
fn fits(metadata: &BatchMetadata, bytes: u64) -> Result<()> {
    let (most, found) = (bytes / 4, metadata.words.len());
    if found as u64 <= most {
        return Ok(());
    }
    Err(BackendError::Batch {
        what: "the words of a batch".to_owned(),
        expected: format!("at most {most}: compile a step after its pools are created"),
        found: found.to_string(),
    })
}

/// A ticket that waits for a readback and converts it.
pub(super) fn later<R: MaybeSend + 'static, T: MaybeSend + 'static>(
    read: Result<Ticket<R>>,
    convert: impl FnOnce(R) -> T + MaybeSend + 'static,
) -> Ticket<T> {
    match read {
        Ok(read) => Ticket::new(async move { Ok(convert(read.await?)) }),
        Err(error) => Ticket::ready(Err(error)),
    }
}
