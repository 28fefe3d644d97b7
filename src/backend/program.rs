//! A forward pass as data: the operations of a step, in the order in which they run.
//!
//! The model builds a [`Program`] from handles; a backend compiles it ([`Backend::compile`](super::Backend::compile)). What
//! differs between two submissions is in the [`Batch`](super::Batch). Tracing, probing and collectives are operations in the
//! list. A block of the paper ([`Op::KdaBlock`] and others) is one operation, which a backend either implements as fused
//! kernels or gets expanded into its parts.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::{AddNorm, Op};

/// The operations of a step.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Program {
    /// In the order in which they run.
    pub ops: Vec<Op>,
    /// Names of parts of the list and the operation that each begins with, in ascending order: `layer 3: KDA, MoE`.
    pub sections: Vec<(usize, String)>,
}

impl Program {
    /// An empty program.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Appends an operation.
    pub fn push(&mut self, op: impl Into<Op>) {
        self.ops.push(op.into());
    }

    /// Starts a named section.
    pub fn section(&mut self, name: impl Into<String>) {
        self.sections.push((self.ops.len(), name.into()));
    }

    /// The program with each operation replaced by the result of `rewrite`: none, one or several operations. Sections keep
    /// their operations.
    #[must_use]
    pub fn rewritten(&self, mut rewrite: impl FnMut(&Op) -> Vec<Op>) -> Self {
        let mut sections = self.sections.iter().peekable();
        let mut program = Self::new();
        for (at, op) in self.ops.iter().enumerate() {
            while let Some((_, name)) = sections.next_if(|(first, _)| *first <= at) {
                program.section(name.clone());
            }
            program.ops.extend(rewrite(op));
        }
        for (_, name) in sections {
            program.section(name.clone());
        }
        program
    }

    /// The program with each residual sum and the norm that follows it as one operation, for backends that run both in one
    /// launch. The two stay in the sum's section.
    #[must_use]
    pub fn joined(&self) -> Self {
        let mut sections = self.sections.iter().peekable();
        let mut program = Self::new();
        for (at, op) in self.ops.iter().enumerate() {
            while let Some((_, name)) = sections.next_if(|(first, _)| *first <= at) {
                program.section(name.clone());
            }
            let both = match (program.ops.last(), op) {
                (Some(Op::Add(add)), Op::RmsNorm(norm)) => AddNorm::of(add, norm),
                _ => None,
            };
            match both.filter(AddNorm::by_rows) {
                Some(both) => {
                    program.ops.pop();
                    program.push(both);
                }
                None => program.ops.push(op.clone()),
            }
        }
        for (_, name) in sections {
            program.section(name.clone());
        }
        program
    }

    /// The program with every block expanded that a backend does not implement as a whole.
    #[must_use]
    pub fn expanded(&self, takes: impl Fn(&Op) -> bool) -> Self {
        fn parts(op: &Op, takes: &dyn Fn(&Op) -> bool) -> Vec<Op> {
            match op.parts() {
                Some(inner) if !takes(op) => inner.iter().flat_map(|op| parts(op, takes)).collect(),
                _ => vec![op.clone()],
            }
        }
        self.rewritten(|op| parts(op, &takes))
    }
}

impl<T: Into<Op>> FromIterator<T> for Program {
    fn from_iter<I: IntoIterator<Item = T>>(ops: I) -> Self {
        Self {
            ops: ops.into_iter().map(Into::into).collect(),
            sections: Vec::new(),
        }
    }
}

impl fmt::Display for Program {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut sections = self.sections.iter().peekable();
        for (at, op) in self.ops.iter().enumerate() {
            while let Some((_, name)) = sections.next_if(|(first, _)| *first <= at) {
                writeln!(f, "# {name}")?;
            }
            writeln!(f, "{at:>5}  {op}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::{Add, Element, RmsNorm, Rows, Shard, Swiglu, Tensor, Weight};

    fn tensor(id: usize, width: usize) -> Tensor {
        Tensor {
            id,
            rows: Rows::Tokens,
            capacity: 8,
            width,
            element: Element::Activation,
        }
    }

    fn program() -> Program {
        let mut program = Program::new();
        program.section("layer 0");
        program.push(Swiglu {
            input: tensor(1, 8),
            output: tensor(2, 4),
        });
        program.section("head");
        program.push(Add {
            source: tensor(2, 4),
            target: tensor(3, 4),
        });
        program.push(Op::Probe(tensor(3, 4)));
        program
    }

    #[test]
    fn a_program_prints_a_line_an_operation_under_its_sections() {
        assert_eq!(
            program().to_string(),
            "# layer 0\n    0  swiglu          t1[T,8] -> t2[T,4]\n# head\n\
             \x20   1  add             t2[T,4] t3[T,4] -> t3[T,4]\n    2  probe           t3[T,4]\n"
        );
    }

    #[test]
    fn a_program_survives_a_file() {
        let text = serde_json::to_string(&program()).unwrap();
        assert_eq!(serde_json::from_str::<Program>(&text).unwrap(), program());
    }

    #[test]
    fn a_sum_and_the_norm_of_it_become_one_operation_and_its_parts_again() {
        let (source, target, output) = (tensor(1, 4), tensor(2, 4), tensor(3, 4));
        let both = AddNorm {
            source,
            target,
            weight: Weight {
                id: 0,
                stack: 1,
                rows: 4,
                columns: 1,
                shard: Shard::WHOLE,
            },
            eps: 1e-5,
            output,
        };
        let mut program = Program::new();
        program.section("layer 0");
        program.ops.extend(both.ops());
        program.sections.push((1, "layer 1".to_owned()));
        program.push(Op::Probe(output));
        let joined = program.joined();
        assert_eq!(joined.ops, [Op::from(both), Op::Probe(output)]);
        assert_eq!(joined.sections[1], (1, "layer 1".to_owned()));
        assert_eq!(joined.expanded(|_| false).ops, program.ops);
        // Those that stay apart: a norm of another tensor, of other rows, or over the sum's source.
        let outputs = Tensor {
            rows: Rows::Outputs,
            ..output
        };
        for (input, output) in [(source, output), (target, outputs), (target, source)] {
            let mut ops = both.ops();
            let norm = RmsNorm {
                input,
                weight: both.weight,
                eps: both.eps,
                output,
            };
            ops[1] = Op::from(norm);
            let apart = Program::from_iter(ops);
            assert_eq!(apart.joined(), apart);
        }
    }

    #[test]
    fn sections_stay_with_what_they_name_when_operations_come_and_go() {
        let twice = program().rewritten(|op| vec![op.clone(), op.clone()]);
        assert_eq!(twice.sections[1], (2, "head".to_owned()));
        let none = program().rewritten(|_| Vec::new());
        assert_eq!(none.ops, []);
        assert_eq!(none.sections.len(), 2);
    }
}
