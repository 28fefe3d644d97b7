//! Encodes router, routed and shared experts: several kernels each.

use std::sync::Arc;

use super::machine::{Buffer, Product};
use super::params;
use super::products::suits_library;
use super::step::{CudaStep, Kernel, STAGES_BYTES, TILE};
use super::weights::Stored;
use crate::backend::gpu::batch_metadata::BatchMetadata;
use crate::backend::{
    AddNorm, ExpertRows, Experts, ExpertsCombine, MlpBlock, MoeBlock, Op, Result, Route, Rows,
    Tensor, Weight,
};
use crate::checkpoint::Format;
use crate::error::BackendError;

/// Maximum number of experts, and of groups of them.
const EXPERTS: usize = 4096;
/// Assignments (pairs of token and chosen expert) that a block sorts, and outputs per block in the form for few rows: as in
/// `kernels/experts.cu`.
const SHARE: usize = 2048;
const FEW: u32 = 32;
/// Columns per block of `experts_combine`, as in `kernels/experts_combine.cu`.
const COMBINED: u32 = 1024;
/// Rows whose scores a block of the router computes together, and experts per block for several tokens and for one: as in
/// `kernels/route.cu`.
const TOGETHER: usize = 8;
const SCORED: u32 = 8;
const SCORED_OF_ONE: u32 = 2;

/// One layer's routed experts.
struct Layer {
    shared: Option<Shared>,
    ids: Arc<Buffer>,
    input: Arc<Buffer>,
    /// Each stack with its format, and whether kernels read blocks.
    gate: (Arc<Buffer>, u32),
    up: (Arc<Buffer>, u32),
    gate_up_blocks: bool,
    down: (Arc<Buffer>, u32),
    down_blocks: bool,
    hidden: Arc<Buffer>,
    results: Arc<Buffer>,
    width: usize,
    hidden_width: usize,
    /// Choices per token.
    top_k: usize,
    /// The first local expert, and the number of local experts.
    first_expert: usize,
    experts: usize,
}

/// Shared experts that were encoded.
pub(super) struct Shared {
    /// `[2 n, d]` and `[d, n]` in bf16, if single rows are left to the routed experts' kernels.
    weights: Option<[Arc<Buffer>; 2]>,
    /// `[T, n]`.
    hidden: Arc<Buffer>,
    /// `[T, d]`.
    output: Arc<Buffer>,
}

impl CudaStep {
    /// Whether a kernel reads these stacks of experts as they are stored: if one is in blocks and each has a single format. Else
    /// it reads them in bf16.
    fn read_blocks(&self, stacks: &[Weight]) -> Result<bool> {
        let (mut in_blocks, mut single) = (false, true);
        for stack in stacks {
            let mut memory = self.shared.memory();
            let ranges = memory.weight(*stack)?.ranges();
            in_blocks |= ranges.iter().any(Stored::in_blocks);
            single &= ranges.len() == 1;
        }
        Ok(in_blocks && single)
    }

    /// A stack as a kernel reads it, and its format.
    fn stack(&self, stack: Weight, blocks: bool) -> Result<(Arc<Buffer>, u32)> {
        if blocks {
            return self.stored(stack);
        }
        Ok((self.matrix(stack)?, Format::BF16.id().unwrap_or_default()))
    }

