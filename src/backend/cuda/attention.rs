//! Encodes latent attention: append to the cache, prefill, decode.

use std::sync::Arc;

use super::machine::{Buffer, Command, Product};
use super::params;
use super::products::{ANY_TOGETHER, any_shape, suits_library};
use super::step::{CudaStep, Kernel, WINDOW};
use crate::backend::gpu::batch_metadata::BatchMetadata;
use crate::backend::{MlaAppend, MlaAttention, MlaBlock, Op, Result, Segments};
use crate::config::Dtype;
use crate::error::BackendError;

/// Positions whose scores a prefill computes together.
const RUN: usize = 64;
/// Query tiles per block of `mla_prefill`.
const TILES: usize = 16;
/// Rows for which kv_b is read once in a decode.
const TOGETHER: usize = 4;

/// Number of blocks for this number of spans: up to an eighth more, which return at once, so that a graph of a step's
/// commands can be reused for many tokens and not only until a row begins another span.
pub(super) fn with_room(spans: usize) -> usize {
    spans.next_multiple_of((spans / 8).next_power_of_two())
}

/// The kernel entry for a pool of this dtype, from those for latents in bf16, f16 and f32.
pub(super) fn of_latents(dtype: Dtype, [bf16, f16, f32]: [&'static str; 3]) -> &'static str {
    match dtype {
        Dtype::Bf16 => bf16,
        Dtype::F16 => f16,
        Dtype::F32 => f32,
    }
}

impl CudaStep {
    /// An MLA layer: the projections of its input are one launch for single tokens.
    pub(super) fn encode_mla_block(&mut self, block: &MlaBlock) -> Result<()> {
        let of_input = |op: &Op| matches!(op, Op::Linear(linear) if linear.input == block.input);
        let (first, rest): (Vec<Op>, Vec<Op>) = block.ops().into_iter().partition(of_input);
        let together = first.into_iter().filter_map(|op| match op {
            Op::Linear(linear) => Some(linear),
            _ => None,
        });
        self.name("linear");
        self.products(&together.collect::<Vec<_>>())?;
        rest.iter().try_for_each(|op| self.push(op))
    }

    pub(super) fn encode_mla_append(&mut self, op: MlaAppend) -> Result<()> {
        self.name("mla_append");
        let layout = op.pool.layout;
        let input = self.tensor(op.input)?;
        let (weight, format) = self.stored(op.weight)?;
        let latents = self.shared.memory().latents(&op.pool, op.layer)?.clone();
        let params = params::MlaAppend {
            batch: &self.batch,
            input: &input,
            weight: &weight,
            format,
            latents: &latents,
            latent: layout.latent,
            rope: layout.rope,
            block_tokens: layout.block_tokens,
            eps: op.eps,
        };
        let entry = ["mla_append", "mla_append_f16", "mla_append_f32"];
        let kernel = Kernel::new(of_latents(layout.dtype, entry), 128, &params);
        self.launch(kernel, |image| [image.tokens as u32, 1, 1]);
        Ok(())
    }

    /// For each window: gathers its latents, expands them with one dense product, lays them out for the tensor cores, and
    /// attends to them.
    pub(super) fn encode_prefill(&mut self, op: MlaAttention) -> Result<()> {
        let layout = op.pool.layout;
        self.name("mla_prefill");
        let (heads, key) = (op.heads(), op.nope + layout.rope);
        let entries = PrefillEntries::new(key, op.value)?;
        let (entry, widest) = (entries.entry, entries.widest);
        let lay_out = of_latents(layout.dtype, entries.lay_out);
        let gather = ["mla_gather", "mla_gather_f16", "mla_gather_f32"];
        let gather = of_latents(layout.dtype, gather);
        let (query, output) = (self.tensor(op.query)?, self.tensor(op.output)?);
        let latents = self.shared.memory().latents(&op.pool, op.layer)?.clone();
        let (weight, stored) = (self.matrix(op.kv_b)?, self.stored(op.kv_b)?);
        let longest = self.capacity.blocks * layout.block_tokens;
        let positions = longest.min(WINDOW);
        let outputs = heads * (op.nope + op.value);
        let gathered = self.scratch("a window of latents", 2 * positions * layout.latent)?;
        let rows = self.scratch("expanded keys and values", 4 * positions * outputs)?;
        let expansion = Expansion {
            input: Arc::clone(&gathered),
            weight,
            stored,
            output: Arc::clone(&rows),
            columns: layout.latent,
            outputs,
        };
        // Bytes per image of a run: keys, values, and the factors of keys.
        let image_bytes = 2 * RUN * (widest + entries.most_value) + 16;
        let most = positions.div_ceil(RUN) * heads;
        let images = self.scratch("runs of an attention", most * image_bytes)?;
        // Number of rows of the state that is carried from one window to the next.
        let waiting = if longest > WINDOW {
            self.capacity.tokens * heads
        } else {
            0
        };
        let marks = self.scratch("running softmax", 8 * waiting)?;
        let partial = self.scratch("running attention", 4 * waiting * op.value)?;
        let batch = Arc::clone(&self.batch);
        let [heads, latent, nope, rope, value, block_tokens] = widths_of(&op, heads);
        self.each(move |image| {
            let (first, last) = windows_of(op.segments, image);
            let mut commands = Vec::with_capacity(4 * (last - first));
            for (number, window) in image.windows[first..last].iter().enumerate() {
                let number = first + number;
                let params = params::MlaPrefill {
                    batch: &batch,
                    window: number as u32,
                    query: &query,
                    latents: &latents,
                    gathered: &gathered,
                    expanded: &rows,
                    images: &images,
                    output: &output,
                    marks: &marks,
                    partial: &partial,
                    heads,
                    latent,
                    nope,
                    rope,
                    value,
                    block_tokens,
                };
                let gather = Kernel::new(gather, 64, &params);
                let positions = window.positions as u32;
                commands.push(Command::Launch(gather.over([positions, 1, 1])));
                let counted = image.window_word(number);
                commands.push(expansion.command(&batch, counted, window.positions));
                let lay_out = Kernel::new(lay_out, 128, &params);
                let runs = window.positions.div_ceil(RUN) as u32;
                commands.push(Command::Launch(lay_out.over([runs, heads, 1])));
                let attend = Kernel::new(entry, 256, &params);
                let attend = attend.shared(2 * image_bytes + 512 * widest)?;
                let blocks = window.tiles.div_ceil(TILES) as u32;
                commands.push(Command::Launch(attend.over([blocks, heads, 1])));
            }
            Ok(commands)
        });
        Ok(())
    }

    /// Absorbed form: the absorbed query, a softmax over each span of latents, the spans merged and expanded.
    pub(super) fn encode_decode(&mut self, op: MlaAttention) -> Result<()> {
        let layout = op.pool.layout;
        self.name("mla_decode");
        check_decode(&op)?;
        let heads = op.heads();
        let single = op.segments == Segments::Single;
        let (most, most_spans) = if single {
            let rows = self.capacity.segments.min(self.capacity.tokens);
            (rows, self.metadata_layout.spans(&self.capacity))
        } else {
            (self.capacity.tokens, self.capacity.tokens)
        };
        let (query, output) = (self.tensor(op.query)?, self.tensor(op.output)?);
        let latents = self.shared.memory().latents(&op.pool, op.layer)?.clone();
        let (kv_b, format) = self.stored(op.kv_b)?;
        let absorbed = self.scratch("absorbed queries", 4 * most * heads * layout.latent)?;
        let elements = most_spans * heads * (layout.latent.next_multiple_of(4) + 4);
        let parts = self.scratch("attention by spans", 4 * elements)?;
        let [heads, latent, nope, rope, value, block_tokens] = widths_of(&op, heads);
        let count: fn(&BatchMetadata) -> usize = match op.segments {
            Segments::All => |image| image.tokens,
            Segments::Single => |image| image.tokens - image.several_rows,
            Segments::Several => |image| image.several_rows,
        };
        let spans: fn(&BatchMetadata) -> usize = if single {
            |image| with_room(image.spans)
        } else {
            count
        };
        let batch = Arc::clone(&self.batch);
        let tiles = layout.latent.div_ceil(16) + layout.rope.div_ceil(16);
        let entry = match (layout.latent, layout.rope) {
            (512, 64) => ["mla_attend_512", "mla_attend_512_f16", "mla_attend_512_f32"],
            _ => ["mla_attend", "mla_attend_f16", "mla_attend_f32"],
        };
        let entry = of_latents(layout.dtype, entry);
        self.each(move |image| {
            let rows = count(image);
            if rows == 0 {
                return Ok(Vec::new());
            }
            let params = params::MlaDecode {
                batch: &batch,
                single,
                rows,
                query: &query,
                kv_b: &kv_b,
                format,
                absorbed: &absorbed,
                latents: &latents,
                parts: &parts,
                output: &output,
                heads,
                latent,
                nope,
                rope,
                value,
                block_tokens,
            };
            let absorb = Kernel::new("mla_absorb", 256, &params);
            let attend = Kernel::new(entry, 256, &params).shared(25216 + 5120 * tiles)?;
            let merge = Kernel::new("mla_merge", 512, &params);
            let together = rows.div_ceil(TOGETHER) as u32;
            Ok(vec![
                Command::Launch(absorb.over([latent.div_ceil(128), heads, together])),
                Command::Launch(attend.over([spans(image) as u32, heads.div_ceil(32), 1])),
                Command::Launch(merge.over([heads, together, 1])),
            ])
        });
        Ok(())
    }
}

/// The kernels of a prefill, with the maximum widths of keys and values.
struct PrefillEntries {
    /// `mla_images` for latents in bf16, f16 and f32.
    lay_out: [&'static str; 3],
    entry: &'static str,
    widest: usize,
    most_value: usize,
}

impl PrefillEntries {
    /// Those for keys and values of these widths.
    fn new(key: usize, value: usize) -> Result<Self> {
        match (key, value) {
            (0..=64, 0..=64) => Ok(Self {
                lay_out: ["mla_images_64", "mla_images_64_f16", "mla_images_64_f32"],
                entry: "mla_prefill_64",
                widest: 64,
                most_value: 64,
            }),
            (0..=192, 0..=128) => Ok(Self {
                lay_out: ["mla_images_192", "mla_images_192_f16", "mla_images_192_f32"],
                entry: "mla_prefill_192",
                widest: 192,
                most_value: 128,
            }),
            _ => Err(BackendError::Unsupported {
                backend: "cuda",
                what: format!(
                    "keys of width {key} and values of width {value}; the maxima are 192 and 128"
                ),
            }),
        }
    }
}

/// The dense product that expands a window's latents to keys and values.
struct Expansion {
    /// `[positions, columns]` bf16.
    input: Arc<Buffer>,
    /// `[outputs, columns]` bf16.
    weight: Arc<Buffer>,
    /// The same weight as it is stored, and its format.
    stored: (Arc<Buffer>, u32),
    /// `[positions, outputs]` f32.
    output: Arc<Buffer>,
    columns: usize,
    outputs: usize,
}

impl Expansion {
    /// The product for a window of this number of positions, which is word `counted` of the batch.
    fn command(&self, batch: &Arc<Buffer>, counted: u32, positions: usize) -> Command {
        let (columns, outputs, full) = (self.columns, self.outputs, true);
        if suits_library(columns, outputs) {
            return Command::Product(Product {
                input: Arc::clone(&self.input),
                weight: Arc::clone(&self.weight),
                output: Arc::clone(&self.output),
                rows: positions,
                columns,
                outputs,
                full,
            });
        }
        let product = any_shape(&params::Linear {
            batch,
            rows: counted,
            input: &self.input,
            weight: &self.stored.0,
            format: self.stored.1,
            output: &self.output,
            full,
            columns,
            outputs,
            first: 0,
            width: outputs,
        });
        Command::Launch(product.over([
            (outputs as u32).div_ceil(8),
            positions.div_ceil(ANY_TOGETHER) as u32,
            1,
        ]))
    }
}

/// The first window of these segments, and the end of their windows.
fn windows_of(segments: Segments, image: &BatchMetadata) -> (usize, usize) {
    match segments {
        Segments::All => (0, image.windows.len()),
        Segments::Several => (0, image.several_windows),
        Segments::Single => (image.several_windows, image.windows.len()),
    }
}

/// Fails for widths that `mla_absorb`, `mla_attend` and `mla_merge` do not support.
fn check_decode(op: &MlaAttention) -> Result<()> {
    let layout = op.pool.layout;
    for (what, found, widest) in [
        ("latents", layout.latent, 512),
        ("shared keys", layout.rope, 64),
        ("expanded keys", op.nope, 256),
    ] {
        if found > widest {
            return Err(BackendError::Unsupported {
                backend: "cuda",
                what: format!("{what} of width {found}; the maximum is {widest}"),
            });
        }
    }
    Ok(())
}

/// Heads, latent, nope, rope, value and tokens per block, as the kernels' parameters.
fn widths_of(op: &MlaAttention, heads: usize) -> [u32; 6] {
    let layout = op.pool.layout;
    [
        heads,
        layout.latent,
        op.nope,
        layout.rope,
        op.value,
        layout.block_tokens,
    ]
    .map(|word| word as u32)
}
