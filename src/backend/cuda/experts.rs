//! Encodes router, routed and shared experts: several kernels each.

use std::sync::Arc;

use super::machine::{Argument, Buffer, Product};
use super::products::suits_library;
use super::step::{CudaStep, Kernel, STAGES_BYTES, TILE, arguments};
use super::weights::Stored;
use crate::backend::gpu::batch_metadata::BatchMetadata;
use crate::backend::{
    AddNorm, ExpertRows, Experts, ExpertsCombine, MlpBlock, MoeBlock, Op, Result, Route, Rows,
    Tensor, Weight,
};
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

/// One layer's routed experts: the arguments of their kernels.
struct Layer {
    shared: Option<Shared>,
    ids: Arc<Buffer>,
    input: Arc<Buffer>,
    gate_up: Stacks,
    down: Stacks,
    hidden: Arc<Buffer>,
    results: Arc<Buffer>,
    width: u32,
    hidden_width: u32,
    /// Choices per token.
    choices: u32,
    /// The first local expert, and the number of local experts.
    first: u32,
    experts: u32,
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

/// Stacks of experts of one kernel.
struct Stacks {
    /// Whether any of them is in blocks: then each is passed with its format, else in bf16.
    in_blocks: bool,
    arguments: Vec<Argument>,
}

impl Stacks {
    /// The kernel for these stacks.
    fn entry(&self, dense: &'static str, blocks: &'static str) -> &'static str {
        if self.in_blocks { blocks } else { dense }
    }
}

impl CudaStep {
    /// The stacks as the experts' kernels require them: as they are stored if one is in blocks and each has a single format,
    /// else in bf16.
    fn stacks(&self, weights: &[Weight]) -> Result<Stacks> {
        let mut in_blocks = false;
        let mut stored = Vec::new();
        for weight in weights {
            let mut memory = self.shared.memory();
            let ranges = memory.weight(*weight)?.ranges();
            in_blocks |= ranges.iter().any(Stored::in_blocks);
            stored.push(ranges.to_vec());
        }
        let single = stored.iter().all(|ranges| ranges.len() == 1);
        let (in_blocks, arguments) = if in_blocks && single {
            let ranges = stored.iter().flatten();
            (true, ranges.flat_map(Stored::arguments).collect())
        } else {
            let dense = weights.iter().map(|weight| {
                let matrix = self.matrix(*weight)?;
                Ok(Argument::from(&matrix))
            });
            (false, dense.collect::<Result<_>>()?)
        };
        Ok(Stacks {
            in_blocks,
            arguments,
        })
    }

    /// Scores and choice: in one launch for a batch of one token, else one after the other.
    pub(super) fn encode_route(&mut self, op: Route) -> Result<()> {
        self.name("route");
        let count = op.weight.rows;
        limit(count)?;
        let scores = self.scratch("router scores", 4 * self.capacity.tokens * count)?;
        let input = self.tensor(op.input)?;
        let (ids, weights) = (self.tensor(op.experts)?, self.tensor(op.weights)?);
        let [bias, bias_format] = self.stored(op.bias)?;
        let [weight, format] = self.stored(op.weight)?;
        let (width, top_k) = (op.input.width, op.experts.width);
        let sizes = arguments![
            count,
            top_k,
            op.groups,
            op.top_groups,
            u32::from(op.renormalize),
            op.scale
        ];
        let shared = 12 * count + 8 * op.groups;
        let finished = self.counter()?;
        let one = arguments![
            &input,
            weight,
            format,
            &scores,
            &finished,
            bias,
            bias_format,
            &ids,
            &weights,
            width
        ];
        let one = Kernel::new("route_one", 64, one.into_iter().chain(sizes.clone()));
        let blocks = (count as u32).div_ceil(SCORED_OF_ONE);
        self.launch(one.shared(shared)?, move |metadata| {
            [blocks, u32::from(metadata.tokens == 1), 1]
        });
        self.encode_scores(&op, &input, &scores)?;
        let choose = arguments![&scores, bias, bias_format, &ids, &weights];
        let choose = self.kernel("route_choose", 32, choose.into_iter().chain(sizes));
        self.launch(choose.shared(shared)?, |metadata| {
            let tokens = metadata.tokens as u32;
            [if tokens > 1 { tokens } else { 0 }, 1, 1]
        });
        Ok(())
    }

