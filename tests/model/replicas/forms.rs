//! Every form has the bits of one device, runs where its homes say, and traces what one device traces.

use std::collections::BTreeMap;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};

use super::*;
use crate::backends::BACKENDS;
use crate::common::error;
use crate::groups::run;
use crate::wrapped::{Part, Wrap, Wrapped};
use kimi_linear::backend::{Batch, Draw, FedToken, Op, Result, TensorValues};
use kimi_linear::checkpoint::{Checkpoint, Preset};
use kimi_linear::config::Dtype;
use kimi_linear::model::{TraceChoice, TraceHead};
use kimi_linear::quantize;

/// Forms of a replica on up to three devices, by name: those that have an end of a change, and those in the middle of one.
fn forms(replica: usize) -> Vec<(String, Vec<LayerHome>)> {
    let mut forms = vec![
        ("whole".to_owned(), whole(replica)),
        ("whole elsewhere".to_owned(), whole(2)),
        ("experts".to_owned(), experts(replica, &[0, 1])),
        (
            "experts the other way round".to_owned(),
            experts(0, &[1, 0]),
        ),
        ("experts on others".to_owned(), experts(0, &[1, 2])),
    ];
    for count in 0..=LAYERS {
        forms.push((format!("{count} layers"), layers(count)));
    }
    let mut each = |name: &str, of: Vec<LayerHome>| {
        for layer in 1..LAYERS {
            // The middle of a change, forwards and backwards, and a single layer.
            let middle = [&of[..layer], &whole(replica)[layer..]].concat();
            forms.push((format!("{name} below layer {layer}"), middle));
            let middle = [&whole(replica)[..layer], &of[layer..]].concat();
            forms.push((format!("{name} from layer {layer}"), middle));
            let mut single = whole(replica);
            single[layer] = of[layer].clone();
            forms.push((format!("{name} of layer {layer}"), single));
        }
    };
    each("experts", experts(replica, &[0, 1]));
    each("the other device", whole(1 - replica));
    let turns = (0..LAYERS).map(|layer| LayerHome::whole(layer % 3));
    forms.push(("in turns".to_owned(), turns.collect()));
    let mut mixed = layers(2);
    (mixed[1], mixed[3]) = (home(0, &[0, 1]), home(1, &[2, 0]));
    forms.push(("layers and experts".to_owned(), mixed));
    forms
}

#[test]
fn every_form_has_the_bits_of_one_device() {
    let tokens = prompt();
    for (replica, segment) in [(0, 24), (1, 7), (0, 1)] {
        let expected = run(&mut load(backends::cpu()), &tokens, segment);
        let replicas = on_cpus(3);
        let mut model = model(&replicas, replica);
        for (name, homes) in forms(replica) {
            place(&mut model, &homes, Caches::Discard);
            let found = run(&mut model, &tokens, segment);
            assert!(
                found == expected,
                "replica {replica}, {name}, by {segment}: other bits"
            );
        }
    }
}

#[test]
fn so_it_has_with_quantised_weights_and_four_devices() {
    let tokens = prompt();
    for preset in [Preset::Q8, Preset::Q4] {
        let load = |backend: Box<dyn Backend>| {
            let checkpoint = Checkpoint::open(&reference("tiny-8"), &config()).unwrap();
            let checkpoint = quantize::while_loading(checkpoint, &config(), preset).unwrap();
            let limits = harness::limits(32, BLOCKS, Dtype::F32);
            Model::load(&config(), &checkpoint, backend, limits, &mut |_| {}).unwrap()
        };
        let expected = run(&mut load(backends::cpu()), &tokens, 24);
        let replicas = on_cpus(4);
        let mut model = load(replicas.backend(3));
        for homes in [
            whole(3),
            experts(3, &[0, 1, 2, 3]),
            experts(3, &[2, 3]),
            layers(2),
        ] {
            place(&mut model, &homes, Caches::Discard);
            let found = run(&mut model, &tokens, 24);
            assert!(found == expected, "{preset:?} {homes:?}: other bits");
        }
    }
}

