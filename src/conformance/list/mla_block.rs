//! `mla_block`: projections, the append, both forms of attention and the output as one.

use super::blocks::{BlockFixture, COMPOSED, OWN, both_ways, projection};
use super::kda_fixture::{LAYER, segment};
use crate::backend::{
    Block, Capacity, LatentLayout, LatentPool, LatentRecord, MlaBlock, Op, Result, Segment, Slot,
};
use crate::checkpoint::Format;
use crate::conformance::oracle::{self, Attention, widen};
use crate::conformance::{Case, CaseContext, Matrix, Tolerance};

const EPS: f32 = 1e-6;
const BLOCK_TOKENS: usize = 16;

/// Sequences: tokens before the segment, tokens of the segment, and its blocks, in random order.
const SEQUENCES: [(usize, usize, [u32; 3]); 5] = [
    (0, 1, [15, 7, 0]),
    (5, 33, [2, 10, 3]),
    (3, 0, [5, 13, 6]),
    (18, 7, [8, 1, 9]),
    (31, 1, [11, 4, 12]),
];

struct Fixture {
    block: BlockFixture,
    /// Queries, kv_a, the norm, kv_b, output.
    weights: [Matrix; 5],
    /// The latents before each segment.
    pasts: Vec<Vec<f32>>,
}

impl Fixture {
    fn new(ctx: &mut CaseContext<'_>, attention: Attention, d: usize) -> Result<Self> {
        let Attention {
            heads,
            latent,
            nope,
            rope,
            value,
        } = attention;
        let tokens = SEQUENCES.iter().map(|(_, length, _)| length).sum();
        let pool = ctx.backend.latent_pool(LatentLayout {
            layers: 2,
            latent,
            rope,
            block_tokens: BLOCK_TOKENS,
            blocks: 16,
            dtype: ctx.cache(None),
        })?;
        let values = ctx.activations(tokens * d, 1.0);
        let weights = [
            projection(ctx, heads * (nope + rope), d)?,
            projection(ctx, latent + rope, d)?,
            ctx.norm_weight(Format::BF16, latent)?,
            projection(ctx, heads * (nope + value), latent)?,
            projection(ctx, d, heads * value)?,
        ];
        let block = MlaBlock {
            input: ctx.output(tokens, d)?,
            query_proj: weights[0].weight,
            kv_a_proj: weights[1].weight,
            kv_a_norm: (weights[2].weight, EPS),
            kv_b_proj: weights[3].weight,
            output_proj: weights[4].weight,
            nope,
            value,
            pool,
            layer: LAYER,
            query: ctx.output(tokens, heads * (nope + rope))?,
            kv_a: ctx.output(tokens, latent + rope)?,
            heads: ctx.output(tokens, heads * value)?,
            output: ctx.output(tokens, d)?,
        };
        let capacity = Capacity {
            tokens: tokens + 1,
            segments: SEQUENCES.len(),
            outputs: 0,
            blocks: 16,
            checkpoints: 0,
        };
        let steps = both_ways(ctx, Op::from(block), capacity)?;
        let pasts = seed(ctx, &pool)?;
        Ok(Self {
            block: BlockFixture {
                input: block.input,
                output: block.output,
                values,
                scratch: vec![block.query, block.kv_a, block.heads],
                steps,
            },
            weights,
            pasts,
        })
    }
}

/// Poisons all blocks, then writes each sequence's rows before its segment.
fn seed(ctx: &mut CaseContext<'_>, pool: &LatentPool) -> Result<Vec<Vec<f32>>> {
    let width = pool.layout.width();
    let LatentLayout { latent, rope, .. } = pool.layout;
    let record = |rows: &[f32]| LatentRecord::from_f32(latent, rope, rows);
    let poison = record(&vec![f32::NAN; BLOCK_TOKENS * width]);
    for block in 0..pool.layout.blocks as u32 {
        ctx.backend
            .write_latents(pool, LAYER, Block(block), &poison)?;
    }
    let mut pasts = Vec::new();
    for (position, _, table) in SEQUENCES {
        let rows = ctx.random.normals(position * width, 1.0);
        let rows = ctx.cached(pool.layout.dtype, rows);
        for (rows, block) in rows.chunks(BLOCK_TOKENS * width).zip(table) {
            ctx.backend
                .write_latents(pool, LAYER, Block(block), &record(rows))?;
        }
        pasts.push(rows);
    }
    Ok(pasts)
}

