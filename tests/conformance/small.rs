//! Small errors in few places, which a norm over the whole tensor or over a wide row would hide.

use kimi_linear::backend::*;

use crate::bugs::Bug;
use crate::edits::{count, map_rows, map_states};
use crate::wrapped::{Edit, Part};

/// Bounds of the list in f32 that the planted errors are measured in.
const BOUND: f32 = 1e-5;

/// Whether a row is one of the few that are wrong, one in `many`. Its own bits say so: then it is wrong whatever is beside
/// it, and no comparison of a batch with its parts sees it.
fn chosen(row: &[f32], many: u32) -> bool {
    row[0].to_bits().is_multiple_of(many)
}

/// Four bounds off, in one row of `many`.
fn one_row_off(rows: &mut [f32], width: usize, many: u32) {
    for row in rows.chunks_exact_mut(width) {
        if chosen(row, many) {
            row.iter_mut().for_each(|x| *x *= 1.0 + 4.0 * BOUND);
        }
    }
}

/// The greatest element three bounds off, in one of seven rows that are wide enough to hide it.
fn one_element_off(rows: &mut [f32], width: usize) {
    for row in rows.chunks_exact_mut(width).filter(|row| row.len() >= 64) {
        if chosen(row, 7)
            && let Some(greatest) = row.iter_mut().max_by(|a, b| a.abs().total_cmp(&b.abs()))
        {
            *greatest *= 1.0 + 3.0 * BOUND;
        }
    }
}

/// Edits the rows of an operation's output; `width` elements are compared as a row.
fn edited(output: Tensor, width: usize, edit: impl Fn(&mut [f32], usize) + Send + 'static) -> Edit {
    Box::new(move |backend, batch| {
        let rows = count(output, batch);
        map_rows(backend, output, rows, |_, row| edit(row, width))
    })
}

/// The output of an operation and the width of what is compared as a row, where the list holds it to both norms.
fn rows_of(op: &Op) -> Option<(Tensor, usize)> {
    match op {
        Op::Linear(op) => Some((op.output, op.output.width)),
        Op::KdaRecurrence(op) => Some((op.output, op.pool.layout.value_width)),
        Op::MlaPrefill(op) => Some((op.output, op.value)),
        _ => None,
    }
}

/// The operation with a small error, where that is the bug.
pub(crate) fn planted(bug: Bug, op: &Op) -> Option<Part> {
    let edit: Edit = match (bug, op) {
        (Bug::OneRowOff, Op::KdaRecurrence(_) | Op::MlaPrefill(_)) => {
            let (output, width) = rows_of(op)?;
            edited(output, width, |row, width| one_row_off(row, width, 61))
        }
        (Bug::OneElementOff, op) => {
            let (output, width) = rows_of(op)?;
            edited(output, width, one_element_off)
        }
        (Bug::OneStateRowOff, Op::KdaRecurrence(op)) => {
            let op = *op;
            Box::new(move |backend, batch| {
                map_states(backend, &op.pool, op.layer, batch, |record| {
                    one_row_off(&mut record.state, record.value_width, 61);
                })
            })
        }
        _ => return None,
    };
    Some(Part {
        after: Some(edit),
        ..Part::plain(op.clone())
    })
}

/// One row of 31 of a block's output, off in the block alone and not in its composition.
pub(crate) fn after_block(bug: Bug, block: &Op) -> Option<Edit> {
    let output = match (bug, block) {
        (Bug::OneFusedRowOff, Op::KdaBlock(block)) => block.output,
        (Bug::OneFusedRowOff, Op::MlaBlock(block)) => block.output,
        _ => return None,
    };
    Some(edited(output, output.width, |row, width| {
        one_row_off(row, width, 31);
    }))
}
