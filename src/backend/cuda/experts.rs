//! How router and routed experts are encoded: several kernels each.

use std::sync::Arc;

use super::machine::{Argument, Buffer, Product};
use super::step::{CudaStep, Kernel, arguments, suits_library};
use crate::backend::gpu::batch_metadata::BatchMetadata;
use crate::backend::{Experts, Result, Route, Rows};
use crate::error::BackendError;

/// The most experts, and groups of them.
const EXPERTS: usize = 4096;
/// Rows and columns of a tile, and bytes of its stages in shared memory: as in `kernels/shared/tile.h`.
const TILE: usize = 128;
const STAGES_BYTES: usize = 4 * 2 * 2 * 128 * 40;
/// Places that a block sorts, and outputs of a block of the path for few: as in `kernels/experts.cu`.
const SHARE: usize = 2048;
const FEW: u32 = 32;
/// Columns of a block that adds choices up: as there.
const COMBINED: u32 = 1024;
/// Rows whose scores a block of the router takes together, and experts of a block for several rows and for one: as in
/// `kernels/route.cu`.
const TOGETHER: usize = 8;
const SCORED: u32 = 8;
const SCORED_OF_ONE: u32 = 2;

/// One layer's routed experts: what their kernels are given.
struct Layer {
    ids: Arc<Buffer>,
    input: Arc<Buffer>,
    gate: Arc<Buffer>,
    up: Arc<Buffer>,
    down: Arc<Buffer>,
    hidden: Arc<Buffer>,
    results: Arc<Buffer>,
    width: u32,
    hidden_width: u32,
    /// Of a token.
    choices: u32,
    /// The first expert that is here, and how many are.
    first: u32,
    experts: u32,
}

impl CudaStep {
    pub(super) fn encode_route(&mut self, op: Route) -> Result<()> {
        self.name("route");
        let count = op.weight.rows;
        limit(count)?;
        let scores = self.scratch("router scores", 4 * self.capacity.tokens * count)?;
        let input = self.tensor(op.input)?;
        let (ids, weights) = (self.tensor(op.experts)?, self.tensor(op.weights)?);
        let [bias, format] = self.stored(op.bias)?;
        let (top_k, groups, top_groups) = (op.experts.width, op.groups, op.top_groups);
        self.encode_scores(&op, &input, &scores)?;
        let kernel = self.kernel(
            "route_choose",
            32,
            arguments![
                &scores,
                bias,
                format,
                &ids,
                &weights,
                count,
                top_k,
                groups,
                top_groups,
                u32::from(op.renormalize),
                op.scale
            ],
        );
        let shared = 12 * count + 8 * op.groups;
        self.launch(kernel.shared(shared)?, |metadata| {
            [metadata.tokens as u32, 1, 1]
        });
        Ok(())
    }

    /// Scores before the sigmoid: a product for rows of longer segments where the library takes the weight, the router's own
    /// kernels for the rest. A row's path depends on its segment alone.
    fn encode_scores(
        &mut self,
        op: &Route,
        input: &Arc<Buffer>,
        scores: &Arc<Buffer>,
    ) -> Result<()> {
        let [weight, format] = self.stored(op.weight)?;
        let (width, count) = (op.input.width, op.weight.rows);
        let matrix = self.bf16(op.weight)?;
        let matrix = matrix.filter(|_| suits_library(width, count));
        let by_library = matrix.is_some();
        if let Some(matrix) = matrix {
            self.library(Product {
                input: Arc::clone(input),
                weight: matrix,
                output: Arc::clone(scores),
                rows: 0,
                columns: width,
                outputs: count,
                full: true,
            });
        }
        let experts = count as u32;
        let rows = move |metadata: &BatchMetadata| {
            if by_library {
                metadata.few(Rows::Tokens)
            } else {
                metadata.tokens
            }
        };
        let scored = |entry, threads| {
            self.kernel(
                entry,
                threads,
                arguments![
                    input,
                    weight,
                    format,
                    scores,
                    width,
                    experts,
                    u32::from(!by_library)
                ],
            )
        };
        let (one, several) = (scored("route_scores_one", 64), scored("route_scores", 256));
        self.launch(one, move |metadata| {
            [
                experts.div_ceil(SCORED_OF_ONE),
                u32::from(rows(metadata) == 1),
                1,
            ]
        });
        self.launch(several, move |metadata| {
            let tiles = match rows(metadata) {
                1 => 0,
                count => count.div_ceil(TOGETHER) as u32,
            };
            [experts.div_ceil(SCORED), tiles, 1]
        });
        Ok(())
    }

