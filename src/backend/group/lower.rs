//! A program as the ranks of a group run it: its operations, each with its ranks, and exchanges between these.
//!
//! A block's result is a sum over ranks if tensor parallelism divides its last matrix, so an exchange follows it. With expert
//! parallelism the ranks exchange each expert's row, and every rank adds them in the router's order, like a single device. Where
//! devices exchange results by themselves, these are operations of the ranks' programs, which end only between stages; rows of
//! experts are then a sum as well, of one rank's row and the others' zeros.

use super::tables::{RankTables, Tables};
use crate::backend::parts::cut::{
    Exchange, ExpertExchange, Item, Part, Parts, Placed, Sent, cut, divided_experts,
};
use crate::backend::{AllReduce, MoeBlock, Op, Parallelism, Program, Result, Tensor};
use crate::error::BackendError;

/// Makes an exchange an operation of the ranks' programs.
fn put_on_devices(item: &mut Item) {
    let Item::Exchange(exchange) = *item else {
        return;
    };
    *item = match exchange {
        Exchange::Sum(op) => Item::of(op),
        Exchange::Gather(op) => Item::of(op),
        Exchange::Experts(ExpertExchange { rows, .. }) => Item::of(AllReduce { target: rows }),
    };
}

/// Cuts a program into parts. `rows` is the tensor that takes the experts' rows, `[T, top_k * d]`, with expert parallelism; with
/// `on_devices` the ranks of a stage exchange results by themselves.
///
/// # Errors
/// Operations that a group does not run: traces of heads, and probes of what is divided among ranks.
pub(super) fn lower(
    program: &Program,
    degrees: &Parallelism,
    tables: &Tables,
    on_devices: bool,
    rows: impl FnMut(&MoeBlock) -> Result<Tensor>,
) -> Result<Vec<Part>> {
    let mut items = items(program, degrees, tables, rows)?;
    if on_devices {
        items.iter_mut().for_each(put_on_devices);
    }
    // A program of single layers goes on from the program of the layer before.
    let goes_on = opens_later_stage(&items, tables)?;
    let stages = stages_of(&items, tables)?;
    let width = degrees.width();
    let ranks = |stage: usize| -> Vec<usize> { (stage * width..(stage + 1) * width).collect() };
    let placed = items.into_iter().zip(&stages).map(|(item, stage)| Placed {
        item,
        ranks: ranks(*stage),
        to: ranks(*stage),
    });
    let Parts {
        mut parts, before, ..
    } = cut(placed.collect());
    let first = stages.first().copied().filter(|_| goes_on).unwrap_or(0);
    if let Some(previous) = first.checked_sub(1) {
        let of_stage = before.into_iter().filter(|(_, on)| *on == ranks(first));
        let sent = of_stage.map(|(tensor, to)| Sent {
            tensor,
            holders: ranks(previous),
            to,
        });
        parts.insert(0, Part::Send(sent.collect()));
    }
    Ok(parts)
}

/// Operations on the handles of a rank, counted through all stages.
pub(super) fn program_of(
    ops: &[Op],
    index: usize,
    degrees: &Parallelism,
    tables: &Tables,
) -> Result<Program> {
    let width = degrees.width();
    let rank = index % width;
    let to = RankTables {
        tables,
        stage: index / width,
        rank,
        width,
    };
    let ops = ops.iter().map(|op| {
        let mut op = op.relocated(&to)?;
        if let Op::ExpertRows(op) = &mut op {
            op.first_expert += degrees.expert_shard(rank).rank * op.gate.stack;
        }
        Ok(op)
    });
    ops.collect()
}

