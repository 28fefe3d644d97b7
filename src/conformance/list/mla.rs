//! `mla_append`, `mla_prefill` and `mla_decode` over scattered blocks.
//!
//! Blocks are assigned in random order, and rows that were not appended are NaN, so that reading one is noticed.

use crate::backend::{
    Batch, Block, Capacity, LatentLayout, LatentPool, LatentRecord, MlaAppend, MlaAttention, Op,
    Program, Result, Segment, Segments, Slot, Step, Tensor,
};
use crate::checkpoint::Format;
use crate::config::Dtype;
use crate::conformance::oracle::{self, Attention, widen};
use crate::conformance::{CaseContext, Matrix, Tolerance};

/// Layers of the pools below, and the one that is used.
const LAYERS: usize = 2;
const LAYER: usize = 1;

/// A sequence: number of cached tokens, and of tokens of this segment.
pub(super) type Span = (usize, usize);

/// A pool with blocks assigned to some sequences.
struct Cache {
    pool: LatentPool,
    tables: Vec<Vec<Block>>,
}

impl Cache {
    /// Assigns blocks for these spans, one more than each needs, and poisons everything.
    fn new(
        ctx: &mut CaseContext<'_>,
        [latent, rope, block_tokens]: [usize; 3],
        dtype: Option<Dtype>,
        spans: &[Span],
    ) -> Result<Self> {
        let mut needed: Vec<usize> = spans
            .iter()
            .map(|(position, length)| (position + length).div_ceil(block_tokens) + 1)
            .collect();
        needed.push(2);
        let mut free: Vec<u32> = (0..needed.iter().sum::<usize>() as u32).collect();
        let pool = ctx.backend.latent_pool(LatentLayout {
            layers: LAYERS,
            latent,
            rope,
            block_tokens,
            blocks: free.len(),
            dtype: ctx.cache(dtype),
        })?;
        let mut tables = Vec::new();
        for count in &needed[..spans.len()] {
            let mut draw = || Block(free.swap_remove(ctx.random.below(free.len())));
            tables.push((0..*count).map(|_| draw()).collect());
        }
        let cache = Self { pool, tables };
        let poison = vec![f32::NAN; block_tokens * (latent + rope)];
        for layer in 0..LAYERS {
            for block in 0..pool.layout.blocks {
                cache.write(ctx, layer, Block(block as u32), &poison)?;
            }
        }
        Ok(cache)
    }

    fn write(
        &self,
        ctx: &mut CaseContext<'_>,
        layer: usize,
        block: Block,
        rows: &[f32],
    ) -> Result<()> {
        let LatentLayout { latent, rope, .. } = self.pool.layout;
        let record = LatentRecord::from_f32(latent, rope, rows);
        ctx.backend.write_latents(&self.pool, layer, block, &record)
    }

    /// Writes the first rows of a sequence.
    fn seed(&self, ctx: &mut CaseContext<'_>, sequence: usize, rows: &[f32]) -> Result<()> {
        let block = self.pool.layout.block_tokens * self.pool.layout.width();
        for (rows, block) in rows.chunks(block).zip(&self.tables[sequence]) {
            self.write(ctx, LAYER, *block, rows)?;
        }
        Ok(())
    }

    /// All rows of a layer, block by block.
    fn read(&self, ctx: &mut CaseContext<'_>, layer: usize) -> Result<Vec<Vec<f32>>> {
        let tokens = self.pool.layout.block_tokens;
        (0..self.pool.layout.blocks as u32)
            .map(|block| {
                let ticket = ctx
                    .backend
                    .read_latents(&self.pool, layer, Block(block), tokens);
                Ok(ticket.wait()?.to_f32())
            })
            .collect()
    }

    /// The row of a sequence's position, from the result of [`Cache::read`].
    fn row<'a>(&self, blocks: &'a [Vec<f32>], sequence: usize, position: usize) -> &'a [f32] {
        let (tokens, width) = (self.pool.layout.block_tokens, self.pool.layout.width());
        let block = self.tables[sequence][position / tokens].0 as usize;
        &blocks[block][position % tokens * width..][..width]
    }

    fn segment(&self, sequence: usize, (position, length): Span) -> Segment {
        Segment {
            length,
            position,
            slot_in: None,
            slot_out: Slot(sequence as u32),
            checkpoints: Vec::new(),
            blocks: self.tables[sequence].clone(),
        }
    }

    fn capacity(&self, tokens: usize) -> Capacity {
        Capacity {
            tokens: tokens + 1,
            segments: self.tables.len() + 1,
            outputs: 0,
            blocks: self.pool.layout.blocks + 1,
            checkpoints: 0,
        }
    }
}

