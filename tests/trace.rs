//! The trace: its numbers are those of naive double-precision code, and without it nothing is different.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

mod engine_harness;

use engine_harness::{
    OPTIONS, Outcomes, answer, collect, engine_on, limits, load_on, request, tokens,
};
use kimi_linear::backend::cpu::CpuBackend;
use kimi_linear::backend::trace::{KDA_NUMBERS, TraceAttention, TraceGate, TraceKda};
use kimi_linear::backend::{
    Backend, Batch, Block, Capacity, Element, LatentLayout, LatentRecord, Orientation, Piece, Rows,
    Shard, Slot, StateLayout, StateRecord, TensorValues, WeightSource,
};
use kimi_linear::checkpoint::Format;
use kimi_linear::config::Dtype;
use kimi_linear::engine::{Engine, Event, PromptScores, Request, RequestId};
use kimi_linear::model::{Limits, Recording, StateTrace, TraceChoice, TraceFrame, TraceHead};
use pollster::block_on;

const BOUND: f64 = 1e-5;

fn cpu() -> Box<dyn Backend> {
    Box::new(CpuBackend::new())
}

/// What runs on every backend of this build.
type Make = fn() -> Box<dyn Backend>;

#[cfg(not(feature = "wgpu"))]
const BACKENDS: &[Make] = &[cpu];
#[cfg(feature = "wgpu")]
const BACKENDS: &[Make] = &[cpu, gpu::whole, gpu::cut];

/// The names that `--backend` takes of them.
#[cfg(not(feature = "wgpu"))]
const NAMES: &[&str] = &["cpu"];
#[cfg(feature = "wgpu")]
const NAMES: &[&str] = &["cpu", "wgpu"];

#[cfg(feature = "wgpu")]
mod gpu {
    use kimi_linear::backend::Backend;
    use kimi_linear::backend::wgpu::{Options, WgpuBackend};

    fn open(options: Options) -> Box<dyn Backend> {
        let backend = WgpuBackend::with_options(options);
        Box::new(backend.unwrap_or_else(|error| {
            panic!("{error}. These tests need a Vulkan driver: apt-get install mesa-vulkan-drivers libvulkan1")
        }))
    }

    pub(super) fn whole() -> Box<dyn Backend> {
        open(Options::default())
    }

    /// Without subgroups, and with weights cut into buffers of a few rows.
    pub(super) fn cut() -> Box<dyn Backend> {
        open(Options {
            subgroups: false,
            weight_limit: Some(300),
            ..Options::default()
        })
    }
}

#[track_caller]
fn close(what: &str, found: f32, expected: f64) {
    let error = (f64::from(found) - expected).abs() / expected.abs().max(1e-3);
    assert!(error <= BOUND, "{what}: {found} against {expected}");
}

/// Numbers between -1 and 1, from a seed.
fn numbers(seed: u64, count: usize) -> Vec<f32> {
    tokens(seed, count)
        .into_iter()
        .map(|token| token as f32 / 125.0 - 1.0)
        .collect()
}

fn sigmoid(x: f32) -> f64 {
    1.0 / (1.0 + (-f64::from(x)).exp())
}

const ONE: Capacity = Capacity {
    tokens: 1,
    pieces: 1,
    outputs: 1,
    blocks: 8,
    checkpoints: 0,
};

fn one_token(position: usize, slot_in: Option<Slot>) -> Batch {
    Batch {
        tokens: vec![0],
        pieces: vec![Piece {
            length: 1,
            position,
            slot_in,
            slot_out: Slot(1),
            checkpoints: Vec::new(),
            blocks: (0..8).rev().map(Block).collect(),
        }],
        outputs: Vec::new(),
    }
}

#[test]
fn the_numbers_of_a_state_are_those_of_naive_code() {
    BACKENDS.iter().for_each(|backend| check_state(backend()));
}

