//! Whether the bounds of half precision can be kept at all: a backend that computes in f32 and only rounds what it
//! writes to activations, to bf16 or to f16, must pass the list. The machines without such a device learn it here.

use std::sync::{Arc, Mutex, MutexGuard};

use kimi_linear::backend::*;
use kimi_linear::conformance::{Options, Verdict, cases, run};
use libtest_mimic::{Failed, Trial};

use crate::backends::Make;

pub(crate) fn trials(make: Make) -> Vec<Trial> {
    [Precision::Bf16, Precision::F16]
        .map(|precision| {
            let name = format!("bounds/{precision:?} by rounding alone");
            Trial::test(name, move || holds(make, precision))
        })
        .into()
}

/// Cases whose values lie beyond the greatest f16: rounding makes them infinite, whatever the kernel does.
const BEYOND_F16: [&str; 2] = ["/loud values", "/large keys"];

fn holds(make: Make, precision: Precision) -> std::result::Result<(), Failed> {
    let mut failed = Vec::new();
    // Not the refusals: this wrapper submits an operation at a time, so the first has run when the second refuses.
    for case in cases()
        .into_iter()
        .filter(|case| case.operation != "refusals")
    {
        if precision == Precision::F16 && BEYOND_F16.iter().any(|name| case.name.ends_with(name)) {
            println!("{precision:?} cannot hold the values of {}", case.name);
            continue;
        }
        let mut backend: Box<dyn Backend> = Box::new(Halved::new(make(), precision));
        let outcome = run(&case, &mut *backend, Options::default());
        let share = outcome.error / outcome.bound;
        println!(
            "{precision:?} {share:.2} of {:.1e}: {}",
            outcome.bound, case.name
        );
        if outcome.verdict != Verdict::Passed {
            let (error, detail) = (outcome.error, outcome.detail);
            failed.push(format!("{}: {error:.1e}, {detail}", case.name));
        }
    }
    if failed.is_empty() {
        return Ok(());
    }
    Err(failed.join("\n").into())
}

struct Halved {
    inner: Arc<Mutex<Box<dyn Backend>>>,
    device: Device,
}

impl Halved {
    fn new(inner: Box<dyn Backend>, precision: Precision) -> Self {
        let mut device = inner.device().clone();
        device.precision = precision;
        let inner = Arc::new(Mutex::new(inner));
        Self { inner, device }
    }

    fn inner(&self) -> MutexGuard<'_, Box<dyn Backend>> {
        self.inner.lock().unwrap()
    }
}

/// Methods handed on as they are.
macro_rules! hand_on {
    ($($name:ident($($argument:ident: $kind:ty),*) -> $result:ty;)*) => {
        $(fn $name(&mut self, $($argument: $kind),*) -> $result {
            self.inner().$name($($argument),*)
        })*
    };
}

impl Backend for Halved {
    fn device(&self) -> &Device {
        &self.device
    }

    fn shard(&self) -> Shard {
        self.inner().shard()
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
        Ok(Box::new(HalvedStep {
            inner: Arc::clone(&self.inner),
            precision: self.device.precision,
            capacity,
            operations: Vec::new(),
        }))
    }
}

/// Every operation in a step of its own, with the tensors that it writes.
struct HalvedStep {
    inner: Arc<Mutex<Box<dyn Backend>>>,
    precision: Precision,
    capacity: Capacity,
    operations: Vec<(Box<dyn Step>, Vec<Tensor>)>,
}

impl HalvedStep {
    fn record(
        &mut self,
        record: impl FnOnce(&mut dyn Step) -> Result<()>,
        written: Vec<Tensor>,
    ) -> Result<()> {
        let mut step = self.inner.lock().unwrap().step(self.capacity)?;
        record(&mut *step)?;
        self.operations.push((step, written));
        Ok(())
    }

    fn round(&self, tensor: Tensor, batch: &Batch) -> Result<()> {
        if tensor.element != Element::Activation {
            return Ok(());
        }
        let rows = match tensor.rows {
            Rows::Tokens => batch.tokens.len(),
            Rows::Outputs => batch.outputs.len(),
        };
        let mut inner = self.inner.lock().unwrap();
        let values = inner.read_tensor(tensor, rows).wait()?;
        let round = |x: &f32| match self.precision {
            Precision::F32 => *x,
            Precision::F16 => half::f16::from_f32(*x).to_f32(),
            Precision::Bf16 => half::bf16::from_f32(*x).to_f32(),
        };
        let values = values.as_f32().unwrap().iter().map(round).collect();
        inner.write_tensor(tensor, &TensorValues::F32(values))
    }
}

/// Operations with the arguments that they write.
macro_rules! rounded {
    ($($name:ident($kind:ty) $(-> $output:ident)*;)*) => {
        $(fn $name(&mut self, op: $kind) -> Result<()> {
            self.record(|step| step.$name(op), vec![$(op.$output),*])
        })*
    };
}

impl Step for HalvedStep {
    rounded! {
        embed(Embed) -> output;
        rms_norm(RmsNorm) -> output;
        linear(Linear) -> output;
        short_conv(ShortConv) -> output;
        kda_gates(KdaGates);
        kda_recurrence(KdaRecurrence) -> output;
        gated_norm(GatedNorm) -> output;
        mla_append(MlaAppend);
        mla_prefill(MlaAttention) -> output;
        mla_decode(MlaAttention) -> output;
        route(Route);
        experts(Experts) -> output;
        swiglu(Swiglu) -> output;
        add(Add) -> target;
        all_reduce(AllReduce) -> target;
        all_gather(AllGather) -> output;
        select(Select);
        probe(Tensor);
    }

    fn operations(&self) -> &[&'static str] {
        // A list a call: this is a test, and few calls.
        let names = self
            .operations
            .iter()
            .flat_map(|(step, _)| step.operations());
        names.copied().collect::<Vec<_>>().leak()
    }

    fn submit(&mut self, batch: &Batch) -> Result<Ticket<StepOutput>> {
        let mut output = StepOutput::default();
        for i in 0..self.operations.len() {
            let part = self.operations[i].0.submit(batch)?.wait()?;
            output.choices.extend(part.choices);
            output.logits.extend(part.logits);
            output.probes.extend(part.probes);
            for tensor in self.operations[i].1.clone() {
                self.round(tensor, batch)?;
            }
        }
        Ok(Ticket::ready(Ok(output)))
    }
}
