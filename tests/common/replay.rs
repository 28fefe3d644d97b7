//! A backend that keeps what its router chose, or puts another run's choices in their place: one flipped expert moves a
//! small model's logits by a tenth, which would hide everything else.
#![allow(unreachable_pub, missing_docs, clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use kimi_linear::backend::*;

/// Experts and weights of one router at one position of the only sequence.
pub type Choices = BTreeMap<(usize, usize), (Vec<u32>, Vec<f32>)>;

/// An expert that another run did not choose there.
#[derive(Clone, Copy, Debug)]
pub struct Flip {
    pub router: usize,
    pub position: usize,
    /// How far the weight of what was chosen is from that of what was not.
    pub gap: f32,
}

/// What to do with the router's choices.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Keep them in `choices`.
    Keep,
    /// Hold them against `choices`.
    Watch,
    /// The same, then use `choices` in their place.
    Replace,
}

/// What the wrapper and the test share.
#[derive(Default)]
pub struct Log {
    pub choices: Choices,
    pub flips: Vec<Flip>,
}

pub struct Replay {
    inner: Arc<Mutex<Box<dyn Backend>>>,
    device: Device,
    mode: Mode,
    log: Arc<Mutex<Log>>,
}

impl Replay {
    pub fn new(inner: Box<dyn Backend>, mode: Mode, log: &Arc<Mutex<Log>>) -> Self {
        Self {
            device: inner.device().clone(),
            inner: Arc::new(Mutex::new(inner)),
            mode,
            log: Arc::clone(log),
        }
    }
}

/// Methods handed on as they are.
macro_rules! hand_on {
    ($($name:ident($($argument:ident: $kind:ty),*) -> $result:ty;)*) => {
        $(fn $name(&mut self, $($argument: $kind),*) -> $result {
            self.inner.lock().unwrap().$name($($argument),*)
        })*
    };
}

impl Backend for Replay {
    fn device(&self) -> &Device {
        &self.device
    }

    fn shard(&self) -> Shard {
        self.inner.lock().unwrap().shard()
    }

    hand_on! {
        weight(source: WeightSource) -> Result<Weight>;
        random_weight(weight: RandomWeight) -> Result<Weight>;
        tensor(rows: Rows, capacity: usize, width: usize, element: Element) -> Result<Tensor>;
        write_tensor(tensor: Tensor, values: &TensorValues) -> Result<()>;
        read_tensor(tensor: Tensor, rows: usize) -> Ticket<TensorValues>;
        state_pool(layout: StateLayout) -> Result<StatePool>;
        latent_pool(layout: LatentLayout) -> Result<LatentPool>;
        read_state(pool: &StatePool, layer: usize, slot: Slot) -> Ticket<StateRecord>;
        write_state(pool: &StatePool, layer: usize, slot: Slot, record: &StateRecord) -> Result<()>;
        read_latents(pool: &LatentPool, layer: usize, block: Block, tokens: usize) -> Ticket<LatentRecord>;
        write_latents(pool: &LatentPool, layer: usize, block: Block, record: &LatentRecord) -> Result<()>;
    }

    fn step(&mut self, capacity: Capacity) -> Result<Box<dyn Step>> {
        let first = self.inner.lock().unwrap().step(capacity)?;
        Ok(Box::new(ReplayStep {
            inner: Arc::clone(&self.inner),
            log: Arc::clone(&self.log),
            mode: self.mode,
            capacity,
            parts: vec![(first, None)],
        }))
    }
}

/// A step that is cut after each router.
struct ReplayStep {
    inner: Arc<Mutex<Box<dyn Backend>>>,
    log: Arc<Mutex<Log>>,
    mode: Mode,
    capacity: Capacity,
    parts: Vec<(Box<dyn Step>, Option<Route>)>,
}

impl ReplayStep {
    fn last(&mut self) -> &mut dyn Step {
        &mut *self.parts.last_mut().unwrap().0
    }

