//! Cuts a list of operations, each with the ranks that run it, into parts of a step.
//!
//! Consecutive operations of the same ranks are one program of each. Before such a program come the tensors that it reads and
//! that an earlier part has left on other ranks.

use crate::backend::{AllGather, AllReduce, Experts, ExpertsCombine, Op, Tensor};

/// A part of a step; ranks are counted among all, and the tensors are those of the whole.
pub(in crate::backend) enum Part {
    /// The same operations on each of these ranks, each on its own handles.
    Run { ranks: Vec<usize>, ops: Vec<Op> },
    /// An exchange: what is read from each of the first ranks, and written to each of the others.
    Exchange {
        exchange: Exchange,
        from: Vec<usize>,
        to: Vec<usize>,
    },
    /// Tensors that the next part reads.
    Send(Vec<Sent>),
}

impl Part {
    /// The ranks that take part in it.
    pub(in crate::backend) fn ranks(&self) -> Vec<usize> {
        match self {
            Self::Run { ranks, .. } => ranks.clone(),
            Self::Exchange { from, to, .. } => [&from[..], to].concat(),
            Self::Send(tensors) => {
                let ranks = tensors.iter().map(|it| [&it.holders[..], &it.to].concat());
                ranks.flatten().collect()
            }
        }
    }
}

/// A tensor that some ranks have and others need.
#[derive(Clone, Debug, PartialEq)]
pub(in crate::backend) struct Sent {
    pub(in crate::backend) tensor: Tensor,
    pub(in crate::backend) holders: Vec<usize>,
    pub(in crate::backend) to: Vec<usize>,
}

/// An exchange between ranks.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(in crate::backend) enum Exchange {
    /// The sum over ranks, in rank order.
    Sum(AllReduce),
    /// The ranks' columns, in rank order.
    Gather(AllGather),
    /// Each chosen expert's row from the rank that has the expert.
    Experts(ExpertExchange),
}

/// The tensors of such an exchange.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(in crate::backend) struct ExpertExchange {
    /// `[T, top_k]`: the chosen experts.
    pub(in crate::backend) experts: Tensor,
    /// `[T, top_k * d]`: their results.
    pub(in crate::backend) rows: Tensor,
    /// The number of experts of all ranks.
    pub(in crate::backend) count: usize,
}

impl Exchange {
    /// Its name in timings.
    pub(in crate::backend) fn name(&self) -> &'static str {
        match self {
            Self::Sum(_) => "all_reduce",
            Self::Gather(_) => "all_gather",
            Self::Experts(_) => "expert_exchange",
        }
    }

    /// What is read from each rank, and what is written.
    pub(in crate::backend) fn tensors(&self) -> (Tensor, Tensor) {
        match self {
            Self::Sum(op) => (op.target, op.target),
            Self::Gather(op) => (op.input, op.output),
            Self::Experts(op) => (op.rows, op.rows),
        }
    }
}

/// An operation of the list that is cut into parts.
pub(in crate::backend) enum Item {
    Op(Box<Op>),
    Exchange(Exchange),
}

impl Item {
    pub(in crate::backend) fn of(op: impl Into<Op>) -> Self {
        Self::Op(Box::new(op.into()))
    }
}

/// Routed experts as ranks with some of them compute them: the rows, `[T, top_k * d]`, their exchange, and their sum in the
/// router's order, as on a single device.
pub(in crate::backend) fn divided_experts(experts: &Experts, rows: Tensor) -> [Item; 3] {
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
    [
        Item::of(experts.rows(rows)),
        Item::Exchange(Exchange::Experts(exchange)),
        Item::of(combine),
    ]
}

/// An item with the ranks that run it; of an exchange, those that are read.
pub(in crate::backend) struct Placed {
    pub(in crate::backend) item: Item,
    pub(in crate::backend) ranks: Vec<usize>,
    /// The ranks that an exchange writes to; of other items not used.
    pub(in crate::backend) to: Vec<usize>,
}

/// A list in parts.
pub(in crate::backend) struct Parts {
    pub(in crate::backend) parts: Vec<Part>,
    /// Tensors that are read before anything writes them: an earlier step has left them, and these ranks read them first.
    pub(in crate::backend) before: Vec<(Tensor, Vec<usize>)>,
    /// Where the last values are of each tensor that the list reads or writes.
    pub(in crate::backend) after: Holders,
}

/// The ranks that have the last values of tensors.
#[derive(Default)]
pub(in crate::backend) struct Holders(pub(in crate::backend) Vec<(Tensor, Vec<usize>)>);

impl Holders {
    /// Those of a tensor, if it was read or written before.
    pub(in crate::backend) fn of(&self, tensor: Tensor) -> Option<&[usize]> {
        let mut known = self.0.iter();
        let found = known.find(|(other, _)| *other == tensor);
        found.map(|(_, ranks)| ranks.as_slice())
    }

    /// These ranks have values of a tensor that no other has.
    pub(in crate::backend) fn set(&mut self, tensor: Tensor, ranks: &[usize]) {
        match self.0.iter_mut().find(|(other, _)| *other == tensor) {
            Some((_, held)) => *held = ranks.to_vec(),
            None => self.0.push((tensor, ranks.to_vec())),
        }
    }
}

