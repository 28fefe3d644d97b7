//! A weight as the tensors of a checkpoint make it up, one below the other.

use crate::backend::{Place, WeightPart, WeightSource};
#[cfg(feature = "transfer")]
use crate::checkpoint::Checkpoint;
use crate::checkpoint::TensorData;
use crate::error::BackendError;
#[cfg(feature = "transfer")]
use crate::error::Error;

/// The weight of these tensors, concatenated by rows into a stack of `stack` matrices: those of experts, or 1.
///
/// # Errors
/// Tensors of different widths, or rows that are not whole blocks.
pub(super) fn assemble(
    names: &[String],
    tensors: &[TensorData],
    stack: usize,
    place: Place,
) -> Result<WeightSource, BackendError> {
    let (mut rows, mut columns) = (0, None);
    let mut parts = Vec::with_capacity(names.len());
    for (name, tensor) in names.iter().zip(tensors) {
        let wrong = |what, expected: String, found: String| BackendError::Weight {
            name: name.clone(),
            what,
            expected,
            found,
        };
        let width = tensor.shape.get(1).copied().unwrap_or(1);
        let columns = *columns.get_or_insert(width);
        if width != columns {
            let what = "the width, since the two are one matrix here,";
            let expected = format!("{columns} as in {}", names[0]);
            return Err(wrong(what, expected, width.to_string()));
        }
        let stored = tensor.shape[0];
        rows += stored;
        let format = tensor.format;
        let bytes = format.split_rows(0..stored, columns).ok_or_else(|| {
            let expected = format!("whole blocks of {} elements ({format})", format.block());
            wrong("the columns of a stored row", expected, columns.to_string())
        })?;
        parts.push(WeightPart {
            format,
            bytes: tensor.bytes.slice(bytes),
        });
    }
    let columns = columns.unwrap_or(1);
    Ok(WeightSource {
        name: names.first().cloned().unwrap_or_default(),
        tensors: names.to_vec(),
        stack,
        rows: rows / stack.max(1),
        columns,
        stored_columns: columns,
        first_column: 0,
        parts,
        place,
    })
}

/// The same from a checkpoint's own tensors; `apart`, each in a mapping of its own, for a backend that copies weights.
///
/// # Errors
/// Those of [`assemble`], and tensors that are not there or cannot be read.
#[cfg(feature = "transfer")]
pub(crate) fn weight_source(
    checkpoint: &Checkpoint,
    names: &[String],
    stack: usize,
    place: Place,
    apart: bool,
) -> Result<WeightSource, Error> {
    let tensors = checkpoint.tensors_named(names, apart)?;
    Ok(assemble(names, &tensors, stack, place)?)
}