fn check_state(mut backend: Box<dyn Backend>) {
    let (heads, k, v) = (3, 8, 6);
    let layout = StateLayout {
        layers: 2,
        key_heads: heads,
        value_heads: heads,
        key_width: k,
        value_width: v,
        taps: 4,
        slots: 2,
    };
    let pool = backend.state_pool(layout).unwrap();
    let mut plan = |width, element| backend.tensor(Rows::Tokens, 1, width, element).unwrap();
    let qkv = plan(layout.channels(), Element::Activation);
    let (gates, beta) = (plan(heads * k, Element::F32), plan(heads, Element::F32));
    let output = plan(heads * KDA_NUMBERS, Element::F32);
    let (gate, opened) = (
        plan(heads * v, Element::Activation),
        plan(heads, Element::F32),
    );
    let qkv_values = numbers(1, layout.channels());
    let gate_values: Vec<f32> = numbers(2, heads * k)
        .iter()
        .map(|x| -x.abs() * 3.0)
        .collect();
    let beta_values: Vec<f32> = numbers(3, heads).iter().map(|x| x.abs()).collect();
    let opening = numbers(4, heads * v);
    let state = numbers(5, layout.state_len());
    for (tensor, values) in [
        (qkv, &qkv_values),
        (gates, &gate_values),
        (beta, &beta_values),
        (gate, &opening),
    ] {
        backend
            .write_tensor(tensor, &TensorValues::F32(values.clone()))
            .unwrap();
    }
    let record = StateRecord {
        orientation: Orientation::KeyValue,
        heads,
        key_width: k,
        value_width: v,
        state: state.clone(),
        channels: layout.channels(),
        tail: vec![0.0; layout.tail_len()],
    };
    backend.write_state(&pool, 1, Slot(0), &record).unwrap();
    let mut step = backend.step(ONE).unwrap();
    step.trace_kda(TraceKda {
        qkv,
        gates,
        beta,
        pool,
        layer: 1,
        output,
    })
    .unwrap();
    step.probe(output).unwrap();
    step.trace_gate(TraceGate {
        gate,
        output: opened,
    })
    .unwrap();
    step.probe(opened).unwrap();
    for slot_in in [Some(Slot(0)), None] {
        let found = step.submit(&one_token(9, slot_in)).unwrap().wait().unwrap();
        let [kda, open] = [0, 1].map(|i| found.probes[i].as_f32().unwrap().to_vec());
        for head in 0..heads {
            let raw: Vec<f64> = (0..k)
                .map(|d| f64::from(qkv_values[(heads + head) * k + d]))
                .collect();
            let norm = (raw.iter().map(|x| x * x).sum::<f64>() + 1e-6).sqrt();
            let decay: Vec<f64> = (0..k)
                .map(|d| f64::from(gate_values[head * k + d]).exp())
                .collect();
            let strength = f64::from(beta_values[head]);
            // S <- diag(e^g) S; u = beta (v - S^T k); S <- S + k u^T.
            let mut s = vec![vec![0.0; v]; k];
            if slot_in.is_some() {
                for d in 0..k {
                    for e in 0..v {
                        s[d][e] = decay[d] * f64::from(state[(head * k + d) * v + e]);
                    }
                }
            }
            let (mut after, mut write, mut error) = (0.0, 0.0, 0.0);
            for e in 0..v {
                let answered: f64 = (0..k).map(|d| s[d][e] * raw[d] / norm).sum();
                let wrong = f64::from(qkv_values[2 * heads * k + head * v + e]) - answered;
                error += wrong * wrong;
                for d in 0..k {
                    let added = raw[d] / norm * strength * wrong;
                    write += added * added;
                    after += (s[d][e] + added) * (s[d][e] + added);
                }
            }
            let mean = decay.iter().sum::<f64>() / k as f64;
            let expected = [after.sqrt(), write.sqrt(), error.sqrt(), mean, strength];
            for (i, expected) in expected.into_iter().enumerate() {
                close(
                    &format!("number {i} of head {head}"),
                    kda[head * KDA_NUMBERS + i],
                    expected,
                );
            }
            let opening = opening[head * v..(head + 1) * v]
                .iter()
                .map(|x| sigmoid(*x))
                .sum::<f64>()
                / v as f64;
            close("the gate", open[head], opening);
        }
    }
}

#[test]
fn attention_is_that_of_naive_code() {
    BACKENDS
        .iter()
        .for_each(|backend| check_attention(backend()));
}

