//! Encodes the gated delta rule: by chunks, by steps, and a layer's fused form of both.

use std::sync::Arc;

use super::machine::{Buffer, Command, Launch, fitting};
use super::params;
use super::step::{CudaStep, Kernel};
use crate::backend::gpu::batch_metadata::{MOST_SPLITS, MetadataLayout};
use crate::backend::gpu::layout::form_word;
use crate::backend::{Form, GatedNorm, KdaBlock, KdaRecurrence, Linear, Op, Result, StateLayout};
use crate::error::BackendError;

/// Maximum width of a key in both forms, and of a value in the stepwise one.
const WIDEST: usize = 128;
/// Maximum width between the projections of decay and output gate for which the decode's kernel has the second one.
const MOST_RANK: usize = 128;
/// Taps of a convolution that is fused with the recurrence.
const TAPS: usize = 4;
/// Bytes per tile of an image, and per tile of values with its scale.
const TILE: usize = 512;
const VALUE_TILE: usize = TILE + 16;
/// Chunk images in flight in `kda_scan`.
const STAGES: usize = 5;
/// Multiprocessors of the device that widths are tuned for, and their schedulers.
const MULTIPROCESSORS: usize = 132;
const SCHEDULERS: usize = 512;
/// Number of tiles of sixteen columns per block of `kda_scan`: `FEW_TILES` if the grid is small, otherwise `MOST_TILES`.
const FEW_TILES: usize = 4;
const MOST_TILES: usize = 8;