    /// Compares, keeps or replaces the choices of one router over the rows of a batch.
    fn look(&self, router: usize, op: &Route, batch: &Batch) -> Result<()> {
        let top_k = op.experts.width;
        let rows = batch.tokens.len();
        let mut inner = self.inner.lock().unwrap();
        let ids = inner.read_tensor(op.experts, rows).wait()?;
        let weights = inner.read_tensor(op.weights, rows).wait()?;
        let mut ids = ids.as_index().unwrap().to_vec();
        let mut weights = weights.as_f32().unwrap().to_vec();
        let positions = batch
            .pieces
            .iter()
            .flat_map(|piece| piece.position..piece.position + piece.length);
        let mut log = self.log.lock().unwrap();
        for (row, position) in positions.enumerate() {
            let range = row * top_k..(row + 1) * top_k;
            let (own, own_weights) = (&mut ids[range.clone()], &mut weights[range]);
            if self.mode == Mode::Keep {
                let kept = (own.to_vec(), own_weights.to_vec());
                log.choices.insert((router, position), kept);
                continue;
            }
            let (theirs, their_weights) = log.choices[&(router, position)].clone();
            for (id, weight) in own.iter().zip(own_weights.iter()) {
                if !theirs.contains(id) {
                    let missed = theirs.iter().position(|their| !own.contains(their));
                    let gap = (weight - their_weights[missed.unwrap_or(0)]).abs();
                    log.flips.push(Flip {
                        router,
                        position,
                        gap,
                    });
                }
            }
            own.copy_from_slice(&theirs);
            own_weights.copy_from_slice(&their_weights);
        }
        if self.mode == Mode::Replace {
            inner.write_tensor(op.experts, &TensorValues::Index(ids))?;
            inner.write_tensor(op.weights, &TensorValues::F32(weights))?;
        }
        Ok(())
    }
}

/// Operations handed on to the part under way.
macro_rules! record {
    ($($name:ident($kind:ty);)*) => {
        $(fn $name(&mut self, op: $kind) -> Result<()> {
            self.last().$name(op)
        })*
    };
}

impl Step for ReplayStep {
    record! {
        embed(Embed);
        rms_norm(RmsNorm);
        linear(Linear);
        short_conv(ShortConv);
        kda_gates(KdaGates);
        kda_recurrence(KdaRecurrence);
        gated_norm(GatedNorm);
        mla_append(MlaAppend);
        mla_prefill(MlaAttention);
        mla_decode(MlaAttention);
        experts(Experts);
        swiglu(Swiglu);
        add(Add);
        all_reduce(AllReduce);
        all_gather(AllGather);
        select(Select);
        probe(Tensor);
        kda_block(&KdaBlock);
        mla_block(&MlaBlock);
        mlp_block(&MlpBlock);
    }

    fn route(&mut self, op: Route) -> Result<()> {
        self.last().route(op)?;
        self.parts.last_mut().unwrap().1 = Some(op);
        let next = self.inner.lock().unwrap().step(self.capacity)?;
        self.parts.push((next, None));
        Ok(())
    }

    fn operations(&self) -> &[&'static str] {
        let parts = self.parts.iter().flat_map(|(step, _)| step.operations());
        parts.copied().collect::<Vec<_>>().leak()
    }

    fn submit(&mut self, batch: &Batch) -> Result<Ticket<StepOutput>> {
        let mut output = StepOutput::default();
        let mut router = 0;
        for i in 0..self.parts.len() {
            let part = self.parts[i].0.submit(batch)?.wait()?;
            output.choices.extend(part.choices);
            output.logits.extend(part.logits);
            output.probes.extend(part.probes);
            if let Some(op) = self.parts[i].1 {
                self.look(router, &op, batch)?;
                router += 1;
            }
        }
        Ok(Ticket::ready(Ok(output)))
    }
}
