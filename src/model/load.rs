//! Loads a checkpoint into a model: which tensors make up each weight, and where each belongs on several devices.
//!
//! It waits for files only in a browser, where a weight is read when it is its turn.

use std::ops::ControlFlow;

use super::origin::Origin;
use super::source::Source;
use super::weight_source::assemble;
use super::{AttentionBlock, FfnBlock, Head, Layer, Limits, Model, Stream};
use crate::backend::{
    Backend, Cut, Element, KdaBlock, LatentLayout, LatentPool, MlaBlock, MlpBlock, MoeBlock, Place,
    RandomWeight, Route, Rows, StateLayout, StatePool, Tensor, Weight,
};
use crate::config::{Attention, Ffn, ModelConfig, Role};
use crate::error::{BackendError, Error};
use crate::files;

pub(super) async fn load(
    config: &ModelConfig,
    source: Source<'_>,
    mut backend: Box<dyn Backend>,
    limits: Limits,
    progress: &mut dyn FnMut(u64) -> ControlFlow<()>,
) -> Result<Model, Error> {
    let (states, latents) = pools(config, &mut *backend, &limits)?;
    let mut planner = Planner {
        backend: &mut *backend,
        limits: &limits,
        bytes: 0,
    };
    let activations = Activations::plan(config, &mut planner)?;
    let head = planner.head(config)?;
    let activation_bytes = planner.bytes;

    let mut loader = Loader {
        config,
        source,
        backend: &mut *backend,
        layer: 0,
        done: 0,
        progress,
    };
    let embedding = loader.whole(Role::Embedding.name(0)).await?;
    let layers = loader.layers(states, latents, &activations).await?;
    let final_norm = loader.whole(Role::FinalNorm.name(0)).await?;
    let lm_head = loader.rows(Role::Head.name(0)).await?;
    let stream = activations.stream;
    let origin = Origin::of(&loader.source, config).await?;
    Ok(Model {
        config: config.clone(),
        origin,
        backend,
        limits,
        embedding,
        layers,
        final_norm,
        lm_head,
        states,
        latents,
        stream,
        head,
        activation_bytes,
        positions: limits.step.blocks.min(limits.blocks) * limits.block_tokens,
        trace: None,
    })
}

/// The pools of states and latents.
fn pools(
    config: &ModelConfig,
    backend: &mut dyn Backend,
    limits: &Limits,
) -> Result<(StatePool, LatentPool), Error> {
    let heads = config.kda_num_heads;
    let states = backend.state_pool(StateLayout {
        layers: config.kda_layers().count(),
        key_heads: heads,
        value_heads: heads,
        key_width: config.kda_head_dim,
        value_width: config.kda_head_dim,
        taps: config.short_conv_kernel_size,
        slots: limits.slots,
    })?;
    let latents = backend.latent_pool(LatentLayout {
        layers: config.mla_layers().count(),
        latent: config.kv_lora_rank,
        rope: config.qk_rope_head_dim,
        block_tokens: limits.block_tokens,
        blocks: limits.blocks,
        dtype: limits.cache,
    })?;
    Ok((states, latents))
}

/// The scratch of all blocks; layers run one after the other and share it.
struct Activations {
    stream: Stream,
    kda: Option<KdaScratch>,
    mla: Option<MlaScratch>,
    dense: Option<MlpScratch>,
    moe: Option<MoeScratch>,
}

struct KdaScratch {
    qkv: Tensor,
    qkv_conv: Tensor,
    decay_rank: Tensor,
    gate_rank: Tensor,
    decay: Tensor,
    gates: Tensor,
    write: Tensor,
    beta: Tensor,
    heads: Tensor,
    gate: Tensor,
    normed: Tensor,
}

struct MlaScratch {
    query: Tensor,
    kv_a: Tensor,
    heads: Tensor,
}

#[derive(Clone, Copy)]
struct MlpScratch {
    gate_up: Tensor,
    hidden: Tensor,
}

struct MoeScratch {
    experts: Tensor,
    weights: Tensor,
    /// Hidden activations and output of the shared experts, if the model has any.
    shared: Option<(MlpScratch, Tensor)>,
}

/// Plans activations and counts them.
struct Planner<'a> {
    backend: &'a mut dyn Backend,
    limits: &'a Limits,
    /// Bytes so far, in f32.
    bytes: u64,
}