fn check_attention(mut backend: Box<dyn Backend>) {
    let (heads, head, latent, rope, nope, value, block) = (2, 1, 6, 3, 4, 5, 4);
    let layout = LatentLayout {
        layers: 2,
        latent,
        rope,
        block_tokens: block,
        blocks: 8,
        dtype: Dtype::F32,
    };
    let pool = backend.latent_pool(layout).unwrap();
    let kv_b_values = numbers(1, heads * (nope + value) * latent);
    let kv_b = backend
        .weight(WeightSource {
            name: "kv_b".to_owned(),
            format: Format::F32,
            stack: 1,
            rows: heads * (nope + value),
            columns: latent,
            stored_columns: latent,
            first_column: 0,
            parts: vec![bytemuck::allocation::pod_collect_to_vec::<f32, u8>(&kv_b_values).into()],
            shard: Shard::WHOLE,
        })
        .unwrap();
    let query = backend
        .tensor(Rows::Tokens, 1, heads * (nope + rope), Element::Activation)
        .unwrap();
    let output = backend.tensor(Rows::Tokens, 1, 32, Element::F32).unwrap();
    let query_values = numbers(2, heads * (nope + rope));
    backend
        .write_tensor(query, &TensorValues::F32(query_values.clone()))
        .unwrap();
    let rows: Vec<Vec<f32>> = (0..8)
        .map(|i| numbers(10 + i, block * (latent + rope)))
        .collect();
    for (i, rows) in rows.iter().enumerate() {
        // Block tables run backwards: the first tokens are in the last block.
        let record = LatentRecord {
            latent,
            rope,
            rows: rows.clone(),
        };
        backend
            .write_latents(&pool, 1, Block(7 - i as u32), &record)
            .unwrap();
    }
    let mut step = backend.step(ONE).unwrap();
    step.trace_attention(TraceAttention {
        query,
        kv_b,
        nope,
        value,
        pool,
        layer: 1,
        head,
        output,
    })
    .unwrap();
    step.probe(output).unwrap();
    for position in [0, 3, 17, 31] {
        let found = step
            .submit(&one_token(position, None))
            .unwrap()
            .wait()
            .unwrap();
        let weights = found.probes[0].as_f32().unwrap();
        let query = &query_values[head * (nope + rope)..];
        let scores: Vec<f64> = (0..=position)
            .map(|at| {
                let row = &rows[at / block][at % block * (latent + rope)..];
                // The key as it is published: expanded, then the shared part.
                let key = |d: usize| -> f64 {
                    if d >= nope {
                        return f64::from(row[latent + d - nope]);
                    }
                    let expansion = &kv_b_values[(head * (nope + value) + d) * latent..];
                    (0..latent)
                        .map(|c| f64::from(expansion[c]) * f64::from(row[c]))
                        .sum()
                };
                let dot: f64 = (0..nope + rope).map(|d| f64::from(query[d]) * key(d)).sum();
                dot / ((nope + rope) as f64).sqrt()
            })
            .collect();
        let sum: f64 = scores.iter().map(|score| score.exp()).sum();
        for (at, score) in scores.iter().enumerate() {
            close(
                &format!("position {at} of {position}"),
                weights[at],
                score.exp() / sum,
            );
        }
        assert!(weights[position + 1..].iter().all(|weight| *weight == 0.0));
    }
}

