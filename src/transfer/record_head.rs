//! A layer record in a frame: its description in the head, its elements in the body.

use bytes::BufMut;
use xxhash_rust::xxh3::Xxh3;

use super::frame_fields::Fields;
use crate::cache::{LayerRecord, LayerTensor};
use crate::config::Dtype;
use crate::error::TransferError;

const TENSORS: [LayerTensor; 5] = [
    LayerTensor::State,
    LayerTensor::ConvQuery,
    LayerTensor::ConvKey,
    LayerTensor::ConvValue,
    LayerTensor::Latents,
];
const DTYPES: [Dtype; 3] = [Dtype::F32, Dtype::F16, Dtype::Bf16];
/// Maximum number of dimensions of a record's shape.
const MAX_RANK: usize = 4;

/// The number of `one` in a list, from 1; 0, which readers refuse, if it is not in the list.
fn code<T: PartialEq>(list: &[T], one: &T) -> u8 {
    let index = list.iter().position(|other| other == one);
    index.map_or(0, |index| index as u8 + 1)
}

fn of_code<T: Copy>(
    list: &[T],
    what: &'static str,
    fields: &mut Fields<'_>,
) -> Result<T, TransferError> {
    let code = fields.u8(what)?;
    let index = usize::from(code).checked_sub(1);
    let found = index.and_then(|index| list.get(index).copied());
    let expected = || format!("a number from 1 to {}", list.len());
    found.ok_or_else(|| TransferError::frame(what, expected(), code))
}

/// Appends all fields of a record except its elements.
pub(super) fn put(head: &mut Vec<u8>, record: &LayerRecord) {
    head.put_u128_le(record.id);
    head.put_u64_le(record.checksum);
    head.put_u8(code(&TENSORS, &record.tensor));
    head.put_u8(code(&DTYPES, &record.dtype));
    head.put_u8(record.shape.len() as u8);
    let ranges = [&record.heads, &record.positions];
    let ranges = ranges
        .into_iter()
        .flat_map(|range| [range.start, range.end]);
    for number in [record.layer].into_iter().chain(ranges) {
        head.put_u64_le(number as u64);
    }
    for size in &record.shape {
        head.put_u64_le(*size as u64);
    }
}

/// What the numbers of a record, `body` bytes after this head, are to be added to for its checksum.
pub(super) fn hasher(head: &[u8], body: usize) -> Result<Xxh3, TransferError> {
    let (_, record) = take(&mut Fields::new(head), body)?;
    Ok(record.hasher())
}

/// The number and the record of a head, without its numbers, of which `body` bytes follow.
pub(super) fn take(
    fields: &mut Fields<'_>,
    body: usize,
) -> Result<(u64, LayerRecord), TransferError> {
    let sequence = fields.u64("sequence")?;
    let id = fields.u128("id of a record")?;
    let checksum = fields.u64("checksum of a record")?;
    let tensor = of_code(&TENSORS, "tensor of a record", fields)?;
    let dtype = of_code(&DTYPES, "dtype of a record", fields)?;
    let rank = usize::from(fields.u8("rank of a record")?);
    if rank > MAX_RANK {
        let expected = format!("at most {MAX_RANK}");
        return Err(TransferError::frame("rank of a record", expected, rank));
    }
    let layer = fields.size("layer of a record")?;
    let heads = fields.size("heads of a record")?..fields.size("heads of a record")?;
    let positions = fields.size("positions of a record")?..fields.size("positions of a record")?;
    let mut shape = Vec::with_capacity(rank);
    for _ in 0..rank {
        shape.push(fields.size("shape of a record")?);
    }
    // A product of sizes that no record has would overflow in the check of the record.
    let size = shape
        .iter()
        .try_fold(dtype.size(), |product, size| product.checked_mul(*size));
    if size != Some(body) {
        let expected = format!("{body} of the shape {shape:?} in {dtype}");
        let found = size.map_or("more than memory holds".to_owned(), |size| size.to_string());
        return Err(TransferError::frame("bytes of a record", expected, found));
    }
    let record = LayerRecord {
        id,
        tensor,
        layer,
        heads,
        positions,
        dtype,
        shape,
        bytes: Vec::new(),
        checksum,
    };
    Ok((sequence, record))
}
