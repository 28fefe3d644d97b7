//! Experts of some layers on the CPU beside a device: with the CPU as the device the bits of the CPU alone, with others within the
//! bounds of the device.

use std::sync::PoisonError;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::backends::{self, BACKENDS};
use crate::common::{close, reference};
use crate::group::{group, offloaded};
use crate::harness;
use kimi_linear::backend::cpu::CpuBackend;
use kimi_linear::backend::dry::DryBackend;
use kimi_linear::backend::{Backend, DrawCapacity, Offload, TensorValues};
use kimi_linear::checkpoint::{Checkpoint, Preset};
use kimi_linear::config::{Dtype, ModelConfig};
use kimi_linear::model::{Limits, Model, StepOptions, TraceChoice, TraceHead};
use kimi_linear::quantize;

const BLOCKS: usize = 8;
/// Bound on f32 logits of two devices.
const BOUND: f64 = 1e-4;

/// The models, each with a number of its layers with experts: one, some, all.
const MODELS: [(&str, [usize; 3]); 2] = [("tiny-a", [1, 3, 4]), ("tiny-128", [1, 2, 3])];

const ALL: StepOptions = StepOptions {
    candidates: 2,
    keep_rows: true,
    probe_hidden: true,
    draws: DrawCapacity::NONE,
};

fn config(name: &str) -> ModelConfig {
    ModelConfig::from_file(&reference(name).join("config.json")).unwrap()
}

fn checkpoint(name: &str, preset: Option<Preset>) -> Checkpoint {
    let checkpoint = Checkpoint::open(&reference(name), &config(name)).unwrap();
    match preset {
        Some(preset) => quantize::while_loading(checkpoint, &config(name), preset).unwrap(),
        None => checkpoint,
    }
}

fn load(name: &str, preset: Option<Preset>, backend: Box<dyn Backend>) -> Model {
    let limits = harness::limits(32, BLOCKS, backend.device().cache);
    let checkpoint = checkpoint(name, preset);
    Model::load(&config(name), &checkpoint, backend, limits, &mut |_| {}).unwrap()
}

/// Both on the CPU.
fn on_cpus(name: &str, count: usize) -> Box<dyn Backend> {
    offloaded(name, count, backends::cpu(), backends::cpu())
}

fn prompt() -> Vec<u32> {
    (0..60).map(|i| (i * 37 + 5) % 250).collect()
}

/// What a run returns.
#[derive(PartialEq)]
struct Ran {
    logits: Vec<f32>,
    probes: Vec<TensorValues>,
    greedy: Vec<u32>,
}

/// The prompt in segments of at most `segment` tokens, and ten greedy tokens after it.
fn run(model: &mut Model, segment: usize) -> Ran {
    let mut step = model.step(model.limits().step, ALL).unwrap();
    let (prompt, mut position) = (prompt(), 0);
    let mut ran = Ran {
        logits: Vec::new(),
        probes: Vec::new(),
        greedy: Vec::new(),
    };
    let mut submit = |tokens: &[u32], ran: &mut Ran| {
        let batch = harness::batch(tokens, position, BLOCKS);
        position += tokens.len();
        let output = step.submit(&batch).unwrap().wait().unwrap();
        ran.logits.extend(&output.logits);
        ran.probes.extend(output.probes);
        output.choices.last().unwrap().candidates[0].0
    };
    let mut next = 0;
    for tokens in prompt.chunks(segment) {
        next = submit(tokens, &mut ran);
    }
    for _ in 0..10 {
        ran.greedy.push(next);
        next = submit(&[next], &mut ran);
    }
    ran
}

#[test]
fn a_cpu_beside_itself_has_the_bits_of_one() {
    for (name, counts) in MODELS {
        for segment in [32, 7, 1] {
            let whole = run(&mut load(name, None, backends::cpu()), segment);
            for count in counts {
                let found = run(&mut load(name, None, on_cpus(name, count)), segment);
                assert!(found == whole, "{name}, {count} layers, by {segment}");
            }
        }
    }
}

#[test]
fn so_it_has_with_quantised_weights() {
    for preset in [Preset::Q8, Preset::Q4] {
        let preset = Some(preset);
        for (name, counts) in MODELS {
            let whole = run(&mut load(name, preset, backends::cpu()), 32);
            for count in counts {
                let found = run(&mut load(name, preset, on_cpus(name, count)), 32);
                assert!(found == whole, "{name}, {count} layers, {preset:?}");
            }
        }
    }
}