/// The three operations over a piece of two tokens and a single one.
fn ragged(mut backend: Box<dyn Backend>) -> [Vec<f32>; 3] {
    let (heads, k, v, latent, rope, nope, value) = (4, 70, 130, 66, 3, 5, 6);
    let capacity = Capacity {
        tokens: 3,
        pieces: 2,
        blocks: 16,
        ..ONE
    };
    let states = backend
        .state_pool(StateLayout {
            layers: 1,
            key_heads: 2,
            value_heads: heads,
            key_width: k,
            value_width: v,
            taps: 4,
            slots: 3,
        })
        .unwrap();
    let latents = backend
        .latent_pool(LatentLayout {
            layers: 1,
            latent,
            rope,
            block_tokens: 16,
            blocks: 9,
            dtype: Dtype::F32,
        })
        .unwrap();
    let layout = states.layout;
    let record = StateRecord {
        orientation: Orientation::KeyValue,
        heads,
        key_width: k,
        value_width: v,
        state: numbers(1, layout.state_len()),
        channels: layout.channels(),
        tail: vec![0.0; layout.tail_len()],
    };
    backend.write_state(&states, 0, Slot(0), &record).unwrap();
    for i in 0..9 {
        let rows = numbers(20 + i, 16 * (latent + rope));
        let record = LatentRecord { latent, rope, rows };
        backend
            .write_latents(&latents, 0, Block(i as u32), &record)
            .unwrap();
    }
    let rows = heads * (nope + value);
    let kv_b = backend
        .weight(WeightSource {
            name: "kv_b".to_owned(),
            format: Format::F32,
            stack: 1,
            rows,
            columns: latent,
            stored_columns: latent,
            first_column: 0,
            parts: vec![
                bytemuck::allocation::pod_collect_to_vec::<f32, u8>(&numbers(9, rows * latent))
                    .into(),
            ],
            shard: Shard::WHOLE,
        })
        .unwrap();
    let mut plan = |seed, width, element| {
        let tensor = backend.tensor(Rows::Tokens, 3, width, element).unwrap();
        let values = numbers(seed, 3 * width);
        // Decay is negative; all else may be anything.
        let values = values.iter().map(|x| if seed == 3 { -x.abs() } else { *x });
        backend
            .write_tensor(tensor, &TensorValues::F32(values.collect()))
            .unwrap();
        tensor
    };
    let qkv = plan(2, layout.channels(), Element::Activation);
    let gates = plan(3, heads * k, Element::F32);
    let beta = plan(4, heads, Element::F32);
    let gate = plan(5, heads * v, Element::Activation);
    let query = plan(6, heads * (nope + rope), Element::Activation);
    // What was there before must not be left.
    let outputs = [heads * KDA_NUMBERS, heads, 128].map(|width| plan(7, width, Element::F32));
    let mut step = backend.step(capacity).unwrap();
    step.trace_kda(TraceKda {
        qkv,
        gates,
        beta,
        pool: states,
        layer: 0,
        output: outputs[0],
    })
    .unwrap();
    step.trace_gate(TraceGate {
        gate,
        output: outputs[1],
    })
    .unwrap();
    step.trace_attention(TraceAttention {
        query,
        kv_b,
        nope,
        value,
        pool: latents,
        layer: 0,
        head: 2,
        output: outputs[2],
    })
    .unwrap();
    for output in outputs {
        step.probe(output).unwrap();
    }
    let piece = |length, position, slot: u32, blocks: std::ops::Range<u32>| Piece {
        length,
        position,
        slot_in: (slot == 0).then_some(Slot(0)),
        slot_out: Slot(slot + 1),
        checkpoints: Vec::new(),
        blocks: blocks.rev().map(Block).collect(),
    };
    let batch = Batch {
        tokens: vec![0; 3],
        pieces: vec![piece(2, 9, 1, 0..1), piece(1, 100, 0, 1..9)],
        outputs: Vec::new(),
    };
    let found = step.submit(&batch).unwrap().wait().unwrap();
    assert_eq!(found.milliseconds, [], "nobody asked for times");
    [0, 1, 2].map(|i| found.probes[i].as_f32().unwrap().to_vec())
}

#[test]
fn only_single_tokens_are_told_of() {
    let expected = ragged(cpu());
    for backend in BACKENDS {
        for (expected, found) in expected.iter().zip(ragged(backend())) {
            let (others, single) = found.split_at(found.len() / 3 * 2);
            assert!(others.iter().all(|number| *number == 0.0), "{others:?}");
            assert!(single.iter().any(|number| *number != 0.0));
            for (found, expected) in found.iter().zip(expected) {
                close("a number", *found, f64::from(*expected));
            }
        }
    }
}

/// One backend of a kind, for whole models: the other cuts weights finer than a model's rows.
const WHOLE: &[Make] = BACKENDS.split_at(NAMES.len()).0;

fn engine(backend: Make, limits: Limits) -> Engine {
    engine_on(backend(), "tiny-a", limits, OPTIONS)
}

