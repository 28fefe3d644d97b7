//! The operations of a trace, each compared with naive code.

use kimi_linear::backend::trace::{
    KDA_NUMBERS, TraceAttention, TraceGate, TraceKda, TraceRoute, TraceState, kda_row,
};
use kimi_linear::backend::{
    Backend, Batch, Block, Capacity, Element, LatentLayout, LatentRecord, Op, Orientation, Place,
    Program, Rows, Segment, Slot, StateLayout, StateRecord, TensorValues, WeightPart, WeightSource,
};
use kimi_linear::checkpoint::Format;
use kimi_linear::config::Dtype;

use crate::{BACKENDS, close, cpu, numbers};

fn sigmoid(x: f32) -> f64 {
    1.0 / (1.0 + (-f64::from(x)).exp())
}

const ONE: Capacity = Capacity {
    tokens: 1,
    segments: 1,
    outputs: 1,
    blocks: 8,
    checkpoints: 0,
};

fn one_token(position: usize, slot_in: Option<Slot>) -> Batch {
    Batch {
        tokens: vec![0],
        segments: vec![Segment {
            length: 1,
            position,
            slot_in,
            slot_out: Slot(1),
            checkpoints: Vec::new(),
            blocks: (0..8).rev().map(Block).collect(),
        }],
        outputs: Vec::new(),
        draws: Vec::new(),
        fed: Vec::new(),
    }
}

/// A weight's only part, in f32.
fn f32_part(values: &[f32]) -> WeightPart {
    WeightPart {
        format: Format::F32,
        bytes: bytemuck::allocation::pod_collect_to_vec::<f32, u8>(values).into(),
    }
}

#[test]
fn the_numbers_of_a_state_are_those_of_naive_code() {
    BACKENDS
        .iter()
        .for_each(|(name, backend)| check_state(name, backend()));
}

fn check_state(name: &str, mut backend: Box<dyn Backend>) {
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
    let record = kda_row(&layout);
    let output = plan(2 * heads * record, Element::F32);
    let (gate, opened) = (
        plan(heads * v, Element::Activation),
        plan(2 * heads, Element::F32),
    );
    let other = numbers(6, 2 * heads * record);
    let (other_gate, other_kda) = (other[..2 * heads].to_vec(), other);
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
        (output, &other_kda),
        (opened, &other_gate),
    ] {
        backend
            .write_tensor(tensor, &TensorValues::F32(values.clone()))
            .unwrap();
    }
    let before = StateRecord {
        orientation: Orientation::KeyValue,
        heads,
        key_width: k,
        value_width: v,
        state: state.clone(),
        channels: layout.channels(),
        conv_state: vec![0.0; layout.conv_state_len()],
    };
    backend.write_state(&pool, 1, Slot(0), &before).unwrap();
    let ops = [
        Op::from(TraceKda {
            qkv,
            gates,
            beta,
            pool,
            layer: 1,
            output,
        }),
        Op::Probe(output),
        Op::from(TraceGate {
            gate,
            layout,
            layer: 1,
            output: opened,
        }),
        Op::Probe(opened),
    ];
    let program: Program = ops.into_iter().collect();
    let mut step = backend.compile(&program, ONE).unwrap();
    for slot_in in [Some(Slot(0)), None] {
        let found = step.submit(&one_token(9, slot_in)).unwrap().wait().unwrap();
        let [kda, open] = [0, 1].map(|i| found.probes[i].as_f32().unwrap());
        let (first, kda) = kda.split_at(heads * record);
        let (first_gates, open) = open.split_at(heads);
        assert_eq!(
            (first, first_gates),
            (&other_kda[..heads * record], &other_gate[..heads]),
            "{name}: another layer's part is left alone"
        );
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
                    &format!("{name}: number {i} of head {head}"),
                    kda[head * record + i],
                    expected,
                );
            }
            let decays = &kda[head * record + KDA_NUMBERS..][..k];
            assert_eq!(decays, &gate_values[head * k..(head + 1) * k], "{name}");
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
    // The rows below are exact in every dtype.
    for dtype in [Dtype::F32, Dtype::F16, Dtype::Bf16] {
        for (name, backend) in BACKENDS {
            check_attention(&format!("{name}, {dtype}"), backend(), dtype);
        }
    }
}