impl Planner<'_> {
    fn plan(&mut self, rows: Rows, width: usize, element: Element) -> Result<Tensor, BackendError> {
        let capacity = self.count(rows, width);
        self.backend.tensor(rows, capacity, width, element)
    }

    /// One row per token.
    fn tokens(&mut self, width: usize, element: Element) -> Result<Tensor, BackendError> {
        self.plan(Rows::Tokens, width, element)
    }

    /// One row per token, of which each of several devices has a part: heads or hidden units.
    fn split(&mut self, width: usize, element: Element) -> Result<Tensor, BackendError> {
        let capacity = self.count(Rows::Tokens, width);
        self.backend
            .split_tensor(Rows::Tokens, capacity, width, element)
    }

    /// Counts an activation, and returns its number of rows.
    fn count(&mut self, rows: Rows, width: usize) -> usize {
        let capacity = match rows {
            Rows::Tokens => self.limits.step.tokens,
            Rows::Outputs => self.limits.step.outputs,
        };
        self.bytes += 4 * capacity as u64 * width as u64;
        capacity
    }

    /// A gated MLP's hidden activations.
    fn mlp(&mut self, hidden: usize) -> Result<MlpScratch, BackendError> {
        Ok(MlpScratch {
            gate_up: self.split(2 * hidden, Element::Activation)?,
            hidden: self.split(hidden, Element::Activation)?,
        })
    }

    fn head(&mut self, config: &ModelConfig) -> Result<Head, BackendError> {
        let normed = self.plan(Rows::Outputs, config.hidden_size, Element::Activation)?;
        let width = config.vocab_size;
        let capacity = self.count(Rows::Outputs, width);
        let local_logits =
            self.backend
                .split_tensor(Rows::Outputs, capacity, width, Element::F32)?;
        let logits = if self.backend.ranks() == 1 {
            local_logits
        } else {
            self.plan(Rows::Outputs, width, Element::F32)?
        };
        // A draw for each segment of a step that feeds the next one.
        let draws = self.limits.step.segments;
        let drawn = self
            .backend
            .tensor(Rows::Outputs, draws, 2, Element::Index)?;
        self.bytes += 8 * draws as u64;
        Ok(Head {
            normed,
            local_logits,
            logits,
            drawn,
        })
    }
}

impl Activations {
    fn plan(config: &ModelConfig, planner: &mut Planner<'_>) -> Result<Self, BackendError> {
        let d = config.hidden_size;
        let (activation, f32) = (Element::Activation, Element::F32);
        let stream = Stream {
            hidden: planner.tokens(d, activation)?,
            normed: planner.tokens(d, activation)?,
            output: planner.tokens(d, activation)?,
        };
        let has = |wanted: Attention| config.layers.iter().any(|layer| layer.attention == wanted);
        let has_ffn = |wanted: Ffn| config.layers.iter().any(|layer| layer.ffn == wanted);
        let kda = if has(Attention::Kda) {
            let heads = config.kda_num_heads;
            let width = heads * config.kda_head_dim;
            Some(KdaScratch {
                qkv: planner.split(3 * width, activation)?,
                qkv_conv: planner.split(3 * width, activation)?,
                decay_rank: planner.tokens(config.kda_head_dim, activation)?,
                gate_rank: planner.tokens(config.kda_head_dim, activation)?,
                decay: planner.split(width, activation)?,
                gates: planner.split(width, f32)?,
                write: planner.split(heads, activation)?,
                beta: planner.split(heads, f32)?,
                heads: planner.split(width, activation)?,
                gate: planner.split(width, activation)?,
                normed: planner.split(width, activation)?,
            })
        } else {
            None
        };
        let mla = if has(Attention::Mla) {
            let heads = config.num_attention_heads;
            Some(MlaScratch {
                query: planner.split(heads * config.mla_query_dim(), activation)?,
                kv_a: planner.tokens(config.latent_width(), activation)?,
                heads: planner.split(heads * config.v_head_dim, activation)?,
            })
        } else {
            None
        };
        let dense = if has_ffn(Ffn::Dense) {
            Some(planner.mlp(config.intermediate_size)?)
        } else {
            None
        };
        let moe = if has_ffn(Ffn::Moe) {
            let shared = if config.num_shared_experts > 0 {
                Some(planner.mlp(config.shared_intermediate_size())?)
            } else {
                None
            };
            Some(MoeScratch {
                experts: planner.tokens(config.num_experts_per_token, Element::Index)?,
                weights: planner.tokens(config.num_experts_per_token, f32)?,
                shared: shared
                    .map(|scratch| Ok((scratch, planner.tokens(d, activation)?)))
                    .transpose()?,
            })
        } else {
            None
        };
        Ok(Self {
            stream,
            kda,
            mla,
            dense,
            moe,
        })
    }
}

/// An activation that `Activations::plan` creates if the configuration has a layer that needs it.
fn planned<'a, T>(scratch: Option<&'a T>, what: &'static str) -> Result<&'a T, BackendError> {
    scratch.ok_or_else(|| BackendError::Shape {
        operation: "loading",
        what,
        expected: "planned".to_owned(),
        found: "missing".to_owned(),
    })
}