/// The frames of one request that runs alone.
fn frames(backend: Make, name: &str, request: Request) -> Vec<TraceFrame> {
    let mut engine = engine_on(backend(), name, limits(1, 4, 16), OPTIONS);
    engine.submit(RequestId(1), request).unwrap();
    while block_on(engine.step()) {}
    let frame = |(_, event)| match event {
        Event::Trace { frame, .. } => Some(*frame),
        Event::Failed(error) => panic!("{error}"),
        _ => None,
    };
    engine.take_events().filter_map(frame).collect()
}

fn choice(kda: (usize, usize), mla: (usize, usize)) -> TraceChoice {
    let head = |(layer, head)| Some(TraceHead { layer, head });
    TraceChoice {
        kda: head(kda),
        mla: head(mla),
    }
}

#[test]
fn frames_agree_with_the_states_they_show() {
    WHOLE.iter().for_each(|backend| check_frames(*backend));
}

fn check_frames(backend: Make) {
    for (name, layer, mla) in [("tiny-a", 0, 3), ("tiny-a", 4, 3), ("tiny-128", 0, 1)] {
        for head in 0..2 {
            let (model, ..) = load_on(cpu(), name, limits(1, 1, 4));
            let mla = model.config().mla_layers().next().unwrap_or(mla);
            let layer = if model.kda_ordinal(layer).is_some() {
                layer
            } else {
                0
            };
            let trace = Some(choice((layer, head), (mla, head)));
            let frames = frames(
                backend,
                name,
                Request {
                    trace,
                    ..request(tokens(1, 30), 9)
                },
            );
            assert_eq!(
                frames.len(),
                8,
                "a frame for each token of the answer that ran"
            );
            for (i, frame) in frames.iter().enumerate() {
                assert_eq!(frame.position, 30 + i);
                let scale = f64::from(model.config().routed_scaling_factor);
                for layer in &frame.experts {
                    assert_eq!(layer.experts.len(), model.config().num_experts_per_token);
                    close(
                        "the sum of the experts' weights",
                        layer.weights.iter().sum(),
                        scale,
                    );
                }
                assert_eq!(frame.kda.len(), model.config().kda_layers().count());
                let attention = frame.attention.as_ref().unwrap();
                assert_eq!(
                    (attention.layer, attention.head, attention.weights.len()),
                    (mla, head, 31 + i)
                );
                close("the sum of attention", attention.weights.iter().sum(), 1.0);
                assert!(
                    frame
                        .operations
                        .iter()
                        .any(|time| time.operation == "linear" && time.milliseconds > 0.0)
                );
            }
            // From one whole state to the next: what was written is what changed beside the decay.
            for pair in frames.windows(2) {
                let [before, after] = [0, 1].map(|i| pair[i].state.as_ref().unwrap());
                let numbers = pair[1]
                    .kda
                    .iter()
                    .find(|kda| kda.layer == layer)
                    .unwrap()
                    .heads[head];
                let (mut norm, mut written) = (0.0, 0.0);
                for (i, (before, after)) in before.state.iter().zip(&after.state).enumerate() {
                    let kept = f64::from(
                        pair[1].state.as_ref().unwrap().decay[i / numbers_width(&pair[1])],
                    ) * f64::from(*before);
                    written += (f64::from(*after) - kept).powi(2);
                    norm += f64::from(*after).powi(2);
                }
                close("the state", numbers.state, norm.sqrt());
                let relative = (f64::from(numbers.write) - written.sqrt()).abs() / norm.sqrt();
                assert!(
                    relative < BOUND,
                    "written: {} against {}",
                    numbers.write,
                    written.sqrt()
                );
                let mean = after.decay.iter().map(|x| f64::from(*x)).sum::<f64>()
                    / after.decay.len() as f64;
                close("the mean decay", numbers.decay, mean);
                check_gates(&pair[1], after);
                // Keys have length one, but for the epsilon under their root.
                let part =
                    f64::from(numbers.write) / (f64::from(numbers.beta) * f64::from(numbers.error));
                assert!(part <= 1.0 + BOUND && part > 0.0, "{numbers:?}");
                assert!(numbers.gate > 0.0 && numbers.gate < 1.0);
                check_recurrence(before, after);
                close("the write strength", after.beta, f64::from(numbers.beta));
                let gate: f64 = after.gate.iter().map(|gate| f64::from(*gate)).sum();
                close("the gate", numbers.gate, gate / after.gate.len() as f64);
            }
        }
    }
}

