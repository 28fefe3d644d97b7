//! Encodes router and routed experts: several dispatches each; a stack may span several buffers.

use super::params::params;
use super::pipelines::{Bind, Program};
use super::step::{WgpuStep, flat};
use crate::backend::gpu::batch_metadata::BatchMetadata;
use crate::backend::{
    ExpertRows, Experts, ExpertsCombine, MlpBlock, MoeBlock, Result, Route, Rows, Tensor, Weight,
};
use crate::error::BackendError;

params! {
    Experts of "experts_few", "experts_many" {
        columns: u32, stride: u32, rows: u32, first: u32, width: u32, first_expert: u32, experts: u32,
        top_k: u32, by_token: u32, most_tiles: u32,
    }
    Combine of "experts_combine" {
        width: u32, top_k: u32, first_expert: u32, experts: u32, shared_too: u32,
    }
    Group of "experts_group" {
        top_k: u32, first_expert: u32, experts: u32, tile: u32, most_tiles: u32,
    }
    Route of "route" {
        experts: u32, top_k: u32, groups: u32, top_groups: u32, renormalize: u32, scale: f32,
        not_a_number: u32,
    }
}

/// Maximum number of experts in the shaders.
const EXPERTS: usize = 1024;
const GROUPS: usize = 256;

/// Assignments per tile in the form for many rows. An assignment is a pair of token and chosen expert.
const TILE: usize = 32;

/// The buffer of sorted assignments, and how a batch selects between tiles of one assignment and of many.
#[derive(Clone)]
struct Sorting {
    /// Count, tiles, assignments.
    groups: wgpu::Buffer,
    /// Maximum number of tiles in either form.
    most_tiles: usize,
    top_k: usize,
    experts: usize,
    /// Average number of assignments per expert up to which a tile has a single assignment.
    few: usize,
}

impl Sorting {
    /// Maximum number of tiles for this batch in the form for few assignments or for many; 0 if the other form is used.
    fn tiles(&self, metadata: &BatchMetadata, many: bool) -> u32 {
        let assignments = metadata.tokens * self.top_k;
        if many != (assignments > self.few * self.experts) {
            return 0;
        }
        let tiles = if many {
            assignments.min(assignments / TILE + self.experts)
        } else {
            assignments
        };
        tiles as u32
    }
}

impl WgpuStep {
    pub(super) fn encode_route(&mut self, op: Route) -> Result<()> {
        self.name("route");
        let experts = op.weight.rows;
        if experts > EXPERTS || op.groups > GROUPS {
            return Err(too_many(experts, op.groups));
        }
        let encoder = &self.encoder;
        let logits = encoder.scratch("router logits", encoder.capacity.tokens * experts)?;
        let bias = encoder.small("route", op.bias)?;
        let input = encoder.tensor(op.input)?;
        let (ids, weights) = (encoder.tensor(op.experts)?, encoder.tensor(op.weights)?);
        self.product((&input, Rows::Tokens), op.weight, &logits)?;
        self.dispatch(
            Program::new("route"),
            &params::Route {
                experts: experts as u32,
                top_k: op.experts.width as u32,
                groups: op.groups as u32,
                top_groups: op.top_groups as u32,
                renormalize: u32::from(op.renormalize),
                scale: op.scale,
                not_a_number: f32::NAN.to_bits(),
            },
            &[
                Bind::Read(2, &logits),
                Bind::Read(3, &bias),
                Bind::Write(4, &ids),
                Bind::Write(5, &weights),
            ],
            |metadata| [metadata.tokens as u32, 1, 1],
        )
    }

    /// Router, routed and shared experts. The routed experts' sum and the shared experts' result are added in one dispatch.
    pub(super) fn encode_moe_block(&mut self, block: &MoeBlock) -> Result<()> {
        for op in block.shared.iter().flat_map(MlpBlock::ops) {
            self.push(&op)?;
        }
        self.encode_route(block.route)?;
        let shared = block.shared.map(|shared| shared.output);
        self.encode_experts(block.experts(), shared)
    }

    /// `shared`: what is added to the sum.
    pub(super) fn encode_experts(&mut self, op: Experts, shared: Option<Tensor>) -> Result<()> {
        self.name("experts");
        let (top_k, d) = (op.experts.width, op.input.width);
        let assignments = self.encoder.capacity.tokens * top_k;
        let results = self.encoder.scratch("experts' outputs", assignments * d)?;
        self.expert_results(op.rows(op.output), &results)?;
        let combine = params::Combine {
            width: d as u32,
            top_k: top_k as u32,
            first_expert: op.first_expert as u32,
            experts: op.gate.stack as u32,
            shared_too: u32::from(shared.is_some()),
        };
        self.combine(
            combine,
            [op.experts, op.weights],
            &results,
            (op.output, shared),
        )
    }

    pub(super) fn encode_expert_rows(&mut self, op: ExpertRows) -> Result<()> {
        self.name("expert_rows");
        let results = self.tensor(op.output)?;
        self.expert_results(op, &results)
    }