struct Loader<'a> {
    config: &'a ModelConfig,
    source: Source<'a>,
    backend: &'a mut dyn Backend,
    /// The layer that is loaded.
    layer: usize,
    done: u64,
    progress: &'a mut dyn FnMut(u64) -> ControlFlow<()>,
}

impl Loader<'_> {
    /// All layers in their order; the KDA layers share one pool, the MLA layers the other.
    async fn layers(
        &mut self,
        states: StatePool,
        latents: LatentPool,
        activations: &Activations,
    ) -> Result<Vec<Layer>, Error> {
        let config = self.config;
        let (mut kda_layers, mut mla_layers) = (0.., 0..);
        let mut layers = Vec::with_capacity(config.layers.len());
        for (i, kind) in config.layers.iter().enumerate() {
            self.layer = i;
            let attention = match kind.attention {
                Attention::Kda => {
                    let layer = kda_layers.next().unwrap_or_default();
                    AttentionBlock::Kda(Box::new(self.kda(i, states, layer, activations).await?))
                }
                Attention::Mla => {
                    let layer = mla_layers.next().unwrap_or_default();
                    AttentionBlock::Mla(Box::new(self.mla(i, latents, layer, activations).await?))
                }
            };
            let ffn = match kind.ffn {
                Ffn::Dense => FfnBlock::Dense(Box::new(self.dense(i, activations).await?)),
                Ffn::Moe => FfnBlock::Moe(Box::new(self.moe(i, activations).await?)),
            };
            layers.push(Layer {
                input_norm: self.whole(Role::InputNorm.name(i)).await?,
                attention,
                post_attention_norm: self.whole(Role::PostAttentionNorm.name(i)).await?,
                ffn,
            });
        }
        Ok(layers)
    }

    /// Loads the named tensors, concatenated by rows into one matrix.
    async fn weight(&mut self, names: &[String], cut: Cut) -> Result<Weight, Error> {
        self.stack(names, 1, cut).await
    }

    /// Loads the named tensors, concatenated by rows into a stack of `stack` matrices: those of experts, or 1.
    async fn stack(&mut self, names: &[String], stack: usize, cut: Cut) -> Result<Weight, Error> {
        let place = Place {
            layer: self.layer,
            cut,
            experts: names.len() == stack && stack > 1,
            ..Place::default()
        };
        let checkpoint = match &self.source {
            Source::Stored(checkpoint) => *checkpoint,
            Source::Random { .. } => return self.make(names, stack, place),
        };
        // Pages of a whole file's mapping would stay in memory beside the device's copy.
        let apart = self.backend.copies_weight(&place);
        let (tensors, _held) = files::reading(|| checkpoint.tensors_named(names, apart)).await?;
        self.done += tensors.iter().map(|it| it.bytes.len() as u64).sum::<u64>();
        let weight = self
            .backend
            .weight(assemble(names, &tensors, stack, place)?)?;
        self.report(0)?;
        Ok(weight)
    }

    /// Has the backend generate random weights of the same shape as these tensors.
    fn make(&mut self, names: &[String], stack: usize, place: Place) -> Result<Weight, Error> {
        let made = self.source.made(names)?;
        let rows: usize = made.rows.iter().sum();
        let weight = self.backend.random_weight(RandomWeight {
            name: names[0].clone(),
            format: made.format,
            stack,
            rows: rows / stack,
            columns: made.columns,
            place,
            random: made.random,
        })?;
        self.report(made.bytes)?;
        Ok(weight)
    }

    /// Adds to the number of loaded bytes.
    fn report(&mut self, bytes: u64) -> Result<(), Error> {
        self.done += bytes;
        match (self.progress)(self.done) {
            ControlFlow::Continue(()) => Ok(()),
            ControlFlow::Break(()) => Err(Error::LoadStopped),
        }
    }

    async fn whole(&mut self, name: String) -> Result<Weight, Error> {
        self.weight(&[name], Cut::Whole).await
    }

    async fn rows(&mut self, name: String) -> Result<Weight, Error> {
        self.weight(&[name], Cut::Rows).await
    }

    async fn columns(&mut self, name: String) -> Result<Weight, Error> {
        self.weight(&[name], Cut::Columns).await
    }

    async fn kda(
        &mut self,
        i: usize,
        pool: StatePool,
        layer: usize,
        activations: &Activations,
    ) -> Result<KdaBlock, Error> {
        let scratch = planned(activations.kda.as_ref(), "KDA scratch")?;
        let name = |role: Role| role.name(i);
        let qkv = [Role::KdaQuery, Role::KdaKey, Role::KdaValue].map(name);
        let conv = [Role::KdaQueryConv, Role::KdaKeyConv, Role::KdaValueConv].map(name);
        Ok(KdaBlock {
            input: activations.stream.normed,
            qkv_proj: self.weight(&qkv, Cut::Rows).await?,
            conv: self.weight(&conv, Cut::Rows).await?,
            decay_proj: [
                self.whole(name(Role::KdaDecayDown)).await?,
                self.rows(name(Role::KdaDecayUp)).await?,
            ],
            beta_proj: self.rows(name(Role::KdaBeta)).await?,
            a_log: self.rows(name(Role::KdaALog)).await?,
            dt_bias: self.rows(name(Role::KdaDtBias)).await?,
            gate_proj: [
                self.whole(name(Role::KdaGateDown)).await?,
                self.rows(name(Role::KdaGateUp)).await?,
            ],
            output_norm: (
                self.whole(name(Role::KdaOutputNorm)).await?,
                self.config.rms_norm_eps,
            ),
            output_proj: self.columns(name(Role::KdaOutput)).await?,
            pool,
            layer,
            qkv: scratch.qkv,
            qkv_conv: scratch.qkv_conv,
            decay_rank: scratch.decay_rank,
            gate_rank: scratch.gate_rank,
            decay: scratch.decay,
            gates: scratch.gates,
            write: scratch.write,
            beta: scratch.beta,
            heads: scratch.heads,
            gate: scratch.gate,
            normed: scratch.normed,
            output: activations.stream.output,
        })
    }

    async fn mla(
        &mut self,
        i: usize,
        pool: LatentPool,
        layer: usize,
        activations: &Activations,
    ) -> Result<MlaBlock, Error> {
        let scratch = planned(activations.mla.as_ref(), "MLA scratch")?;
        let name = |role: Role| role.name(i);
        Ok(MlaBlock {
            input: activations.stream.normed,
            query_proj: self.rows(name(Role::MlaQuery)).await?,
            kv_a_proj: self.whole(name(Role::MlaLatent)).await?,
            kv_a_norm: (
                self.whole(name(Role::MlaLatentNorm)).await?,
                ModelConfig::KV_A_NORM_EPS,
            ),
            kv_b_proj: self.rows(name(Role::MlaExpand)).await?,
            output_proj: self.columns(name(Role::MlaOutput)).await?,
            nope: self.config.qk_nope_head_dim,
            value: self.config.v_head_dim,
            pool,
            layer,
            query: scratch.query,
            kv_a: scratch.kv_a,
            heads: scratch.heads,
            output: activations.stream.output,
        })
    }

    /// A gated MLP of these tensors: gate, up, down.
    async fn mlp(
        &mut self,
        [gate, up, down]: [String; 3],
        input: Tensor,
        scratch: MlpScratch,
        output: Tensor,
    ) -> Result<MlpBlock, Error> {
        Ok(MlpBlock {
            input,
            gate_up_proj: self.weight(&[gate, up], Cut::Rows).await?,
            down_proj: self.columns(down).await?,
            gate_up: scratch.gate_up,
            hidden: scratch.hidden,
            output,
            reduce: true,
        })
    }

    async fn dense(&mut self, i: usize, activations: &Activations) -> Result<MlpBlock, Error> {
        let Stream { normed, output, .. } = activations.stream;
        let scratch = *planned(activations.dense.as_ref(), "dense scratch")?;
        self.mlp(
            Role::DENSE.map(|role| role.name(i)),
            normed,
            scratch,
            output,
        )
        .await
    }

    async fn moe(&mut self, i: usize, activations: &Activations) -> Result<MoeBlock, Error> {
        let Stream { normed, output, .. } = activations.stream;
        let scratch = planned(activations.moe.as_ref(), "MoE scratch")?;
        let experts = self.config.num_experts;
        let stack = |role: Role| -> Vec<String> {
            (0..experts)
                .map(|expert| role.expert_name(i, expert))
                .collect()
        };
        let route = Route {
            input: normed,
            weight: self.whole(Role::Router.name(i)).await?,
            bias: self.whole(Role::RouterBias.name(i)).await?,
            groups: self.config.num_expert_group,
            top_groups: self.config.topk_group,
            renormalize: self.config.moe_renormalize,
            scale: self.config.routed_scaling_factor,
            experts: scratch.experts,
            weights: scratch.weights,
        };
        let shared = match scratch.shared {
            Some((scratch, shared_output)) => {
                let names = Role::SHARED.map(|role| role.name(i));
                Some(MlpBlock {
                    reduce: false,
                    ..self.mlp(names, normed, scratch, shared_output).await?
                })
            }
            None => None,
        };
        Ok(MoeBlock {
            route,
            gate: self
                .stack(&stack(Role::ExpertGate), experts, Cut::Rows)
                .await?,
            up: self
                .stack(&stack(Role::ExpertUp), experts, Cut::Rows)
                .await?,
            down: self
                .stack(&stack(Role::ExpertDown), experts, Cut::Columns)
                .await?,
            first_expert: 0,
            shared,
            output,
        })
    }
}