    pub(super) fn encode_experts(&mut self, op: Experts) -> Result<()> {
        self.name("experts");
        let (local, n, d, top_k) = (
            op.gate.stack,
            op.gate.rows,
            op.input.width,
            op.experts.width,
        );
        limit(local)?;
        let places = self.capacity.tokens * top_k;
        let [width, hidden_width, choices, first, experts] =
            [d, n, top_k, op.first_expert, local].map(|word| word as u32);
        let layer = Layer {
            ids: self.tensor(op.experts)?,
            input: self.tensor(op.input)?,
            gate: self.matrix(op.gate)?,
            up: self.matrix(op.up)?,
            down: self.matrix(op.down)?,
            hidden: self.scratch("experts' hidden activations", 2 * places * n)?,
            results: self.scratch("experts' outputs", 4 * places * d)?,
            width,
            hidden_width,
            choices,
            first,
            experts,
        };
        self.encode_few(&layer)?;
        self.encode_many(&layer)?;
        let (weights, output) = (self.tensor(op.weights)?, self.tensor(op.output)?);
        let kernel = self.kernel(
            "experts_combine",
            256,
            arguments![
                &layer.ids,
                &weights,
                &layer.results,
                &output,
                width,
                choices,
                first,
                experts
            ],
        );
        let columns = width.div_ceil(COMBINED);
        self.launch(kernel, move |metadata| [metadata.tokens as u32, columns, 1]);
        Ok(())
    }

    /// Rows of single tokens.
    fn encode_few(&mut self, layer: &Layer) -> Result<()> {
        let (top_k, local) = (layer.choices as usize, layer.experts as usize);
        let most_places = self.capacity.segments.min(self.capacity.tokens) * top_k;
        let most = most_places.min(local);
        let words = 1 + 3 * most + most_places;
        let list = self.scratch("single rows' places by expert", 4 * words)?;
        let (ids, most) = (&layer.ids, most as u32);
        let (choices, first, experts) = (layer.choices, layer.first, layer.experts);
        let kernel = self.kernel(
            "experts_list",
            256,
            arguments![ids, &list, most, choices, first, experts],
        );
        // One row alone needs no list: each of its choices is an expert of its own.
        self.launch(kernel.shared(40 * local)?, |metadata| {
            [u32::from(metadata.few(Rows::Tokens) > 1), 1, 1]
        });
        // As many as may have been chosen, whatever was, so that a graph serves every choice.
        let chosen = move |metadata: &BatchMetadata| {
            let rows = metadata.few(Rows::Tokens);
            let places = rows * top_k;
            if rows < 2 { places } else { places.min(local) }
        };
        let few = |entry, from: &Arc<Buffer>, weights: &[&Arc<Buffer>], to: &Arc<Buffer>| {
            let mut arguments = arguments![&self.batch, ids, &list, most, from].to_vec();
            arguments.extend(weights.iter().map(|weight| Argument::from(*weight)));
            let sizes = [layer.width, layer.hidden_width, choices, first, experts];
            arguments.push(to.into());
            arguments.extend(sizes.map(Argument::from));
            Kernel::new(entry, 256, arguments)
        };
        let gate_up = [&layer.gate, &layer.up];
        let kernel = few("experts_few_in", &layer.input, &gate_up, &layer.hidden);
        let down = few(
            "experts_few_out",
            &layer.hidden,
            &[&layer.down],
            &layer.results,
        );
        let outputs = layer.hidden_width.div_ceil(FEW / 2);
        self.launch(kernel, move |metadata| {
            [outputs, chosen(metadata) as u32, 1]
        });
        let outputs = layer.width.div_ceil(FEW);
        self.launch(down, move |metadata| [outputs, chosen(metadata) as u32, 1]);
        Ok(())
    }

    /// Rows of longer segments.
    fn encode_many(&mut self, layer: &Layer) -> Result<()> {
        let (top_k, local) = (layer.choices as usize, layer.experts as usize);
        let (width, hidden_width) = (layer.width, layer.hidden_width);
        let (choices, first, experts) = (layer.choices, layer.first, layer.experts);
        let places = self.capacity.tokens * top_k;
        let most = most_tiles(places, local);
        let counts = self.scratch("choices by expert", 4 * places.div_ceil(SHARE) * local)?;
        let groups = self.scratch("places by expert", 4 * (1 + 3 * most + places))?;
        let (ids, tiles) = (&layer.ids, most as u32);
        let shares = move |metadata: &BatchMetadata| {
            let places = metadata.several_rows * top_k;
            [places.div_ceil(SHARE) as u32, 1, 1]
        };
        let kernel = self.kernel(
            "experts_count",
            256,
            arguments![ids, &counts, choices, first, experts],
        );
        self.launch(kernel.shared(4 * local)?, shares);
        let kernel = self.kernel(
            "experts_group",
            256,
            arguments![ids, &counts, &groups, tiles, choices, first, experts],
        );
        self.launch(kernel.shared(40 * local)?, shares);
        let count =
            move |metadata: &BatchMetadata| most_tiles(metadata.several_rows * top_k, local) as u32;
        let kernel = Kernel::new(
            "experts_many_in",
            128,
            arguments![
                &groups,
                tiles,
                &layer.input,
                &layer.gate,
                &layer.up,
                &layer.hidden,
                width,
                hidden_width,
                choices
            ],
        );
        let columns = hidden_width.div_ceil(TILE as u32 / 2);
        self.launch(kernel.shared(STAGES_BYTES)?, move |metadata| {
            [columns, count(metadata), 1]
        });
        let kernel = Kernel::new(
            "experts_many_out",
            128,
            arguments![
                &groups,
                tiles,
                &layer.hidden,
                &layer.down,
                &layer.results,
                width,
                hidden_width
            ],
        );
        let columns = width.div_ceil(TILE as u32);
        self.launch(kernel.shared(STAGES_BYTES)?, move |metadata| {
            [columns, count(metadata), 1]
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