fn check_attention(name: &str, mut backend: Box<dyn Backend>, dtype: Dtype) {
    // More positions than one workgroup processes.
    let (heads, head, latent, rope, nope, value, block, blocks) = (2, 1, 6, 3, 4, 5, 4, 72);
    let layout = LatentLayout {
        layers: 2,
        latent,
        rope,
        block_tokens: block,
        blocks,
        dtype,
    };
    let pool = backend.latent_pool(layout).unwrap();
    let kv_b_values = numbers(1, heads * (nope + value) * latent);
    let kv_b = backend
        .weight(WeightSource {
            name: "kv_b".to_owned(),
            tensors: Vec::new(),
            stack: 1,
            rows: heads * (nope + value),
            columns: latent,
            stored_columns: latent,
            first_column: 0,
            parts: vec![f32_part(&kv_b_values)],
            place: Place::default(),
        })
        .unwrap();
    let query = backend
        .tensor(Rows::Tokens, 1, heads * (nope + rope), Element::Activation)
        .unwrap();
    let places = blocks * block;
    let output = backend
        .tensor(Rows::Tokens, 1, places, Element::F32)
        .unwrap();
    let query_values = numbers(2, heads * (nope + rope));
    backend
        .write_tensor(query, &TensorValues::F32(query_values.clone()))
        .unwrap();
    let rows: Vec<Vec<f32>> = (0..blocks)
        .map(|i| numbers(10 + i as u64, block * (latent + rope)))
        .collect();
    for (i, rows) in rows.iter().enumerate() {
        // Block tables are in descending order: the first tokens are in the last block.
        let record = LatentRecord::from_f32(latent, rope, rows);
        backend
            .write_latents(&pool, 1, Block((blocks - 1 - i) as u32), &record)
            .unwrap();
    }
    let capacity = Capacity { blocks, ..ONE };
    let ops = [
        Op::from(TraceAttention {
            query,
            kv_b,
            nope,
            value,
            pool,
            layer: 1,
            head,
            output,
        }),
        Op::Probe(output),
        Op::ProbePositions(output),
    ];
    let program: Program = ops.into_iter().collect();
    let mut step = backend.compile(&program, capacity).unwrap();
    for position in [0, 3, 17, 127, 128, 287] {
        let mut batch = one_token(position, None);
        batch.segments[0].blocks = (0..blocks as u32).rev().map(Block).collect();
        let found = step.submit(&batch).unwrap().wait().unwrap();
        let weights = found.probes[0].as_f32().unwrap();
        let query = &query_values[head * (nope + rope)..];
        let scores: Vec<f64> = (0..=position)
            .map(|at| {
                let row = &rows[at / block][at % block * (latent + rope)..];
                // The key in its published form: the expanded part, then the shared part.
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
                &format!("{name}: position {at} of {position}"),
                weights[at],
                score.exp() / sum,
            );
        }
        let reached = found.probes[1].as_f32().unwrap();
        assert_eq!(reached, &weights[..=position], "no more than it reaches");
    }
}