fn batch(segments: Vec<Segment>) -> Batch {
    Batch {
        tokens: vec![0; segments.iter().map(|segment| segment.length).sum()],
        segments,
        outputs: Vec::new(),
        draws: Vec::new(),
        fed: Vec::new(),
    }
}

fn total(spans: &[Span]) -> usize {
    spans.iter().map(|(_, length)| length).sum()
}

/// Numbers at the boundaries of f16 and bf16: ties and their neighbours, the greatest and the smallest, infinities and NaN.
const BORDERS: [f32; 24] = [
    1.0 + 1.0 / 2048.0,
    1.0 + 3.0 / 2048.0,
    -1.0 - 3.0 / 2048.0 + 1.0 / (1 << 20) as f32,
    1.0 + 1.0 / 256.0,
    1.0 + 3.0 / 256.0,
    -1.0 - 1.0 / 256.0 - 1.0 / (1 << 20) as f32,
    2.0 - 1.0 / 8192.0,
    65504.0,
    65519.996,
    65520.0,
    -1e9,
    3.3e38,
    f32::MAX,
    6.103_515_6e-5,
    6.1e-5,
    5.960_464_5e-8,
    8.940_697e-8,
    2.980_232_2e-8,
    -2.980_232_6e-8,
    1e-20,
    -0.0,
    f32::INFINITY,
    f32::NEG_INFINITY,
    f32::NAN,
];

/// Numbers at the boundaries of narrower dtypes are rounded to nearest even; they are the shared part of keys, which is not
/// normalised.
pub(super) fn borders(ctx: &mut CaseContext<'_>, dtype: Dtype) -> Result<()> {
    let (latent, rope) = (9, BORDERS.len());
    let mut values = ctx.activations(latent, 1.0);
    values.extend(ctx.rounded(BORDERS.to_vec()));
    let shape = [latent, rope, 4];
    append_rows(ctx, shape, Some(dtype), &[(6, 1)], &values, 1e-6)
}

/// Appended rows are normalised and at their positions, and nothing else has changed.
pub(super) fn append(
    ctx: &mut CaseContext<'_>,
    shape: [usize; 3],
    dtype: Option<Dtype>,
    spans: &[Span],
    scale: f32,
    eps: f32,
) -> Result<()> {
    let values = ctx.activations(total(spans) * (shape[0] + shape[1]), scale);
    append_rows(ctx, shape, dtype, spans, &values, eps)
}

/// The same for these rows.
fn append_rows(
    ctx: &mut CaseContext<'_>,
    shape: [usize; 3],
    dtype: Option<Dtype>,
    spans: &[Span],
    values: &[f32],
    eps: f32,
) -> Result<()> {
    let [latent, rope, _] = shape;
    let width = latent + rope;
    let cache = Cache::new(ctx, shape, dtype, spans)?;
    let dtype = cache.pool.layout.dtype;
    let norm = ctx.norm_weight(Format::BF16, latent)?;
    let input = ctx.input(width, crate::backend::Element::Activation, values)?;
    let append = MlaAppend {
        input,
        weight: norm.weight,
        eps,
        pool: cache.pool,
        layer: LAYER,
    };
    let capacity = cache.capacity(total(spans));
    let mut step = ctx
        .backend
        .compile(&Program::from_iter([append]), capacity)?;
    let segments = (0..spans.len())
        .map(|i| cache.segment(i, spans[i]))
        .collect();
    let before = [cache.read(ctx, 0)?, cache.read(ctx, LAYER)?];
    ctx.submit(&mut *step, &batch(segments))?;
    if ctx.timed() {
        return Ok(());
    }
    let after = [cache.read(ctx, 0)?, cache.read(ctx, LAYER)?];
    let answer = oracle::append(&widen(values), &norm.values, rope, eps);
    // With the appended rows restored to their earlier values, everything must be as before.
    let mut rest = after.clone();
    let mut row = 0;
    for (sequence, (position, length)) in spans.iter().enumerate() {
        for position in *position..position + length {
            let found = cache.row(&after[1], sequence, position);
            let answer = &answer[row * width..(row + 1) * width];
            let label = |what: &str| format!("{what} of sequence {sequence} at {position}");
            ctx.close_kept(
                label("the latent"),
                latent,
                &found[..latent],
                &answer[..latent],
                dtype,
            );
            let shared = values[row * width + latent..(row + 1) * width].to_vec();
            let shared = ctx.cached(dtype, shared);
            ctx.same(label("k_pe"), &found[latent..], &shared);
            let tokens = cache.pool.layout.block_tokens;
            let block = cache.tables[sequence][position / tokens].0 as usize;
            let place = position % tokens * width..(position % tokens + 1) * width;
            rest[1][block][place.clone()].copy_from_slice(&before[1][block][place]);
            row += 1;
        }
    }
    for layer in 0..LAYERS {
        for (block, (rest, before)) in rest[layer].iter().zip(&before[layer]).enumerate() {
            let what = format!("rows of block {block} of layer {layer}, not appended to");
            ctx.same(what, rest, before);
        }
    }
    Ok(())
}

