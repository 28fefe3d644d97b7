//! Cuts a program into what the device runs and what the host computes in between.
//!
//! A block whose experts are on the host becomes its parts, and the program is cut at the experts: the router is the end of the
//! device's program before, and the sum with the shared experts begins the one after. What follows the experts and does not
//! touch their result, as the shared experts do not, is a program of its own, which the device runs while the host computes.

use super::tables::{OnDevice, Tables};
use crate::backend::{Op, Program, Result, Tensor};

/// A part of a step.
pub(super) enum Part {
    /// A program of the device.
    Device(Program),
    /// An operation of experts, on handles that are not relocated yet.
    Host {
        op: Box<Op>,
        /// What the device runs meanwhile; may be empty.
        beside: Program,
    },
}

/// The parts of a program, in the order in which they run.
///
/// # Errors
/// Weights of another backend, and other operations on weights that are on the host than those of experts.
pub(super) fn lower(program: &Program, tables: &Tables) -> Result<Vec<Part>> {
    let program = program.expanded(|op| match op {
        Op::MoeBlock(block) => !matches!(tables.is_on_host(block.gate), Ok(true)),
        _ => true,
    });
    let device = OnDevice(tables);
    let (mut parts, mut before) = (Vec::new(), Program::new());
    let mut ops = program.ops.iter().peekable();
    while let Some(op) = ops.next() {
        if !tables.on_host(op)? {
            before.push(op.relocated(&device)?);
            continue;
        }
        if !before.ops.is_empty() {
            parts.push(Part::Device(std::mem::take(&mut before)));
        }
        let results = op.operands().writes;
        let mut beside = Program::new();
        while let Some(next) = ops.peek() {
            if touches(next, &results) || tables.on_host(next)? {
                break;
            }
            beside.push(next.relocated(&device)?);
            ops.next();
        }
        parts.push(Part::Host {
            op: Box::new(op.clone()),
            beside,
        });
    }
    if !before.ops.is_empty() {
        parts.push(Part::Device(before));
    }
    Ok(parts)
}

/// Whether an operation, or any part of a block, reads or writes one of these tensors. A block's own operands are without its
/// scratch.
fn touches(op: &Op, tensors: &[Tensor]) -> bool {
    if let Some(parts) = op.parts() {
        return parts.iter().any(|part| touches(part, tensors));
    }
    let operands = op.operands();
    let mut used = operands.reads.iter().chain(&operands.writes);
    used.any(|tensor| tensors.contains(tensor))
}