/// The five operations over a segment of two tokens and a single one.
fn ragged(mut backend: Box<dyn Backend>) -> [Vec<f32>; 5] {
    let (heads, k, v, latent, rope, nope, value) = (4, 70, 130, 66, 3, 5, 6);
    let (top, reached) = (3, 101);
    let capacity = Capacity {
        tokens: 3,
        segments: 2,
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
            dtype: backend.device().cache,
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
        conv_state: vec![0.0; layout.conv_state_len()],
    };
    backend.write_state(&states, 0, Slot(0), &record).unwrap();
    let left = StateRecord {
        state: numbers(8, layout.state_len()),
        ..record
    };
    backend.write_state(&states, 0, Slot(1), &left).unwrap();
    for i in 0..9 {
        let rows = numbers(20 + i, 16 * (latent + rope));
        let record = LatentRecord::from_f32(latent, rope, &rows);
        backend
            .write_latents(&latents, 0, Block(i as u32), &record)
            .unwrap();
    }
    let rows = heads * (nope + value);
    let kv_b = backend
        .weight(WeightSource {
            name: "kv_b".to_owned(),
            tensors: Vec::new(),
            stack: 1,
            rows,
            columns: latent,
            stored_columns: latent,
            first_column: 0,
            parts: vec![f32_part(&numbers(9, rows * latent))],
            place: Place::default(),
        })
        .unwrap();
    let mut plan = |seed, width, element| {
        let tensor = backend.tensor(Rows::Tokens, 3, width, element).unwrap();
        let values = numbers(seed, 3 * width);
        // The decay is negative; other values are arbitrary.
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
    let weights = plan(10, top, Element::F32);
    // Earlier contents must be overwritten.
    let outputs = [heads * kda_row(&layout), heads, reached, k * v, 2 * top]
        .map(|width| plan(7, width, Element::F32));
    let experts = backend
        .tensor(Rows::Tokens, 3, top, Element::Index)
        .unwrap();
    let chosen: Vec<u32> = (0..3 * top as u32).map(|i| 251 - 17 * i).collect();
    backend
        .write_tensor(experts, &TensorValues::Index(chosen.clone()))
        .unwrap();
    let ops = [
        Op::from(TraceKda {
            qkv,
            gates,
            beta,
            pool: states,
            layer: 0,
            output: outputs[0],
        }),
        Op::from(TraceGate {
            gate,
            layout,
            layer: 0,
            output: outputs[1],
        }),
        Op::from(TraceAttention {
            query,
            kv_b,
            nope,
            value,
            pool: latents,
            layer: 0,
            head: 2,
            output: outputs[2],
        }),
        Op::from(TraceState {
            pool: states,
            layer: 0,
            head: 2,
            output: outputs[3],
        }),
        Op::from(TraceRoute {
            experts,
            weights,
            layer: 0,
            layers: 1,
            output: outputs[4],
        }),
    ];
    let program: Program = ops.into_iter().chain(outputs.map(Op::Probe)).collect();
    let mut step = backend.compile(&program, capacity).unwrap();
    let segment = |length, position, slot: u32, blocks: std::ops::Range<u32>| Segment {
        length,
        position,
        slot_in: (slot == 0).then_some(Slot(0)),
        slot_out: Slot(slot + 1),
        checkpoints: Vec::new(),
        blocks: blocks.rev().map(Block).collect(),
    };
    let batch = Batch {
        tokens: vec![0; 3],
        segments: vec![segment(2, 9, 1, 0..1), segment(1, reached - 1, 0, 1..9)],
        outputs: Vec::new(),
        draws: Vec::new(),
        fed: Vec::new(),
    };
    let found = step.submit(&batch).unwrap().wait().unwrap();
    assert_eq!(found.milliseconds, [], "nobody asked for times");
    let found = [0, 1, 2, 3, 4].map(|i| found.probes[i].as_f32().unwrap().to_vec());
    assert_eq!(
        found[3][2 * k * v..],
        left.state[2 * k * v..3 * k * v],
        "the head's state as it was left, to the bit"
    );
    let (numbers, _) = found[4][2 * 2 * top..].split_at(top);
    let numbers: Vec<u32> = numbers.iter().map(|number| *number as u32).collect();
    assert_eq!(numbers, chosen[2 * top..], "experts by their numbers");
    found
}

#[test]
fn only_single_tokens_are_told_of() {
    let expected = ragged(cpu());
    for (_, backend) in BACKENDS {
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