/// The properties of a layout that the chunkwise kernels use; as in `kernels/kda_chunk.cu`.
#[derive(Clone, Copy)]
struct Chunkwise {
    /// `kda_prepare`, `kda_prepare_fused`, `kda_scan`, `kda_operators` and `kda_seeds` for this width of keys, and that
    /// width.
    prepare: [&'static str; 2],
    entries: [&'static str; 3],
    padded: usize,
    /// Bytes of the image of one chunk and head up to its values, and of the whole image.
    common: usize,
    image: usize,
    /// Tiles of sixteen columns of a head's state.
    tiles: usize,
    heads: usize,
}

impl Chunkwise {
    fn new(layout: &StateLayout) -> Self {
        let (padded, prepare, entries) = match layout.key_width {
            0..=32 => (
                32,
                ["kda_prepare_32", "kda_prepare_fused_32"],
                ["kda_scan_32", "kda_operators_32", "kda_seeds_32"],
            ),
            33..=64 => (
                64,
                ["kda_prepare_64", "kda_prepare_fused_64"],
                ["kda_scan_64", "kda_operators_64", "kda_seeds_64"],
            ),
            _ => (
                128,
                ["kda_prepare_128", "kda_prepare_fused_128"],
                ["kda_scan_128", "kda_operators_128", "kda_seeds_128"],
            ),
        };
        let common = TILE * (padded / 4 + 1) + 4 * padded;
        let tiles = layout.value_width.div_ceil(16);
        Self {
            prepare,
            entries,
            padded,
            common,
            image: common + VALUE_TILE * tiles,
            tiles,
            heads: layout.value_heads,
        }
    }

    /// Bytes of shared memory of `kda_prepare`.
    fn prepare_shared(&self) -> usize {
        self.image + 160 * self.padded
    }

    /// Tiles per block of `kda_scan` for this number of scans: few if all blocks then run at the same time. Columns are
    /// independent, so results do not depend on it.
    fn width(&self, scans: usize) -> usize {
        let few = 2 * scans * self.heads <= MULTIPROCESSORS;
        self.tiles.min(if few { FEW_TILES } else { MOST_TILES })
    }

    /// The launch of `kda_scan` or `kda_operators` over a grid.
    fn over(&self, launch: &Launch, columns: usize, width: usize, scans: usize) -> Result<Command> {
        let shared = STAGES * (self.common + VALUE_TILE * width);
        Ok(Command::Launch(Launch {
            grid: grid([columns.div_ceil(width), self.heads, scans])?,
            threads: fitting("a block", 32 * width as u64)?,
            shared: fitting("shared memory", shared as u64)?,
            ..launch.clone()
        }))
    }

    /// Maximum number of splits of a segment: as many as give each of the device's schedulers one warp.
    fn splits(&self) -> usize {
        MOST_SPLITS.min(SCHEDULERS / (self.heads * self.tiles).max(1))
    }
}

/// Number of blocks along each axis.
fn grid([x, y, z]: [usize; 3]) -> Result<[u32; 3]> {
    let blocks = |count: usize| fitting("a grid", count as u64);
    Ok([blocks(x)?, blocks(y)?, blocks(z)?])
}

fn too_wide(what: String) -> BackendError {
    BackendError::Unsupported {
        backend: "cuda",
        what: format!("{what}; the widest are {WIDEST}"),
    }
}

/// Whether a KDA layer is run as a whole: the fused kernels load pairs of channels and four taps at once, as in the published
/// model; other layouts use the separate operations.
pub(super) fn takes_kda_block(block: &KdaBlock) -> bool {
    let layout = block.pool.layout;
    layout.key_heads == layout.value_heads
        && [layout.key_width, layout.value_width]
            .iter()
            .all(|width| *width <= WIDEST && width.is_multiple_of(2))
        && layout.taps == TAPS
}

impl CudaStep {
    pub(super) fn encode_kda_recurrence(&mut self, op: KdaRecurrence) -> Result<()> {
        let layout = op.pool.layout;
        self.name("kda_recurrence");
        if layout.key_width > WIDEST {
            return Err(too_wide(format!("keys {} wide", layout.key_width)));
        }
        if op.form != Form::Chunk && layout.value_width > WIDEST {
            return Err(too_wide(format!("values {} wide", layout.value_width)));
        }
        let (qkv, gates) = (self.tensor(op.qkv)?, self.tensor(op.gates)?);
        let (beta, output) = (self.tensor(op.beta)?, self.tensor(op.output)?);
        let states = self.shared.memory().states(&op.pool, op.layer)?.0.clone();
        let form = form_word(op.form);
        if op.form != Form::Step {
            let shape = Chunkwise::new(&layout);
            let workspace = self.images(&shape, layout.value_heads)?;
            let params = params::KdaPrepare {
                batch: &self.batch,
                qkv: &qkv,
                gates: &gates,
                beta: &beta,
                workspace: &workspace,
                key_heads: layout.key_heads,
                heads: layout.value_heads,
                key_width: layout.key_width,
                value_width: layout.value_width,
                form,
            };
            let kernel = Kernel::new(shape.prepare[0], 128, &params);
            self.prepare(kernel, &shape, op.form)?;
            self.scan(&shape, &layout, op.form, &workspace, &states, &output, None)?;
        }
        if op.form != Form::Chunk {
            let every = op.form == Form::Step;
            let heads = layout.value_heads as u32;
            let params = params::KdaStep {
                batch: &self.batch,
                qkv: &qkv,
                gates: &gates,
                beta: &beta,
                states: &states,
                output: &output,
                key_heads: layout.key_heads,
                heads: layout.value_heads,
                key_width: layout.key_width,
                value_width: layout.value_width,
                form,
            };
            let kernel = Kernel::new("kda_step", 256, &params);
            self.launch(kernel, move |image| {
                let some = every || image.short_segments > 0;
                [heads, if some { image.segments as u32 } else { 0 }, 1]
            });
        }
        Ok(())
    }

    /// The workspace of both chunkwise kernels.
    fn images(&mut self, shape: &Chunkwise, heads: usize) -> Result<Arc<Buffer>> {
        let bytes = MetadataLayout::chunks(&self.capacity) * heads * shape.image;
        self.scratch("chunks of a recurrence", bytes)
    }

    /// Encodes one of the kernels that write images.
    fn prepare(&mut self, kernel: Kernel, shape: &Chunkwise, form: Form) -> Result<()> {
        let heads = shape.heads as u32;
        let kernel = kernel.shared(shape.prepare_shared())?;
        self.launch(kernel, move |image| {
            let chunks = match form {
                Form::Chunk => image.chunks,
                Form::Auto | Form::Step => image.several_chunks,
            };
            [chunks as u32, heads, 1]
        });
        Ok(())
    }

    /// `fused`: the convolution's inputs, and its convolution states.
    fn scan(
        &mut self,
        shape: &Chunkwise,
        layout: &StateLayout,
        form: Form,
        workspace: &Arc<Buffer>,
        states: &Arc<Buffer>,
        output: &Arc<Buffer>,
        fused: Option<(&Arc<Buffer>, &Arc<Buffer>)>,
    ) -> Result<()> {
        let shape = *shape;
        let operators = self.splits(&shape, layout, workspace, states)?;
        let (input, conv_states) = fused.unzip();
        let params = params::KdaScan {
            batch: &self.batch,
            workspace,
            operators: operators.as_ref(),
            states,
            output,
            input,
            conv_states,
            key_heads: layout.key_heads,
            heads: layout.value_heads,
            key_width: layout.key_width,
            value_width: layout.value_width,
            form: form_word(form),
        };
        let launch = Kernel::new(shape.entries[0], 32, &params).over([0; 3]);
        self.each(move |image| {
            let scans = match form {
                Form::Chunk => image.scans,
                Form::Auto | Form::Step => image.several_scans,
            };
            let launch = || shape.over(&launch, shape.tiles, shape.width(scans), scans);
            (scans > 0).then(launch).into_iter().collect()
        });
        Ok(())
    }

    /// The entry states of the splits of long segments, if there may be any: the buffer that they are written to.
    fn splits(
        &mut self,
        shape: &Chunkwise,
        layout: &StateLayout,
        workspace: &Arc<Buffer>,
        states: &Arc<Buffer>,
    ) -> Result<Option<Arc<Buffer>>> {
        let shape = *shape;
        self.splits = self.splits.min(shape.splits());
        let most = MetadataLayout::splits(&self.capacity, self.splits);
        if most == 0 {
            return Ok(None);
        }
        let columns = 16 * shape.tiles + shape.padded;
        let bytes = 4 * most * shape.heads * columns * shape.padded;
        let operators = self.scratch("splits of a recurrence", bytes)?;
        let params = params::KdaSplits {
            batch: &self.batch,
            workspace,
            operators: &operators,
            states,
            heads: layout.value_heads,
            key_width: layout.key_width,
            value_width: layout.value_width,
        };
        let launch = Kernel::new(shape.entries[1], 32, &params).over([0; 3]);
        let seeds = Kernel::new(shape.entries[2], 128, &params).over([0; 3]);
        self.each(move |image| {
            let tiles = shape.tiles + shape.padded / 16;
            let launch = || shape.over(&launch, tiles, tiles.min(MOST_TILES), image.splits);
            (image.splits > 0).then(launch).into_iter().collect()
        });
        self.each(move |image| {
            let launch = || {
                let grid = grid([shape.tiles.div_ceil(4), shape.heads, image.cuts])?;
                Ok(Command::Launch(Launch {
                    grid,
                    ..seeds.clone()
                }))
            };
            (image.cuts > 0).then(launch).into_iter().collect()
        });
        Ok(Some(operators))
    }

    /// A KDA layer: prefill in two kernels and a norm, decode in one, between the projections. Those of the block's input are
    /// one launch for single tokens; the second ones of decay and output gate are in the decode's kernel, or one launch.
    pub(super) fn encode_kda_block(&mut self, block: &KdaBlock) -> Result<()> {
        let projections = block.ops().into_iter().filter_map(|op| match op {
            Op::Linear(linear) => Some(linear),
            _ => None,
        });
        let (out, into): (Vec<Linear>, Vec<Linear>) =
            projections.partition(|linear| linear.output == block.output);
        let (first, second): (Vec<Linear>, Vec<Linear>) = into
            .into_iter()
            .partition(|linear| linear.input == block.input);
        self.name("linear");
        self.products(&first)?;
        let projected = self.second_projections(block)?;
        self.name("linear");
        if projected.is_some() {
            for linear in &second {
                self.product_of_several(linear)?;
            }
        } else {
            self.products(&second)?;
        }
        self.name("kda_block");
        self.fused(block, &block.gated_norm(), projected)?;
        self.name("linear");
        self.products(&out)
    }

    /// The weights of the second projections of decay and output gate, if the decode's kernel computes them: both in bf16, of
    /// rows that it can copy.
    fn second_projections(&self, block: &KdaBlock) -> Result<Option<[Arc<Buffer>; 2]>> {
        let ([_, decay], [_, gate]) = (block.decay_proj, block.gate_proj);
        let rank = decay.columns;
        if rank != gate.columns || rank > MOST_RANK || !rank.is_multiple_of(8) {
            return Ok(None);
        }
        Ok(self.bf16(decay)?.zip(self.bf16(gate)?).map(Into::into))
    }

    /// The operations between a KDA layer's projections; with `projected`, the second projections of single tokens as well.
    fn fused(
        &mut self,
        block: &KdaBlock,
        norm: &GatedNorm,
        projected: Option<[Arc<Buffer>; 2]>,
    ) -> Result<()> {
        let layout = block.pool.layout;
        let (input, heads) = (self.tensor(block.qkv)?, self.tensor(block.heads)?);
        let (decay, write) = (self.tensor(block.decay)?, self.tensor(block.write)?);
        let (gate, normed) = (self.tensor(block.gate)?, self.tensor(block.normed)?);
        let (weight, format) = self.stored(block.conv)?;
        let (a_log, a_log_format) = self.stored(block.a_log)?;
        let (dt_bias, dt_bias_format) = self.stored(block.dt_bias)?;
        let (norm_weight, norm_format) = self.stored(norm.weight)?;
        let (states, conv_states) = {
            let memory = self.shared.memory();
            memory.states(&block.pool, block.layer)?.clone()
        };
        let batch = Arc::clone(&self.batch);
        let params = params::KdaDecode {
            batch: &batch,
            input: &input,
            weight: &weight,
            format,
            conv_states: &conv_states,
            decay: Some(&decay),
            decay_rank: None,
            decay_up: None,
            write: &write,
            a_log: &a_log,
            a_log_format,
            dt_bias: &dt_bias,
            dt_bias_format,
            gate: Some(&gate),
            gate_rank: None,
            gate_up: None,
            rank: 0,
            norm: &norm_weight,
            norm_format,
            eps: norm.eps,
            states: &states,
            output: &normed,
            heads: layout.value_heads,
            key_width: layout.key_width,
            value_width: layout.value_width,
        };
        self.fused_chunks(&layout, &params, &decay, &heads)?;
        self.several_gated_norm(norm)?;
        // Rows of single tokens, which the norm above left undefined.
        let kernel = self.decode(block, params, projected)?;
        let heads = layout.value_heads as u32;
        self.launch(kernel, move |image| {
            let segments = if image.short_segments > 0 {
                image.segments
            } else {
                0
            };
            [heads, segments as u32, 1]
        });
        Ok(())
    }

    /// The chunkwise form of a layer whose decode has these parameters, before its norm.
    fn fused_chunks(
        &mut self,
        layout: &StateLayout,
        of: &params::KdaDecode<'_>,
        decay: &Arc<Buffer>,
        output: &Arc<Buffer>,
    ) -> Result<()> {
        let shape = Chunkwise::new(layout);
        let workspace = self.images(&shape, layout.value_heads)?;
        let params = params::KdaPrepareFused {
            batch: of.batch,
            input: of.input,
            weight: of.weight,
            format: of.format,
            conv_states: of.conv_states,
            decay,
            write: of.write,
            a_log: of.a_log,
            a_log_format: of.a_log_format,
            dt_bias: of.dt_bias,
            dt_bias_format: of.dt_bias_format,
            workspace: &workspace,
            key_heads: layout.key_heads,
            heads: layout.value_heads,
            key_width: layout.key_width,
            value_width: layout.value_width,
            form: form_word(Form::Auto),
        };
        let kernel = Kernel::new(shape.prepare[1], 128, &params);
        self.prepare(kernel, &shape, Form::Auto)?;
        let fused = Some((of.input, of.conv_states));
        self.scan(
            &shape,
            layout,
            Form::Auto,
            &workspace,
            of.states,
            output,
            fused,
        )
    }

    /// The kernel of a decode; with `projected` it computes decay and output gate from their ranks.
    fn decode(
        &self,
        block: &KdaBlock,
        params: params::KdaDecode<'_>,
        projected: Option<[Arc<Buffer>; 2]>,
    ) -> Result<Kernel> {
        let Some([decay_up, gate_up]) = projected else {
            return Ok(Kernel::new("kda_decode", 256, &params));
        };
        let (decay_rank, gate_rank) = (
            self.tensor(block.decay_rank)?,
            self.tensor(block.gate_rank)?,
        );
        let params = params::KdaDecode {
            decay: None,
            decay_rank: Some(&decay_rank),
            decay_up: Some(&decay_up),
            gate: None,
            gate_rank: Some(&gate_rank),
            gate_up: Some(&gate_up),
            rank: block.gate_rank.width,
            ..params
        };
        let kernel = Kernel::new("kda_decode_projected", 256, &params);
        kernel.shared(2 * 2 * WIDEST * (MOST_RANK + 8))
    }
}