/// Steps of single tokens, and steps of single layers that follow each other.
#[test]
fn other_steps_have_the_same_bits() {
    let tokens = prompt();
    let stepwise = |model: &mut Model| {
        let mut step = model.stepwise_step(model.limits().step, ALL).unwrap();
        let batch = harness::batch(&tokens[..6], 0, BLOCKS);
        step.submit(&batch).unwrap().wait().unwrap()
    };
    let by_layers = |model: &mut Model| {
        let steps = model.layer_steps(model.limits().step, ALL).unwrap();
        let batch = harness::batch(&tokens[..9], 0, BLOCKS);
        let mut outputs = Vec::new();
        for mut step in steps {
            outputs.push(step.submit(&batch).unwrap().wait().unwrap());
        }
        outputs
    };
    let mut one = load(backends::cpu());
    let expected = (stepwise(&mut one), by_layers(&mut one));
    let mut model = model(&on_cpus(3), 0);
    for (name, homes) in forms(0) {
        place(&mut model, &homes, Caches::Discard);
        assert!(stepwise(&mut model) == expected.0, "{name}, stepwise");
        assert!(by_layers(&mut model) == expected.1, "{name}, by layers");
    }
}

#[test]
fn traces_are_those_of_one_device() {
    let head = |layer| Some(TraceHead { layer, head: 5 });
    let choice = TraceChoice {
        kda: head(3),
        mla: head(2),
        vectors: true,
    };
    let traced = |model: &mut Model| {
        let mut step = model.traced_step(choice, ALL).unwrap();
        let mut frames = Vec::new();
        for (position, token) in prompt().into_iter().take(4).enumerate() {
            let batch = harness::batch(&[token], position, BLOCKS);
            let output = step.step.submit(&batch).unwrap().wait().unwrap();
            frames.push(step.frame(&output, position, token));
        }
        frames
    };
    let expected = traced(&mut load(backends::cpu()));
    let mut model = model(&on_cpus(3), 0);
    for (name, homes) in forms(0) {
        place(&mut model, &homes, Caches::Discard);
        assert_eq!(traced(&mut model), expected, "{name}");
    }
}

/// Tokens that one submission draws and the next one reads, without the host: with the head on another device than the embedding.
#[test]
fn drawn_tokens_reach_the_embedding() {
    let tokens = prompt();
    let draw = |model: &mut Model| {
        let draws = [Draw::best(0)];
        let options = StepOptions {
            draws: DrawCapacity::of(&draws),
            probe_hidden: false,
            ..ALL
        };
        let mut step = model.step(model.limits().step, options).unwrap();
        let mut position = 0;
        let mut all = Vec::new();
        for submission in 0..5 {
            let fed = submission > 0;
            let mut batch = match fed {
                true => harness::batch(&[0], position, BLOCKS),
                false => harness::batch(&tokens, 0, BLOCKS),
            };
            position += batch.tokens.len();
            batch.outputs.drain(..batch.outputs.len() - 1);
            batch.draws = draws.to_vec();
            if fed {
                batch.fed = vec![FedToken { row: 0, draw: 0 }];
            }
            all.push(step.submit(&batch).unwrap().wait().unwrap());
        }
        all
    };
    let expected = draw(&mut load(backends::cpu()));
    assert!(expected[1].logits != expected[2].logits);
    let mut model = model(&on_cpus(2), 0);
    for homes in [whole(0), whole(1), layers(3), experts(0, &[0, 1])] {
        place(&mut model, &homes, Caches::Discard);
        assert!(draw(&mut model) == expected, "{homes:?}");
    }
}

/// Notes the operations that a device runs, and damages the results of one kind.
#[derive(Clone)]
struct Watched {
    ran: Arc<Mutex<BTreeMap<&'static str, usize>>>,
    damaged: Arc<Mutex<Option<&'static str>>>,
}

