//! Plants each bug: the operations of a program, one of which is altered.

use std::collections::HashMap;

use bytes::Bytes;
use kimi_linear::backend::*;

use crate::bugs::Bug;
use crate::edits::{count, drop_states, map_rows, map_states, next_up, shift, widened};
use crate::small;
use crate::wrapped::{Part, Wrap};

/// One bug, planted in the backend that it is wrapped around.
#[derive(Clone)]
pub(crate) struct Mutated {
    bug: Bug,
    sources: HashMap<usize, WeightSource>,
    vocabulary: Option<usize>,
}

impl Mutated {
    pub(crate) fn new(bug: Bug) -> Self {
        Self {
            bug,
            sources: HashMap::new(),
            vocabulary: None,
        }
    }
}

impl Mutated {
    fn embed(&mut self, op: Embed) -> Result<Vec<Part>> {
        self.vocabulary = Some(op.weight.rows);
        match self.bug {
            Bug::EmbedOffByOne => Ok(vec![Part::adjusted(
                |batch| {
                    batch
                        .tokens
                        .iter_mut()
                        .for_each(|id| *id = id.saturating_sub(1))
                },
                Op::from(op),
            )]),
            _ => Ok(vec![Part::plain(Op::from(op))]),
        }
    }

    fn rms_norm(&mut self, mut op: RmsNorm) -> Result<Vec<Part>> {
        match self.bug {
            Bug::NormEpsilon => op.eps *= 10.0,
            Bug::FirstRowsOnly => {
                return Ok(vec![Part::adjusted(
                    |batch| {
                        (0..)
                            .zip(&mut batch.outputs)
                            .for_each(|(i, row)| row.row = i)
                    },
                    Op::from(op),
                )]);
            }
            _ => {}
        }
        Ok(vec![Part::plain(Op::from(op))])
    }

    fn linear(&mut self, op: Linear) -> Result<Vec<Part>> {
        match self.bug {
            Bug::LastColumnDropped => Ok(vec![Part::before(
                move |backend, batch| {
                    let rows = count(op.input, batch);
                    map_rows(backend, op.input, rows, |_, row| {
                        row[op.input.width - 1] = 0.0
                    })
                },
                Op::from(op),
            )]),
            Bug::RowsDependOnBatch => Ok(vec![Part::after(Op::from(op), move |backend, batch| {
                let rows = count(op.output, batch);
                map_rows(backend, op.output, rows, |_, row| {
                    if rows > 2 {
                        next_up(&mut row[0]);
                    }
                })
            })]),
            _ => Ok(vec![Part::plain(Op::from(op))]),
        }
    }

    fn short_conv(&mut self, mut op: ShortConv, backend: &mut dyn Backend) -> Result<Vec<Part>> {
        match self.bug {
            Bug::ConvOffByOne => {
                op.weight = self.altered(backend, op.weight, |row, size| row.rotate_left(size))?;
                Ok(vec![Part::plain(Op::from(op))])
            }
            Bug::ConvStateOffByOne => Ok(vec![Part::after(Op::from(op), move |backend, batch| {
                map_states(backend, &op.pool, op.layer, batch, |record| {
                    let kept = op.pool.layout.taps - 1;
                    record
                        .conv_state
                        .chunks_exact_mut(kept)
                        .for_each(|conv_state| conv_state.rotate_left(1));
                })
            })]),
            Bug::ConvStateIgnored => Ok(vec![Part::adjusted(drop_states, Op::from(op))]),
            _ => Ok(vec![Part::plain(Op::from(op))]),
        }
    }

