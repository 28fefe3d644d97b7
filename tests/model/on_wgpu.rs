//! The wgpu backend against the reference checkpoints, on any adapter of this machine.

use crate::common::caches::check_caches;
use crate::common::{Fixture, close};
use crate::harness;
use kimi_linear::backend::wgpu::{Options, WgpuBackend};
use kimi_linear::backend::{
    Add, Backend, Batch, Block, Capacity, Element, Op, OutputRow, Program, Rows, Segment, Slot,
    StateLayout, StepOutput, TensorValues,
};
use kimi_linear::checkpoint::Checkpoint;
use kimi_linear::config::{Dtype, ModelConfig};
use kimi_linear::error::BackendError;
use kimi_linear::model::{Limits, Model, StepOptions};

/// Bound on logits against the oracle, whose own error is 2e-6.
const BOUND: f64 = 1e-4;
/// Bound on everything else, which fewer operations contribute to.
const NEAR: f64 = 1e-5;

const BLOCK_TOKENS: usize = 16;
const SLOTS: usize = 8;
const BLOCKS: usize = 64;

fn backend(options: Options) -> WgpuBackend {
    WgpuBackend::with_options(options).unwrap_or_else(|error| {
        panic!("{error}. These tests need a Vulkan driver: apt-get install mesa-vulkan-drivers libvulkan1")
    })
}

fn load(name: &str, options: Options) -> Model {
    let limits = Limits {
        step: Capacity {
            tokens: 200,
            segments: 8,
            outputs: 200,
            blocks: BLOCKS,
            checkpoints: 8,
        },
        slots: SLOTS,
        blocks: BLOCKS,
        block_tokens: BLOCK_TOKENS,
        cache: Dtype::F32,
    };
    harness::load(name, Box::new(backend(options)), limits)
}

/// Bytes of a file's mappings that are in this process's memory.
#[cfg(target_os = "linux")]
fn resident(file: &std::path::Path) -> u64 {
    let (mut inside, mut bytes) = (false, 0);
    for line in std::fs::read_to_string("/proc/self/smaps").unwrap().lines() {
        let mut words = line.split_whitespace();
        match words.next() {
            Some("Rss:") if inside => bytes += 1024 * words.next().unwrap().parse::<u64>().unwrap(),
            // The line of a mapping, which ends in its file.
            Some(first) if !first.ends_with(':') => inside = line.ends_with(file.to_str().unwrap()),
            _ => {}
        }
    }
    bytes
}

#[cfg(target_os = "linux")]
#[test]
fn a_weight_on_the_device_leaves_no_pages_of_its_file() {
    // A file of its own, since other tests map the same checkpoint.
    let dir = tempfile::tempdir().unwrap();
    let demo = concat!(env!("CARGO_MANIFEST_DIR"), "/assets/demo/");
    let [config, weights] = ["config.json", "model.safetensors"].map(|name| {
        let path = dir.path().join(name);
        std::fs::copy(demo.to_owned() + name, &path).unwrap();
        path
    });
    let config = ModelConfig::from_file(&config).unwrap();
    let checkpoint = Checkpoint::open(dir.path(), &config).unwrap();
    let limits = harness::limits(16, BLOCKS, Dtype::F32);
    let device = Box::new(backend(Options::default()));
    let model = Model::load(&config, &checkpoint, device, limits, &mut |_| {}).unwrap();
    let (left, all) = (resident(&weights), weights.metadata().unwrap().len());
    // The pages around the header; a system may map two megabytes at once.
    assert!(left <= 2 << 20, "{left} of {all} bytes are left");
    drop(model);
    let sum = |tensor: kimi_linear::checkpoint::TensorData| {
        let bytes = tensor.bytes.iter();
        bytes.map(|byte| u64::from(*byte)).sum::<u64>()
    };
    let read: u64 = checkpoint
        .tensors()
        .map(|tensor| sum(tensor.unwrap()))
        .sum();
    let read_through = resident(&weights);
    assert!(
        read > 0 && read_through >= all,
        "{read_through} of {all} bytes are counted"
    );
}

/// One segment of the sequence number `sequence` of at most four, with logits requested at every position.
fn segment(sequence: usize, length: usize, position: usize) -> Segment {
    let blocks = (position + length).div_ceil(BLOCK_TOKENS) as u32;
    let (slot, last) = (Slot(1 + sequence as u32), 63 - 16 * sequence as u32);
    Segment {
        length,
        position,
        slot_in: (position > 0).then_some(slot),
        slot_out: slot,
        checkpoints: Vec::new(),
        blocks: (0..blocks).map(|i| Block(last - i)).collect(),
    }
}