/// Every channel's log decay is there, and agrees with the heads' means and with the chosen head's own.
fn check_gates(frame: &TraceFrame, state: &StateTrace) {
    for layer in &frame.kda {
        let k = state.decay.len();
        assert_eq!(layer.gates.len(), layer.heads.len() * k);
        for (head, gates) in layer.heads.iter().zip(layer.gates.chunks_exact(k)) {
            let sum: f64 = gates.iter().map(|gate| f64::from(*gate).exp()).sum();
            close("a head's mean decay", head.decay, sum / k as f64);
        }
    }
    let layer = frame.kda.iter().find(|kda| kda.layer == state.layer);
    let gates = &layer.unwrap().gates[state.head * state.decay.len()..];
    for (gate, decay) in gates.iter().zip(&state.decay) {
        close("a channel's decay", *decay, f64::from(*gate).exp());
    }
}

/// What is told of one head is the recurrence: `S = diag(a) S' + beta k (v - (diag(a) S')^T k)^T`, number by number.
fn check_recurrence(before: &StateTrace, after: &StateTrace) {
    let (k, v) = (after.decay.len(), after.width);
    assert_eq!(
        (after.key.len(), after.value.len(), after.gate.len()),
        (k, v, v)
    );
    let query: f64 = after.query.iter().map(|q| f64::from(*q).powi(2)).sum();
    assert!(
        (query * k as f64 - 1.0).abs() < 1e-3,
        "a query of length {query}"
    );
    let kept = |d: usize, e: usize| f64::from(after.decay[d]) * f64::from(before.state[d * v + e]);
    for e in 0..v {
        let read: f64 = (0..k).map(|d| f64::from(after.key[d]) * kept(d, e)).sum();
        let error = f64::from(after.value[e]) - read;
        for d in 0..k {
            let expected = kept(d, e) + f64::from(after.beta) * f64::from(after.key[d]) * error;
            let found = f64::from(after.state[d * v + e]);
            assert!(
                (expected - found).abs() < BOUND,
                "S[{d}, {e}]: {found} against {expected}"
            );
        }
    }
}

#[test]
fn a_prompt_is_traced_from_where_it_was_asked() {
    WHOLE.iter().for_each(|backend| check_prompt(*backend));
}

fn check_prompt(backend: Make) {
    let plain = request(tokens(3, 30), 6);
    let traced = Request {
        trace: Some(choice((0, 1), (3, 1))),
        trace_from: Some(20),
        ..plain.clone()
    };
    let mut engine = engine_on(backend(), "tiny-a", limits(1, 4, 16), OPTIONS);
    let mut run = |id: u64, request: Request| {
        engine.submit(RequestId(id), request).unwrap();
        while block_on(engine.step()) {}
        engine
            .take_events()
            .map(|(_, event)| event)
            .collect::<Vec<_>>()
    };
    let scored = run(
        1,
        Request {
            scores: PromptScores::Likelihoods,
            ..plain.clone()
        },
    );
    let logprobs: Vec<Option<f32>> = scored
        .iter()
        .filter_map(|event| match event {
            Event::Scored(scored) => Some(scored.logprobs.clone()),
            _ => None,
        })
        .flatten()
        .collect();
    let ids = |events: &[Event]| -> Vec<u32> {
        let id = |event: &Event| match event {
            Event::Token { id, .. } => Some(*id),
            _ => None,
        };
        events.iter().filter_map(id).collect()
    };
    // What the first run leaves in the cache is deeper than the place from which the trace is wanted.
    run(2, plain.clone());
    let events = run(3, traced);
    assert_eq!(ids(&events), ids(&scored));
    let frames: Vec<&TraceFrame> = events
        .iter()
        .filter_map(|event| match event {
            Event::Trace { frame, .. } => Some(&**frame),
            _ => None,
        })
        .collect();
    let positions: Vec<usize> = frames.iter().map(|frame| frame.position).collect();
    assert_eq!(positions, (20..35).collect::<Vec<_>>());
    for frame in &frames {
        let expected = logprobs.get(frame.position).copied().flatten();
        assert_eq!(frame.next.is_some(), frame.position < 29);
        if let (Some(found), Some(expected)) = (frame.next, expected) {
            assert!(
                (found - expected).abs() < 1e-3,
                "{found} against {expected}"
            );
        }
    }
    for pair in frames.windows(2) {
        let [before, after] = [0, 1].map(|i| pair[i].state.as_ref().unwrap());
        check_recurrence(before, after);
    }
}

