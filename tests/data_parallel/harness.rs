//! Replicas of a reference checkpoint, and their answers.

use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::sync::Mutex;
use std::sync::mpsc::{self, Receiver};

use crate::engine_harness::common::reference;
use crate::engine_harness::{BLOCK, OPTIONS, Outcome, engine_on, limits};
use crate::faulty::{Faulty, Shared};
use kimi_linear::backend::cpu::CpuBackend;
use kimi_linear::backend::{Backend, Parallelism};
use kimi_linear::config::Dtype;
use kimi_linear::data_parallel::{
    DataParallel, DataParallelOptions, ParameterDrop, ParameterState, Parameters, StateSizes,
    state_sizes,
};
use kimi_linear::engine::{
    EngineClient, EngineHandle, EngineOptions, Event, MemoryPlanner, Request, RequestId,
};
use kimi_linear::llm::LlmFiles;

/// Answers that run and wait at a replica.
pub const MOST: usize = 64;

/// Replicas on these backends.
pub fn replicas(backends: Vec<Box<dyn Backend>>) -> DataParallel {
    let engines = backends.into_iter().map(|backend| {
        let engine = engine_on(backend, "tiny-a", limits(3, 6, 64), OPTIONS);
        EngineHandle::start(engine).unwrap()
    });
    let context = 64 * BLOCK;
    DataParallel::new(engines.collect(), MOST, context)
}

/// As many replicas as there are plans, by which their devices fail.
pub fn failing(plans: &[Shared]) -> DataParallel {
    let faulty = |plan| Box::new(Faulty::new(Box::new(CpuBackend::new()), plan));
    replicas(plans.iter().map(|plan| faulty(plan) as _).collect())
}

/// The events of a request.
pub struct Reading {
    pub id: RequestId,
    received: Receiver<Event>,
    samples: usize,
}

/// Submits requests together.
pub fn submit(client: &dyn EngineClient, requests: Vec<Request>) -> Vec<Reading> {
    let (mut submitted, mut reading) = (Vec::new(), Vec::new());
    for request in requests {
        let (sender, received) = mpsc::channel();
        reading.push((received, request.samples));
        let sink = Box::new(move |event| {
            let _ = sender.send(event);
            ControlFlow::Continue(())
        });
        submitted.push((request, sink as _));
    }
    let ids = client.submit_all(submitted);
    let each = ids.into_iter().zip(reading);
    each.map(|(id, (received, samples))| Reading {
        id,
        received,
        samples,
    })
    .collect()
}

pub fn submit_one(client: &dyn EngineClient, request: Request) -> Reading {
    submit(client, vec![request]).remove(0)
}

impl Reading {
    /// The next event; `None` after the last.
    pub fn next(&self) -> Option<Event> {
        self.received.recv().ok()
    }

    /// Its answers; checks that events come in order, and none twice.
    pub fn outcomes(self) -> Vec<Outcome> {
        let mut outcomes = vec![Outcome::default(); self.samples];
        let (mut queued, mut prefilled, mut over) = (false, 0, false);
        while let Some(event) = self.next() {
            assert!(!over, "an event after the last: {event:?}");
            match event {
                Event::Queued { .. } => assert!(!std::mem::replace(&mut queued, true)),
                Event::Prefill { done, .. } => {
                    assert!(done > prefilled, "{done} after {prefilled}");
                    prefilled = done;
                }
                Event::Token {
                    sample,
                    id,
                    logprobs,
                } => {
                    assert!(queued);
                    let outcome: &mut Outcome = &mut outcomes[sample];
                    assert!(outcome.reason.is_none(), "a token after the end");
                    outcome.tokens.push(id);
                    outcome.logprobs.push(logprobs);
                }
                Event::Finished {
                    sample,
                    reason,
                    usage,
                    ..
                } => {
                    let outcome = &mut outcomes[sample];
                    assert!(outcome.reason.replace(reason).is_none(), "finished twice");
                    outcome.usage = usage;
                    over = outcomes.iter().all(|it| it.reason.is_some());
                }
                Event::Failed(error) => {
                    outcomes[0].error = Some(error.to_string());
                    over = true;
                }
                _ => {}
            }
        }
        assert!(over, "the last event is missing");
        outcomes
    }