    /// Scores before the sigmoid of several tokens: cuBLASLt for rows of longer segments if it supports the weight, the
    /// router's own kernel for other rows. A row's code path depends on its segment alone.
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
        let all = u32::from(!by_library);
        let kernel = self.kernel(
            "route_scores",
            256,
            arguments![input, weight, format, scores, width, experts, all],
        );
        self.launch(kernel, move |metadata: &BatchMetadata| {
            let rows = match metadata.tokens {
                1 => 0,
                _ if by_library => metadata.few(Rows::Tokens),
                tokens => tokens,
            };
            [experts.div_ceil(SCORED), rows.div_ceil(TOGETHER) as u32, 1]
        });
        Ok(())
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
            && !self.stacks(&[routed.gate, routed.up])?.in_blocks
            && !self.stacks(&[routed.down])?.in_blocks;
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
        let added = shared.as_ref().map(|shared| &shared.output);
        let added = added.map_or(Argument::Null, Argument::from);
        self.expert_results(op.rows(op.output), &results, shared)?;
        let there = [op.first_expert, op.gate.stack].map(|word| word as u32);
        let chosen = [op.experts, op.weights];
        self.combine(chosen, &results, added, op.output, there, norm)
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
        self.combine(chosen, &results, Argument::Null, op.output, there, None)
    }

    /// The results of the local experts, `[T, top_k, d]` f32, and of the shared ones for single rows; the tensor `op.output` is
    /// not used.
    fn expert_results(
        &mut self,
        op: ExpertRows,
        results: &Arc<Buffer>,
        shared: Option<Shared>,
    ) -> Result<()> {
        let (local, n, top_k) = (op.gate.stack, op.gate.rows, op.experts.width);
        limit(local)?;
        let assignments = self.capacity.tokens * top_k;
        let [width, hidden_width, choices, first, experts] =
            [op.input.width, n, top_k, op.first_expert, local].map(|word| word as u32);
        let layer = Layer {
            shared,
            ids: self.tensor(op.experts)?,
            input: self.tensor(op.input)?,
            gate_up: self.stacks(&[op.gate, op.up])?,
            down: self.stacks(&[op.down])?,
            hidden: self.scratch("experts' hidden activations", 2 * assignments * n)?,
            results: Arc::clone(results),
            width,
            hidden_width,
            choices,
            first,
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
        added: Argument,
        output: Tensor,
        [first, experts]: [u32; 2],
        norm: Option<&AddNorm>,
    ) -> Result<()> {
        let [width, choices] = [output.width, ids.width].map(|word| word as u32);
        let [ids, weights, output] = [
            self.tensor(ids)?,
            self.tensor(weights)?,
            self.tensor(output)?,
        ];
        let combined = arguments![
            &ids, &weights, results, added, &output, width, choices, first, experts
        ];
        if let Some(norm) = norm {
            let (target, normed) = (self.tensor(norm.target)?, self.tensor(norm.output)?);
            let [weight, format] = self.stored(norm.weight)?;
            let more = arguments![&target, weight, format, &normed, norm.eps];
            let all = combined.into_iter().chain(more);
            let kernel = self.kernel("experts_combine_norm", 256, all);
            self.launch(kernel, |metadata| [metadata.tokens as u32, 1, 1]);
        } else {
            let kernel = self.kernel("experts_combine", 256, combined);
            let columns = width.div_ceil(COMBINED);
            self.launch(kernel, move |metadata| [metadata.tokens as u32, columns, 1]);
        }
        Ok(())
    }

    /// Rows of single tokens.
    fn encode_few(&mut self, layer: &Layer) -> Result<()> {
        let (top_k, local) = (layer.choices as usize, layer.experts as usize);
        let most_places = self.capacity.segments.min(self.capacity.tokens) * top_k;
        let most = most_places.min(local);
        let words = 1 + 3 * most + most_places;
        let list = self.scratch("single rows' assignments by expert", 4 * words)?;
        let (ids, most) = (&layer.ids, most as u32);
        let (choices, first, experts) = (layer.choices, layer.first, layer.experts);
        let kernel = self.kernel(
            "experts_list",
            256,
            arguments![ids, &list, most, choices, first, experts],
        );
        // A single row needs no list: each of its choices is a different expert.
        self.launch(kernel.shared(40 * local)?, |metadata| {
            [u32::from(metadata.few(Rows::Tokens) > 1), 1, 1]
        });
        let shared = match &layer.shared {
            Some(Shared {
                weights: Some([gate_up, down]),
                hidden,
                output,
            }) => Some([gate_up, down, hidden, output].map(Argument::from)),
            _ => None,
        };
        // The maximum number of chosen experts, so that one graph serves every choice.
        let more = u32::from(shared.is_some());
        let chosen = move |metadata: &BatchMetadata| {
            let rows = metadata.few(Rows::Tokens);
            let assignments = rows * top_k;
            match rows {
                0 => 0,
                1 => more + assignments as u32,
                _ => more + assignments.min(local) as u32,
            }
        };
        // Only kernels for stacks in bf16 have arguments for shared experts: their weight, and where they read or write.
        let few = |entry,
                   from: &Arc<Buffer>,
                   stacks: &Stacks,
                   weight: Argument,
                   to: &Arc<Buffer>,
                   ends: Vec<Argument>| {
            let mut arguments = arguments![&self.batch, ids, &list, most, from].to_vec();
            arguments.extend(stacks.arguments.iter().cloned());
            arguments.extend(Some(weight).filter(|_| !stacks.in_blocks));
            arguments.push(to.into());
            arguments.extend(ends.into_iter().filter(|_| !stacks.in_blocks));
            let sizes = [layer.width, layer.hidden_width, choices, first, experts];
            arguments.extend(sizes.map(Argument::from));
            Kernel::new(entry, 256, arguments)
        };
        let [shared_in, shared_out, shared_hidden, shared_output] =
            shared.unwrap_or([const { Argument::Null }; 4]);
        let (gate_up, down) = (&layer.gate_up, &layer.down);
        let entry = gate_up.entry("experts_few_in", "experts_few_in_blocks");
        let ends = vec![shared_hidden.clone()];
        let kernel = few(entry, &layer.input, gate_up, shared_in, &layer.hidden, ends);
        let entry = down.entry("experts_few_out", "experts_few_out_blocks");
        let ends = vec![shared_hidden, shared_output];
        let down = few(entry, &layer.hidden, down, shared_out, &layer.results, ends);
        let outputs = layer.hidden_width.div_ceil(FEW / 2);
        self.launch(kernel, move |metadata| [outputs, chosen(metadata), 1]);
        let outputs = layer.width.div_ceil(FEW);
        self.launch(down, move |metadata| [outputs, chosen(metadata), 1]);
        Ok(())
    }

    /// Rows of longer segments.
    fn encode_many(&mut self, layer: &Layer) -> Result<()> {
        let (top_k, local) = (layer.choices as usize, layer.experts as usize);
        let (width, hidden_width) = (layer.width, layer.hidden_width);
        let (choices, first, experts) = (layer.choices, layer.first, layer.experts);
        let assignments = self.capacity.tokens * top_k;
        let most = most_tiles(assignments, local);
        let counts = self.scratch("choices by expert", 4 * assignments.div_ceil(SHARE) * local)?;
        let groups = self.scratch("assignments by expert", 4 * (1 + 3 * most + assignments))?;
        let (ids, tiles) = (&layer.ids, most as u32);
        let shares = move |metadata: &BatchMetadata| {
            let assignments = metadata.several_rows * top_k;
            [assignments.div_ceil(SHARE) as u32, 1, 1]
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
        let many = |entry, from: &Arc<Buffer>, stacks: &Stacks, to: &Arc<Buffer>| {
            let mut arguments = arguments![&groups, tiles, from].to_vec();
            arguments.extend(stacks.arguments.iter().cloned());
            arguments.extend(arguments![to, width, hidden_width]);
            Kernel::new(entry, 128, arguments)
        };
        let (gate_up, down) = (&layer.gate_up, &layer.down);
        let entry = gate_up.entry("experts_many_in", "experts_many_in_blocks");
        let mut kernel = many(entry, &layer.input, gate_up, &layer.hidden);
        kernel.arguments.push(choices.into());
        let columns = hidden_width.div_ceil(TILE as u32 / 2);
        self.launch(kernel.shared(STAGES_BYTES)?, move |metadata| {
            [columns, count(metadata), 1]
        });
        let entry = down.entry("experts_many_out", "experts_many_out_blocks");
        let kernel = many(entry, &layer.hidden, down, &layer.results);
        let columns = width.div_ceil(TILE as u32);
        self.launch(kernel.shared(STAGES_BYTES)?, move |metadata| {
            [columns, count(metadata), 1]
        });
        Ok(())
    }
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
