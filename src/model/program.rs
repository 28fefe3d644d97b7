//! The forward pass as a program: embedding, layers, head. The operations of a layer's blocks are in `backend::block`.

use std::ops::Range;

use super::{AttentionBlock, FfnBlock, Layer, Model, StepOptions};
use crate::backend::{
    Add, AllGather, AllReduce, Embed, Form, KdaRecurrence, Linear, MlaAttention, Op, Program,
    RmsNorm, Sample, Segments, Select, Tensor,
};

impl Model {
    /// The operations of a forward pass. No device is used.
    #[must_use]
    pub fn program(&self, step_options: StepOptions) -> Program {
        self.program_of(0..self.layers.len(), step_options)
    }

    /// The operations of a range of layers, with the embedding before the first layer and the head after the last. Submitting
    /// the parts of a forward pass one after the other with the same batch gives the same bits as the whole. When a part has
    /// completed, so have the caches of its layers.
    #[must_use]
    pub fn program_of(&self, layers: Range<usize>, step_options: StepOptions) -> Program {
        let mut program = Program::new();
        let hidden = self.stream.hidden;
        if layers.start == 0 {
            program.section("embedding");
            program.push(Embed {
                weight: self.embedding,
                drawn: Some(self.head.drawn),
                output: hidden,
            });
            if step_options.probe_hidden {
                program.push(Op::Probe(hidden));
            }
        }
        for (number, layer) in self
            .layers
            .iter()
            .enumerate()
            .take(layers.end)
            .skip(layers.start)
        {
            program.section(format!("layer {number}: {layer}"));
            self.layer(&mut program, layer);
            if step_options.probe_hidden {
                program.push(Op::Probe(hidden));
            }
        }
        if layers.end == self.layers.len() {
            program.section("head");
            self.output(&mut program, step_options);
        }
        program
    }

    /// The operations of a forward pass in which segments of any length run in the form of single tokens: the recurrence token
    /// by token, attention over the latents themselves. On the CPU each row has the same bits as in a segment of its own. It
    /// is for few tokens that follow a decode; a prompt would take longer than in [`Model::program`].
    #[must_use]
    pub fn stepwise_program(&self, step_options: StepOptions) -> Program {
        let program = self.program(step_options);
        program.rewritten(|op| match op {
            Op::KdaBlock(block) => stepwise_block(block.ops(), block.output),
            Op::MlaBlock(block) => stepwise_block(block.ops(), block.output),
            other => vec![other.clone()],
        })
    }

    /// `h = h + attention(norm(h))`, then `h = h + ffn(norm(h))`.
    fn layer(&self, program: &mut Program, layer: &Layer) {
        let (hidden, normed) = (self.stream.hidden, self.stream.normed);
        let norm = |weight| RmsNorm {
            input: hidden,
            weight,
            eps: self.config.rms_norm_eps,
            output: normed,
        };
        let residual = Add {
            source: self.stream.output,
            target: hidden,
        };
        program.push(norm(layer.input_norm));
        match &layer.attention {
            AttentionBlock::Kda(block) => program.push(**block),
            AttentionBlock::Mla(block) => program.push(**block),
        }
        program.push(residual);
        program.push(norm(layer.post_attention_norm));
        match &layer.ffn {
            FfnBlock::Dense(block) => program.push(**block),
            FfnBlock::Moe(block) => program.push(**block),
        }
        program.push(residual);
    }

    /// Logits of the requested rows, their candidates, and the draws from them.
    fn output(&self, program: &mut Program, step_options: StepOptions) {
        let head = self.head;
        program.push(RmsNorm {
            input: self.stream.hidden,
            weight: self.final_norm,
            eps: self.config.rms_norm_eps,
            output: head.normed,
        });
        program.push(Linear {
            input: head.normed,
            weight: self.lm_head,
            output: head.local_logits,
        });
        if head.local_logits != head.logits {
            program.push(AllGather {
                input: head.local_logits,
                output: head.logits,
            });
        }
        if step_options.probe_hidden {
            program.push(Op::Probe(head.logits));
        }
        program.push(Select {
            logits: head.logits,
            candidates: step_options.candidates,
            keep_rows: step_options.keep_rows,
        });
        let capacity = step_options.draws;
        if capacity.draws > 0 {
            program.push(Sample {
                logits: head.logits,
                capacity,
                drawn: Some(head.drawn),
            });
        }
    }
}

/// A block's parts in the form of single tokens, and the sum over ranks that a group puts after a whole block.
fn stepwise_block(ops: Vec<Op>, output: Tensor) -> Vec<Op> {
    let sum = Op::from(AllReduce { target: output });
    let ops = ops.into_iter().filter_map(stepwise);
    ops.chain([sum]).collect()
}

/// An operation in the form of single tokens for all segments; `None` for what only longer ones need.
fn stepwise(op: Op) -> Option<Op> {
    match op {
        Op::KdaRecurrence(op) => Some(Op::from(KdaRecurrence {
            form: Form::Step,
            ..op
        })),
        Op::MlaPrefill(_) => None,
        Op::MlaDecode(op) => Some(Op::MlaDecode(MlaAttention {
            segments: Segments::All,
            ..op
        })),
        other => Some(other),
    }
}

/// `KDA, MoE` and so on.
impl std::fmt::Display for Layer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let attention = match self.attention {
            AttentionBlock::Kda(_) => "KDA",
            AttentionBlock::Mla(_) => "MLA",
        };
        let ffn = match self.ffn {
            FfnBlock::Dense(_) => "MLP",
            FfnBlock::Moe(_) => "MoE",
        };
        write!(f, "{attention}, {ffn}")
    }
}