fn batch(tokens: &[u32], segments: Vec<Segment>) -> Batch {
    Batch {
        tokens: tokens.to_vec(),
        segments,
        outputs: (0..tokens.len())
            .map(|row| OutputRow {
                row,
                target: Some(tokens[row]),
            })
            .collect(),
        draws: Vec::new(),
        fed: Vec::new(),
    }
}

const ALL: StepOptions = StepOptions {
    candidates: 5,
    keep_rows: true,
    probe_hidden: true,
    draws: kimi_linear::backend::DrawCapacity::NONE,
};

/// Logits at every position, with the prompt cut into segments of at most `size` tokens.
fn prefill(model: &mut Model, tokens: &[u32], size: usize) -> (Vec<f32>, StepOutput) {
    let mut step = model.step(model.limits().step, ALL).unwrap();
    let (mut logits, mut last) = (Vec::new(), StepOutput::default());
    for (i, tokens) in tokens.chunks(size).enumerate() {
        let batch = batch(tokens, vec![segment(0, tokens.len(), i * size)]);
        last = step.submit(&batch).unwrap().wait().unwrap();
        logits.extend_from_slice(&last.logits);
        check_choices(&batch, &last);
    }
    (logits, last)
}

/// Choices compared with the rows from which they were made.
fn check_choices(batch: &Batch, output: &StepOutput) {
    let width = output.logits.len() / batch.outputs.len();
    for ((choice, row), wanted) in output
        .choices
        .iter()
        .zip(output.logits.chunks_exact(width))
        .zip(&batch.outputs)
    {
        let mut order: Vec<(u32, f32)> = (0..).zip(row.iter().copied()).collect();
        order.sort_by(|a, b| b.1.total_cmp(&a.1));
        assert_eq!(choice.candidates, order[..5]);
        assert!(choice.finite);
        assert_eq!(
            choice.target_logit,
            wanted.target.map(|target| row[target as usize])
        );
        let sum: f64 = row.iter().map(|logit| f64::from(*logit).exp()).sum();
        assert!((f64::from(choice.log_normaliser) - sum.ln()).abs() < 1e-5);
    }
}

fn check(name: &str, options: Options, lengths: &[usize], sizes: &[usize], traced: usize) {
    let expected = Fixture::open(&format!("{name}/expected.safetensors"));
    let mut model = load(name, options);
    for n in lengths {
        let of = |what: &str| format!("prompt.{n}.{what}");
        let tokens = expected.ids(&of("tokens"));
        for size in sizes {
            let (logits, output) = prefill(&mut model, &tokens, *size);
            let label = |what: &str| format!("{name}, {what} of {n} tokens by {size}");
            close(
                &label("logits"),
                &logits,
                &expected.f32(&of("logits")),
                BOUND,
            );
            if *n == traced {
                check_caches(
                    &mut model,
                    &expected,
                    *n,
                    Slot(1),
                    &segment(0, *n, 0).blocks,
                    NEAR,
                    &label,
                );
                if size >= n {
                    for i in 0..model.config().layers.len() {
                        let hidden = output.probes[i + 1].as_f32().unwrap();
                        let expected = expected.f32(&of(&format!("hidden.{i}")));
                        close(&label("hidden"), hidden, &expected, NEAR);
                    }
                }
            }
            let mut greedy = vec![output.choices.last().unwrap().candidates[0].0];
            let mut step = model.step(model.limits().step, ALL).unwrap();
            while greedy.len() < 24 {
                let last = &greedy[greedy.len() - 1..];
                let batch = batch(last, vec![segment(0, 1, n + greedy.len() - 1)]);
                let output = step.submit(&batch).unwrap().wait().unwrap();
                greedy.push(output.choices[0].candidates[0].0);
            }
            assert_eq!(
                greedy,
                expected.ids(&of("greedy")),
                "{}",
                label("greedy tokens")
            );
        }
    }
}

const SPLITS: [usize; 5] = [200, 1, 7, 16, 64];

#[test]
fn tiny_a_computes_what_it_must() {
    check("tiny-a", Options::default(), &[1, 7, 65, 200], &SPLITS, 65);
}

#[test]
fn tiny_128_computes_what_it_must() {
    check("tiny-128", Options::default(), &[5, 130], &SPLITS, 130);
}