impl Wrap for Watched {
    fn parts(&mut self, op: &Op, _: &mut dyn Backend) -> Result<Vec<Part>> {
        if *self.damaged.lock().unwrap() != Some(op.name()) {
            return Ok(vec![Part::plain(op.clone())]);
        }
        let written = op.operands().writes;
        Ok(vec![Part::after(op.clone(), move |backend, batch| {
            damage(backend, batch, &written)
        })])
    }

    fn submitting(&self, operations: &[&'static str]) {
        let mut ran = self.ran.lock().unwrap();
        for name in operations {
            *ran.entry(name).or_default() += 1;
        }
    }
}

fn damage(
    backend: &mut dyn Backend,
    batch: &Batch,
    tensors: &[kimi_linear::backend::Tensor],
) -> Result<()> {
    for tensor in tensors {
        let rows = batch.tokens.len();
        let values = backend.read_tensor(*tensor, rows).wait()?;
        if let TensorValues::F32(mut values) = values {
            values.iter_mut().for_each(|value| *value += 0.25);
            backend.write_tensor(*tensor, &TensorValues::F32(values))?;
        }
    }
    Ok(())
}

#[test]
fn devices_run_what_the_homes_say_and_an_error_of_any_of_them_shows() {
    let tokens = prompt();
    let watched = || Watched {
        ran: Arc::default(),
        damaged: Arc::default(),
    };
    let watch = [watched(), watched()];
    let devices = watch.clone().map(|watch| {
        let device: Box<dyn Backend> = Box::new(Wrapped::new(backends::cpu(), watch));
        device
    });
    let replicas = replicas(devices.into());
    let mut model = model(&replicas, 0);
    let once = |model: &mut Model| {
        let mut step = model.step(model.limits().step, ALL).unwrap();
        let batch = harness::batch(&tokens, 0, BLOCKS);
        step.submit(&batch).unwrap().wait().unwrap()
    };
    let expected = once(&mut model);
    let counts = |device: usize| std::mem::take(&mut *watch[device].ran.lock().unwrap());
    let home = counts(0);
    assert_eq!(
        (home["embed"], home["kda_recurrence"], home["experts"]),
        (1, 3, 4)
    );
    assert!(counts(1).is_empty());
    let damaged = |model: &mut Model, device: usize, name: &'static str| {
        *watch[device].damaged.lock().unwrap() = Some(name);
        let found = once(model);
        *watch[device].damaged.lock().unwrap() = None;
        found.logits != expected.logits
    };
    // Half of the experts: only their rows.
    place(&mut model, &experts(0, &[0, 1]), Caches::Discard);
    counts(0);
    assert!(damaged(&mut model, 1, "expert_rows"));
    assert_eq!(counts(1), BTreeMap::from([("expert_rows", 4)]));
    let home = counts(0);
    assert_eq!((home["expert_rows"], home["experts_combine"]), (4, 4));
    assert!(!home.contains_key("experts"));
    assert!(damaged(&mut model, 0, "expert_rows"));
    assert!(!damaged(&mut model, 1, "mla_block"));
    assert!(!damaged(&mut model, 1, "kda_block"));
    // The last two layers: one with states, one with latents, and the head.
    place(&mut model, &layers(3), Caches::Discard);
    counts(1);
    assert!(damaged(&mut model, 1, "kda_block"));
    let other = counts(1);
    assert_eq!(
        (other["kda_recurrence"], other["experts"], other["select"]),
        (1, 2, 1)
    );
    assert!(!other.contains_key("embed"));
    assert!(damaged(&mut model, 1, "mla_block"));
    assert!(damaged(&mut model, 1, "moe_block"));
    assert!(!damaged(&mut model, 1, "embed"));
    // At home again the other one runs nothing.
    place(&mut model, &whole(0), Caches::Discard);
    counts(1);
    assert!(once(&mut model) == expected);
    assert!(counts(1).is_empty());
}