#[test]
fn segments_in_the_form_of_single_tokens_have_the_same_bits() {
    for (name, counts) in MODELS {
        let stepwise = |backend| {
            let mut model = load(name, None, backend);
            let mut step = model.stepwise_step(model.limits().step, ALL).unwrap();
            let tokens = prompt();
            let mut submit = |range: std::ops::Range<usize>| {
                let batch = harness::batch(&tokens[range.clone()], range.start, BLOCKS);
                step.submit(&batch).unwrap().wait().unwrap()
            };
            [submit(0..6), submit(6..11)]
        };
        let whole = stepwise(backends::cpu());
        for count in counts {
            assert_eq!(stepwise(on_cpus(name, count)), whole, "{name}, {count}");
        }
    }
}

#[test]
fn traces_are_those_of_one_device() {
    let head = |layer| Some(TraceHead { layer, head: 1 });
    let choice = TraceChoice {
        kda: head(2),
        mla: head(3),
        vectors: true,
    };
    for (name, counts) in MODELS {
        let traced = |backend| {
            let mut model = load(name, None, backend);
            let mut step = model.traced_step(choice, ALL).unwrap();
            let mut frames = Vec::new();
            for (position, token) in prompt().into_iter().take(5).enumerate() {
                let batch = harness::batch(&[token], position, BLOCKS);
                let output = step.step.submit(&batch).unwrap().wait().unwrap();
                frames.push(step.frame(&output, position, token));
            }
            frames
        };
        let whole = traced(backends::cpu());
        for count in counts {
            assert_eq!(traced(on_cpus(name, count)), whole, "{name}, {count}");
        }
    }
}

/// The router ends the device's program, the shared experts run beside the routed ones, and their sum begins the next program.
#[test]
fn operations_are_listed_in_their_order_and_timed() {
    let mut model = load("tiny-a", None, on_cpus("tiny-a", 2));
    let options = StepOptions {
        probe_hidden: false,
        ..ALL
    };
    let mut step = model.step(model.limits().step, options).unwrap();
    let names = step.operations().to_vec();
    let sent: Vec<usize> = (0..names.len()).filter(|i| names[*i] == "send").collect();
    assert_eq!(sent.len(), 2, "{names:?}");
    for i in sent {
        let around = &names[i - 1..i + 6];
        let expected = [
            "route", "send", "experts", "linear", "swiglu", "linear", "add",
        ];
        assert_eq!(around, expected);
    }
    step.time(true).unwrap();
    let batch = harness::batch(&prompt()[..9], 0, BLOCKS);
    let timed = step.submit(&batch).unwrap().wait().unwrap();
    let times = |name| {
        let mut times = timed.milliseconds.iter();
        times.find(|(other, _)| *other == name).unwrap().1
    };
    for name in ["embed", "route", "send", "experts", "select"] {
        assert!(times(name) > 0.0, "{name}");
    }
    step.time(false).unwrap();
    let plain = step.submit(&batch).unwrap().wait().unwrap();
    assert!(plain.milliseconds.is_empty());
    assert_eq!((plain.choices, plain.logits), (timed.choices, timed.logits));
}

#[test]
fn other_devices_agree_with_themselves() {
    for (backend, open) in &BACKENDS[1..] {
        // In bf16 another rounding may choose another expert: `on_cuda` replays the experts.
        if open().device().precision != Dtype::F32 {
            continue;
        }
        for (name, counts) in MODELS {
            let whole = run(&mut load(name, None, open()), 32);
            for count in counts {
                let device = offloaded(name, count, open(), backends::cpu());
                let found = run(&mut load(name, None, device), 32);
                let what = format!("{name} on {backend}, {count} layers");
                close(&what, &found.logits, &whole.logits, BOUND);
                assert_eq!(found.greedy, whole.greedy, "{what}");
            }
        }
    }
}

/// What two devices without memory would hold.
fn dry(config: &ModelConfig, count: usize) -> (Offload, [impl Fn() -> [u64; 4]; 2]) {
    let [device, host] = [DryBackend::new(), DryBackend::new()];
    let used = [device.used(), host.used()].map(|used| {
        move || {
            let used = *used.lock().unwrap_or_else(PoisonError::into_inner);
            [used.weights, used.states, used.latents, used.activations]
        }
    });
    let both = Offload::new(Box::new(device), Box::new(host), config, count).unwrap();
    (both, used)
}