    fn kda_gates(&mut self, op: KdaGates) -> Result<Vec<Part>> {
        let edit: fn(&mut f32) = match self.bug {
            Bug::GatesFlipped => |gate| *gate = -*gate,
            Bug::GatesClamped => |gate| *gate = gate.max(-5.0),
            Bug::SoftplusNaive => |gate| {
                if gate.abs() < 6e-8 {
                    *gate = 0.0;
                }
            },
            Bug::WriteDoubled => {
                return Ok(vec![Part::after(Op::from(op), move |backend, batch| {
                    map_rows(backend, op.beta, batch.tokens.len(), |_, row| {
                        row.iter_mut().for_each(|beta| *beta *= 2.0);
                    })
                })]);
            }
            _ => return Ok(vec![Part::plain(Op::from(op))]),
        };
        Ok(vec![Part::after(Op::from(op), move |backend, batch| {
            map_rows(backend, op.gates, batch.tokens.len(), |_, row| {
                row.iter_mut().for_each(edit);
            })
        })])
    }

    fn kda_recurrence(&mut self, op: KdaRecurrence) -> Result<Vec<Part>> {
        let record = Op::from(op);
        let layout = op.pool.layout;
        let second = self.bug == Bug::Unsteady;
        match self.bug {
            Bug::DecayMissing => Ok(vec![Part::before(
                move |backend, batch| {
                    map_rows(backend, op.gates, batch.tokens.len(), |_, row| {
                        row.fill(0.0)
                    })
                },
                record,
            )]),
            Bug::DecayLate => Ok(vec![Part::before(
                move |backend, batch| {
                    let starts: Vec<usize> = batch.starts().collect();
                    let mut held = Vec::new();
                    map_rows(backend, op.gates, batch.tokens.len(), |i, row| {
                        let now = row.to_vec();
                        if starts.contains(&i) {
                            row.fill(0.0);
                        } else {
                            row.copy_from_slice(&held);
                        }
                        held = now;
                    })
                },
                record,
            )]),
            Bug::NormOfKeysEpsilon => Ok(vec![Part::before(
                move |backend, batch| {
                    // x / sqrt(n + 1e-5) equals the result of sqrt(0.1) x with 1e-6.
                    map_rows(backend, op.qkv, batch.tokens.len(), |_, row| {
                        let keys = 2 * layout.key_heads * layout.key_width;
                        row[..keys].iter_mut().for_each(|x| *x *= 0.1_f32.sqrt());
                    })
                },
                record,
            )]),
            Bug::QueryUnscaled => Ok(vec![Part::after(record, move |backend, batch| {
                map_rows(backend, op.output, batch.tokens.len(), |_, row| {
                    let scale = (layout.key_width as f32).sqrt();
                    row.iter_mut().for_each(|x| *x *= scale);
                })
            })]),
            Bug::StateTransposed => Ok(vec![Part::after(record, move |backend, batch| {
                map_states(backend, &op.pool, op.layer, batch, |record| {
                    let (k, v) = (record.key_width, record.value_width);
                    let state = record.state.clone();
                    for (i, value) in record.state.iter_mut().enumerate() {
                        let (head, place) = (i / (k * v), i % (k * v));
                        *value = state[head * k * v + place % k * v + place / k];
                    }
                })
            })]),
            Bug::StateIgnored => Ok(vec![Part::adjusted(drop_states, record)]),
            Bug::StateStale => Ok(vec![Part::adjusted(
                |batch| {
                    for segment in &mut batch.segments {
                        segment.slot_in = segment.slot_in.or(Some(segment.slot_out));
                    }
                },
                record,
            )]),
            Bug::EmptySegmentSkipped => Ok(vec![Part::adjusted(
                |batch| batch.segments.retain(|segment| segment.length > 0),
                record,
            )]),
            Bug::CheckpointAtEnd => Ok(vec![Part::after(record, move |backend, batch| {
                for segment in &batch.segments {
                    let end = backend
                        .read_state(&op.pool, op.layer, segment.slot_out)
                        .wait()?;
                    for checkpoint in &segment.checkpoints {
                        backend.write_state(&op.pool, op.layer, checkpoint.slot, &end)?;
                    }
                }
                Ok(())
            })]),
            Bug::CheckpointCutsNothing => Ok(vec![Part::adjusted(
                // The checkpoint one token early cuts the chunks at another position; its state is then wrong as well.
                |batch| {
                    for checkpoint in batch
                        .segments
                        .iter_mut()
                        .flat_map(|segment| &mut segment.checkpoints)
                    {
                        checkpoint.after -= 1;
                    }
                },
                record,
            )]),
            Bug::NeighbourWritten => Ok(vec![Part::after(record, move |backend, batch| {
                let named = |slot| {
                    batch.segments.iter().any(|segment| {
                        segment.slot_out == slot
                            || segment.slot_in == Some(slot)
                            || segment.checkpoints.iter().any(|kept| kept.slot == slot)
                    })
                };
                let mut slots = (0..layout.slots as u32).map(Slot);
                if let Some(slot) = slots.find(|slot| !named(*slot)) {
                    let mut record = backend.read_state(&op.pool, op.layer, slot).wait()?;
                    record.state[0] = 1.0;
                    backend.write_state(&op.pool, op.layer, slot, &record)?;
                }
                Ok(())
            })]),
            Bug::BatchDependent => Ok(vec![Part::after(record, move |backend, batch| {
                let several = batch.segments.len() > 1;
                map_rows(backend, op.output, batch.tokens.len(), |_, row| {
                    if several {
                        next_up(&mut row[0]);
                    }
                })
            })]),
            Bug::Unsteady => {
                let calls = std::sync::atomic::AtomicUsize::new(0);
                Ok(vec![Part::after(record, move |backend, batch| {
                    let call = calls.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
                    map_rows(backend, op.output, batch.tokens.len(), |_, row| {
                        if second && call % 3 == 2 {
                            next_up(&mut row[0]);
                        }
                    })
                })])
            }
            _ => Ok(vec![Part::plain(record)]),
        }
    }