    /// Its only answer.
    pub fn outcome(self) -> Outcome {
        let mut outcomes = self.outcomes();
        assert_eq!(outcomes.len(), 1);
        outcomes.remove(0)
    }
}

/// Slots of a replica that holds all parameters, and its sequences.
pub const SLOTS: usize = 6;
pub const SEQUENCES: usize = 4;

/// The sizes of replicas, without a budget.
pub fn planner() -> MemoryPlanner {
    MemoryPlanner {
        sequences: SEQUENCES,
        context: Some(512),
        prefill_chunk: 64,
        checkpoints: 8,
        blocks: None,
        memory: None,
        speculative: 0,
        weights: 0,
        degrees: Parallelism::SINGLE,
        cache: Dtype::F32,
    }
}

pub fn files() -> LlmFiles {
    LlmFiles::open(&reference("tiny-a")).unwrap()
}

/// The least memory with which replicas that hold all parameters have this number of slots.
pub fn memory(form: ParameterDrop, replicas: usize) -> u64 {
    static KNOWN: Mutex<BTreeMap<(&str, usize), u64>> = Mutex::new(BTreeMap::new());
    let mut known = KNOWN.lock().unwrap();
    let entry = known.entry((form.name(), replicas));
    *entry.or_insert_with(|| least_memory(form, replicas))
}

fn least_memory(form: ParameterDrop, replicas: usize) -> u64 {
    let files = files();
    let layers = files.checkpoint().unwrap().layer_bytes(&files.config);
    let slots = |memory: u64| {
        let planner = MemoryPlanner {
            memory: Some(memory),
            ..planner()
        };
        state_sizes(&files.config, &layers, &planner, form, replicas)
            .map_or(0, |sizes| sizes.whole.slots)
    };
    let (mut low, mut high) = (0, 1 << 30);
    while high - low > 1 {
        let middle = low + (high - low) / 2;
        match slots(middle) >= SLOTS {
            true => high = middle,
            false => low = middle,
        }
    }
    high
}

/// Replicas that drop parameters, with the memory of each device.
pub struct Dropping {
    pub client: DataParallel,
    pub plans: Vec<Shared>,
    pub memory: u64,
    pub states: StateSizes,
}

/// Options of replicas with a budget.
pub fn options(form: ParameterDrop, memory: u64, automatic: bool) -> DataParallelOptions {
    DataParallelOptions {
        planner: MemoryPlanner {
            memory: Some(memory),
            ..planner()
        },
        engine: EngineOptions {
            host_bytes: 1 << 20,
            quantum: 8,
            queue: MOST,
            ..EngineOptions::default()
        },
        drop: form,
        automatic,
    }
}

/// As many replicas with a small budget.
pub fn dropping(form: ParameterDrop, replicas: usize, automatic: bool) -> Dropping {
    let plans: Vec<Shared> = (0..replicas).map(|_| Shared::default()).collect();
    let faulty = |plan| Box::new(Faulty::new(Box::new(CpuBackend::new()), plan));
    let devices = plans.iter().map(|plan| faulty(plan) as _).collect();
    let memory = memory(form, replicas);
    let options = options(form, memory, automatic);
    let go_on = &mut |_, _| ControlFlow::Continue(());
    let loaded = files().load_replicas(devices, &options, go_on).unwrap();
    Dropping {
        client: loaded.client,
        plans,
        memory,
        states: loaded.states,
    }
}

impl Dropping {
    /// The parameters of all replicas; no device holds more than it may.
    pub fn parameters(&self) -> Parameters {
        let parameters = self.client.parameters().unwrap();
        for replica in &parameters.replicas {
            let held = replica.memory.total();
            assert!(
                held <= self.memory,
                "{held} of {}: {replica:?}",
                self.memory
            );
        }
        parameters
    }

    /// The state of each replica.
    pub fn states(&self) -> Vec<ParameterState> {
        let parameters = self.parameters();
        parameters.replicas.iter().map(|it| it.state).collect()
    }

    /// Bytes of weights, states and latents of each device.
    pub fn held(&self) -> Vec<(u64, u64, u64)> {
        let replicas = self.parameters().replicas;
        let memory = replicas.into_iter().map(|it| it.memory);
        memory
            .map(|it| (it.weights, it.states, it.latents))
            .collect()
    }
}