/// The form of attention, and the segments that it runs on.
pub(super) type Form = (bool, Segments);

/// The widths of one attention, and its weight's format.
#[derive(Clone, Copy)]
pub(super) struct Shape {
    pub(super) attention: Attention,
    pub(super) block_tokens: usize,
    pub(super) format: Format,
    /// The pool's dtype; `None` is the device's own.
    pub(super) cache: Option<Dtype>,
    /// The size of expanded keys and values.
    pub(super) size: f32,
}

/// An attention planned on a device, with its latents written.
struct Fixture {
    cache: Cache,
    attention: Attention,
    kv_b: Matrix,
    /// `[position + length, latent + rope]` per sequence: the cached numbers, as operands of the device's precision.
    latents: Vec<Vec<f32>>,
    /// `[T, heads * (nope + rope)]`.
    queries: Vec<f32>,
    query: Tensor,
    output: Tensor,
    step: Box<dyn Step>,
}

impl Fixture {
    fn new(
        ctx: &mut CaseContext<'_>,
        shape: Shape,
        (prefill, segments): Form,
        spans: &[Span],
        sharp: f32,
    ) -> Result<Self> {
        let attention = shape.attention;
        let Attention {
            heads,
            latent,
            nope,
            rope,
            value,
        } = attention;
        let widths = [latent, rope, shape.block_tokens];
        let cache = Cache::new(ctx, widths, shape.cache, spans)?;
        let rows = heads * (nope + value);
        let scale = shape.size * (latent as f32).powf(-0.5);
        let kv_b = ctx.random_matrix(shape.format, [1, rows, latent], scale)?;
        let mut latents = Vec::new();
        for (i, (position, length)) in spans.iter().enumerate() {
            let rows = ctx
                .random
                .normals((position + length) * (latent + rope), 1.0);
            let rows = ctx.cached(cache.pool.layout.dtype, rows);
            cache.seed(ctx, i, &rows)?;
            latents.push(ctx.rounded(rows));
        }
        let queries = ctx.activations(total(spans) * heads * (nope + rope), sharp);
        let query = ctx.output(total(spans), heads * (nope + rope))?;
        let output = ctx.output(total(spans), heads * value)?;
        let op = MlaAttention {
            query,
            kv_b: kv_b.weight,
            nope,
            value,
            pool: cache.pool,
            layer: LAYER,
            segments,
            output,
        };
        let op = if prefill {
            Op::MlaPrefill(op)
        } else {
            Op::MlaDecode(op)
        };
        let capacity = cache.capacity(total(spans));
        let step = ctx.backend.compile(&Program::from_iter([op]), capacity)?;
        Ok(Self {
            cache,
            attention,
            kv_b,
            latents,
            queries,
            query,
            output,
            step,
        })
    }

    /// Runs rows of queries from `first` on as these segments.
    fn run(
        &mut self,
        ctx: &mut CaseContext<'_>,
        first: usize,
        segments: Vec<Segment>,
    ) -> Result<Vec<f32>> {
        let (batch, width) = (batch(segments), self.query.width);
        let count = batch.tokens.len();
        ctx.fill(
            self.query,
            &self.queries[first * width..(first + count) * width],
        )?;
        ctx.poison(self.output)?;
        ctx.submit(&mut *self.step, &batch)?;
        ctx.read(self.output, count)
    }

