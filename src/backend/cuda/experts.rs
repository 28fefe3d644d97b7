//! How router and routed experts are recorded: several kernels each.

use super::step::{CudaStep, Kernel, arguments, blocks};
use crate::backend::image::Image;
use crate::backend::{Experts, Result, Route};
use crate::error::BackendError;

/// The most experts, and groups of them.
const EXPERTS: usize = 4096;
/// Rows and columns of a tile, and bytes of one in shared memory: as in `kernels/shared/tile.h`.
const TILE: usize = 64;
const TILE_BYTES: usize = 2 * 64 * 40;
/// Tokens whose scores a block of the router takes together: as in `kernels/route.cu`.
const TOGETHER: usize = 8;

impl CudaStep {
    pub(super) fn record_route(&mut self, op: Route) -> Result<()> {
        op.check(&self.capacity)?;
        self.name("route");
        let count = op.weight.rows;
        limit(count)?;
        let scores = self.scratch("router scores", 4 * self.capacity.tokens * count)?;
        let input = self.tensor(op.input)?;
        let (ids, weights) = (self.tensor(op.experts)?, self.tensor(op.weights)?);
        let [weight, weight_format] = self.stored(op.weight)?;
        let [bias, bias_format] = self.stored(op.bias)?;
        let sizes = [
            op.input.width,
            count,
            op.experts.width,
            op.groups,
            op.top_groups,
        ];
        let [width, experts, top_k, groups, top_groups] = sizes.map(|word| word as u32);
        let kernel = Kernel::new(
            "route_scores",
            256,
            arguments![
                &self.batch,
                &input,
                weight,
                weight_format,
                &scores,
                width,
                experts
            ],
        );
        self.launch(kernel, move |image| {
            let tiles = image.tokens.div_ceil(TOGETHER) as u32;
            [experts.div_ceil(8), tiles, 1]
        });
        let kernel = Kernel::new(
            "route_choose",
            32,
            arguments![
                &self.batch,
                &scores,
                bias,
                bias_format,
                &ids,
                &weights,
                experts,
                top_k,
                groups,
                top_groups,
                u32::from(op.renormalize),
                op.scale
            ],
        );
        self.launch(kernel.shared(8 * (count + op.groups)), |image| {
            [image.tokens as u32, 1, 1]
        });
        Ok(())
    }

    pub(super) fn record_experts(&mut self, op: Experts) -> Result<()> {
        op.check(&self.capacity)?;
        self.name("experts");
        let (local, n, d, top_k) = (
            op.gate.stack,
            op.gate.rows,
            op.input.width,
            op.experts.width,
        );
        limit(local)?;
        let places = self.capacity.tokens * top_k;
        let most_tiles = most_tiles(places, local);
        let hidden = self.scratch("experts' hidden activations", 2 * places * n)?;
        let results = self.scratch("experts' outputs", 4 * places * d)?;
        let groups = self.scratch("places by expert", 4 * (1 + 3 * most_tiles + places))?;
        let (ids, weights) = (self.tensor(op.experts)?, self.tensor(op.weights)?);
        let (input, output) = (self.tensor(op.input)?, self.tensor(op.output)?);
        let (gate, up, down) = (
            self.matrix(op.gate)?,
            self.matrix(op.up)?,
            self.matrix(op.down)?,
        );
        let words = [d, n, top_k, op.first_expert, local, most_tiles];
        let [width, hidden_width, choices, first, experts, tiles] = words.map(|word| word as u32);

        // Rows of single tokens.
        let single = |image: &Image| (image.tokens - image.several_rows) as u32;
        let kernel = Kernel::new(
            "experts_few_in",
            256,
            arguments![
                &self.batch,
                &ids,
                &input,
                &gate,
                &up,
                &hidden,
                width,
                hidden_width,
                choices,
                first,
                experts
            ],
        );
        self.launch(kernel, move |image| {
            [hidden_width.div_ceil(8), single(image) * choices, 1]
        });
        let kernel = Kernel::new(
            "experts_few_out",
            256,
            arguments![
                &self.batch,
                &ids,
                &weights,
                &hidden,
                &down,
                &output,
                width,
                hidden_width,
                choices,
                first,
                experts
            ],
        );
        self.launch(kernel, move |image| [width.div_ceil(8), single(image), 1]);

        // Rows of longer pieces.
        let kernel = Kernel::new(
            "experts_group",
            256,
            arguments![&self.batch, &ids, &groups, tiles, choices, first, experts],
        );
        self.launch(kernel.shared(12 * local), |image| {
            [image.several_rows.min(1) as u32, 1, 1]
        });
        let count =
            move |image: &Image| super::experts::most_tiles(image.several_rows * top_k, local);
        let kernel = Kernel::new(
            "experts_many_in",
            128,
            arguments![
                &groups,
                tiles,
                &input,
                &gate,
                &up,
                &hidden,
                width,
                hidden_width,
                choices
            ],
        );
        self.launch(kernel.shared(2 * 3 * TILE_BYTES), move |image| {
            [n.div_ceil(TILE) as u32, count(image) as u32, 1]
        });
        let kernel = Kernel::new(
            "experts_many_out",
            128,
            arguments![
                &groups,
                tiles,
                &hidden,
                &down,
                &results,
                width,
                hidden_width
            ],
        );
        self.launch(kernel.shared(2 * 2 * TILE_BYTES), move |image| {
            [d.div_ceil(TILE) as u32, count(image) as u32, 1]
        });
        let kernel = Kernel::new(
            "experts_combine",
            256,
            arguments![
                &self.batch,
                &ids,
                &weights,
                &results,
                &output,
                width,
                choices,
                first,
                experts
            ],
        );
        self.launch(kernel, move |image| {
            [blocks((image.several_rows * d) as u64, 256), 1, 1]
        });
        Ok(())
    }
}

/// Tiles at most for so many places: each expert may leave one partly filled.
fn most_tiles(places: usize, experts: usize) -> usize {
    places.min(places / TILE + experts)
}

fn limit(experts: usize) -> Result<()> {
    if experts <= EXPERTS {
        return Ok(());
    }
    Err(BackendError::Unsupported {
        backend: "cuda",
        what: format!("{experts} experts; the most are {EXPERTS}"),
    })
}
