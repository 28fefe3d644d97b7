//! A program as the ranks of a group run it: programs for each rank, and exchanges between ranks where these end.
//!
//! A block's result is a sum over ranks if tensor parallelism divides its last matrix, so an exchange follows it. With expert
//! parallelism the ranks exchange each expert's row, and every rank adds them in the router's order, like a single device. Where
//! devices exchange results by themselves, these are operations of the ranks' programs, which end only between stages; rows of
//! experts are then a sum as well, of one rank's row and the others' zeros.

use super::tables::{RankTables, Tables};
use crate::backend::{
    AllGather, AllReduce, ExpertsCombine, MoeBlock, Op, Parallelism, Program, Result, Tensor,
};
use crate::error::BackendError;

/// A part of a step.
pub(super) enum Part {
    /// The programs of the ranks of a stage.
    Run {
        stage: usize,
        programs: Vec<Program>,
    },
    /// An exchange between the ranks of a stage.
    Exchange { stage: usize, exchange: Exchange },
    /// Tensors that the ranks of the next stage read.
    Send {
        from: usize,
        to: usize,
        tensors: Vec<Tensor>,
    },
}

/// An exchange between the ranks of a stage; the tensors are the group's.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Exchange {
    /// The sum over ranks, in rank order, for every rank.
    Sum(AllReduce),
    /// The ranks' columns, in rank order, for every rank.
    Gather(AllGather),
    /// Each chosen expert's row from the rank that has the expert, for every rank.
    Experts(ExpertExchange),
}

/// The tensors of such an exchange.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct ExpertExchange {
    /// `[T, top_k]`: the chosen experts.
    pub(super) experts: Tensor,
    /// `[T, top_k * d]`: their results.
    pub(super) rows: Tensor,
    /// The number of experts of all ranks.
    pub(super) count: usize,
}

impl Exchange {
    /// Its name in timings.
    pub(super) fn name(&self) -> &'static str {
        match self {
            Self::Sum(_) => "all_reduce",
            Self::Gather(_) => "all_gather",
            Self::Experts(_) => "expert_exchange",
        }
    }
}

/// An operation of the list that is cut into parts.
enum Item {
    Op(Box<Op>),
    Exchange(Exchange),
}

impl Item {
    fn of(op: impl Into<Op>) -> Self {
        Self::Op(Box::new(op.into()))
    }

    /// Makes an exchange an operation of the ranks' programs.
    fn put_on_devices(&mut self) {
        let Self::Exchange(exchange) = *self else {
            return;
        };
        *self = match exchange {
            Exchange::Sum(op) => Self::of(op),
            Exchange::Gather(op) => Self::of(op),
            Exchange::Experts(ExpertExchange { rows, .. }) => Self::of(AllReduce { target: rows }),
        };
    }

    /// Tensors that it reads and writes.
    fn operands(&self) -> (Vec<Tensor>, Vec<Tensor>) {
        match self {
            Self::Op(op) => {
                let operands = op.operands();
                (operands.reads, operands.writes)
            }
            Self::Exchange(Exchange::Sum(op)) => (vec![op.target], vec![op.target]),
            Self::Exchange(Exchange::Gather(op)) => (vec![op.input], vec![op.output]),
            Self::Exchange(Exchange::Experts(op)) => (vec![op.rows, op.experts], vec![op.rows]),
        }
    }
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
        items.iter_mut().for_each(Item::put_on_devices);
    }
    let stages = stages_of(&items, tables)?;
    let mut parts = Vec::new();
    let mut first = 0;
    while first < items.len() {
        let stage = stages[first];
        let before = match first.checked_sub(1) {
            Some(before) => Some(stages[before]),
            // A program of single layers goes on from the program of the layer before.
            None if opens_later_stage(&items, tables)? => Some(stage - 1),
            None => None,
        };
        if let Some(from) = before.filter(|before| *before != stage) {
            let tensors = live(&items[first..]);
            parts.push(Part::Send {
                from,
                to: stage,
                tensors,
            });
        }
        if let Item::Exchange(exchange) = &items[first] {
            let exchange = *exchange;
            parts.push(Part::Exchange { stage, exchange });
            first += 1;
            continue;
        }
        let len = (first..items.len())
            .take_while(|i| stages[*i] == stage && matches!(items[*i], Item::Op(_)))
            .count();
        let ops = first..first + len;
        let programs = programs(&items[ops], stage, degrees, tables)?;
        parts.push(Part::Run { stage, programs });
        first += len;
    }
    Ok(parts)
}

/// The program of each rank of a stage.
fn programs(
    items: &[Item],
    stage: usize,
    degrees: &Parallelism,
    tables: &Tables,
) -> Result<Vec<Program>> {
    let program = |rank: usize| {
        let to = RankTables {
            tables,
            stage,
            rank,
            width: degrees.width(),
        };
        let ops = items.iter().filter_map(|item| match item {
            Item::Op(op) => Some(op),
            Item::Exchange(_) => None,
        });
        let ops = ops.map(|op| {
            let mut op = op.relocated(&to)?;
            if let Op::ExpertRows(op) = &mut op {
                op.first_expert += degrees.expert_shard(rank).rank * op.gate.stack;
            }
            Ok(op)
        });
        ops.collect::<Result<Program>>()
    };
    (0..degrees.width()).map(program).collect()
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
    let experts = block.experts();
    let expert_rows = experts.rows(rows);
    let exchange = ExpertExchange {
        experts: experts.experts,
        rows,
        count: experts.gate.stack,
    };
    let combine = ExpertsCombine {
        experts: experts.experts,
        weights: experts.weights,
        rows,
        output: experts.output,
    };
    let mut items = vec![
        Item::of(block.route),
        Item::of(expert_rows),
        Item::Exchange(Exchange::Experts(exchange)),
        Item::of(combine),
    ];
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

/// Tensors that operations read before any of them writes them.
fn live(items: &[Item]) -> Vec<Tensor> {
    let (mut live, mut written) = (Vec::new(), Vec::new());
    for item in items {
        let (reads, writes) = item.operands();
        for tensor in reads {
            if !written.contains(&tensor) && !live.contains(&tensor) {
                live.push(tensor);
            }
        }
        written.extend(writes);
    }
    live
}

fn unsupported(what: &str) -> BackendError {
    BackendError::Unsupported {
        backend: "several devices'",
        what: what.to_owned(),
    }
}