#[test]
fn so_do_the_plain_variants_over_small_windows() {
    let options = Options {
        subgroups: false,
        window: 64,
        span: 64,
        ..Options::default()
    };
    check("tiny-a", options, &[65, 200], &[200, 7], 65);
    check("tiny-128", options, &[5, 130], &[200, 16], 130);
}

/// The same prompt under other options: logits of two segments and a decode, to the bit.
fn logits(name: &str, options: Options) -> Vec<f32> {
    let mut model = load(name, options);
    let tokens: Vec<u32> = (0..150).map(|i| i * i % 251).collect();
    let (mut logits, _) = prefill(&mut model, &tokens[..149], 80);
    let mut step = model.step(model.limits().step, ALL).unwrap();
    let batch = batch(&tokens[149..], vec![segment(0, 1, 149)]);
    logits.extend(step.submit(&batch).unwrap().wait().unwrap().logits);
    logits
}

#[test]
fn variants_and_limits_change_no_bit() {
    for name in ["tiny-a", "tiny-128"] {
        let usual = logits(name, Options::default());
        let others = [
            (
                "no subgroups",
                Options {
                    subgroups: false,
                    ..Options::default()
                },
            ),
            (
                "weights over 1 MiB",
                Options {
                    weight_limit: Some(1 << 20),
                    ..Options::default()
                },
            ),
            // Less than an expert: its rows are cut too.
            (
                "weights over 4 KiB",
                Options {
                    weight_limit: Some(4 << 10),
                    ..Options::default()
                },
            ),
            (
                "windows of 64",
                Options {
                    window: 64,
                    ..Options::default()
                },
            ),
        ];
        for (what, options) in others {
            assert!(logits(name, options) == usual, "{name}, {what}");
        }
    }
}

#[test]
fn a_ragged_batch_is_bitwise_each_sequence_alone() {
    let lengths = [33, 1, 100, 7];
    let tokens = |seed: usize, n: usize| -> Vec<u32> {
        (0..n)
            .map(|i| ((i * 31 + seed * 17) % 256) as u32)
            .collect()
    };
    for name in ["tiny-a", "tiny-128"] {
        let mut together = load(name, Options::default());
        let vocabulary = together.config().vocab_size;
        let mut step = together.step(together.limits().step, ALL).unwrap();
        let mut submit = |tokens: Vec<u32>, segments| {
            step.submit(&batch(&tokens, segments))
                .unwrap()
                .wait()
                .unwrap()
                .logits
        };
        let all: Vec<u32> = (0..4).flat_map(|i| tokens(i, lengths[i])).collect();
        let first = submit(all, (0..4).map(|i| segment(i, lengths[i], 0)).collect());
        let second = submit(
            vec![9; 4],
            (0..4).map(|i| segment(i, 1, lengths[i])).collect(),
        );
        let mut row = 0;
        for (i, n) in lengths.into_iter().enumerate() {
            let mut alone = load(name, Options::default());
            let mut step = alone.step(alone.limits().step, ALL).unwrap();
            let mut submit = |tokens: Vec<u32>, segments| {
                step.submit(&batch(&tokens, segments))
                    .unwrap()
                    .wait()
                    .unwrap()
                    .logits
            };
            let found = submit(tokens(i, n), vec![segment(0, n, 0)]);
            assert!(
                found == first[row * vocabulary..(row + n) * vocabulary],
                "{name}, {n} tokens"
            );
            let found = submit(vec![9], vec![segment(0, 1, n)]);
            assert!(
                found == second[i * vocabulary..(i + 1) * vocabulary],
                "{name}, after {n} tokens"
            );
            row += n;
        }
    }
}

const SMALL: Capacity = Capacity {
    tokens: 4,
    segments: 1,
    outputs: 1,
    blocks: 1,
    checkpoints: 0,
};