    fn gated_norm(&mut self, mut op: GatedNorm) -> Result<Vec<Part>> {
        match self.bug {
            Bug::GatedNormEpsilon => op.eps /= 10.0,
            Bug::GateIsSilu => {
                return Ok(vec![Part::after(Op::from(op), move |backend, batch| {
                    let rows = batch.tokens.len();
                    let gate = backend.read_tensor(op.gate, rows).wait()?;
                    let gate = gate.as_f32().unwrap().to_vec();
                    map_rows(backend, op.output, rows, |i, row| {
                        let gate = &gate[i * row.len()..];
                        row.iter_mut().zip(gate).for_each(|(x, gate)| *x *= gate);
                    })
                })]);
            }
            _ => {}
        }
        Ok(vec![Part::plain(Op::from(op))])
    }

    fn mla_append(&mut self, mut op: MlaAppend) -> Result<Vec<Part>> {
        match self.bug {
            Bug::LatentEpsilon => op.eps *= 10.0,
            Bug::AppendOffByOne => {
                return Ok(vec![Part::adjusted(|batch| shift(batch, 1), Op::from(op))]);
            }
            _ => {}
        }
        Ok(vec![Part::plain(Op::from(op))])
    }

    fn mla_prefill(&mut self, op: MlaAttention) -> Result<Vec<Part>> {
        match self.bug {
            Bug::FutureSeen => Ok(vec![Part::adjusted(
                |batch| shift(batch, 1),
                Op::MlaPrefill(op),
            )]),
            Bug::ScaleWithoutShared => Ok(vec![Part::before(
                move |backend, batch| {
                    let key = op.nope + op.pool.layout.rope;
                    let scale = (key as f32 / op.nope as f32).sqrt();
                    map_rows(backend, op.query, batch.tokens.len(), |_, row| {
                        row.iter_mut().for_each(|x| *x *= scale);
                    })
                },
                Op::MlaPrefill(op),
            )]),
            _ => Ok(vec![Part::plain(Op::MlaPrefill(op))]),
        }
    }

