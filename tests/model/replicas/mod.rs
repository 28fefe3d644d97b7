//! Replicas that compute each other's layers: the bits of one device in every form, caches that move, memory that is counted, and
//! devices that are lost.

mod forms;
mod losses;
mod memory;
mod moves;
mod threads;

use std::sync::Arc;

use crate::backends;
use crate::common::{Fixture, reference};
use crate::harness;
use kimi_linear::backend::{Backend, Caches, DrawCapacity, LayerHome, Replicas, StepOutput};
use kimi_linear::config::ModelConfig;
use kimi_linear::model::{Model, StepOptions};

const BLOCKS: usize = 8;
/// Layers of the model: a dense one, then four with eight experts; attention over latents in layers 2 and 4.
const LAYERS: usize = 5;

const ALL: StepOptions = StepOptions {
    candidates: 1,
    keep_rows: true,
    probe_hidden: true,
    draws: DrawCapacity::NONE,
};

fn config() -> ModelConfig {
    ModelConfig::from_file(&reference("tiny-8").join("config.json")).unwrap()
}

/// Replicas on these devices.
fn replicas(devices: Vec<Box<dyn Backend>>) -> Arc<Replicas> {
    Replicas::new(devices, &config()).unwrap()
}

/// Replicas on CPUs.
fn on_cpus(count: usize) -> Arc<Replicas> {
    replicas((0..count).map(|_| backends::cpu()).collect())
}

/// The model of a replica.
fn model(replicas: &Arc<Replicas>, replica: usize) -> Model {
    load(replicas.backend(replica))
}

fn load(backend: Box<dyn Backend>) -> Model {
    let limits = harness::limits(32, BLOCKS, backend.device().cache);
    harness::load("tiny-8", backend, limits)
}

fn home(device: usize, experts: &[usize]) -> LayerHome {
    LayerHome {
        device,
        experts: experts.to_vec(),
    }
}

/// All layers whole on one device.
fn whole(device: usize) -> Vec<LayerHome> {
    vec![LayerHome::whole(device); LAYERS]
}

/// The experts of every layer on these devices, everything else on one.
fn experts(device: usize, on: &[usize]) -> Vec<LayerHome> {
    vec![home(device, on); LAYERS]
}

/// The first `count` layers on the first device, the others on the second.
fn layers(count: usize) -> Vec<LayerHome> {
    let device = |layer| usize::from(layer >= count);
    (0..LAYERS)
        .map(|layer| LayerHome::whole(device(layer)))
        .collect()
}

/// Places every layer.
fn place(model: &mut Model, homes: &[LayerHome], caches: Caches) {
    for (layer, home) in homes.iter().enumerate() {
        model.backend().place(layer, home, caches).unwrap();
    }
}

fn prompt() -> Vec<u32> {
    Fixture::open("tiny-8/expected.safetensors").ids("prompt.24.tokens")
}

/// The submissions of a [`Sequence`]: a prompt in four parts, then single tokens.
const SUBMISSIONS: usize = 12;

/// What a sequence has computed.
#[derive(Default, PartialEq)]
struct Sequence {
    submitted: usize,
    position: usize,
    outputs: Vec<StepOutput>,
}

impl Sequence {
    /// The next submission, by a step that is compiled for it.
    fn go_on(&mut self, model: &mut Model) -> Result<(), kimi_linear::error::BackendError> {
        let prompt = prompt();
        let tokens = match self.submitted {
            part @ 0..4 => prompt[part * 6..part * 6 + 6].to_vec(),
            _ => vec![self.outputs.last().unwrap().choices[0].candidates[0].0],
        };
        let mut step = model.step(model.limits().step, ALL)?;
        let mut batch = harness::batch(&tokens, self.position, BLOCKS);
        batch.outputs.drain(..tokens.len() - 1);
        self.outputs.push(step.submit(&batch)?.wait()?);
        self.position += tokens.len();
        self.submitted += 1;
        Ok(())
    }

    /// A whole sequence; `before` is called before each submission, with its number.
    fn run(model: &mut Model, mut before: impl FnMut(&mut Model, usize)) -> Self {
        let mut sequence = Self::default();
        while sequence.submitted < SUBMISSIONS {
            before(model, sequence.submitted);
            sequence.go_on(model).unwrap();
        }
        sequence
    }
}

/// The sequence of a CPU alone.
fn alone() -> Sequence {
    Sequence::run(&mut load(backends::cpu()), |_, _| ())
}