    /// Scores and choice: in one launch for a batch of one token, else one after the other.
    pub(super) fn encode_route(&mut self, op: Route) -> Result<()> {
        self.name("route");
        let count = op.weight.rows;
        limit(count)?;
        let scores = self.scratch("router scores", 4 * self.capacity.tokens * count)?;
        let input = self.tensor(op.input)?;
        let (ids, weights) = (self.tensor(op.experts)?, self.tensor(op.weights)?);
        let (bias, bias_format) = self.stored(op.bias)?;
        let (weight, format) = self.stored(op.weight)?;
        let matrix = self.bf16(op.weight)?;
        let matrix = matrix.filter(|_| suits_library(op.input.width, count));
        let shared = 12 * count + 8 * op.groups;
        let (batch, finished) = (Arc::clone(&self.batch), self.counter()?);
        let params = params::Route {
            batch: &batch,
            input: &input,
            weight: &weight,
            format,
            bias: &bias,
            bias_format,
            scores: &scores,
            finished: &finished,
            ids: &ids,
            weights: &weights,
            width: op.input.width,
            experts: count,
            top_k: op.experts.width,
            groups: op.groups,
            top_groups: op.top_groups,
            renormalize: op.renormalize,
            scale: op.scale,
            all: matrix.is_none(),
        };
        let one = Kernel::new("route_one", 64, &params).shared(shared)?;
        let blocks = (count as u32).div_ceil(SCORED_OF_ONE);
        self.launch(one, move |metadata| {
            [blocks, u32::from(metadata.tokens == 1), 1]
        });
        self.encode_scores(&params, matrix);
        let choose = Kernel::new("route_choose", 32, &params).shared(shared)?;
        self.launch(choose, |metadata| {
            let tokens = metadata.tokens as u32;
            [if tokens > 1 { tokens } else { 0 }, 1, 1]
        });
        Ok(())
    }

    /// Scores before the sigmoid of several tokens: cuBLASLt for rows of longer segments if it supports the weight (`matrix`),
    /// the router's own kernel for other rows. A row's code path depends on its segment alone.
    fn encode_scores(&mut self, route: &params::Route<'_>, matrix: Option<Arc<Buffer>>) {
        let by_library = matrix.is_some();
        if let Some(matrix) = matrix {
            self.library(Product {
                input: Arc::clone(route.input),
                weight: matrix,
                output: Arc::clone(route.scores),
                rows: 0,
                columns: route.width,
                outputs: route.experts,
                full: true,
            });
        }
        let experts = route.experts as u32;
        let kernel = Kernel::new("route_scores", 256, route);
        self.launch(kernel, move |metadata: &BatchMetadata| {
            let rows = match metadata.tokens {
                1 => 0,
                _ if by_library => metadata.few(Rows::Tokens),
                tokens => tokens,
            };
            [experts.div_ceil(SCORED), rows.div_ceil(TOGETHER) as u32, 1]
        });
    }

    /// Router, routed and shared experts. For single rows, shared experts of the routed ones' width are one more expert; the
    /// routed experts' sum and the shared experts' result are added in one launch.
    /// With `norm`, so are the residual sum and the norm after it.
    pub(super) fn encode_moe_block(
        &mut self,
        block: &MoeBlock,
        norm: Option<&AddNorm>,
    ) -> Result<()> {
        let experts = block.experts();
        let shared = match &block.shared {
            Some(shared) => Some(self.encode_shared(shared, &experts)?),
            None => None,
        };
        self.encode_route(block.route)?;
        self.encode_experts(experts, shared, norm)
    }

    /// The shared experts, of all rows or of longer segments.
    fn encode_shared(&mut self, shared: &MlpBlock, routed: &Experts) -> Result<Shared> {
        let (hidden, output) = (self.tensor(shared.hidden)?, self.tensor(shared.output)?);
        let both = [shared.gate_up_proj, shared.down_proj];
        let alike = shared.input == routed.input
            && shared.hidden.width == routed.gate.rows
            && !self.read_blocks(&[routed.gate, routed.up])?
            && !self.read_blocks(&[routed.down])?;
        let [gate_up, down] = both.map(|weight| self.bf16(weight));
        let weights = match (gate_up?, down?) {
            (Some(gate_up), Some(down)) if alike => Some([gate_up, down]),
            _ => None,
        };
        for op in shared.ops() {
            match op {
                Op::Linear(linear) if weights.is_some() => {
                    self.name("linear");
                    self.product_of_several(&linear)?;
                }
                Op::Swiglu(swiglu) if weights.is_some() => self.encode_several_swiglu(swiglu)?,
                op => self.push(&op)?,
            }
        }
        Ok(Shared {
            weights,
            hidden,
            output,
        })
    }

