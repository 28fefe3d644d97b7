//! Generates random numbers in device memory.

use std::sync::Arc;

use super::machine::{Argument, Buffer, Command, Launch, Machine, NO_STEP, Work, blocks};
use crate::backend::{Random, Result};
use crate::checkpoint::Format;

/// Elements per block of `kernels/fill.cu`.
pub(super) const EACH: u64 = 256 * 16;

/// Fills a buffer: element `i` is number `i`. The kernel has run when this returns.
pub(super) fn fill(
    machine: &Arc<dyn Machine>,
    buffer: &Arc<Buffer>,
    format: Format,
    random: Random,
) -> Result<()> {
    let count = buffer.bytes / format.block_bytes() as u64;
    let arguments = [
        buffer.into(),
        format.id().unwrap_or_default().into(),
        Argument::Long(count),
        random.seed.into(),
        random.mean.into(),
        random.scale().into(),
    ];
    let command = Command::Launch(Launch {
        kernel: "fill",
        grid: [blocks(count, EACH)?.max(1), 1, 1],
        threads: 256,
        shared: 0,
        arguments: arguments.into(),
    });
    let ticket = machine.submit(&Work {
        step: NO_STEP,
        upload: None,
        commands: &[command],
        timed: None,
        answers: &[],
    })?;
    ticket.wait().map(drop)
}