    /// Compares the outputs of all segments with the definition, and checks that the cache has not changed.
    fn check(
        &self,
        ctx: &mut CaseContext<'_>,
        form: Form,
        spans: &[Span],
        output: &[f32],
        before: &[Vec<f32>],
    ) -> Result<()> {
        let (width, key) = (self.output.width, self.query.width);
        let mut first = 0;
        for (i, (position, length)) in spans.iter().enumerate() {
            let rows = first..first + length;
            first += length;
            let found = &output[rows.start * width..rows.end * width];
            if !form.1.contains(*length) {
                let what = format!("rows of sequence {i}, not among the segments,");
                ctx.same(what, found, &vec![f32::NAN; found.len()]);
                continue;
            }
            let answer = self.attention.attend(
                &widen(&self.queries[rows.start * key..rows.end * key]),
                &self.kv_b.values,
                &widen(&self.latents[i]),
                *position,
            );
            let what = format!("sequence {i} ({length} tokens after {position})");
            ctx.close(what, self.attention.value, found, &answer);
        }
        for (block, (after, before)) in self.cache.read(ctx, LAYER)?.iter().zip(before).enumerate()
        {
            ctx.same(format!("block {block}"), after, before);
        }
        Ok(())
    }
}

/// A ragged batch against the definition; rows of other segments and the cache are not changed.
pub(super) fn attend(
    ctx: &mut CaseContext<'_>,
    shape: Shape,
    form: Form,
    spans: &[Span],
    sharp: f32,
) -> Result<()> {
    let mut fixture = Fixture::new(ctx, shape, form, spans, sharp)?;
    let before = fixture.cache.read(ctx, LAYER)?;
    let segments = (0..spans.len())
        .map(|i| fixture.cache.segment(i, spans[i]))
        .collect();
    let output = fixture.run(ctx, 0, segments)?;
    if ctx.timed() {
        return Ok(());
    }
    fixture.check(ctx, form, spans, &output, &before)
}
/// Each sequence has the same bits as alone, a prompt may be cut anywhere, and calls repeat their results.
pub(super) fn properties(ctx: &mut CaseContext<'_>, shape: Shape, form: Form) -> Result<()> {
    let spans = [(0, 1), (5, 33), (16, 0), (70, 9), (3, 1)];
    let mut fixture = Fixture::new(ctx, shape, form, &spans, 2.0)?;
    let segments: Vec<Segment> = (0..spans.len())
        .map(|i| fixture.cache.segment(i, spans[i]))
        .collect();
    let together = fixture.run(ctx, 0, segments.clone())?;
    for time in 2..=ctx.repeats {
        let next = fixture.run(ctx, 0, segments.clone())?;
        ctx.same(format!("outputs of call {time}"), &next, &together);
    }
    let (mut first, width) = (0, fixture.output.width);
    for (i, segment) in segments.iter().enumerate() {
        let found = fixture.run(ctx, first, vec![segment.clone()])?;
        let rows = &together[first * width..(first + segment.length) * width];
        let value = fixture.attention.value;
        let what = format!("outputs of sequence {i} alone");
        ctx.same_in_f32(what, value, &found, rows);
        let reference = widen(rows);
        for cut in 0..=segment.length {
            let (position, length) = spans[i];
            let mut found =
                fixture.run(ctx, first, vec![fixture.cache.segment(i, (position, cut))])?;
            let rest = fixture.cache.segment(i, (position + cut, length - cut));
            found.extend(fixture.run(ctx, first + cut, vec![rest])?);
            ctx.close_to(
                format!("sequence {i} cut after {cut}"),
                value,
                &found,
                &reference,
                Tolerance::Split,
            );
        }
        first += segment.length;
    }
    Ok(())
}

/// Sequences that share the blocks of one prompt, and differ after it.
pub(super) fn shared(ctx: &mut CaseContext<'_>, shape: Shape, form: Form) -> Result<()> {
    let prompt = 2 * shape.block_tokens;
    let spans = [(prompt, 5), (prompt, 1), (prompt + 1, 3)];
    let mut fixture = Fixture::new(ctx, shape, form, &spans, 2.0)?;
    let (first, width) = (
        fixture.cache.tables[0][..2].to_vec(),
        fixture.cache.pool.layout.width(),
    );
    let rows = fixture.latents[0][..prompt * width].to_vec();
    for (table, latents) in fixture.cache.tables.iter_mut().zip(&mut fixture.latents) {
        table[..2].copy_from_slice(&first);
        latents[..prompt * width].copy_from_slice(&rows);
    }
    let before = fixture.cache.read(ctx, LAYER)?;
    let segments = (0..spans.len())
        .map(|i| fixture.cache.segment(i, spans[i]))
        .collect();
    let output = fixture.run(ctx, 0, segments)?;
    fixture.check(ctx, form, &spans, &output, &before)
}