/// The operations, with an exchange after each whose result is divided.
fn items(
    program: &Program,
    degrees: &Parallelism,
    tables: &Tables,
    mut rows: impl FnMut(&MoeBlock) -> Result<Tensor>,
) -> Result<Vec<Item>> {
    let sum = |target| Item::Exchange(Exchange::Sum(AllReduce { target }));
    let divided = degrees.tensor > 1;
    let mut items = Vec::new();
    for (at, op) in program.ops.iter().enumerate() {
        match op {
            Op::Linear(op) if divided && tables.gives_parts(op.weight)? => {
                let next = program.ops.get(at + 1);
                if !matches!(next, Some(Op::AllReduce(sum)) if sum.target == op.output) {
                    return Err(unsupported("parts of a sum that is not formed after them"));
                }
                items.push(Item::of(*op));
                continue;
            }
            Op::MoeBlock(block) if degrees.expert > 1 => {
                let rows = rows(block)?;
                items.extend(expert_parallel(block, rows, divided));
                continue;
            }
            Op::AllReduce(op) => {
                items.extend(divided.then(|| sum(op.target)));
                continue;
            }
            Op::AllGather(op) if divided => {
                items.push(Item::Exchange(Exchange::Gather(*op)));
                continue;
            }
            Op::Probe(tensor) | Op::ProbePositions(tensor) if tables.is_split(*tensor)? => {
                return Err(unsupported("probes of what is divided among devices"));
            }
            Op::TraceKda(_)
            | Op::TraceGate(_)
            | Op::TraceRoute(_)
            | Op::TraceState(_)
            | Op::TraceAttention(_) => return Err(unsupported("traces of a token")),
            Op::Experts(_) if degrees.expert > 1 || divided => {
                return Err(unsupported("routed experts outside of their block"));
            }
            _ => items.push(Item::of(op.clone())),
        }
        let target = match op {
            Op::KdaBlock(block) => Some(block.output),
            Op::MlaBlock(block) => Some(block.output),
            Op::MlpBlock(block) if block.reduce => Some(block.output),
            Op::MoeBlock(block) => Some(block.output),
            _ => None,
        };
        items.extend(target.filter(|_| divided).map(sum));
    }
    Ok(items)
}

/// Router, routed and shared experts, with the routed experts' rows exchanged.
fn expert_parallel(block: &MoeBlock, rows: Tensor, divided: bool) -> Vec<Item> {
    let mut items = vec![Item::of(block.route)];
    items.extend(divided_experts(&block.experts(), rows));
    // The shared experts, and their sum with the routed ones.
    for op in block.ops().into_iter().skip(2) {
        let shared = match &op {
            Op::MlpBlock(shared) => Some(shared.output),
            _ => None,
        };
        items.push(Item::of(op));
        let target = shared.filter(|_| divided);
        items.extend(target.map(|target| Item::Exchange(Exchange::Sum(AllReduce { target }))));
    }
    items
}

/// The stage of each operation: that of its weights, or else that of the operation before it.
fn stages_of(items: &[Item], tables: &Tables) -> Result<Vec<usize>> {
    let mut stage = 0;
    let mut stages = Vec::with_capacity(items.len());
    for item in items {
        if let Item::Op(op) = item {
            let weights = weights(op);
            for weight in weights {
                stage = tables.stage_of(weight)?;
            }
        }
        stages.push(stage);
    }
    Ok(stages)
}

/// Whether the first weight of a program is of the first layer of a later stage.
fn opens_later_stage(items: &[Item], tables: &Tables) -> Result<bool> {
    let first = items.iter().find_map(|item| match item {
        Item::Op(op) => weights(op).first().copied(),
        Item::Exchange(_) => None,
    });
    first.map_or(Ok(false), |weight| tables.opens_later_stage(weight))
}

/// A weight of an operation, or of each of a block's parts.
fn weights(op: &Op) -> Vec<crate::backend::Weight> {
    match op.parts() {
        Some(parts) => parts.iter().flat_map(weights).take(1).collect(),
        None => op.operands().weights.into_iter().take(1).collect(),
    }
}

fn unsupported(what: &str) -> BackendError {
    BackendError::Unsupported {
        backend: "several devices'",
        what: what.to_owned(),
    }
}
