//! Layers that move in the middle of a sequence, with their caches: its answer stays the same, to the bit.

use super::*;
use crate::backends::BACKENDS;
use crate::wrapped::{Part, Wrap, Wrapped};
use kimi_linear::backend::{Op, Result, Slot};
use kimi_linear::checkpoint::{Checkpoint, Preset};
use kimi_linear::error::BackendError;
use kimi_linear::model::LayerCache;
use kimi_linear::quantize;

/// The ends of changes, from and to.
fn changes() -> Vec<[Vec<LayerHome>; 2]> {
    let forms = [
        whole(0),
        whole(1),
        experts(0, &[0, 1]),
        layers(1),
        layers(4),
    ];
    let mut changes = Vec::new();
    for from in &forms {
        for to in &forms {
            if from != to {
                changes.push([from.clone(), to.clone()]);
            }
        }
    }
    changes
}

/// One layer is placed before each submission, and then back.
#[test]
fn a_sequence_goes_on_while_layers_move() {
    let expected = alone();
    let replicas = on_cpus(2);
    for [from, to] in changes() {
        let mut model = model(&replicas, 0);
        place(&mut model, &from, Caches::Discard);
        let found = Sequence::run(&mut model, |model, submission| {
            let layer = submission % LAYERS;
            let homes = if submission < LAYERS { &to } else { &from };
            let backend = model.backend();
            backend.place(layer, &homes[layer], Caches::Keep).unwrap();
        });
        assert!(found == expected, "{from:?} to {to:?}: other bits");
    }
}

/// The same without the caches: the test above would notice.
#[test]
fn caches_that_are_discarded_are_missed() {
    let expected = alone();
    for layer in 0..LAYERS {
        let mut model = model(&on_cpus(2), 0);
        let found = Sequence::run(&mut model, |model, submission| {
            if submission == 4 {
                let to = LayerHome::whole(1);
                model.backend().place(layer, &to, Caches::Discard).unwrap();
            }
        });
        assert!(found.outputs[..4] == expected.outputs[..4]);
        assert!(found.outputs[4] != expected.outputs[4], "layer {layer}");
    }
}

/// Every slot and every block moves, also those that no sequence has.
#[test]
fn all_of_a_layers_caches_move() {
    let mut model = model(&on_cpus(2), 0);
    model.fill_caches(7).unwrap();
    let all = |model: &mut Model| {
        let (states, latents) = (model.states(), model.latents());
        let mut found = (Vec::new(), Vec::new());
        for layer in 0..LAYERS {
            match model.layer_cache(layer) {
                LayerCache::State(at) => {
                    for slot in 0..states.layout.slots as u32 {
                        let read = model.backend().read_state(&states, at, Slot(slot));
                        found.0.push(read.wait().unwrap());
                    }
                }
                LayerCache::Latents(at) => {
                    for block in 0..latents.layout.blocks as u32 {
                        let block = kimi_linear::backend::Block(block);
                        let tokens = latents.layout.block_tokens;
                        let read = model.backend().read_latents(&latents, at, block, tokens);
                        found.1.push(read.wait().unwrap());
                    }
                }
            }
        }
        found
    };
    let before = all(&mut model);
    // Random numbers are those of a single device.
    let mut one = load(backends::cpu());
    one.fill_caches(7).unwrap();
    assert!(before == all(&mut one));
    for homes in [layers(2), whole(1), experts(0, &[0, 1]), whole(0)] {
        place(&mut model, &homes, Caches::Keep);
        assert!(all(&mut model) == before, "{homes:?}");
    }
}

/// Pools change their size in every form, and keep what they have.
#[test]
fn pools_grow_and_shrink_in_every_form() {
    let expected = alone();
    for homes in [whole(0), experts(0, &[0, 1]), layers(2)] {
        let replicas = on_cpus(2);
        let mut model = model(&replicas, 0);
        let memory = |device| replicas.memory(device);
        let found = Sequence::run(&mut model, |model, submission| match submission {
            2 => place(model, &homes, Caches::Keep),
            3 => model.resize(5, BLOCKS + 3).unwrap(),
            5 => place(model, &whole(1), Caches::Keep),
            6 => {
                let both = memory(0) + memory(1);
                let [states, latents] = [
                    model.states().layout.bytes(),
                    model.latents().layout.bytes(),
                ];
                assert_eq!((both.states, both.latents), (states, latents));
                assert_eq!((memory(0).states, memory(0).latents), (0, 0));
                place(model, &homes, Caches::Keep);
            }
            8 => model.resize(2, BLOCKS).unwrap(),
            _ => {}
        });
        assert!(found == expected, "{homes:?}: other bits");
    }
}

#[test]
fn a_step_of_before_a_change_is_refused() {
    let mut model = model(&on_cpus(2), 0);
    let batch = harness::batch(&prompt(), 0, BLOCKS);
    type Change = fn(&mut Model);
    let changes: [(&str, Change); 3] = [
        ("those of when the step was compiled", |model| {
            place(model, &experts(0, &[0, 1]), Caches::Keep);
        }),
        ("those of when the step was compiled", |model| {
            place(model, &layers(2), Caches::Discard);
        }),
        ("one of before its size changed", |model| {
            model.resize(3, BLOCKS).unwrap();
        }),
    ];
    for (expected, change) in changes {
        let mut step = model.step(model.limits().step, ALL).unwrap();
        step.submit(&batch).unwrap().wait().unwrap();
        // Nothing changes with what is refused, or is so already.
        let backend = model.backend();
        let refused = backend.place(LAYERS, &LayerHome::whole(0), Caches::Keep);
        assert!(refused.is_err());
        model.resize(model.limits().slots, BLOCKS).unwrap();
        step.submit(&batch).unwrap().wait().unwrap();
        change(&mut model);
        let error = step.submit(&batch).err().unwrap().to_string();
        assert!(error.contains(expected), "{error}");
    }
}

