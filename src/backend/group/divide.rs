//! Cuts what a group is given into its ranks' parts, and joins what they give back.

use crate::backend::parallelism::list;
use crate::backend::{
    Cut, Parallelism, Place, RandomWeight, Result, Shard, StateLayout, StateRecord, WeightPart,
    WeightSource,
};
use crate::error::BackendError;

/// A rank's part of a weight; `rank` counts within its stage.
///
/// # Errors
/// Rows, columns or experts that do not come out even, or columns that would be cut inside a block.
pub(crate) fn weight(
    source: &WeightSource,
    degrees: &Parallelism,
    rank: usize,
) -> Result<WeightSource> {
    let mut part = source.clone();
    let (tensor, expert) = (degrees.tensor_shard(rank), degrees.expert_shard(rank));
    let wrong = |what, expected: String, found: usize| BackendError::Weight {
        name: source.name.clone(),
        what,
        expected,
        found: found.to_string(),
    };
    if source.place.experts && expert != Shard::WHOLE {
        let experts = expert.range(source.parts.len());
        let experts = experts.filter(|_| source.parts.len() == source.stack);
        let experts = experts.ok_or_else(|| {
            let expected = format!("{}, a part for each expert", source.stack);
            wrong("the number of parts", expected, source.parts.len())
        })?;
        part.stack = experts.len();
        part.parts = source.parts[experts].to_vec();
        part.place.shard = expert;
        return Ok(part);
    }
    match source.place.cut {
        _ if tensor == Shard::WHOLE => return Ok(part),
        Cut::Whole => return Ok(part),
        Cut::Rows => {
            for part in &mut part.parts {
                *part = rows(source, part, tensor)?;
            }
            part.rows /= tensor.ranks;
        }
        Cut::Columns => {
            let columns = columns(source, tensor)?;
            part.first_column += columns.start;
            part.columns = columns.len();
        }
    }
    part.place.shard = tensor;
    Ok(part)
}

/// A rank's share of a part's rows.
fn rows(source: &WeightSource, part: &WeightPart, shard: Shard) -> Result<WeightPart> {
    let wrong = |what, expected, found: usize| BackendError::Weight {
        name: source.name.clone(),
        what,
        expected,
        found: found.to_string(),
    };
    let WeightPart { format, bytes } = part;
    let stride = format.bytes(1, source.stored_columns).unwrap_or_default();
    if stride == 0 || !bytes.len().is_multiple_of(stride) {
        let expected = format!("a multiple of {stride}");
        return Err(wrong("the bytes of a part", expected, bytes.len()));
    }
    let count = bytes.len() / stride;
    let range = shard.range(count);
    let range = range.and_then(|range| format.split_rows(range, source.stored_columns));
    let range = range.ok_or_else(|| {
        let expected = format!("a multiple of {} ranks", shard.ranks);
        wrong("the rows of a part", expected, count)
    })?;
    Ok(WeightPart {
        format: *format,
        bytes: bytes.slice(range),
    })
}

/// A rank's share of the columns.
fn columns(source: &WeightSource, shard: Shard) -> Result<std::ops::Range<usize>> {
    // Every part has blocks of its own.
    let blocks = |degree: usize| {
        let width = source.columns / degree;
        width * degree == source.columns
            && source.parts.iter().all(|part| {
                (1..=degree).all(|rank| {
                    let first = source.first_column + (rank - 1) * width;
                    part.format.split_columns(first..first + width).is_some()
                })
            })
    };
    let range = shard.range(source.columns).filter(|_| blocks(shard.ranks));
    range.ok_or_else(|| {
        let formats = source.parts.first().map(|part| part.format);
        let format = formats.map(|format| format!(" in {format}, whose blocks stay whole"));
        BackendError::Parallelism {
            kind: "tensor",
            degree: shard.ranks,
            what: format!(
                "{} has {} columns{}",
                source.name,
                source.columns,
                format.unwrap_or_default()
            ),
            works: list((1..=source.columns).filter(|degree| blocks(*degree))),
        }
    })
}

/// A rank's part of a weight of random numbers. Parts that differ between ranks have other numbers.
pub(in crate::backend) fn random(
    whole: &RandomWeight,
    degrees: &Parallelism,
    rank: usize,
) -> RandomWeight {
    let Place { cut, experts, .. } = whole.place;
    let (tensor, expert) = (degrees.tensor_shard(rank), degrees.expert_shard(rank));
    let mut part = whole.clone();
    if experts && expert != Shard::WHOLE {
        part.stack /= expert.ranks;
        part.place.shard = expert;
    } else if tensor != Shard::WHOLE && cut != Cut::Whole {
        match cut {
            Cut::Rows => part.rows /= tensor.ranks,
            Cut::Columns | Cut::Whole => part.columns /= tensor.ranks,
        }
        part.place.shard = tensor;
    }
    if part.place.shard != Shard::WHOLE {
        part.random = whole.random.part(rank);
    }
    part
}