    /// With the shared experts that are added to the sum, and what follows it.
    pub(super) fn encode_experts(
        &mut self,
        op: Experts,
        shared: Option<Shared>,
        norm: Option<&AddNorm>,
    ) -> Result<()> {
        self.name("experts");
        let assignments = self.capacity.tokens * op.experts.width;
        let results = self.scratch("experts' outputs", 4 * assignments * op.input.width)?;
        let added = shared.as_ref().map(|shared| Arc::clone(&shared.output));
        self.expert_results(op.rows(op.output), &results, shared)?;
        let there = [op.first_expert, op.gate.stack].map(|word| word as u32);
        let chosen = [op.experts, op.weights];
        self.combine(chosen, &results, added.as_ref(), op.output, there, norm)
    }

    pub(super) fn encode_expert_rows(&mut self, op: ExpertRows) -> Result<()> {
        self.name("expert_rows");
        let results = self.tensor(op.output)?;
        if self.shared.ranks() > 1 {
            // The rows of all ranks are added: those of other ranks' experts are zeros here.
            self.encode_zeros(&results, op.output.capacity, op.output.width);
        }
        self.expert_results(op, &results, None)
    }

    pub(super) fn encode_experts_combine(&mut self, op: ExpertsCombine) -> Result<()> {
        self.name("experts_combine");
        let results = self.tensor(op.rows)?;
        let chosen = [op.experts, op.weights];
        // Every choice has a row.
        let there = [0, u32::MAX];
        self.combine(chosen, &results, None, op.output, there, None)
    }

    /// The results of the local experts, `[T, top_k, d]` f32, and of the shared ones for single rows; the tensor `op.output` is
    /// not used.
    fn expert_results(
        &mut self,
        op: ExpertRows,
        results: &Arc<Buffer>,
        shared: Option<Shared>,
    ) -> Result<()> {
        let (experts, hidden_width, top_k) = (op.gate.stack, op.gate.rows, op.experts.width);
        limit(experts)?;
        let assignments = self.capacity.tokens * top_k;
        let gate_up_blocks = self.read_blocks(&[op.gate, op.up])?;
        let down_blocks = self.read_blocks(&[op.down])?;
        let layer = Layer {
            shared,
            ids: self.tensor(op.experts)?,
            input: self.tensor(op.input)?,
            gate: self.stack(op.gate, gate_up_blocks)?,
            up: self.stack(op.up, gate_up_blocks)?,
            gate_up_blocks,
            down: self.stack(op.down, down_blocks)?,
            down_blocks,
            hidden: self.scratch(
                "experts' hidden activations",
                2 * assignments * hidden_width,
            )?,
            results: Arc::clone(results),
            width: op.input.width,
            hidden_width,
            top_k,
            first_expert: op.first_expert,
            experts,
        };
        self.encode_few(&layer)?;
        self.encode_many(&layer)
    }

    /// The weighted sum of a token's results with what is added to it, and what follows. `there`: the first local expert, and
    /// the number of local experts.
    fn combine(
        &mut self,
        [ids, weights]: [Tensor; 2],
        results: &Arc<Buffer>,
        added: Option<&Arc<Buffer>>,
        output: Tensor,
        [first_expert, experts]: [u32; 2],
        norm: Option<&AddNorm>,
    ) -> Result<()> {
        let (width, top_k) = (output.width, ids.width);
        let [ids, weights, output] = [
            self.tensor(ids)?,
            self.tensor(weights)?,
            self.tensor(output)?,
        ];
        let params = params::ExpertsCombine {
            batch: &self.batch,
            ids: &ids,
            weights: &weights,
            results,
            shared: added,
            output: &output,
            width,
            top_k,
            first_expert,
            experts,
            target: None,
            norm: None,
            format: 0,
            normed: None,
            eps: 0.0,
        };
        if let Some(norm) = norm {
            let (target, normed) = (self.tensor(norm.target)?, self.tensor(norm.output)?);
            let (weight, format) = self.stored(norm.weight)?;
            let params = params::ExpertsCombine {
                target: Some(&target),
                norm: Some(&weight),
                format,
                normed: Some(&normed),
                eps: norm.eps,
                ..params
            };
            let kernel = Kernel::new("experts_combine_norm", 256, &params);
            self.launch(kernel, |metadata| [metadata.tokens as u32, 1, 1]);
        } else {
            let kernel = Kernel::new("experts_combine", 256, &params);
            let columns = (width as u32).div_ceil(COMBINED);
            self.launch(kernel, move |metadata| [metadata.tokens as u32, columns, 1]);
        }
        Ok(())
    }

