//! The processor as a device that can be told to go away.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    missing_docs,
    unreachable_pub
)]

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use kimi_linear::backend::cpu::CpuBackend;
use kimi_linear::backend::trace::{TraceAttention, TraceGate, TraceKda, TraceRoute, TraceState};
use kimi_linear::backend::{
    Add, AllGather, AllReduce, Backend, Batch, Block, Capacity, Device, Element, Embed, Experts,
    GatedNorm, KdaGates, KdaRecurrence, LatentLayout, LatentPool, LatentRecord, Linear, MlaAppend,
    MlaAttention, Result, RmsNorm, Route, Rows, Select, Shard, ShortConv, Slot, StateLayout,
    StatePool, StateRecord, Step, StepOutput, Swiglu, Tensor, TensorValues, Ticket, Weight,
    WeightSource,
};
use kimi_linear::error::BackendError;

/// Whether it is gone.
pub type Gone = Arc<AtomicBool>;

pub struct Failing {
    inner: CpuBackend,
    gone: Gone,
}

impl Failing {
    pub fn new(gone: &Gone) -> Self {
        Self {
            inner: CpuBackend::new(),
            gone: Arc::clone(gone),
        }
    }
}

struct FailingStep {
    inner: Box<dyn Step>,
    gone: Gone,
}

macro_rules! hand_on {
    ($($name:ident($($argument:ident: $kind:ty),*) -> $result:ty;)*) => {
        $(fn $name(&mut self, $($argument: $kind),*) -> $result {
            self.inner.$name($($argument),*)
        })*
    };
}

impl Backend for Failing {
    fn device(&self) -> &Device {
        self.inner.device()
    }

    fn shard(&self) -> Shard {
        self.inner.shard()
    }

    hand_on! {
        weight(source: WeightSource) -> Result<Weight>;
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
        Ok(Box::new(FailingStep {
            inner: self.inner.step(capacity)?,
            gone: Arc::clone(&self.gone),
        }))
    }
}

impl Step for FailingStep {
    hand_on! {
        embed(op: Embed) -> Result<()>;
        rms_norm(op: RmsNorm) -> Result<()>;
        linear(op: Linear) -> Result<()>;
        short_conv(op: ShortConv) -> Result<()>;
        kda_gates(op: KdaGates) -> Result<()>;
        kda_recurrence(op: KdaRecurrence) -> Result<()>;
        gated_norm(op: GatedNorm) -> Result<()>;
        mla_append(op: MlaAppend) -> Result<()>;
        mla_prefill(op: MlaAttention) -> Result<()>;
        mla_decode(op: MlaAttention) -> Result<()>;
        route(op: Route) -> Result<()>;
        experts(op: Experts) -> Result<()>;
        swiglu(op: Swiglu) -> Result<()>;
        add(op: Add) -> Result<()>;
        all_reduce(op: AllReduce) -> Result<()>;
        all_gather(op: AllGather) -> Result<()>;
        select(op: Select) -> Result<()>;
        probe(tensor: Tensor) -> Result<()>;
        trace_kda(op: TraceKda) -> Result<()>;
        trace_gate(op: TraceGate) -> Result<()>;
        trace_state(op: TraceState) -> Result<()>;
        probe_positions(tensor: Tensor) -> Result<()>;
        trace_attention(op: TraceAttention) -> Result<()>;
        trace_route(op: TraceRoute) -> Result<()>;
        time(on: bool) -> Result<()>;
    }

    fn operations(&self) -> &[&'static str] {
        self.inner.operations()
    }

    fn submit(&mut self, batch: &Batch) -> Result<Ticket<StepOutput>> {
        if self.gone.load(Ordering::SeqCst) {
            return Err(BackendError::Lost {
                backend: "cpu",
                reason: "someone pulled the plug".to_owned(),
            });
        }
        self.inner.submit(batch)
    }
}