    pub(super) fn encode_experts_combine(&mut self, op: ExpertsCombine) -> Result<()> {
        self.name("experts_combine");
        let results = self.tensor(op.rows)?;
        let combine = params::Combine {
            width: op.output.width as u32,
            top_k: op.experts.width as u32,
            first_expert: 0,
            // Every choice has a row.
            experts: u32::MAX,
            shared_too: 0,
        };
        self.combine(
            combine,
            [op.experts, op.weights],
            &results,
            (op.output, None),
        )
    }

    /// The weighted sum of a token's results, `[assignments, d]`, and what is added to it.
    fn combine(
        &mut self,
        params: params::Combine,
        [ids, weights]: [Tensor; 2],
        results: &wgpu::Buffer,
        (output, shared): (Tensor, Option<Tensor>),
    ) -> Result<()> {
        let d = output.width;
        let [ids, weights, output] = [
            self.tensor(ids)?,
            self.tensor(weights)?,
            self.tensor(output)?,
        ];
        let shared = shared.map(|shared| self.tensor(shared)).transpose()?;
        self.dispatch(
            Program::new("experts_combine"),
            &params,
            &[
                Bind::Read(2, &ids),
                Bind::Read(3, &weights),
                Bind::Read(4, results),
                Bind::Write(5, &output),
                Bind::Read(8, shared.as_ref().unwrap_or(&weights)),
            ],
            move |metadata| flat(metadata.tokens * d),
        )
    }

    /// The results of the local experts, `[assignments, d]`; the tensor `op.output` is not used.
    fn expert_results(&mut self, op: ExpertRows, results: &wgpu::Buffer) -> Result<()> {
        let (local, n) = (op.gate.stack, op.gate.rows);
        if local > EXPERTS {
            return Err(too_many(local, 1));
        }
        let encoder = &self.encoder;
        let top_k = op.experts.width;
        let assignments = encoder.capacity.tokens * top_k;
        let most_tiles = assignments;
        let gate = encoder.scratch("experts' gates", assignments * n)?;
        let up = encoder.scratch("experts' hidden activations", assignments * n)?;
        let sorting = Sorting {
            groups: encoder.scratch("assignments by expert", 1 + 3 * most_tiles + assignments)?,
            most_tiles,
            top_k,
            experts: local,
            few: encoder.few(),
        };
        let (ids, input) = (encoder.tensor(op.experts)?, encoder.tensor(op.input)?);
        for many in [false, true] {
            let tile = if many { TILE } else { 1 };
            let counted = sorting.clone();
            self.dispatch(
                Program::new("experts_group"),
                &params::Group {
                    top_k: top_k as u32,
                    first_expert: op.first_expert as u32,
                    experts: local as u32,
                    tile: tile as u32,
                    most_tiles: most_tiles as u32,
                },
                &[Bind::Read(2, &ids), Bind::Write(3, &sorting.groups)],
                move |metadata| [counted.tiles(metadata, many).min(1), 1, 1],
            )?;
        }
        self.grouped(&sorting, (&input, true), op.gate, &gate)?;
        self.grouped(&sorting, (&input, true), op.up, &up)?;
        self.dispatch(
            Program::entry("experts_combine", "experts_activate"),
            &params::Combine {
                width: n as u32,
                top_k: top_k as u32,
                first_expert: op.first_expert as u32,
                experts: local as u32,
                shared_too: 0,
            },
            &[
                Bind::Read(2, &ids),
                Bind::Read(6, &up),
                Bind::Write(7, &gate),
            ],
            move |metadata| flat(metadata.tokens * top_k * n),
        )?;
        self.grouped(&sorting, (&gate, false), op.down, results)
    }

    /// Each assignment's row times its expert's matrix, over every buffer of the stack. `by_token`: the input has a row per
    /// token, else one per assignment.
    fn grouped(
        &mut self,
        sorting: &Sorting,
        (input, by_token): (&wgpu::Buffer, bool),
        weight: Weight,
        output: &wgpu::Buffer,
    ) -> Result<()> {
        for part in self.encoder.parts("experts", weight)? {
            let params = params::Experts {
                columns: weight.columns as u32,
                stride: part.vectors,
                rows: part.rows.len() as u32,
                first: part.rows.start as u32,
                width: weight.rows as u32,
                first_expert: part.matrices.start as u32,
                experts: part.matrices.len() as u32,
                top_k: sorting.top_k as u32,
                by_token: u32::from(by_token),
                most_tiles: sorting.most_tiles as u32,
            };
            let binds = [
                Bind::Read(2, input),
                Bind::Read(3, &part.buffer),
                Bind::Read(4, &sorting.groups),
                Bind::Write(5, output),
            ];
            let groups = params.rows.div_ceil(32);
            for many in [false, true] {
                let program = if many {
                    Program::new("experts_many").with("THREADS", 256)
                } else {
                    Program::new("experts_few")
                };
                let counted = sorting.clone();
                self.dispatch(
                    program.with("FORMAT", part.format),
                    &params,
                    &binds,
                    move |metadata| {
                        [
                            if many { groups.div_ceil(2) } else { groups },
                            counted.tiles(metadata, many),
                            1,
                        ]
                    },
                )?;
            }
        }
        Ok(())
    }
}

fn too_many(experts: usize, groups: usize) -> BackendError {
    BackendError::Unsupported {
        backend: "wgpu",
        what: format!("{experts} experts in {groups} groups; the maximum is {EXPERTS} in {GROUPS}"),
    }
}