#[test]
fn submissions_run_in_order_and_may_overlap() {
    let mut backend = backend(Options::default());
    let [a, b] = [1.0, 2.0].map(|value| {
        let tensor = backend
            .tensor(Rows::Tokens, 4, 3, Element::Activation)
            .unwrap();
        backend
            .write_tensor(tensor, &TensorValues::F32(vec![value; 12]))
            .unwrap();
        tensor
    });
    let ops = [
        Op::from(Add {
            source: b,
            target: a,
        }),
        Op::Probe(a),
    ];
    let program: Program = ops.into_iter().collect();
    let mut step = backend.compile(&program, SMALL).unwrap();
    let batch = |length: usize| Batch {
        tokens: vec![0; length],
        segments: vec![Segment {
            blocks: Vec::new(),
            ..segment(0, length, 0)
        }],
        outputs: Vec::new(),
        draws: Vec::new(),
        fed: Vec::new(),
    };
    let tickets: Vec<_> = [4, 2, 3].map(|n| step.submit(&batch(n)).unwrap()).into();
    let probes: Vec<_> = tickets
        .into_iter()
        .map(|ticket| ticket.wait().unwrap().probes)
        .collect();
    assert_eq!(probes[0], [TensorValues::F32(vec![3.0; 12])]);
    assert_eq!(probes[1], [TensorValues::F32(vec![5.0; 6])]);
    let last = [7.0, 7.0, 5.0].map(|value| [value; 3]).concat();
    assert_eq!(probes[2], [TensorValues::F32(last.clone())]);
    let rest = [last, vec![3.0; 3]].concat();
    assert_eq!(
        backend.read_tensor(a, 4).wait().unwrap(),
        TensorValues::F32(rest)
    );
    // With another executor, the last first, and one that is dropped.
    let [first, dropped, last] = [4, 2, 3].map(|n| step.submit(&batch(n)).unwrap());
    drop(dropped);
    let [last, first] = [last, first].map(|ticket| pollster::block_on(ticket).unwrap().probes);
    let rows = |values: &[f32]| TensorValues::F32(values.iter().flat_map(|v| [*v; 3]).collect());
    assert_eq!(first, [rows(&[9.0, 9.0, 7.0, 5.0])]);
    assert_eq!(last, [rows(&[13.0, 13.0, 9.0])]);
}

#[test]
fn a_lost_device_is_a_sentence() {
    let mut backend = backend(Options::default());
    let tensor =
        |backend: &mut WgpuBackend| backend.tensor(Rows::Tokens, 4, 3, Element::Activation);
    let (a, b) = (tensor(&mut backend).unwrap(), tensor(&mut backend).unwrap());
    let ops = [
        Op::from(Add {
            source: b,
            target: a,
        }),
        Op::Probe(a),
    ];
    let program: Program = ops.into_iter().collect();
    let mut step = backend.compile(&program, SMALL).unwrap();
    let batch = Batch {
        tokens: vec![0],
        segments: vec![Segment {
            blocks: Vec::new(),
            ..segment(0, 1, 0)
        }],
        outputs: Vec::new(),
        draws: Vec::new(),
        fed: Vec::new(),
    };
    let [under_way, dropped] = [(); 2].map(|()| step.submit(&batch).unwrap());
    backend.lose_device();
    drop(dropped);
    // It may have been finished before.
    let outcome = under_way.wait();
    assert!(matches!(outcome, Ok(_) | Err(BackendError::Lost { .. })));
    let errors = [
        step.submit(&batch)
            .and_then(|ticket| ticket.wait())
            .unwrap_err(),
        backend.read_tensor(a, 1).wait().unwrap_err(),
        backend
            .write_tensor(a, &TensorValues::F32(vec![1.0; 3]))
            .unwrap_err(),
        tensor(&mut backend).unwrap_err(),
    ];
    for error in errors {
        assert!(matches!(error, BackendError::Lost { .. }), "{error}");
        assert!(
            error.to_string().starts_with("the wgpu device was lost: "),
            "{error}"
        );
    }
}

#[test]
fn what_cannot_be_is_refused_in_a_sentence() {
    let mut backend = backend(Options::default());
    let error = backend
        .compiles("@compute @workgroup_size(1) fn main() { let x: u32 = 1.5; }")
        .unwrap_err();
    assert!(matches!(error, BackendError::Driver { .. }), "{error}");
    backend
        .compiles("@compute @workgroup_size(1) fn main() {}")
        .unwrap();

    let layout = StateLayout {
        layers: 1,
        key_heads: 32,
        value_heads: 32,
        key_width: 128,
        value_width: 128,
        taps: 4,
        slots: 1 << 24,
    };
    let error = backend.state_pool(layout).unwrap_err().to_string();
    assert!(
        error.contains("one layer of 16777216 slots of KDA states takes 35184372088832 bytes"),
        "{error}"
    );

    let options = Options {
        adapter: Some(99),
        ..Options::default()
    };
    let error = WgpuBackend::with_options(options)
        .err()
        .unwrap()
        .to_string();
    assert!(
        error.starts_with("there is no wgpu device 99: this machine has number 0, "),
        "{error}"
    );
}
