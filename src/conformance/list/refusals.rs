//! Batches and programs that every backend must refuse, with the same typed error, before anything runs.

use super::kda_fixture::{LAYER, record, segment};
use crate::backend::{
    Add, Batch, Block, Capacity, DrawCapacity, Element, Embed, FedToken, GatedNorm, LatentLayout,
    LatentPool, Linear, MlaAppend, Op, OutputRow, Program, Result, RmsNorm, Rows, Sample, Segment,
    Select, ShortConv, Slot, StateCheckpoint, StateLayout, StatePool, Step, Swiglu, Tensor, Weight,
};
use crate::checkpoint::Format;
use crate::conformance::context::PADDING;
use crate::conformance::{Case, CaseContext, Tolerance};
use crate::error::BackendError;

pub(super) fn cases() -> Vec<Case> {
    type Run = fn(&mut CaseContext<'_>) -> Result<()>;
    let cases: [(&str, Run); 3] = [
        ("batches that do not fit", batches),
        ("shapes that do not fit", shapes),
        ("names in order", names),
    ];
    cases
        .into_iter()
        .map(|(name, run)| Case::new("refusals", name, Tolerance::Exact, run))
        .collect()
}

const VOCABULARY: usize = 11;
const SLOTS: usize = 6;
const BLOCKS: usize = 5;
const BLOCK_TOKENS: usize = 4;

/// A step that reads tokens, slots and blocks.
struct Fixture {
    step: Box<dyn Step>,
    states: StatePool,
    latents: LatentPool,
}

impl Fixture {
    fn new(ctx: &mut CaseContext<'_>) -> Result<Self> {
        let states = ctx.backend.state_pool(StateLayout {
            layers: 2,
            key_heads: 1,
            value_heads: 1,
            key_width: 4,
            value_width: 4,
            taps: 4,
            slots: SLOTS,
        })?;
        let latents = ctx.backend.latent_pool(LatentLayout {
            layers: 1,
            latent: 8,
            rope: 4,
            block_tokens: BLOCK_TOKENS,
            blocks: BLOCKS,
            dtype: ctx.cache(None),
        })?;
        let table = ctx.random_matrix(Format::F32, [1, VOCABULARY, 12], 1.0)?;
        let conv = ctx.random_matrix(Format::F32, [1, 12, 4], 1.0)?;
        let norm = ctx.norm_weight(Format::F32, 8)?;
        let (hidden, output) = (ctx.output(10, 12)?, ctx.output(10, 12)?);
        let drawn = ctx.blank(Rows::Outputs, 2, 2, Element::Index)?;
        let capacity = Capacity {
            tokens: 10,
            segments: 3,
            outputs: 2,
            blocks: 6,
            checkpoints: 2,
        };
        let program = Program::from_iter([
            Op::from(Embed {
                weight: table.weight,
                drawn: Some(drawn),
                output: hidden,
            }),
            Op::from(ShortConv {
                input: hidden,
                weight: conv.weight,
                pool: states,
                layer: LAYER,
                output,
            }),
            Op::from(MlaAppend {
                input: output,
                weight: norm.weight,
                eps: 1e-6,
                pool: latents,
                layer: 0,
            }),
            Op::Probe(hidden),
        ]);
        let step = ctx.backend.compile(&program, capacity)?;
        let layout = states.layout;
        let zero = record(
            &layout,
            &vec![0.0; layout.state_len()],
            &vec![0.0; layout.conv_state_len()],
        );
        for slot in 0..SLOTS as u32 {
            ctx.backend.write_state(&states, LAYER, Slot(slot), &zero)?;
        }
        Ok(Self {
            step,
            states,
            latents,
        })
    }

    fn conv_states(&self, ctx: &mut CaseContext<'_>) -> Result<Vec<f32>> {
        let mut conv_states = Vec::new();
        for slot in 0..SLOTS as u32 {
            let record = ctx
                .backend
                .read_state(&self.states, LAYER, Slot(slot))
                .wait()?;
            conv_states.extend(record.conv_state);
        }
        Ok(conv_states)
    }
}

/// Two segments that fit.
fn good() -> Batch {
    let segment = |length, slot_in, slot_out, position, blocks: &[u32]| Segment {
        position,
        blocks: blocks.iter().copied().map(Block).collect(),
        ..segment(length, slot_in, Slot(slot_out))
    };
    Batch {
        tokens: vec![0, 10, 3, 4, 5],
        segments: vec![
            segment(3, None, 0, 0, &[2]),
            segment(2, Some(Slot(1)), 1, 3, &[0, 4]),
        ],
        outputs: vec![
            OutputRow {
                row: 2,
                target: None,
            },
            OutputRow {
                row: 4,
                target: Some(10),
            },
        ],
        draws: Vec::new(),
        fed: Vec::new(),
    }
}

/// Makes a valid batch invalid.
type Spoil = Box<dyn Fn(&mut Batch)>;

const fn checkpoint(after: usize, slot: u32) -> StateCheckpoint {
    StateCheckpoint {
        after,
        slot: Slot(slot),
    }
}

/// Batches with wrong tokens, segments, outputs or sizes.
fn spoiled_rows() -> Vec<(&'static str, Spoil)> {
    vec![
        (
            "more tokens than the capacity",
            Box::new(|batch| {
                batch.tokens = vec![0; 11];
                batch.segments[0].length = 9;
                batch.segments[0].blocks = vec![Block(2), Block(1), Block(3)];
            }),
        ),
        (
            "lengths that do not add up",
            Box::new(|batch| batch.segments[0].length = 2),
        ),
        (
            "more segments than the capacity",
            Box::new(|batch| {
                batch.segments.push(segment(0, None, Slot(3)));
                batch.segments.push(segment(0, None, Slot(4)));
            }),
        ),
        (
            "more outputs than the capacity",
            Box::new(|batch| {
                batch.outputs.insert(
                    0,
                    OutputRow {
                        row: 1,
                        target: None,
                    },
                );
            }),
        ),
        (
            "outputs out of order",
            Box::new(|batch| batch.outputs.reverse()),
        ),
        (
            "an output twice",
            Box::new(|batch| batch.outputs[0].row = 4),
        ),
        (
            "an output past the last row",
            Box::new(|batch| batch.outputs[1].row = 5),
        ),
        (
            "more block entries than the capacity",
            Box::new(|batch| {
                batch.segments[0].blocks = [2, 1, 3, 2, 2].map(Block).to_vec();
            }),
        ),
    ]
}

/// Batches with wrong checkpoints.
fn spoiled_checkpoints() -> Vec<(&'static str, Spoil)> {
    vec![
        (
            "more checkpoints than the capacity",
            Box::new(move |batch| {
                batch.segments[0].checkpoints =
                    vec![checkpoint(1, 2), checkpoint(2, 3), checkpoint(3, 4)];
            }),
        ),
        (
            "a checkpoint after nothing",
            Box::new(move |batch| {
                batch.segments[0].checkpoints = vec![checkpoint(0, 2)];
            }),
        ),
        (
            "a checkpoint past the segment",
            Box::new(move |batch| {
                batch.segments[0].checkpoints = vec![checkpoint(4, 2)];
            }),
        ),
        (
            "checkpoints out of order",
            Box::new(move |batch| {
                batch.segments[0].checkpoints = vec![checkpoint(2, 2), checkpoint(1, 3)];
            }),
        ),
    ]
}

/// Batches with wrong slots.
fn spoiled_slots() -> Vec<(&'static str, Spoil)> {
    vec![
        (
            "a slot to write that does not exist",
            Box::new(|batch| {
                batch.segments[0].slot_out = Slot(SLOTS as u32);
            }),
        ),
        (
            "a slot to read that does not exist",
            Box::new(|batch| {
                batch.segments[1].slot_in = Some(Slot(u32::MAX));
            }),
        ),
        (
            "a slot to keep in that does not exist",
            Box::new(move |batch| {
                batch.segments[0].checkpoints = vec![checkpoint(1, SLOTS as u32)];
            }),
        ),
        (
            "a slot written twice",
            Box::new(|batch| batch.segments[0].slot_out = Slot(1)),
        ),
        (
            "a slot written twice, once to keep",
            Box::new(move |batch| {
                batch.segments[0].checkpoints = vec![checkpoint(1, 0)];
            }),
        ),
        (
            "a slot read that another writes",
            Box::new(|batch| {
                batch.segments[1].slot_in = Some(Slot(0));
            }),
        ),
        (
            "a slot read that its own checkpoint writes",
            Box::new(move |batch| {
                batch.segments[1].slot_out = Slot(2);
                batch.segments[1].checkpoints = vec![checkpoint(1, 1)];
            }),
        ),
    ]
}

/// Batches with tokens that cannot be fed.
fn spoiled_fed() -> Vec<(&'static str, Spoil)> {
    let token = |row, draw| FedToken { row, draw };
    vec![
        (
            "a fed token past the last row",
            Box::new(move |batch| batch.fed = vec![token(5, 0)]),
        ),
        (
            "a token fed by a draw that is not kept",
            Box::new(move |batch| batch.fed = vec![token(0, 2 + PADDING)]),
        ),
        (
            "fed tokens out of order",
            Box::new(move |batch| batch.fed = vec![token(2, 0), token(1, 1)]),
        ),
    ]
}

/// Batches with wrong block tables.
fn spoiled_blocks() -> Vec<(&'static str, Spoil)> {
    vec![
        (
            "a block table too short",
            Box::new(|batch| {
                batch.segments[1].blocks.pop();
            }),
        ),
        (
            "no block table",
            Box::new(|batch| batch.segments[0].blocks.clear()),
        ),
        (
            "a block that does not exist",
            Box::new(|batch| {
                batch.segments[0].blocks[0] = Block(BLOCKS as u32);
            }),
        ),
        (
            "a block written twice",
            Box::new(|batch| batch.segments[0].blocks[0] = Block(4)),
        ),
        (
            "a block read that another writes",
            Box::new(|batch| {
                batch.segments[1].position = 4;
                batch.segments[1].blocks = vec![Block(2), Block(4)];
            }),
        ),
    ]
}

fn batches(ctx: &mut CaseContext<'_>) -> Result<()> {
    let mut fixture = Fixture::new(ctx)?;
    fixture.step.submit(&good())?.wait()?;
    let before = fixture.conv_states(ctx)?;
    let token = |token, position| BackendError::TokenOutOfRange {
        token,
        position,
        last: VOCABULARY - 1,
    };
    // Two ids past the vocabulary, because a tokenizer may have more tokens than the embedding.
    let tokens: [(u32, usize); 3] = [(11, 0), (12, 4), (u32::MAX, 2)];
    for (id, position) in tokens {
        let mut batch = good();
        batch.tokens[position] = id;
        let found = fixture.step.submit(&batch).err();
        let what = format!("token {id} is refused by type and place");
        ctx.holds(what, found == Some(token(id, position)));
    }
    let mut batch = good();
    batch.outputs[1].target = Some(11);
    let found = fixture.step.submit(&batch).err();
    ctx.holds(
        "a target past the vocabulary is refused",
        found == Some(token(11, 4)),
    );
    let spoiled = spoiled_rows()
        .into_iter()
        .chain(spoiled_checkpoints())
        .chain(spoiled_slots())
        .chain(spoiled_fed())
        .chain(spoiled_blocks());
    for (what, spoil) in spoiled {
        let mut batch = good();
        spoil(&mut batch);
        let refused = matches!(fixture.step.submit(&batch), Err(BackendError::Batch { .. }));
        ctx.holds(format!("{what}: refused"), refused);
    }
    let after = fixture.conv_states(ctx)?;
    ctx.same("the convolution states after refusals", &after, &before);
    let record = ctx
        .backend
        .read_latents(&fixture.latents, 0, Block(2), 3)
        .wait()?;
    ctx.holds(
        "latents after refusals",
        record.to_f32().iter().all(|x| x.is_finite()),
    );
    // The step still works.
    fixture.step.submit(&good())?.wait()?;
    Ok(())
}

/// Handles for operations whose shapes do not fit; tensors are named by their width or element.
struct Handles {
    matrix: Weight,
    vector: Weight,
    eight: Tensor,
    six: Tensor,
    seven: Tensor,
    four: Tensor,
    gates: Tensor,
    outputs: Tensor,
    logits: Tensor,
    small: Tensor,
    indices: Tensor,
    states: StatePool,
}

fn shapes(ctx: &mut CaseContext<'_>) -> Result<()> {
    let handles = Handles {
        matrix: ctx.random_matrix(Format::F32, [1, 6, 8], 1.0)?.weight,
        vector: ctx.norm_weight(Format::F32, 8)?.weight,
        eight: ctx.output(4, 8)?,
        six: ctx.output(4, 6)?,
        seven: ctx.output(4, 7)?,
        four: ctx.output(4, 4)?,
        gates: ctx.blank(Rows::Tokens, 4, 8, Element::F32)?,
        outputs: ctx.blank(Rows::Outputs, 4, 6, Element::Activation)?,
        logits: ctx.blank(Rows::Outputs, 4, 6, Element::F32)?,
        small: ctx.blank(Rows::Tokens, 3, 6, Element::Activation)?,
        indices: ctx.blank(Rows::Tokens, 4, 8, Element::Index)?,
        states: Fixture::new(ctx)?.states,
    };
    // An invalid operation is refused after a valid one, and the valid one alone compiles.
    let batch = crate::conformance::context::plain(4);
    let good = Op::from(Add {
        source: handles.six,
        target: ctx.output(4, 6)?,
    });
    ctx.compile(&batch, [good.clone()])?;
    let invalid = invalid_products(&handles)
        .into_iter()
        .chain(invalid_elementwise(&handles))
        .chain(invalid_others(&handles));
    for (what, op) in invalid {
        let result = ctx.compile(&batch, [good.clone(), op]);
        let refused = matches!(result, Err(BackendError::Shape { .. }));
        ctx.holds(format!("{what}: refused"), refused);
    }
    Ok(())
}

/// Products, norms and embeddings with shapes that do not fit.
fn invalid_products(handles: &Handles) -> Vec<(&'static str, Op)> {
    let Handles {
        matrix,
        vector,
        eight,
        six,
        outputs,
        ..
    } = *handles;
    let linear = |input, output| {
        Op::from(Linear {
            input,
            weight: matrix,
            output,
        })
    };
    let norm = |input, output| RmsNorm {
        input,
        weight: vector,
        eps: 1e-5,
        output,
    };
    let matrix_norm = RmsNorm {
        weight: matrix,
        ..norm(eight, eight)
    };
    let embed = Embed {
        weight: matrix,
        drawn: None,
        output: six,
    };
    let drawn_six = Embed {
        drawn: Some(six),
        output: eight,
        ..embed
    };
    vec![
        ("linear, another input width", linear(six, six)),
        ("linear, another output width", linear(eight, eight)),
        ("linear, tokens to outputs", linear(eight, outputs)),
        ("rms_norm, another input width", Op::from(norm(six, six))),
        ("rms_norm, another output width", Op::from(norm(eight, six))),
        ("rms_norm, a matrix for a vector", Op::from(matrix_norm)),
        ("embed, another width", Op::from(embed)),
        ("embed, drawn tokens of another shape", Op::from(drawn_six)),
    ]
}

/// Elementwise operations with shapes that do not fit.
fn invalid_elementwise(handles: &Handles) -> Vec<(&'static str, Op)> {
    let Handles {
        eight,
        six,
        seven,
        four,
        gates,
        small,
        indices,
        ..
    } = *handles;
    let add = |source, target| Op::from(Add { source, target });
    let swiglu = |input, output| Op::from(Swiglu { input, output });
    vec![
        ("swiglu, an odd width", swiglu(seven, six)),
        ("add, a tensor to itself", add(six, six)),
        (
            "add, tensors for fewer rows than the step's",
            add(six, small),
        ),
        ("swiglu, indices", swiglu(indices, four)),
        ("add, another width", add(six, eight)),
        ("add, another element", add(eight, gates)),
    ]
}

/// Operations of KDA layers and the selection of tokens with shapes that do not fit.
fn invalid_others(handles: &Handles) -> Vec<(&'static str, Op)> {
    let Handles {
        matrix,
        vector,
        eight,
        six,
        gates,
        outputs,
        logits,
        states,
        ..
    } = *handles;
    let conv = |input, output| {
        Op::from(ShortConv {
            input,
            weight: matrix,
            pool: states,
            layer: 0,
            output,
        })
    };
    let gated_norm = GatedNorm {
        input: six,
        gate: six,
        weight: vector,
        eps: 1e-5,
        output: six,
    };
    let select = |logits, candidates| {
        Op::from(Select {
            logits,
            candidates,
            keep_rows: false,
        })
    };
    let sample = Sample {
        logits: gates,
        capacity: DrawCapacity::NONE,
        drawn: None,
    };
    vec![
        ("short_conv, rows of outputs", conv(outputs, six)),
        ("gated_norm, not whole heads", Op::from(gated_norm)),
        ("short_conv, another width", conv(eight, eight)),
        ("select, rows of tokens", select(gates, 1)),
        ("select, no candidates", select(logits, 0)),
        ("sample, rows of tokens", Op::from(sample)),
    ]
}

/// A step lists the operations that it runs, in order.
fn names(ctx: &mut CaseContext<'_>) -> Result<()> {
    let fixture = Fixture::new(ctx)?;
    let expected = ["embed", "short_conv", "mla_append", "probe"];
    ctx.holds("the names", fixture.step.operations() == expected);
    Ok(())
}
