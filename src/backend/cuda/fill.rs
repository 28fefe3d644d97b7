//! Generates random numbers in device memory.

use std::sync::Arc;

use super::machine::{Buffer, Command, Machine, NO_STEP, Work, blocks};
use super::params::Fill;
use super::step::Kernel;
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
    let params = Fill {
        output: buffer,
        format: format.id().unwrap_or_default(),
        count,
        seed: random.seed,
        mean: random.mean,
        scale: random.scale(),
    };
    let grid = [blocks(count, EACH)?.max(1), 1, 1];
    let command = Command::Launch(Kernel::new("fill", 256, &params).over(grid));
    let ticket = machine.submit(&Work {
        step: NO_STEP,
        upload: None,
        commands: &[command],
        timed: None,
        answers: &[],
    })?;
    ticket.wait().map(drop)
}