#[test]
fn bytes_on_device_and_host_are_those_that_were_predicted() {
    let published = ModelConfig::published().unwrap();
    let experts = published.expert_bytes(Dtype::Bf16);
    let (whole, [used, _]) = dry(&published, 0);
    Model::random(
        &published,
        0,
        Box::new(whole),
        Limits::smallest(),
        &mut |_| {},
    )
    .unwrap();
    let whole = used();
    for count in [1, 13, 26] {
        let (both, [device, host]) = dry(&published, count);
        let traffic = both.traffic();
        let limits = Limits::smallest();
        let mut model = Model::random(&published, 0, Box::new(both), limits, &mut |_| {}).unwrap();
        let on_host: u64 = experts.iter().take(count).sum();
        assert_eq!(device()[0], published.weight_bytes(Dtype::Bf16) - on_host);
        assert_eq!(device()[1..], whole[1..], "states, latents, activations");
        assert_eq!(host()[..3], [on_host, 0, 0]);
        let options = StepOptions {
            keep_rows: false,
            probe_hidden: false,
            ..ALL
        };
        model.step(limits.step, options).unwrap();
        // Rows, experts and their weights go to the host, rows come back; layers share the host's tensors.
        let row = 4 * (2304 + 8 + 8 + 2304);
        assert_eq!(host()[3], row);
        let sent = |number: &AtomicU64| number.load(Ordering::Relaxed);
        assert_eq!(sent(&traffic.per_token), count as u64 * row);
        assert_eq!(sent(&traffic.per_output), 0);
    }
    for preset in [None, Some(Preset::Q8)] {
        let (config, checkpoint) = (config("tiny-a"), checkpoint("tiny-a", preset));
        let experts = checkpoint.expert_bytes(&config);
        assert_eq!(experts.len(), 4);
        let (both, [device, host]) = dry(&config, 3);
        let (limits, both) = (Limits::smallest(), Box::new(both));
        Model::load(&config, &checkpoint, both, limits, &mut |_| {}).unwrap();
        let on_host: u64 = experts.iter().take(3).sum();
        assert_eq!(device()[0] + on_host, checkpoint.total_bytes());
        assert_eq!(host()[0], on_host);
    }
}

/// What is sent is what was counted when the step was compiled.
#[test]
fn bytes_between_device_and_host_are_those_that_were_counted() {
    let config = config("tiny-a");
    let both = Offload::new(backends::cpu(), backends::cpu(), &config, 3).unwrap();
    let traffic = both.traffic();
    let mut model = load("tiny-a", None, Box::new(both));
    let mut step = model.step(model.limits().step, ALL).unwrap();
    let per_token = 3 * 4 * (64 + 2 + 2 + 64);
    let sent = |number: &AtomicU64| number.load(Ordering::Relaxed);
    assert_eq!(sent(&traffic.per_token), per_token);
    let batch = harness::batch(&prompt()[..24], 0, BLOCKS);
    step.submit(&batch).unwrap().wait().unwrap();
    assert_eq!(sent(&traffic.sent), 24 * per_token);
}

#[test]
fn what_cannot_be_is_refused() {
    let config = config("tiny-a");
    let refused = Offload::new(backends::cpu(), backends::cpu(), &config, 5);
    let message = refused.err().unwrap().to_string();
    assert_eq!(
        message,
        "device and host: the number of layers whose experts are on the host should be at most 4, the model's layers with \
         experts, but is 5"
    );
    for of in [[1, 1, 2], [1, 4, 1], [2, 1, 1]] {
        let device = group("tiny-8", of, backends::cpu);
        let count = device.device_count();
        let refused = Offload::new(device, backends::cpu(), &config, 2);
        let message = refused.err().unwrap().to_string();
        let expected = format!(
            "device and host: the number of devices beside the host should be 1, but is {count}"
        );
        assert_eq!(message, expected);
    }
    // A submission returns when the step has run: the engine submits none ahead.
    let both = on_cpus("tiny-a", 2);
    assert!(!both.is_asynchronous());
    let name = &both.device().name;
    let cpu = CpuBackend::new().device().name.clone();
    assert_eq!(*name, format!("{cpu}, experts of 2 layers on {cpu}"));
}
