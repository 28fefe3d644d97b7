//! Edits for planted bugs: rows of tensors, records of slots, batches.

use kimi_linear::backend::*;

/// Edits the first rows of a tensor, one row at a time.
pub(crate) fn map_rows(
    backend: &mut dyn Backend,
    tensor: Tensor,
    rows: usize,
    mut edit: impl FnMut(usize, &mut [f32]),
) -> Result<()> {
    let values = backend.read_tensor(tensor, rows).wait()?;
    let mut values = values.as_f32().unwrap().to_vec();
    for (i, row) in values.chunks_exact_mut(tensor.width).enumerate() {
        edit(i, row);
    }
    backend.write_tensor(tensor, &TensorValues::F32(values))
}

/// Edits the records of the slots that a batch writes.
pub(crate) fn map_states(
    backend: &mut dyn Backend,
    pool: &StatePool,
    layer: usize,
    batch: &Batch,
    edit: impl Fn(&mut StateRecord),
) -> Result<()> {
    for segment in &batch.segments {
        let kept = segment.checkpoints.iter().map(|checkpoint| checkpoint.slot);
        for slot in kept.chain([segment.slot_out]) {
            let mut record = backend.read_state(pool, layer, slot).wait()?;
            edit(&mut record);
            backend.write_state(pool, layer, slot, &record)?;
        }
    }
    Ok(())
}

pub(crate) fn next_up(value: &mut f32) {
    *value = value.next_up();
}

pub(crate) fn drop_states(batch: &mut Batch) {
    batch
        .segments
        .iter_mut()
        .for_each(|segment| segment.slot_in = None);
}

pub(crate) fn shift(batch: &mut Batch, by: isize) {
    for segment in &mut batch.segments {
        segment.position = segment.position.saturating_add_signed(by);
    }
}

/// Number of rows that a tensor has in a batch.
pub(crate) fn count(tensor: Tensor, batch: &Batch) -> usize {
    match tensor.rows {
        Rows::Tokens => batch.tokens.len(),
        Rows::Outputs => batch.outputs.len(),
    }
}

/// A small weight's numbers.
pub(crate) fn widened(source: &WeightSource) -> Vec<f32> {
    let parts = source
        .parts
        .iter()
        .flat_map(|WeightPart { format, bytes }| {
            let mut values = vec![0.0; format.elements(bytes.len())];
            format.widen(bytes, &mut values);
            values
        });
    parts.collect()
}
