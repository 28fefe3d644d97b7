//! Weights as they are handed over, before anything of them is taken.

use crate::backend::{Result, WeightSource};
use crate::error::BackendError;

/// Checks a source's parts against its shape; returns the first row of each part, and one past the last row of all.
pub(crate) fn source(source: &WeightSource) -> Result<Vec<usize>> {
    let wrong = |what, expected: String, found: String| {
        Err(BackendError::Weight {
            name: source.name.clone(),
            what,
            expected,
            found,
        })
    };
    let end = source.first_column + source.columns;
    if end > source.stored_columns {
        return wrong(
            "the range of columns",
            format!("within 0..{}", source.stored_columns),
            format!("{}..{end}", source.first_column),
        );
    }
    let row = source.stored_columns * source.format.size();
    let mut starts = vec![0];
    for part in &source.parts {
        if row == 0 || !part.len().is_multiple_of(row) {
            let expected = format!("a multiple of {row}");
            return wrong("the bytes of a part", expected, part.len().to_string());
        }
        starts.push(starts[starts.len() - 1] + part.len() / row);
    }
    let (rows, found) = (source.stack * source.rows, starts[starts.len() - 1]);
    if rows != found {
        return wrong("the number of rows", rows.to_string(), found.to_string());
    }
    Ok(starts)
}
