//! Where each bug is planted: the operations of a step, one of them altered.

use kimi_linear::backend::*;

use crate::mutants::Bug;
use crate::mutated::MutatedStep;

/// Edits the first rows of a tensor, a row at a time.
fn map_rows(
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
fn map_states(
    backend: &mut dyn Backend,
    pool: &StatePool,
    layer: usize,
    batch: &Batch,
    edit: impl Fn(&mut StateRecord),
) -> Result<()> {
    for piece in &batch.pieces {
        let kept = piece.checkpoints.iter().map(|checkpoint| checkpoint.slot);
        for slot in kept.chain([piece.slot_out]) {
            let mut record = backend.read_state(pool, layer, slot).wait()?;
            edit(&mut record);
            backend.write_state(pool, layer, slot, &record)?;
        }
    }
    Ok(())
}

fn next_up(value: &mut f32) {
    *value = value.next_up();
}

/// Bounds of the list in f32 that the planted errors are measured in.
const BOUND: f32 = 1e-5;

/// Whether a row is one of the few that are wrong, one in `many`. Its own bits say so: then it is wrong whatever is beside
/// it, and no comparison of a batch with its parts sees it.
fn chosen(row: &[f32], many: u32) -> bool {
    row[0].to_bits().is_multiple_of(many)
}

/// Four bounds off, in one row of 61.
fn one_row_off(rows: &mut [f32], width: usize) {
    for row in rows.chunks_exact_mut(width) {
        if chosen(row, 61) {
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

fn drop_states(batch: &mut Batch) {
    batch
        .pieces
        .iter_mut()
        .for_each(|piece| piece.slot_in = None);
}

fn shift(batch: &mut Batch, by: isize) {
    for piece in &mut batch.pieces {
        piece.position = piece.position.saturating_add_signed(by);
    }
}

impl Step for MutatedStep {
    fn embed(&mut self, op: Embed) -> Result<()> {
        self.vocabulary = Some(op.weight.rows);
        match self.bug {
            Bug::EmbedOffByOne => self.adjusted(
                |batch| {
                    batch
                        .tokens
                        .iter_mut()
                        .for_each(|id| *id = id.saturating_sub(1))
                },
                |step| step.embed(op),
            ),
            _ => self.last().embed(op),
        }
    }

    fn rms_norm(&mut self, mut op: RmsNorm) -> Result<()> {
        match self.bug {
            Bug::NormEpsilon => op.eps *= 10.0,
            Bug::FirstRowsOnly => {
                return self.adjusted(
                    |batch| {
                        (0..)
                            .zip(&mut batch.outputs)
                            .for_each(|(i, row)| row.row = i)
                    },
                    |step| step.rms_norm(op),
                );
            }
            _ => {}
        }
        self.last().rms_norm(op)
    }

    fn linear(&mut self, op: Linear) -> Result<()> {
        match self.bug {
            Bug::LastColumnDropped => self.before(
                move |backend, batch| {
                    let rows = count(op.input, batch);
                    map_rows(backend, op.input, rows, |_, row| {
                        row[op.input.width - 1] = 0.0
                    })
                },
                |step| step.linear(op),
            ),
            Bug::RowsDependOnBatch => self.after(
                |step| step.linear(op),
                move |backend, batch| {
                    let rows = count(op.output, batch);
                    map_rows(backend, op.output, rows, |_, row| {
                        if rows > 2 {
                            next_up(&mut row[0]);
                        }
                    })
                },
            ),
            Bug::OneElementOff => self.after(
                |step| step.linear(op),
                move |backend, batch| {
                    map_rows(backend, op.output, count(op.output, batch), |_, row| {
                        one_element_off(row, row.len());
                    })
                },
            ),
            _ => self.last().linear(op),
        }
    }

    fn short_conv(&mut self, mut op: ShortConv) -> Result<()> {
        match self.bug {
            Bug::ConvOffByOne => {
                op.weight = self.altered(op.weight, |row, size| row.rotate_left(size))?;
                self.last().short_conv(op)
            }
            Bug::TailOffByOne => self.after(
                |step| step.short_conv(op),
                move |backend, batch| {
                    map_states(backend, &op.pool, op.layer, batch, |record| {
                        let kept = op.pool.layout.taps - 1;
                        record
                            .tail
                            .chunks_exact_mut(kept)
                            .for_each(|tail| tail.rotate_left(1));
                    })
                },
            ),
            Bug::TailIgnored => self.adjusted(drop_states, |step| step.short_conv(op)),
            _ => self.last().short_conv(op),
        }
    }

    fn kda_gates(&mut self, op: KdaGates) -> Result<()> {
        let edit: fn(&mut f32) = match self.bug {
            Bug::GatesFlipped => |gate| *gate = -*gate,
            Bug::GatesClamped => |gate| *gate = gate.max(-5.0),
            Bug::SoftplusNaive => |gate| {
                if gate.abs() < 6e-8 {
                    *gate = 0.0;
                }
            },
            Bug::WriteDoubled => {
                return self.after(
                    |step| step.kda_gates(op),
                    move |backend, batch| {
                        map_rows(backend, op.beta, batch.tokens.len(), |_, row| {
                            row.iter_mut().for_each(|beta| *beta *= 2.0);
                        })
                    },
                );
            }
            _ => return self.last().kda_gates(op),
        };
        self.after(
            |step| step.kda_gates(op),
            move |backend, batch| {
                map_rows(backend, op.gates, batch.tokens.len(), |_, row| {
                    row.iter_mut().for_each(edit);
                })
            },
        )
    }

    fn kda_recurrence(&mut self, op: KdaRecurrence) -> Result<()> {
        let record = move |step: &mut dyn Step| step.kda_recurrence(op);
        let layout = op.pool.layout;
        let second = self.bug == Bug::Unsteady;
        match self.bug {
            Bug::DecayMissing => self.before(
                move |backend, batch| {
                    map_rows(backend, op.gates, batch.tokens.len(), |_, row| {
                        row.fill(0.0)
                    })
                },
                record,
            ),
            Bug::DecayLate => self.before(
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
            ),
            Bug::NormOfKeysEpsilon => self.before(
                move |backend, batch| {
                    // x / sqrt(n + 1e-5) is what sqrt(0.1) x is under 1e-6.
                    map_rows(backend, op.qkv, batch.tokens.len(), |_, row| {
                        let keys = 2 * layout.key_heads * layout.key_width;
                        row[..keys].iter_mut().for_each(|x| *x *= 0.1_f32.sqrt());
                    })
                },
                record,
            ),
            Bug::QueryUnscaled => self.after(record, move |backend, batch| {
                map_rows(backend, op.output, batch.tokens.len(), |_, row| {
                    let scale = (layout.key_width as f32).sqrt();
                    row.iter_mut().for_each(|x| *x *= scale);
                })
            }),
            Bug::StateTransposed => self.after(record, move |backend, batch| {
                map_states(backend, &op.pool, op.layer, batch, |record| {
                    let (k, v) = (record.key_width, record.value_width);
                    let state = record.state.clone();
                    for (i, value) in record.state.iter_mut().enumerate() {
                        let (head, place) = (i / (k * v), i % (k * v));
                        *value = state[head * k * v + place % k * v + place / k];
                    }
                })
            }),
            Bug::OneRowOff => self.after(record, move |backend, batch| {
                map_rows(backend, op.output, batch.tokens.len(), |_, row| {
                    one_row_off(row, layout.value_width);
                })
            }),
            Bug::OneElementOff => self.after(record, move |backend, batch| {
                map_rows(backend, op.output, batch.tokens.len(), |_, row| {
                    one_element_off(row, layout.value_width);
                })
            }),
            Bug::OneStateRowOff => self.after(record, move |backend, batch| {
                map_states(backend, &op.pool, op.layer, batch, |record| {
                    one_row_off(&mut record.state, record.value_width);
                })
            }),
            Bug::StateIgnored => self.adjusted(drop_states, record),
            Bug::StateStale => self.adjusted(
                |batch| {
                    for piece in &mut batch.pieces {
                        piece.slot_in = piece.slot_in.or(Some(piece.slot_out));
                    }
                },
                record,
            ),
            Bug::EmptyPieceSkipped => self.adjusted(
                |batch| batch.pieces.retain(|piece| piece.length > 0),
                record,
            ),
            Bug::CheckpointAtEnd => self.after(record, move |backend, batch| {
                for piece in &batch.pieces {
                    let end = backend
                        .read_state(&op.pool, op.layer, piece.slot_out)
                        .wait()?;
                    for checkpoint in &piece.checkpoints {
                        backend.write_state(&op.pool, op.layer, checkpoint.slot, &end)?;
                    }
                }
                Ok(())
            }),
            Bug::CheckpointCutsNothing => self.adjusted(
                // The checkpoint one token early cuts the chunks elsewhere; its state is then wrong as well.
                |batch| {
                    for checkpoint in batch
                        .pieces
                        .iter_mut()
                        .flat_map(|piece| &mut piece.checkpoints)
                    {
                        checkpoint.after -= 1;
                    }
                },
                record,
            ),
            Bug::NeighbourWritten => self.after(record, move |backend, batch| {
                let named = |slot| {
                    batch.pieces.iter().any(|piece| {
                        piece.slot_out == slot
                            || piece.slot_in == Some(slot)
                            || piece.checkpoints.iter().any(|kept| kept.slot == slot)
                    })
                };
                let mut slots = (0..layout.slots as u32).map(Slot);
                if let Some(slot) = slots.find(|slot| !named(*slot)) {
                    let mut record = backend.read_state(&op.pool, op.layer, slot).wait()?;
                    record.state[0] = 1.0;
                    backend.write_state(&op.pool, op.layer, slot, &record)?;
                }
                Ok(())
            }),
            Bug::BatchDependent => self.after(record, move |backend, batch| {
                let several = batch.pieces.len() > 1;
                map_rows(backend, op.output, batch.tokens.len(), |_, row| {
                    if several {
                        next_up(&mut row[0]);
                    }
                })
            }),
            Bug::Unsteady => {
                let calls = std::sync::atomic::AtomicUsize::new(0);
                self.after(record, move |backend, batch| {
                    let call = calls.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
                    map_rows(backend, op.output, batch.tokens.len(), |_, row| {
                        if second && call % 3 == 2 {
                            next_up(&mut row[0]);
                        }
                    })
                })
            }
            _ => record(self.last()),
        }
    }

    fn gated_norm(&mut self, mut op: GatedNorm) -> Result<()> {
        match self.bug {
            Bug::GatedNormEpsilon => op.eps /= 10.0,
            Bug::GateIsSilu => {
                return self.after(
                    |step| step.gated_norm(op),
                    move |backend, batch| {
                        let rows = batch.tokens.len();
                        let gate = backend.read_tensor(op.gate, rows).wait()?;
                        let gate = gate.as_f32().unwrap().to_vec();
                        map_rows(backend, op.output, rows, |i, row| {
                            let gate = &gate[i * row.len()..];
                            row.iter_mut().zip(gate).for_each(|(x, gate)| *x *= gate);
                        })
                    },
                );
            }
            _ => {}
        }
        self.last().gated_norm(op)
    }

    fn mla_append(&mut self, mut op: MlaAppend) -> Result<()> {
        match self.bug {
            Bug::LatentEpsilon => op.eps *= 10.0,
            Bug::AppendOffByOne => {
                return self.adjusted(|batch| shift(batch, 1), |step| step.mla_append(op));
            }
            _ => {}
        }
        self.last().mla_append(op)
    }

    fn mla_prefill(&mut self, op: MlaAttention) -> Result<()> {
        match self.bug {
            Bug::FutureSeen => self.adjusted(|batch| shift(batch, 1), |step| step.mla_prefill(op)),
            Bug::ScaleWithoutShared => self.before(
                move |backend, batch| {
                    let key = op.nope + op.pool.layout.rope;
                    let scale = (key as f32 / op.nope as f32).sqrt();
                    map_rows(backend, op.query, batch.tokens.len(), |_, row| {
                        row.iter_mut().for_each(|x| *x *= scale);
                    })
                },
                |step| step.mla_prefill(op),
            ),
            Bug::OneRowOff => self.after(
                |step| step.mla_prefill(op),
                move |backend, batch| {
                    map_rows(backend, op.output, batch.tokens.len(), |_, row| {
                        one_row_off(row, op.value);
                    })
                },
            ),
            Bug::OneElementOff => self.after(
                |step| step.mla_prefill(op),
                move |backend, batch| {
                    map_rows(backend, op.output, batch.tokens.len(), |_, row| {
                        one_element_off(row, op.value);
                    })
                },
            ),
            _ => self.last().mla_prefill(op),
        }
    }

    fn mla_decode(&mut self, op: MlaAttention) -> Result<()> {
        match self.bug {
            Bug::NewestUnseen => {
                self.adjusted(|batch| shift(batch, -1), |step| step.mla_decode(op))
            }
            Bug::SharedKeyDropped => self.before(
                move |backend, batch| {
                    map_rows(backend, op.query, batch.tokens.len(), |_, row| {
                        for head in row.chunks_exact_mut(op.nope + op.pool.layout.rope) {
                            head[op.nope..].fill(0.0);
                        }
                    })
                },
                |step| step.mla_decode(op),
            ),
            _ => self.last().mla_decode(op),
        }
    }

    fn route(&mut self, mut op: Route) -> Result<()> {
        match self.bug {
            Bug::BiasIgnored => op.bias = self.altered(op.bias, |row, _| row.fill(0))?,
            Bug::GroupsIgnored => (op.groups, op.top_groups) = (1, 1),
            Bug::NotRenormalised => op.renormalize = false,
            Bug::BiasedWeights => {
                let bias = self.sources.lock().unwrap()[&op.bias.id].clone();
                let bias = widened(&bias);
                let plain = Route {
                    renormalize: false,
                    scale: 1.0,
                    ..op
                };
                return self.after(
                    |step| step.route(plain),
                    move |backend, batch| {
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
                    },
                );
            }
            _ => {}
        }
        self.last().route(op)
    }

    fn experts(&mut self, mut op: Experts) -> Result<()> {
        match self.bug {
            Bug::GateAndUpSwapped => std::mem::swap(&mut op.gate, &mut op.up),
            Bug::ShardIgnored => op.first_expert = 0,
            Bug::WeightsIgnored => {
                return self.before(
                    move |backend, batch| {
                        map_rows(backend, op.weights, batch.tokens.len(), |_, row| {
                            row.fill(1.0)
                        })
                    },
                    |step| step.experts(op),
                );
            }
            _ => {}
        }
        self.last().experts(op)
    }

    fn swiglu(&mut self, op: Swiglu) -> Result<()> {
        match self.bug {
            Bug::HalvesSwapped => self.before(
                move |backend, batch| {
                    map_rows(backend, op.input, count(op.input, batch), |_, row| {
                        row.rotate_left(op.output.width);
                    })
                },
                |step| step.swiglu(op),
            ),
            _ => self.last().swiglu(op),
        }
    }

    fn add(&mut self, op: Add) -> Result<()> {
        match self.bug {
            Bug::SumOverwrites => self.before(
                move |backend, batch| {
                    map_rows(backend, op.target, count(op.target, batch), |_, row| {
                        row.fill(0.0)
                    })
                },
                |step| step.add(op),
            ),
            _ => self.last().add(op),
        }
    }

    fn all_reduce(&mut self, op: AllReduce) -> Result<()> {
        self.last().all_reduce(op)
    }

    fn all_gather(&mut self, op: AllGather) -> Result<()> {
        self.last().all_gather(op)
    }

    fn select(&mut self, op: Select) -> Result<()> {
        self.last().select(op)
    }

    fn probe(&mut self, tensor: Tensor) -> Result<()> {
        self.last().probe(tensor)
    }

    fn kda_block(&mut self, block: &KdaBlock) -> Result<()> {
        let mut block = *block;
        if self.bug == Bug::FusedKdaEpsilon {
            block.output_norm.1 *= 1000.0;
        }
        block.compose(self)?;
        self.fused_row_off(block.output)
    }

    fn mla_block(&mut self, block: &MlaBlock) -> Result<()> {
        let mut block = *block;
        if self.bug == Bug::FusedMlaEpsilon {
            block.kv_a_norm.1 *= 1000.0;
        }
        block.compose(self)?;
        self.fused_row_off(block.output)
    }

    fn moe_block(&mut self, block: &MoeBlock) -> Result<()> {
        let mut block = *block;
        if self.bug == Bug::SharedExpertsForgotten {
            block.shared = None;
        }
        block.compose(self)
    }

    fn operations(&self) -> &[&'static str] {
        // A list a call: this is a test, and few calls.
        let names = self.segments.iter().flat_map(|part| part.step.operations());
        names.copied().collect::<Vec<_>>().leak()
    }

    fn submit(&mut self, batch: &Batch) -> Result<Ticket<StepOutput>> {
        let mut batch = batch.clone();
        if self.bug == Bug::BadTokensAccepted {
            let last = self.vocabulary.unwrap_or(usize::MAX) - 1;
            for id in &mut batch.tokens {
                *id = (*id).min(last as u32);
            }
        }
        let mut output = StepOutput::default();
        for segment in &mut self.segments {
            let mut seen = batch.clone();
            for edit in &segment.before {
                edit(&mut **self.inner.lock().unwrap(), &seen)?;
            }
            if let Some(adjust) = segment.adjust {
                adjust(&mut seen);
            }
            let part = segment.step.submit(&seen)?.wait()?;
            for edit in &segment.after {
                edit(&mut **self.inner.lock().unwrap(), &batch)?;
            }
            output.choices.extend(part.choices);
            output.logits.extend(part.logits);
            output.probes.extend(part.probes);
        }
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
        Ok(Ticket::ready(Ok(output)))
    }
}

impl MutatedStep {
    /// Four bounds off in one row of 31 of a block's output, where that is the bug.
    fn fused_row_off(&mut self, output: Tensor) -> Result<()> {
        if self.bug != Bug::OneFusedRowOff {
            return Ok(());
        }
        self.after(
            |_| Ok(()),
            move |backend, batch| {
                map_rows(backend, output, batch.tokens.len(), |_, row| {
                    if chosen(row, 31) {
                        row.iter_mut().for_each(|x| *x *= 1.0 + 4.0 * BOUND);
                    }
                })
            },
        )
    }
}

/// The rows that a tensor has in a batch.
fn count(tensor: Tensor, batch: &Batch) -> usize {
    match tensor.rows {
        Rows::Tokens => batch.tokens.len(),
        Rows::Outputs => batch.outputs.len(),
    }
}

/// A small weight's numbers.
fn widened(source: &WeightSource) -> Vec<f32> {
    let bytes: Vec<u8> = source.parts.concat();
    match source.format.size() {
        2 => bytes
            .chunks_exact(2)
            .map(|b| f32::from_bits(u32::from(u16::from_le_bytes([b[0], b[1]])) << 16))
            .collect(),
        _ => bytes
            .chunks_exact(4)
            .map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]))
            .collect(),
    }
}