    fn mla_decode(&mut self, op: MlaAttention) -> Result<Vec<Part>> {
        match self.bug {
            Bug::NewestUnseen => Ok(vec![Part::adjusted(
                |batch| shift(batch, -1),
                Op::MlaDecode(op),
            )]),
            Bug::SharedKeyDropped => Ok(vec![Part::before(
                move |backend, batch| {
                    map_rows(backend, op.query, batch.tokens.len(), |_, row| {
                        for head in row.chunks_exact_mut(op.nope + op.pool.layout.rope) {
                            head[op.nope..].fill(0.0);
                        }
                    })
                },
                Op::MlaDecode(op),
            )]),
            _ => Ok(vec![Part::plain(Op::MlaDecode(op))]),
        }
    }

    fn route(&mut self, mut op: Route, backend: &mut dyn Backend) -> Result<Vec<Part>> {
        match self.bug {
            Bug::BiasIgnored => op.bias = self.altered(backend, op.bias, |row, _| row.fill(0))?,
            Bug::GroupsIgnored => (op.groups, op.top_groups) = (1, 1),
            Bug::NotRenormalised => op.renormalize = false,
            Bug::BiasedWeights => {
                let bias = self.sources[&op.bias.id].clone();
                let bias = widened(&bias);
                let plain = Route {
                    renormalize: false,
                    scale: 1.0,
                    ..op
                };
                return Ok(vec![Part::after(Op::from(plain), move |backend, batch| {
                    let rows = batch.tokens.len();
                    let ids = backend.read_tensor(op.experts, rows).wait()?;
                    let ids = ids.as_index().unwrap().to_vec();
                    map_rows(backend, op.weights, rows, |i, row| {
                        for (j, weight) in row.iter_mut().enumerate() {
                            *weight += bias[ids[i * op.experts.width + j] as usize];
                        }
                        let sum: f32 = row.iter().sum();
                        let divisor = if op.renormalize { sum } else { 1.0 };
                        row.iter_mut()
                            .for_each(|weight| *weight *= op.scale / divisor);
                    })
                })]);
            }
            _ => {}
        }
        Ok(vec![Part::plain(Op::from(op))])
    }

    fn experts(&mut self, mut op: Experts) -> Result<Vec<Part>> {
        match self.bug {
            Bug::GateAndUpSwapped => std::mem::swap(&mut op.gate, &mut op.up),
            Bug::ShardIgnored => op.first_expert = 0,
            Bug::WeightsIgnored => {
                return Ok(vec![Part::before(
                    move |backend, batch| {
                        map_rows(backend, op.weights, batch.tokens.len(), |_, row| {
                            row.fill(1.0)
                        })
                    },
                    Op::from(op),
                )]);
            }
            _ => {}
        }
        Ok(vec![Part::plain(Op::from(op))])
    }

    fn swiglu(&mut self, op: Swiglu) -> Result<Vec<Part>> {
        match self.bug {
            Bug::HalvesSwapped => Ok(vec![Part::before(
                move |backend, batch| {
                    map_rows(backend, op.input, count(op.input, batch), |_, row| {
                        row.rotate_left(op.output.width);
                    })
                },
                Op::from(op),
            )]),
            _ => Ok(vec![Part::plain(Op::from(op))]),
        }
    }

    fn add(&mut self, op: Add) -> Result<Vec<Part>> {
        match self.bug {
            Bug::SumOverwrites => Ok(vec![Part::before(
                move |backend, batch| {
                    map_rows(backend, op.target, count(op.target, batch), |_, row| {
                        row.fill(0.0)
                    })
                },
                Op::from(op),
            )]),
            _ => Ok(vec![Part::plain(Op::from(op))]),
        }
    }
}