    /// Rows of single tokens.
    fn encode_few(&mut self, layer: &Layer) -> Result<()> {
        let (top_k, local) = (layer.top_k, layer.experts);
        let most_places = self.capacity.segments.min(self.capacity.tokens) * top_k;
        let most = most_places.min(local);
        let words = 1 + 3 * most + most_places;
        let list = self.scratch("single rows' assignments by expert", 4 * words)?;
        let params = params::ExpertsGroup {
            batch: &self.batch,
            ids: &layer.ids,
            counts: None,
            groups: &list,
            most_tiles: most,
            top_k,
            first_expert: layer.first_expert,
            experts: local,
        };
        // A single row needs no list: each of its choices is a different expert.
        let kernel = Kernel::new("experts_list", 256, &params).shared(40 * local)?;
        self.launch(kernel, |metadata| {
            [u32::from(metadata.few(Rows::Tokens) > 1), 1, 1]
        });
        let [into, out] = self.few_experts(layer, &list, most);
        // The maximum number of chosen experts, so that one graph serves every choice.
        let shared = layer.shared.as_ref();
        let more = u32::from(shared.is_some_and(|shared| shared.weights.is_some()));
        let chosen = move |metadata: &BatchMetadata| {
            let rows = metadata.few(Rows::Tokens);
            let assignments = rows * top_k;
            match rows {
                0 => 0,
                1 => more + assignments as u32,
                _ => more + assignments.min(local) as u32,
            }
        };
        let outputs = (layer.hidden_width as u32).div_ceil(FEW / 2);
        self.launch(into, move |metadata| [outputs, chosen(metadata), 1]);
        let outputs = (layer.width as u32).div_ceil(FEW);
        self.launch(out, move |metadata| [outputs, chosen(metadata), 1]);
        Ok(())
    }

    /// The kernels for rows of single tokens, with the list of their experts.
    fn few_experts(&self, layer: &Layer, list: &Arc<Buffer>, most: usize) -> [Kernel; 2] {
        let shared = layer.shared.as_ref().and_then(|shared| {
            let [gate_up, down] = shared.weights.as_ref()?;
            Some([gate_up, down, &shared.hidden, &shared.output])
        });
        let [shared_in, shared_out, shared_hidden, shared_output] =
            shared.map_or([None; 4], |shared| shared.map(Some));
        let (ids, top_k) = (&layer.ids, layer.top_k);
        let into = params::ExpertsFewIn {
            batch: &self.batch,
            ids,
            list,
            most,
            input: &layer.input,
            gate: &layer.gate.0,
            gate_format: layer.gate.1,
            up: &layer.up.0,
            up_format: layer.up.1,
            shared: shared_in,
            hidden: &layer.hidden,
            shared_hidden,
            width: layer.width,
            hidden_width: layer.hidden_width,
            top_k,
            first_expert: layer.first_expert,
            experts: layer.experts,
        };
        let out = params::ExpertsFewOut {
            batch: &self.batch,
            ids,
            list,
            most,
            hidden: &layer.hidden,
            down: &layer.down.0,
            format: layer.down.1,
            shared: shared_out,
            results: &layer.results,
            shared_hidden,
            shared_output,
            width: layer.width,
            hidden_width: layer.hidden_width,
            top_k,
            first_expert: layer.first_expert,
            experts: layer.experts,
        };
        let entries = ["experts_few_in", "experts_few_in_blocks"];
        let into = Kernel::new(entries[usize::from(layer.gate_up_blocks)], 256, &into);
        let entries = ["experts_few_out", "experts_few_out_blocks"];
        let out = Kernel::new(entries[usize::from(layer.down_blocks)], 256, &out);
        [into, out]
    }