#[test]
fn homes_that_cannot_be_are_refused() {
    let replicas = on_cpus(2);
    let mut model = model(&replicas, 0);
    let mut refused = |layer: usize, home: &LayerHome| {
        let error = model.backend().place(layer, home, Caches::Keep);
        error.unwrap_err().to_string()
    };
    let cases = [
        (
            5,
            home(0, &[0]),
            "a layer's home: the layer should be below 5, but is 5",
        ),
        (
            1,
            home(2, &[0, 1]),
            "a layer's home: the device should be below 2, but is 2",
        ),
        (
            1,
            home(0, &[0, 3]),
            "a layer's home: the device should be below 2, but is 3",
        ),
        (
            1,
            home(0, &[1]),
            "a layer's home: the device of the experts should be 0, that of the layer, or several, but is 1",
        ),
        (
            1,
            home(0, &[1, 1]),
            "a layer's home: the devices of the experts should be named once each, but is [1, 1]",
        ),
        (
            1,
            home(0, &[]),
            "several devices: the expert parallel size should be at least 1, but is 0",
        ),
    ];
    for (layer, home, expected) in cases {
        assert_eq!(refused(layer, &home), expected);
    }
    replicas.lose(1);
    let error = refused(1, &home(0, &[0, 1]));
    assert!(error.contains("device 1 is gone"), "{error}");
    // Eight experts on three devices.
    let mut model = model_of_three();
    let error = model.backend().place(1, &home(0, &[0, 1, 2]), Caches::Keep);
    assert_eq!(
        error.unwrap_err().to_string(),
        "expert parallelism of degree 3: the model has 8 experts: the degrees 1, 2, 4 and 8 work"
    );
    // Only a replica moves layers.
    let error = backends::cpu().place(1, &LayerHome::whole(0), Caches::Keep);
    assert!(matches!(error, Err(BackendError::Unsupported { .. })));
}

fn model_of_three() -> Model {
    model(&on_cpus(3), 2)
}

#[test]
fn replicas_that_cannot_be_are_refused() {
    let refused = |devices| Replicas::new(devices, &config()).err().unwrap().to_string();
    assert_eq!(
        refused(Vec::new()),
        "several devices: their number should be at least 1, but is 0"
    );
    let group = crate::group::group("tiny-8", [1, 1, 2], backends::cpu);
    assert_eq!(
        refused(vec![backends::cpu(), group]),
        "replicas: the number of devices of each should be 1, but is 2"
    );
    // Replicas load one model: the same tensors in other formats are another one.
    let replicas = on_cpus(2);
    let first = model(&replicas, 0);
    let checkpoint = Checkpoint::open(&reference("tiny-8"), &config()).unwrap();
    let checkpoint = quantize::while_loading(checkpoint, &config(), Preset::Q8).unwrap();
    let limits = *first.limits();
    let backend = replicas.backend(1);
    let second = Model::load(&config(), &checkpoint, backend, limits, &mut |_| {});
    let error = second.err().unwrap().to_string();
    assert!(
        error.contains("what replicas of one model load at the same point"),
        "{error}"
    );
}

/// A move is made of reads and writes: one that loses a row is found by the sequence.
#[derive(Clone)]
struct Forgetful;

impl Wrap for Forgetful {
    fn parts(&mut self, op: &Op, _: &mut dyn Backend) -> Result<Vec<Part>> {
        let Op::MlaBlock(block) = op else {
            return Ok(vec![Part::plain(op.clone())]);
        };
        let (pool, layer) = (block.pool, block.layer);
        // The second token of the first block.
        Ok(vec![Part::before(
            move |backend, batch| {
                let block = batch.segments[0].blocks[0];
                let mut record = backend.read_latents(&pool, layer, block, 2).wait()?;
                let row = record.row_bytes();
                record.rows[row..].fill(0);
                backend.write_latents(&pool, layer, block, &record)
            },
            op.clone(),
        )])
    }
}

#[test]
fn a_row_that_is_lost_on_the_other_device_shows() {
    let expected = alone();
    let other = Box::new(Wrapped::new(backends::cpu(), Forgetful));
    let replicas = replicas(vec![backends::cpu(), other]);
    let mut model = model(&replicas, 0);
    let found = Sequence::run(&mut model, |model, submission| {
        if submission == 4 {
            place(model, &layers(4), Caches::Keep);
        }
    });
    assert!(found.outputs[..4] == expected.outputs[..4]);
    assert!(found.outputs[5..] != expected.outputs[5..]);
}

#[test]
fn layers_move_between_other_devices() {
    for (name, open) in &BACKENDS[1..] {
        let expected = Sequence::run(&mut load(open()), |_, _| ());
        let replicas = replicas(vec![open(), open()]);
        let mut model = model(&replicas, 0);
        let found = Sequence::run(&mut model, |model, submission| match submission {
            2 | 7 => place(model, &layers(2), Caches::Keep),
            3 => model.resize(4, BLOCKS + 1).unwrap(),
            5 | 9 => place(model, &whole(0), Caches::Keep),
            6 => place(model, &whole(1), Caches::Keep),
            _ => {}
        });
        assert!(found == expected, "{name}: other bits");
    }
}
