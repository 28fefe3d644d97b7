//! How router and routed experts are recorded: several kernels each.

use super::step::{CudaStep, Kernel, arguments, blocks};
use crate::backend::image::Image;
use crate::backend::{Experts, Result, Route};
use crate::error::BackendError;

/// The most experts, and groups of them.
const EXPERTS: usize = 4096;
/// Rows and columns of a tile, and bytes of its stages in shared memory: as in `kernels/shared/tile.h`.
const TILE: usize = 128;
const STAGES_BYTES: usize = 4 * 2 * 2 * 128 * 40;
/// Places that a block sorts, and outputs of a block of the path for few: as in `kernels/experts.cu`.
const SHARE: usize = 2048;
const FEW: u32 = 16;
/// Tokens whose scores a block of the router takes together: as in `kernels/route.cu`.
const TOGETHER: usize = 8;

impl CudaStep {
    pub(super) fn record_route(&mut self, op: Route) -> Result<()> {
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
        let counts = self.scratch("choices by expert", 4 * places.div_ceil(SHARE) * local)?;
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
        let single = move |image: &Image| (image.tokens - image.several_rows) as u32 * choices;
        let most_single = self.capacity.pieces.min(self.capacity.tokens) * top_k;
        let bits = 4 * most_single.div_ceil(32);
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
        self.launch(kernel.shared(bits), move |image| {
            [hidden_width.div_ceil(FEW), single(image), 1]
        });
        let kernel = Kernel::new(
            "experts_few_out",
            256,
            arguments![
                &self.batch,
                &ids,
                &hidden,
                &down,
                &results,
                width,
                hidden_width,
                choices,
                first,
                experts
            ],
        );
        self.launch(kernel.shared(bits), move |image| {
            [width.div_ceil(FEW), single(image), 1]
        });

        // Rows of longer pieces.
        let shares = move |image: &Image| (image.several_rows * top_k).div_ceil(SHARE) as u32;
        let kernel = Kernel::new(
            "experts_count",
            256,
            arguments![&self.batch, &ids, &counts, choices, first, experts],
        );
        self.launch(kernel.shared(4 * local), move |image| [shares(image), 1, 1]);
        let kernel = Kernel::new(
            "experts_group",
            256,
            arguments![
                &self.batch,
                &ids,
                &counts,
                &groups,
                tiles,
                choices,
                first,
                experts
            ],
        );
        self.launch(kernel.shared(40 * local), move |image| {
            [shares(image), 1, 1]
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
        self.launch(kernel.shared(STAGES_BYTES), move |image| {
            [n.div_ceil(TILE / 2) as u32, count(image) as u32, 1]
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
        self.launch(kernel.shared(STAGES_BYTES), move |image| {
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
            [blocks((image.tokens * d) as u64, 256), 1, 1]
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