    /// Rows of longer segments.
    fn encode_many(&mut self, layer: &Layer) -> Result<()> {
        let (top_k, local) = (layer.top_k, layer.experts);
        let assignments = self.capacity.tokens * top_k;
        let most = most_tiles(assignments, local);
        let counts = self.scratch("choices by expert", 4 * assignments.div_ceil(SHARE) * local)?;
        let groups = self.scratch("assignments by expert", 4 * (1 + 3 * most + assignments))?;
        let shares = move |metadata: &BatchMetadata| {
            let assignments = metadata.several_rows * top_k;
            [assignments.div_ceil(SHARE) as u32, 1, 1]
        };
        let params = params::ExpertsGroup {
            batch: &self.batch,
            ids: &layer.ids,
            counts: Some(&counts),
            groups: &groups,
            most_tiles: most,
            top_k,
            first_expert: layer.first_expert,
            experts: local,
        };
        let count = Kernel::new("experts_count", 256, &params).shared(4 * local)?;
        let group = Kernel::new("experts_group", 256, &params).shared(40 * local)?;
        self.launch(count, shares);
        self.launch(group, shares);
        let tiles =
            move |metadata: &BatchMetadata| most_tiles(metadata.several_rows * top_k, local) as u32;
        let [into, out] = many(layer, &groups, most);
        let columns = (layer.hidden_width as u32).div_ceil(TILE as u32 / 2);
        self.launch(into.shared(STAGES_BYTES)?, move |metadata| {
            [columns, tiles(metadata), 1]
        });
        let columns = (layer.width as u32).div_ceil(TILE as u32);
        self.launch(out.shared(STAGES_BYTES)?, move |metadata| {
            [columns, tiles(metadata), 1]
        });
        Ok(())
    }
}

/// The kernels for rows of longer segments, with the list of their tiles.
fn many(layer: &Layer, groups: &Arc<Buffer>, most_tiles: usize) -> [Kernel; 2] {
    let into = params::ExpertsManyIn {
        groups,
        most_tiles,
        input: &layer.input,
        gate: &layer.gate.0,
        gate_format: layer.gate.1,
        up: &layer.up.0,
        up_format: layer.up.1,
        hidden: &layer.hidden,
        width: layer.width,
        hidden_width: layer.hidden_width,
        top_k: layer.top_k,
    };
    let out = params::ExpertsManyOut {
        groups,
        most_tiles,
        hidden: &layer.hidden,
        down: &layer.down.0,
        format: layer.down.1,
        results: &layer.results,
        width: layer.width,
        hidden_width: layer.hidden_width,
    };
    let entries = ["experts_many_in", "experts_many_in_blocks"];
    let into = Kernel::new(entries[usize::from(layer.gate_up_blocks)], 128, &into);
    let entries = ["experts_many_out", "experts_many_out_blocks"];
    let out = Kernel::new(entries[usize::from(layer.down_blocks)], 128, &out);
    [into, out]
}

/// Maximum number of tiles for this number of assignments: each expert may have a partial one.
fn most_tiles(assignments: usize, experts: usize) -> usize {
    assignments.min(assignments / TILE + experts)
}

fn limit(experts: usize) -> Result<()> {
    if experts <= EXPERTS {
        return Ok(());
    }
    Err(BackendError::Unsupported {
        backend: "cuda",
        what: format!("{experts} experts; the maximum is {EXPERTS}"),
    })
}