/// What two f32 backends may differ by at the end of a model.
#[cfg(feature = "wgpu")]
const APART: f64 = 1e-4;

/// The frame's numbers in one row.
#[cfg(feature = "wgpu")]
fn all_numbers(frame: &TraceFrame) -> Vec<f32> {
    let kda = frame.kda.iter().flat_map(|layer| &layer.heads);
    let mut all: Vec<f32> = kda
        .flat_map(|h| [h.state, h.write, h.error, h.decay, h.beta, h.gate])
        .collect();
    all.extend(frame.experts.iter().flat_map(|layer| &layer.weights));
    let (state, attention) = (frame.state.as_ref(), frame.attention.as_ref());
    all.extend(state.iter().flat_map(|s| {
        let rows = [&s.decay, &s.state, &s.query, &s.key, &s.value, &s.gate];
        rows.into_iter().flatten()
    }));
    all.extend(attention.iter().flat_map(|attention| &attention.weights));
    all
}

#[cfg(feature = "wgpu")]
#[test]
fn both_backends_tell_the_same() {
    for name in ["tiny-a", "tiny-128"] {
        let (model, ..) = load_on(cpu(), name, limits(1, 1, 4));
        let mla = model.config().mla_layers().next().unwrap();
        let request = Request {
            trace: Some(choice((0, 1), (mla, 1))),
            ..request(tokens(1, 30), 9)
        };
        let [expected, found] =
            [cpu as Make, gpu::whole].map(|backend| frames(backend, name, request.clone()));
        assert_eq!(expected.len(), found.len());
        let mut worst = 0.0_f64;
        for (expected, found) in expected.iter().zip(&found) {
            assert_eq!(
                (expected.position, expected.token),
                (found.position, found.token),
                "{name}"
            );
            let experts = |frame: &TraceFrame| -> Vec<_> {
                frame
                    .experts
                    .iter()
                    .map(|layer| layer.experts.clone())
                    .collect()
            };
            assert_eq!(experts(expected), experts(found), "{name}");
            let (expected, found) = (all_numbers(expected), all_numbers(found));
            assert_eq!(expected.len(), found.len());
            for (expected, found) in expected.iter().zip(found) {
                let size = f64::from(expected.abs()).max(1.0);
                worst = worst.max(f64::from(expected - found).abs() / size);
            }
        }
        assert!(worst <= APART, "{name}: {worst}");
    }
}

fn numbers_width(frame: &TraceFrame) -> usize {
    frame.state.as_ref().unwrap().width
}

#[test]
fn without_a_trace_nothing_is_different() {
    WHOLE.iter().for_each(|backend| check_untraced(*backend));
}

fn check_untraced(backend: Make) {
    let (mut model, ..) = load_on(backend(), "tiny-a", limits(2, 4, 16));
    let recording = Recording {
        candidates: 1,
        keep_rows: false,
        probe_hidden: false,
    };
    let record = |model: &mut kimi_linear::model::Model| {
        model
            .record(model.limits().step, recording)
            .unwrap()
            .operations()
            .to_vec()
    };
    let before = record(&mut model);
    assert!(
        before
            .iter()
            .all(|name| !name.starts_with("trace") && *name != "probe"),
        "{before:?}"
    );
    let traced = model
        .record_traced(choice((0, 0), (3, 1)), recording)
        .unwrap();
    let rest: Vec<_> = traced
        .step
        .operations()
        .iter()
        .filter(|name| !name.starts_with("trace") && **name != "probe")
        .collect();
    assert!(
        rest.iter().copied().eq(&before),
        "a traced step does the same, and tells of it"
    );
    assert!(traced.step.operations().len() > before.len());
    assert_eq!(
        record(&mut model),
        before,
        "nor does one that was traced leave anything behind"
    );
}