/// Cuts a list into parts.
pub(in crate::backend) fn cut(items: Vec<Placed>) -> Parts {
    let mut parts = Vec::new();
    let mut before = Vec::new();
    let mut held = Holders::default();
    let mut items = items.into_iter().peekable();
    while let Some(Placed { item, ranks, to }) = items.next() {
        let op = match item {
            Item::Op(op) => *op,
            Item::Exchange(exchange) => {
                let (_, written) = exchange.tensors();
                held.set(written, &to);
                let from = ranks;
                parts.push(Part::Exchange { exchange, from, to });
                continue;
            }
        };
        let mut ops = vec![op];
        while let Some(next) =
            items.next_if(|next| matches!(next.item, Item::Op(_)) && next.ranks == ranks)
        {
            if let Item::Op(op) = next.item {
                ops.push(*op);
            }
        }
        let (reads, writes) = operands(&ops);
        let mut sent = Vec::new();
        for tensor in reads {
            let Some(holders) = held.of(tensor) else {
                before.push((tensor, ranks.clone()));
                held.set(tensor, &ranks);
                continue;
            };
            let without = ranks.iter().filter(|rank| !holders.contains(rank));
            let to: Vec<usize> = without.copied().collect();
            if to.is_empty() {
                continue;
            }
            let holders = holders.to_vec();
            held.set(tensor, &[&holders[..], &to].concat());
            sent.push(Sent {
                tensor,
                holders,
                to,
            });
        }
        if !sent.is_empty() {
            parts.push(Part::Send(sent));
        }
        writes
            .into_iter()
            .for_each(|tensor| held.set(tensor, &ranks));
        parts.push(Part::Run { ranks, ops });
    }
    Parts {
        parts,
        before,
        after: held,
    }
}

/// The tensors that operations read before any of them writes them, and those that they write; with those inside of blocks.
fn operands(ops: &[Op]) -> (Vec<Tensor>, Vec<Tensor>) {
    fn add(op: &Op, reads: &mut Vec<Tensor>, writes: &mut Vec<Tensor>) {
        if let Some(parts) = op.parts() {
            return parts.iter().for_each(|part| add(part, reads, writes));
        }
        let operands = op.operands();
        for tensor in operands.reads {
            if !writes.contains(&tensor) && !reads.contains(&tensor) {
                reads.push(tensor);
            }
        }
        for tensor in operands.writes {
            if !writes.contains(&tensor) {
                writes.push(tensor);
            }
        }
    }
    let (mut reads, mut writes) = (Vec::new(), Vec::new());
    ops.iter().for_each(|op| add(op, &mut reads, &mut writes));
    (reads, writes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::{Add, Element, Rows};

    fn tensor(id: usize) -> Tensor {
        Tensor {
            id,
            rows: Rows::Tokens,
            capacity: 4,
            width: 8,
            element: Element::F32,
        }
    }

    /// `target += source` on some ranks.
    fn add(source: usize, target: usize, ranks: &[usize]) -> Placed {
        let (source, target) = (tensor(source), tensor(target));
        Placed {
            item: Item::of(Add { source, target }),
            ranks: ranks.to_vec(),
            to: Vec::new(),
        }
    }

    fn sent(id: usize, holders: &[usize], to: &[usize]) -> Sent {
        Sent {
            tensor: tensor(id),
            holders: holders.to_vec(),
            to: to.to_vec(),
        }
    }

    /// What is sent before each part that has operations.
    fn sends(parts: &[Part]) -> Vec<Vec<Sent>> {
        let mut all = Vec::new();
        let mut next = Vec::new();
        for part in parts {
            match part {
                Part::Send(sent) => next = sent.clone(),
                _ => all.push(std::mem::take(&mut next)),
            }
        }
        all
    }

    #[test]
    fn a_tensor_is_sent_where_it_is_read_and_only_once() {
        let items = vec![
            add(1, 2, &[0]),
            add(1, 3, &[0]),
            // Tensor 2 is needed on rank 1, and stays on rank 0.
            add(2, 4, &[1]),
            add(2, 5, &[0]),
            add(2, 6, &[1]),
            // Rank 1 changes it: rank 0 needs it again.
            add(6, 2, &[1]),
            add(2, 5, &[0]),
        ];
        let cut = cut(items);
        let expected = [
            vec![],
            vec![sent(2, &[0], &[1])],
            vec![],
            vec![],
            vec![sent(2, &[1], &[0])],
        ];
        assert_eq!(sends(&cut.parts), expected);
        let before: Vec<_> = cut.before.iter().map(|(it, on)| (it.id, &on[..])).collect();
        let expected: [(usize, &[usize]); 6] = [
            (1, &[0]),
            (2, &[0]),
            (3, &[0]),
            (4, &[1]),
            (5, &[0]),
            (6, &[1]),
        ];
        assert_eq!(before, expected);
        assert_eq!(cut.after.of(tensor(2)), Some(&[1, 0][..]));
        assert_eq!(cut.after.of(tensor(6)), Some(&[1][..]));
        assert_eq!(cut.after.of(tensor(7)), None);
    }

    #[test]
    fn ranks_that_run_together_get_what_any_of_them_lacks() {
        let exchange = Placed {
            item: Item::Exchange(Exchange::Sum(AllReduce { target: tensor(3) })),
            ranks: vec![0, 1],
            to: vec![0],
        };
        let items = vec![
            add(1, 2, &[0]),
            add(2, 3, &[0, 1]),
            exchange,
            add(3, 4, &[0, 1]),
        ];
        let cut = cut(items);
        // Its result is on one rank only.
        let expected = [
            vec![],
            vec![sent(2, &[0], &[1])],
            vec![],
            vec![sent(3, &[0], &[1])],
        ];
        assert_eq!(sends(&cut.parts), expected);
        let runs = cut.parts.iter().filter_map(|part| match part {
            Part::Run { ranks, .. } => Some(&ranks[..]),
            Part::Exchange { from, .. } => Some(&from[..]),
            Part::Send(_) => None,
        });
        let runs: Vec<&[usize]> = runs.collect();
        assert_eq!(runs, [&[0][..], &[0, 1], &[0, 1], &[0, 1]]);
    }
}