/// The states of a rank: those of its heads, of the layers of its stage.
pub(super) fn state_layout(whole: &StateLayout, ranks: usize, layers: usize) -> StateLayout {
    StateLayout {
        layers,
        key_heads: whole.key_heads / ranks,
        value_heads: whole.value_heads / ranks,
        ..*whole
    }
}

/// The convolution states of queries, keys and values: elements of each.
fn conv_parts(layout: &StateLayout) -> [usize; 3] {
    let keys = layout.key_heads * layout.key_width;
    let values = layout.value_heads * layout.value_width;
    [keys, keys, values].map(|channels| channels * (layout.taps - 1))
}

/// The ranks' states as one record of all heads.
pub(super) fn join_states(whole: &StateLayout, parts: &[StateRecord]) -> StateRecord {
    let layout = state_layout(whole, parts.len(), 1);
    let states = parts.iter().flat_map(|part| part.key_value().into_owned());
    let mut conv_state = Vec::with_capacity(whole.conv_state_len());
    let mut first = 0;
    for len in conv_parts(&layout) {
        let parts = parts.iter();
        conv_state.extend(parts.flat_map(|part| &part.conv_state[first..first + len]));
        first += len;
    }
    StateRecord::new(whole, states.collect(), conv_state)
}

/// The part of a record of all heads that belongs to a rank.
pub(super) fn cut_states(whole: &StateLayout, shard: Shard, record: &StateRecord) -> StateRecord {
    let layout = state_layout(whole, shard.ranks, 1);
    let len = layout.state_len();
    let state = record.key_value()[shard.rank * len..(shard.rank + 1) * len].to_vec();
    let mut conv_state = Vec::with_capacity(layout.conv_state_len());
    let mut first = 0;
    for len in conv_parts(&layout) {
        let from = first + shard.rank * len;
        conv_state.extend_from_slice(&record.conv_state[from..from + len]);
        first += shard.ranks * len;
    }
    StateRecord::new(&layout, state, conv_state)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpoint::FORMATS;

    /// Four rows of 128 columns in blocks of 32 (Q8_0).
    fn blocks(cut: Cut) -> Option<WeightSource> {
        let [_, _, _, format, ..] = FORMATS;
        let bytes = vec![0; format.bytes(4, 128)?].into();
        Some(WeightSource {
            name: "down".to_owned(),
            tensors: Vec::new(),
            stack: 1,
            rows: 4,
            columns: 128,
            stored_columns: 128,
            first_column: 0,
            parts: vec![WeightPart { format, bytes }],
            place: Place {
                cut,
                ..Place::default()
            },
        })
    }

    fn tensor(ranks: usize) -> Parallelism {
        Parallelism {
            tensor: ranks,
            ..Parallelism::SINGLE
        }
    }

    #[test]
    fn a_cut_inside_a_block_is_refused_with_the_degrees_that_work() {
        let message = blocks(Cut::Columns).map(|source| {
            let part = weight(&source, &tensor(2), 1).map(|part| (part.first_column, part.columns));
            assert_eq!(part, Ok((64, 64)));
            let refused = weight(&source, &tensor(8), 0);
            refused.err().map(|error| error.to_string())
        });
        let expected = "tensor parallelism of degree 8: down has 128 columns in Q8_0, whose blocks stay whole: \
                        the degrees 1, 2 and 4 work";
        assert_eq!(message, Some(Some(expected.to_owned())));
    }

    #[test]
    fn rows_are_cut_whatever_their_format() {
        let parts = blocks(Cut::Rows).map(|source| {
            let part = weight(&source, &tensor(4), 3)?;
            Ok((part.rows, part.parts[0].bytes.len(), part.place.shard.rank))
        });
        assert_eq!(parts, Some(Result::Ok((1, 4 * 34, 3))));
    }

    #[test]
    fn states_are_cut_by_head_and_joined_again() {
        let layout = StateLayout {
            layers: 1,
            key_heads: 4,
            value_heads: 4,
            key_width: 2,
            value_width: 3,
            taps: 4,
            slots: 1,
        };
        let numbers = |len: usize| (0..len).map(|i| i as f32).collect::<Vec<f32>>();
        let state = numbers(layout.state_len());
        let whole = StateRecord::new(&layout, state, numbers(layout.conv_state_len()));
        for ranks in [1, 2, 4] {
            let cut = |rank| cut_states(&layout, Shard { rank, ranks }, &whole);
            let parts: Vec<StateRecord> = (0..ranks).map(cut).collect();
            assert_eq!(join_states(&layout, &parts), whole);
        }
        // The second of two ranks: heads 2 and 3 of the state, of queries, keys and values.
        let second = cut_states(&layout, Shard { rank: 1, ranks: 2 }, &whole);
        assert_eq!(second.state, numbers(24)[12..]);
        let expected = [12..24, 36..48, 66..84]
            .map(|range: std::ops::Range<usize>| range.map(|i| i as f32).collect::<Vec<f32>>());
        assert_eq!(second.conv_state, expected.concat());
    }
}