#[test]
fn traced_and_untraced_run_beside_each_other() {
    WHOLE.iter().for_each(|backend| check_beside(*backend));
}

fn check_beside(backend: Make) {
    let mut alone = engine(backend, limits(1, 4, 16));
    let cold = |seed: u64| Request {
        reuse: false,
        ..request(tokens(seed, 20 + 9 * seed as usize), 12)
    };
    let expected: Vec<_> = (0..5).map(|seed| answer(&mut alone, cold(seed))).collect();
    let mut engine = engine(backend, limits(4, 6, 24));
    for seed in 0..5 {
        let trace = (seed % 2 == 0).then(|| choice((0, seed as usize % 2), (3, 0)));
        engine
            .submit(
                RequestId(seed),
                Request {
                    trace,
                    ..cold(seed)
                },
            )
            .unwrap();
    }
    let mut outcomes = Outcomes::new();
    while block_on(engine.step()) {}
    collect(&mut engine, &mut outcomes);
    for ((id, _), outcome) in &outcomes {
        assert_eq!(outcome.said(), expected[id.0 as usize].said(), "{id:?}");
    }
    assert_eq!(outcomes.len(), 5);
}

#[test]
fn heads_that_are_not_there_are_refused() {
    let mut engine = engine(cpu, limits(1, 2, 4));
    let refusals = [
        (
            choice((3, 0), (3, 0)),
            "batch: a trace's KDA layer should be one of [0, 1, 2, 4], but is 3",
        ),
        (
            choice((0, 2), (3, 0)),
            "batch: a trace's KDA head should be below 2, but is 2",
        ),
        (
            choice((0, 0), (9, 0)),
            "batch: a trace's MLA layer should be one of [3], but is 9",
        ),
        (
            choice((0, 0), (3, 7)),
            "batch: a trace's MLA head should be below 2, but is 7",
        ),
    ];
    for (trace, message) in refusals {
        let request = Request {
            trace: Some(trace),
            ..request(vec![1], 2)
        };
        assert_eq!(
            engine
                .submit(RequestId(1), request)
                .unwrap_err()
                .to_string(),
            message
        );
    }
}

#[test]
fn generate_writes_a_line_a_token() {
    NAMES.iter().for_each(|backend| check_generate(backend));
}

fn check_generate(backend: &str) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("trace.jsonl");
    let run = |options: &[&str]| {
        let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_kimi-linear"));
        command.args([
            "generate",
            "--backend",
            backend,
            "--prompt",
            "hello",
            "--max-tokens",
            "6",
            "--json",
            "--ignore-eos",
        ]);
        command
            .arg("--model")
            .arg(engine_harness::common::reference("tiny-a"))
            .args(options);
        let output = command.output().unwrap();
        assert!(
            output.status.success(),
            "{}",
            String::from_utf8_lossy(&output.stderr)
        );
        let json: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
        json["tokens"]
            .as_array()
            .unwrap()
            .iter()
            .map(|id| id.as_u64().unwrap())
            .collect::<Vec<_>>()
    };
    let file = path.display().to_string();
    let traced = run(&["--trace", &file, "--trace-kda", "4,1", "--trace-mla", "3,1"]);
    assert_eq!(traced, run(&[]), "tokens are the same");
    let text = std::fs::read_to_string(&path).unwrap();
    let frames: Vec<serde_json::Value> = text
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    assert_eq!(frames.len(), 5);
    for (frame, token) in frames.iter().zip(&traced) {
        assert_eq!(frame["token"], *token);
        assert_eq!(
            (&frame["state"]["layer"], &frame["state"]["head"]),
            (&4.into(), &1.into())
        );
        assert_eq!(frame["state"]["state"].as_array().unwrap().len(), 32 * 32);
        assert_eq!(frame["kda"].as_array().unwrap().len(), 4);
    }
}