/// Some tokens of a sequence's segment.
fn part(sequence: usize, tokens: std::ops::Range<usize>) -> Segment {
    let (position, _, table) = SEQUENCES[sequence];
    Segment {
        position: position + tokens.start,
        blocks: table.map(Block).to_vec(),
        ..segment(tokens.len(), None, Slot(sequence as u32))
    }
}

fn all() -> Vec<Segment> {
    let whole = |(i, (_, length, _)): (usize, &(usize, usize, _))| part(i, 0..*length);
    SEQUENCES.iter().enumerate().map(whole).collect()
}

fn against_definition(ctx: &mut CaseContext<'_>, attention: Attention, d: usize) -> Result<()> {
    let mut fixture = Fixture::new(ctx, attention, d)?;
    let own = fixture.block.run(ctx, OWN, 0, &all())?;
    let composed = fixture.block.run(ctx, COMPOSED, 0, &all())?;
    ctx.close(
        "the output, against the composition",
        d,
        &own,
        &widen(&composed),
    );

    let [query, kv_a, norm, kv_b, output] = &fixture.weights;
    let x = widen(&fixture.block.values);
    let queries = oracle::linear(&x, &query.values, d);
    let appended = oracle::linear(&x, &kv_a.values, d);
    let appended = oracle::append(&appended, &norm.values, attention.rope, EPS);
    let (key, row) = (
        attention.nope + attention.rope,
        attention.latent + attention.rope,
    );
    let mut first = 0;
    for (i, (position, length, _)) in SEQUENCES.into_iter().enumerate() {
        let of =
            |values: &[f64], width: usize| values[first * width..(first + length) * width].to_vec();
        let mut rows = widen(&fixture.pasts[i]);
        rows.extend(of(&appended, row));
        let queries = of(&queries, attention.heads * key);
        let context = attention.attend(&queries, &kv_b.values, &rows, position);
        let answer = oracle::linear(&context, &output.values, attention.heads * attention.value);
        let found = &own[first * d..(first + length) * d];
        ctx.close(format!("the output of sequence {i}"), d, found, &answer);
        first += length;
    }
    Ok(())
}

/// Ragged batches, cuts and repetition. A segment cut to a single token is decoded, a longer one prefilled.
fn properties(ctx: &mut CaseContext<'_>, attention: Attention, d: usize) -> Result<()> {
    let mut fixture = Fixture::new(ctx, attention, d)?;
    let together = fixture.block.run(ctx, OWN, 0, &all())?;
    for time in 2..=ctx.repeats {
        let next = fixture.block.run(ctx, OWN, 0, &all())?;
        ctx.same(format!("the output of call {time}"), &next, &together);
    }
    let mut first = 0;
    for (i, (_, length, _)) in SEQUENCES.into_iter().enumerate() {
        let output = &together[first * d..(first + length) * d];
        let alone = fixture.block.run(ctx, OWN, first, &[part(i, 0..length)])?;
        let what = format!("the output of sequence {i} alone");
        ctx.same_in_f32(what, d, &alone, output);
        for cut in 0..=length {
            let mut found = fixture.block.run(ctx, OWN, first, &[part(i, 0..cut)])?;
            found.extend(
                fixture
                    .block
                    .run(ctx, OWN, first + cut, &[part(i, cut..length)])?,
            );
            let what = format!("the output of sequence {i}, cut after {cut}");
            ctx.close_to(what, d, &found, &widen(output), Tolerance::Split);
        }
        first += length;
    }
    Ok(())
}

pub(super) fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for (heads, latent, nope, rope, value, d) in [
        (3, 36, 20, 4, 33, 40),
        (1, 33, 7, 5, 11, 20),
        (2, 512, 128, 64, 128, 64),
    ] {
        let attention = Attention {
            heads,
            latent,
            nope,
            rope,
            value,
        };
        let name = format!("H={heads} {nope}+{rope} over {latent} d={d}");
        cases.push(Case::new(
            "mla_block",
            &name,
            Tolerance::Block,
            move |ctx| against_definition(ctx, attention, d),
        ));
        let name = format!("{name}/alone, cut and again");
        cases.push(Case::new("mla_block", name, Tolerance::Split, move |ctx| {
            properties(ctx, attention, d)
        }));
    }
    cases
}
