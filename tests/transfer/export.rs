//! The sender's side: records are sent while the prompt is prefilled, without waiting for their reader.

use std::sync::{Arc, Mutex};

use kimi_linear::backend::{Backend, Op, Result};
use kimi_linear::cache::{LayerRecord, LayerTensor};
use kimi_linear::config::Dtype;
use kimi_linear::engine::{Engine, ExportStream, Request, RequestId};
use pollster::block_on;

use crate::engine_harness::{
    OPTIONS, Outcomes, answer, collect, engine, engine_as, engine_on, finish, limits, request,
    tokens,
};
use crate::wrapped::{Part, Wrap, Wrapped};
use crate::{BACKENDS, LENGTH, Limits, cpu, exported, on, prompt, with_pool};

/// Called with the names of a submission's operations.
type Watcher = dyn FnMut(&[&'static str]) + Send;

/// Calls a function before each submission.
#[derive(Clone)]
struct Watched(Arc<Mutex<Watcher>>);

impl Wrap for Watched {
    fn parts(&mut self, op: &Op, _backend: &mut dyn Backend) -> Result<Vec<Part>> {
        Ok(vec![Part::plain(op.clone())])
    }

    fn submitting(&self, operations: &[&'static str]) {
        (self.0.lock().unwrap())(operations);
    }
}

/// The last segment runs in parts of one layer each, also where the layers are on several devices.
#[test]
fn layers_on_several_devices_are_those_of_one() {
    for name in ["tiny-a", "tiny-128"] {
        let (header, records) = exported(on(cpu, name));
        let stages = crate::group::group(name, [1, 1, 2], cpu);
        let engine = engine_on(stages, name, limits(2, 5, 40), OPTIONS);
        let (found, others) = exported(engine);
        assert_eq!(found.tokens, header.tokens, "{name}");
        assert!(records == others, "{name}");
    }
}

/// Before the last layer's part is submitted, the reader has the first layer's record.
#[test]
fn the_first_layer_leaves_before_the_last_is_computed() {
    for (name, open) in BACKENDS {
        let stream = Arc::<Mutex<Option<ExportStream>>>::default();
        let seen = Arc::<Mutex<Vec<LayerRecord>>>::default();
        let (reader, records) = (Arc::clone(&stream), Arc::clone(&seen));
        let mut parts = 0;
        let before = move |operations: &[&'static str]| {
            parts += 1;
            if operations.contains(&"select") && parts > 1 {
                let mut stream = reader.lock().unwrap();
                while let Some(record) = stream.as_mut().unwrap().try_next() {
                    records.lock().unwrap().push(record.unwrap());
                }
            }
        };
        let watched = Watched(Arc::new(Mutex::new(before)));
        let backend = Box::new(Wrapped::new(open(), watched));
        // A prompt of one segment: none of its records exist before its only pass.
        let mut engine = engine_on(backend, "tiny-a", limits(2, 5, 40), OPTIONS);
        let short = request(tokens(1, 40), 0);
        *stream.lock().unwrap() = Some(engine.export(RequestId(1), short, 64).unwrap());
        while block_on(engine.step()) {}
        let seen = seen.lock().unwrap();
        let layers: Vec<_> = seen.iter().map(|it| (it.tensor, it.layer)).collect();
        assert_eq!(layers[0], (LayerTensor::State, 0), "{name}: {layers:?}");
        let rest = stream.lock().unwrap().take().unwrap();
        let rest: Vec<LayerRecord> = rest.map(|record| record.unwrap()).collect();
        assert!(!rest.is_empty(), "{name}: all had left");
        // And they are final: identical to the records read at the end.
        let after = exported_short(on(*open, "tiny-a"));
        let mut all = [seen.clone(), rest].concat();
        all.sort_by_key(|it| (it.tensor, it.layer, it.positions.start));
        assert_eq!(all, after, "{name}");
    }
}

/// The caches of the same prompt after one step of the whole pass: from a snapshot.
fn exported_short(mut engine: Engine) -> Vec<LayerRecord> {
    let prompt = tokens(1, 40);
    let _ = answer(&mut engine, request(prompt.clone(), 0));
    let mut records = block_on(engine.snapshot(&prompt)).unwrap().records();
    records.sort_by_key(|it| (it.tensor, it.layer, it.positions.start));
    records
}

/// A reader that takes no record stops nothing, and finds all of them afterwards; a dropped one leaves nothing behind.
#[test]
fn a_slow_reader_stalls_nobody_and_a_lost_one_leaks_nothing() {
    let known = exported(on(cpu, "tiny-a")).1;
    let mut engine = engine("tiny-a", limits(2, 3, 24), OPTIONS);
    let mut alone = on(cpu, "tiny-a");
    let mut stream = engine
        .export(RequestId(1), request(prompt(), 0), 1)
        .unwrap();
    let mut outcomes = Outcomes::new();
    // These need all slots and blocks.
    let others = || {
        (2..6).map(|id| {
            (
                id,
                Request {
                    reuse: false,
                    ..request(tokens(id, 200), 30)
                },
            )
        })
    };
    for (id, request) in others() {
        engine.submit(RequestId(id), request).unwrap();
    }
    while block_on(engine.step()) {
        let found = engine.occupancy();
        let used = (
            found.slots - found.idle_slots,
            found.blocks - found.idle_blocks,
        );
        assert_eq!(used, engine.held());
    }
    collect(&mut engine, &mut outcomes);
    for (id, request) in others() {
        let found = &outcomes[&(RequestId(id), 0)];
        assert_eq!(
            found.said(),
            answer(&mut alone, request).said(),
            "request {id}"
        );
    }
    let mut records = Vec::new();
    loop {
        while let Some(record) = stream.try_next() {
            records.push(record.unwrap());
        }
        if records.len() == known.len() {
            break;
        }
        engine.send_exports();
    }
    assert!(stream.next().is_none());
    assert_eq!(records, known);

    let stream = engine
        .export(RequestId(1), request(tokens(9, LENGTH), 0), 1)
        .unwrap();
    while block_on(engine.step()) {}
    assert!(engine.held() != (0, 0), "what found no room is held");
    drop(stream);
    engine.send_exports();
    assert_eq!(engine.held(), (0, 0));
    engine.clear_cache();
    let left = engine.occupancy();
    assert_eq!((left.slots, left.blocks, left.host_bytes), (0, 0, 0));
}

#[test]
fn a_request_that_fails_ends_its_stream_with_the_error() {
    let mut engine = on(cpu, "tiny-a");
    let mut stream = engine
        .export(RequestId(1), request(prompt(), 0), 64)
        .unwrap();
    block_on(engine.step());
    engine.cancel(RequestId(1));
    block_on(engine.step());
    let last = stream.by_ref().last().unwrap();
    assert_eq!(
        last.unwrap_err().to_string(),
        "the request whose caches were sent was cancelled"
    );
}

/// A layer's latents are sent in their pool's dtype: 16 bits per number are half the bytes of 32, in records and in host
/// memory.
#[test]
fn records_and_host_memory_of_a_narrow_pool_take_half_the_bytes() {
    for (name, open) in BACKENDS {
        let [wide, narrow, other] = [Dtype::F32, Dtype::Bf16, Dtype::F16].map(|dtype| {
            let records = exported(with_pool(*open, "tiny-a", dtype)).1;
            let of = |it: &LayerRecord| (it.tensor, it.layer, it.positions.clone());
            let mut bytes: Vec<_> = records.iter().map(|it| (of(it), it.bytes.len())).collect();
            bytes.sort_by_key(|(of, _)| (of.0, of.1, of.2.start));
            let latents = records
                .iter()
                .filter(|it| it.tensor == LayerTensor::Latents);
            assert!(
                latents.clone().count() > 0 && latents.clone().all(|it| it.dtype == dtype),
                "{name}"
            );
            bytes
        });
        assert_eq!(narrow, other, "{name}");
        assert_eq!(wide.len(), narrow.len(), "{name}");
        for ((of, wide), (same, narrow)) in wide.iter().zip(&narrow) {
            let part = if of.0 == LayerTensor::Latents { 2 } else { 1 };
            assert_eq!((of, *wide), (same, part * narrow), "{name}");
        }
    }
    let [wide, narrow, other] = [Dtype::F32, Dtype::Bf16, Dtype::F16].map(swapped_latents);
    assert!(wide > 0, "something has left the device");
    assert_eq!((wide, wide), (2 * narrow, 2 * other));
}

/// Bytes of latents in host memory after prompts have evicted each other from the device.
fn swapped_latents(cache: Dtype) -> u64 {
    let limits = Limits {
        cache,
        ..limits(1, 3, 16)
    };
    let mut engine = engine_as(cpu(), "tiny-a", limits, OPTIONS);
    for seed in 1..5 {
        engine
            .submit(RequestId(seed), request(tokens(seed, 150), 1))
            .unwrap();
        finish(&mut engine, &mut Outcomes::new());
    }
    let states = engine.cache_layout().states;
    let state = 4 * (states.layers * (states.state_len() + states.conv_state_len())) as u64;
    let found = engine.occupancy();
    found.host_bytes - found.host_checkpoints as u64 * state
}