impl Wrap for Mutated {
    fn parts(&mut self, op: &Op, backend: &mut dyn Backend) -> Result<Vec<Part>> {
        if let Some(part) = small::planted(self.bug, op) {
            return Ok(vec![part]);
        }
        match op.clone() {
            Op::Embed(op) => self.embed(op),
            Op::RmsNorm(op) => self.rms_norm(op),
            Op::Linear(op) => self.linear(op),
            Op::ShortConv(op) => self.short_conv(op, backend),
            Op::KdaGates(op) => self.kda_gates(op),
            Op::KdaRecurrence(op) => self.kda_recurrence(op),
            Op::GatedNorm(op) => self.gated_norm(op),
            Op::MlaAppend(op) => self.mla_append(op),
            Op::MlaPrefill(op) => self.mla_prefill(op),
            Op::MlaDecode(op) => self.mla_decode(op),
            Op::Route(op) => self.route(op, backend),
            Op::Experts(op) => self.experts(op),
            Op::Swiglu(op) => self.swiglu(op),
            Op::Add(op) => self.add(op),
            other => match self.block(other).parts() {
                Some(inner) => {
                    let mut parts = Vec::new();
                    for op in &inner {
                        parts.extend(self.parts(op, backend)?);
                    }
                    if let Some(last) = parts.last_mut() {
                        last.after = last.after.take().or(small::after_block(self.bug, op));
                    }
                    Ok(parts)
                }
                None => Ok(vec![Part::plain(op.clone())]),
            },
        }
    }

    fn took(&mut self, weight: Weight, source: &WeightSource) {
        self.sources.insert(weight.id, source.clone());
    }

    fn batch(&self, batch: &mut Batch) -> Result<()> {
        if self.bug == Bug::BadTokensAccepted {
            let last = self.vocabulary.unwrap_or(usize::MAX) - 1;
            for id in &mut batch.tokens {
                *id = (*id).min(last as u32);
            }
        }
        for draw in &mut batch.draws {
            match self.bug {
                Bug::AllowedIgnored => draw.allowed = None,
                Bug::ShareIgnored => draw.top_p = 1.0,
                _ => {}
            }
        }
        Ok(())
    }

    fn output(&self, output: &mut StepOutput) {
        for choice in &mut output.choices {
            match self.bug {
                Bug::TiesToHigherIds => {
                    let ids: Vec<(u32, f32)> = choice.candidates.clone();
                    for pair in ids
                        .windows(2)
                        .enumerate()
                        .filter(|(_, pair)| pair[0].1 == pair[1].1)
                    {
                        choice.candidates.swap(pair.0, pair.0 + 1);
                    }
                }
                Bug::AlwaysFinite => choice.finite = true,
                Bug::NormaliserWithoutMaximum => {
                    choice.log_normaliser -= choice.candidates[0].1;
                }
                _ => {}
            }
        }
    }
}

impl Mutated {
    /// A block with a bug of its own.
    fn block(&self, op: Op) -> Op {
        match op {
            Op::KdaBlock(mut block) if self.bug == Bug::FusedKdaEpsilon => {
                block.output_norm.1 *= 1000.0;
                Op::KdaBlock(block)
            }
            Op::MlaBlock(mut block) if self.bug == Bug::FusedMlaEpsilon => {
                block.kv_a_norm.1 *= 1000.0;
                Op::MlaBlock(block)
            }
            Op::MoeBlock(mut block) if self.bug == Bug::SharedExpertsForgotten => {
                block.shared = None;
                Op::MoeBlock(block)
            }
            other => other,
        }
    }

    /// A weight with other bytes in each row.
    fn altered(
        &self,
        backend: &mut dyn Backend,
        weight: Weight,
        alter: impl Fn(&mut [u8], usize),
    ) -> Result<Weight> {
        let mut source = self.sources[&weight.id].clone();
        for part in &mut source.parts {
            let (size, row) = (
                part.format.block_bytes(),
                part.format.bytes(1, source.stored_columns).unwrap(),
            );
            let mut bytes = part.bytes.to_vec();
            bytes.chunks_exact_mut(row).for_each(|row| alter(row, size));
            // Copied once more: `Bytes` keeps the vector's allocation, which is aligned to at least 8 bytes.
            part.bytes = Bytes::from(bytes);
        }
        backend.weight(source)
    }
}