/// What a step says of its operations, their times, and what passes between devices.
#[test]
fn parts_are_named_timed_and_counted() {
    let replicas = on_cpus(2);
    let mut model = model(&replicas, 1);
    let traffic = replicas.traffic(1);
    let tokens = prompt();
    let submit = |model: &mut Model| {
        let options = StepOptions {
            probe_hidden: false,
            keep_rows: false,
            ..ALL
        };
        let before = traffic.sent.load(Ordering::Relaxed);
        let mut step = model.step(model.limits().step, options).unwrap();
        let batch = harness::batch(&tokens, 0, BLOCKS);
        let plain = step.submit(&batch).unwrap().wait().unwrap();
        assert!(plain.milliseconds.is_empty());
        let sent = traffic.sent.load(Ordering::Relaxed) - before;
        step.time(true).unwrap();
        let timed = step.submit(&batch).unwrap().wait().unwrap();
        assert_eq!(timed.choices, plain.choices);
        let times = timed.milliseconds.into_iter();
        let times: Vec<&str> = times
            .filter(|(_, time)| *time > 0.0)
            .map(|(name, _)| name)
            .collect();
        (step.operations().to_vec(), times, sent / 24)
    };
    let names = |names: &[&str], wanted: &str| names.iter().filter(|name| **name == wanted).count();
    let (operations, _, sent) = submit(&mut model);
    assert_eq!((names(&operations, "send"), sent), (0, 0));
    // Normed rows and experts' ids to the other device; three rows of each device read, the ids again, and three rows written; in
    // four layers.
    place(&mut model, &experts(1, &[0, 1]), Caches::Discard);
    let (operations, times, sent) = submit(&mut model);
    assert_eq!(names(&operations, "send"), 4);
    assert_eq!(names(&operations, "expert_exchange"), 4);
    assert_eq!(sent, 4 * 4 * (2 * (64 + 3) + (2 * 3 * 64) + 3 + 3 * 64));
    assert_eq!(traffic.per_token.load(Ordering::Relaxed), sent);
    assert!(
        ["embed", "send", "expert_exchange", "expert_rows"]
            .iter()
            .all(|it| times.contains(it))
    );
    // The residual stream, once read and once written.
    place(&mut model, &layers(2), Caches::Discard);
    let (operations, times, sent) = submit(&mut model);
    assert_eq!(names(&operations, "send"), 1);
    assert_eq!(sent, 4 * 2 * 64);
    assert!(times.contains(&"send"));
}

#[test]
fn replicas_on_other_backends_agree_with_one_device() {
    let tokens = prompt();
    for (name, open) in &BACKENDS[1..] {
        let expected = run(&mut load(open()), &tokens, 11);
        let replicas = replicas(vec![open(), open()]);
        let mut model = model(&replicas, 0);
        assert_eq!(
            model.backend().is_asynchronous(),
            open().is_asynchronous(),
            "{name}"
        );
        let exact = open().device().precision == Dtype::F32;
        for (form, homes) in [
            ("whole", whole(0)),
            ("experts", experts(0, &[0, 1])),
            ("layers", layers(2)),
            ("whole again", whole(0)),
        ] {
            place(&mut model, &homes, Caches::Discard);
            let found = run(&mut model, &tokens, 11);
            if exact || form != "experts" {
                assert!(found == expected, "{name} {form}: other bits");
                continue;
            }
            // A bf16 device computes the shared experts of a single row as one more expert, except where these are divided.
            let len = tokens.len() * expected.0.len() / (tokens.len() + 23);
            let error = error(&found.0[..len], &expected.0[..len]);
            println!("{name} {form}: {error:.2e}");
            assert!(error <= 3e-2, "{name} {form}: {error:e}");
        }
        place(&mut model, &layers(2), Caches::Discard);
        assert!(!model.backend().is_asynchronous(), "{name}");
    }
}
