//! Small errors in a few rows or elements, which a norm over the whole tensor or over a wide row would hide.

use kimi_linear::backend::*;

use crate::bugs::Bug;
use crate::edits::{count, map_rows, map_states};
use crate::wrapped::{Edit, Part};

/// The list's bound in f32, in which the planted errors are measured.
const BOUND: f32 = 1e-5;

/// Whether a row is one of the few wrong ones, one in `many`. It follows from the row's bits: so the row is wrong with any
/// other rows, and a comparison of a batch with its parts does not detect it.
fn chosen(row: &[f32], many: u32) -> bool {
    row[0].to_bits().is_multiple_of(many)
}

/// An error of four bounds, in one row of `many`.
fn one_row_off(rows: &mut [f32], width: usize, many: u32) {
    for row in rows.chunks_exact_mut(width) {
        if chosen(row, many) {
            row.iter_mut().for_each(|x| *x *= 1.0 + 4.0 * BOUND);
        }
    }
}

/// An error of three bounds in the greatest element, in one of seven rows that are wide enough to hide it.
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

/// The output of an operation and the width that is compared as a row, if the list compares it in both norms.
fn rows_of(op: &Op) -> Option<(Tensor, usize)> {
    match op {
        Op::Linear(op) => Some((op.output, op.output.width)),
        Op::KdaRecurrence(op) => Some((op.output, op.pool.layout.value_width)),
        Op::MlaPrefill(op) => Some((op.output, op.value)),
        _ => None,
    }
}

/// The operation with a small error, if that is the bug.
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

/// An error in one row of 31 of a block's output, in the block only and not in its separate operations.
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
