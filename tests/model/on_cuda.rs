//! The CUDA backend over whole models, with its kernels on the CPU: with the f32 run's experts within the bound of bf16, and
//! with its own experts the same greedy tokens until one expert differs.

use std::sync::{Arc, Mutex};

use crate::common::{Fixture, error};
use crate::harness;
use crate::replay::{Log, Mode, Replay};
use kimi_linear::backend::cpu::CpuBackend;
use kimi_linear::backend::{
    Backend, Batch, Capacity, Element, Form, KdaRecurrence, Op, Program, Rows, Segment, Slot,
    StateLayout, Step, StepOutput, TensorValues,
};
use kimi_linear::model::{Model, StepOptions};
use kimi_linear_emulated::Order;

/// A whole model in bf16 against f32, experts replayed (the error is over all logits of a prompt).
const BOUND: f64 = 3e-2;
const BLOCKS: usize = 32;

fn load(name: &str, backend: Box<dyn Backend>, tokens: usize) -> Model {
    let limits = harness::limits(tokens, BLOCKS, backend.device().cache);
    harness::load(name, backend, limits)
}

fn record(model: &mut Model) -> Box<dyn Step> {
    let step_options = StepOptions {
        candidates: 2,
        keep_rows: true,
        probe_hidden: false,
        draws: kimi_linear::backend::DrawCapacity::NONE,
    };
    model.step(model.limits().step, step_options).unwrap()
}

fn run(step: &mut dyn Step, tokens: &[u32], position: usize) -> StepOutput {
    step.submit(&harness::batch(tokens, position, BLOCKS))
        .unwrap()
        .wait()
        .unwrap()
}

/// A prompt with the tokens that follow it, and the f32 run over all of them: logits, greedy choices, experts.
struct Known {
    tokens: Vec<u32>,
    prompt: usize,
    logits: Vec<f32>,
    output: StepOutput,
    log: Arc<Mutex<Log>>,
}

fn known(name: &str, prompt: usize) -> Known {
    let expected = Fixture::open(&format!("{name}/expected.safetensors"));
    let mut tokens = expected.ids(&format!("prompt.{prompt}.tokens"));
    let greedy = expected.ids(&format!("prompt.{prompt}.greedy"));
    tokens.extend(&greedy[..greedy.len() - 1]);
    let log = Arc::<Mutex<Log>>::default();
    let backend = Replay::around(Box::new(CpuBackend::new()), Mode::Keep, &log);
    let mut model = load(name, Box::new(backend), tokens.len());
    let output = run(&mut *record(&mut model), &tokens, 0);
    let found: Vec<u32> = output.choices[prompt - 1..]
        .iter()
        .map(|choice| choice.candidates[0].0)
        .collect();
    assert_eq!(found, greedy, "the f32 run's own tokens");
    Known {
        tokens,
        prompt,
        logits: output.logits.clone(),
        output,
        log,
    }
}

fn on_cuda(name: &str, known: &Known, mode: Mode, orders: &'static [Order]) -> Model {
    let backend = Replay::around(crate::emulated::open(orders), mode, &known.log);
    load(name, Box::new(backend), known.tokens.len())
}

/// Reports the experts that differ since the last call.
fn flips(known: &Known, name: &str) -> Vec<crate::replay::Flip> {
    let flips = std::mem::take(&mut known.log.lock().unwrap().flips);
    let choices = known.log.lock().unwrap().choices.len();
    let widest = flips.iter().map(|flip| flip.gap).fold(0.0, f32::max);
    println!(
        "{name}: {} experts flipped among the choices of {choices} rows, weights at most {widest:.1e} apart",
        flips.len()
    );
    for flip in flips.iter().take(4) {
        println!(
            "  router {}, position {}, {:.1e} apart",
            flip.router, flip.position, flip.gap
        );
    }
    flips
}

fn replayed(name: &str, prompt: usize) {
    let known = known(name, prompt);
    let mut model = on_cuda(name, &known, Mode::Replace, &[Order::Forward]);
    let mut step = record(&mut model);
    let whole = run(&mut *step, &known.tokens, 0);
    let found = error(&whole.logits, &known.logits);
    println!("{name}, {prompt} tokens in one segment: {found:.2e} of {BOUND:.0e}");
    assert!(found <= BOUND, "{name}: {found:.3e}");
    flips(&known, name);

    // The prompt in one segment, then one token at a time.
    let mut logits = run(&mut *step, &known.tokens[..prompt], 0).logits;
    for position in prompt..known.tokens.len() {
        logits.extend(run(&mut *step, &known.tokens[position..=position], position).logits);
    }
    let found = error(&logits, &known.logits);
    println!("{name}, {prompt} tokens, then one by one: {found:.2e} of {BOUND:.0e}");
    assert!(found <= BOUND, "{name}: {found:.3e}");

    // The same with every launch in several orders of its threads: to the bit.
    let mut model = on_cuda(name, &known, Mode::Replace, crate::emulated::ORDERS);
    let again = run(&mut *record(&mut model), &known.tokens, 0);
    assert!(again.logits == whole.logits, "{name}: in other orders");
}

#[test]
fn tiny_a_with_the_experts_of_f32() {
    replayed("tiny-a", 65);
}

#[test]
fn tiny_128_with_the_experts_of_f32() {
    replayed("tiny-128", 5);
}

/// The experts of one and of all layers on the CPU, which keeps f32 between their matrices.
#[test]
fn experts_on_the_cpu_with_the_experts_of_f32() {
    for (name, prompt, counts) in [("tiny-a", 65, [1, 4]), ("tiny-128", 5, [1, 3])] {
        let known = known(name, prompt);
        for count in counts {
            let device = crate::emulated::open(&[Order::Forward]);
            let both = crate::group::offloaded(name, count, device, Box::new(CpuBackend::new()));
            let backend = Replay::around(both, Mode::Replace, &known.log);
            let mut model = load(name, Box::new(backend), known.tokens.len());
            let mut step = record(&mut model);
            let mut logits = run(&mut *step, &known.tokens[..prompt], 0).logits;
            for position in prompt..known.tokens.len() {
                let token = &known.tokens[position..=position];
                logits.extend(run(&mut *step, token, position).logits);
            }
            let found = error(&logits, &known.logits);
            println!("{name}, experts of {count} layers on the CPU: {found:.2e} of {BOUND:.0e}");
            assert!(found <= BOUND, "{name}: {found:.3e}");
        }
    }
}

#[test]
fn greedy_tokens_are_those_of_f32_until_an_expert_flips() {
    for (name, prompt) in [("tiny-a", 7), ("tiny-a", 65), ("tiny-128", 5)] {
        let known = known(name, prompt);
        let mut model = on_cuda(name, &known, Mode::Watch, &[Order::Forward]);
        let output = run(&mut *record(&mut model), &known.tokens, 0);
        let first = flips(&known, name)
            .iter()
            .map(|flip| flip.position)
            .min()
            .unwrap_or(known.tokens.len());
        let mut compared = 0;
        for position in 0..first {
            let (a, b) = (&known.output.choices[position], &output.choices[position]);
            // If two logits are as close as the error of bf16, either may be chosen.
            let near = a.candidates[0].1 - a.candidates[1].1 <= margin(&known, position);
            assert!(
                near || a.candidates[0].0 == b.candidates[0].0,
                "{name}, position {position}"
            );
            compared += usize::from(!near);
        }
        println!("{name}, {prompt} tokens: {compared} of {first} positions compared");
        assert!(known.prompt <= known.tokens.len());
    }
}

/// Minimum difference between two logits of a row for the same order in bf16: each may have an error of the bound times the
/// row's size.
fn margin(known: &Known, position: usize) -> f32 {
    let width = known.logits.len() / known.tokens.len();
    let row = &known.logits[position * width..(position + 1) * width];
    let mean = row.iter().map(|x| x * x).sum::<f32>() / width as f32;
    2.0 * BOUND as f32 * mean.sqrt()
}

/// Past several chunks, blocks of latents and tiles of experts.
#[test]
fn a_prompt_may_be_cut_at_every_position() {
    let known = known("tiny-a", 65);
    let mut model = on_cuda("tiny-a", &known, Mode::Replace, &[Order::Forward]);
    let mut step = record(&mut model);
    let (mut worst, mut at) = (0.0, 0);
    for cut in 1..known.tokens.len() {
        let (first, second) = known.tokens.split_at(cut);
        let mut logits = run(&mut *step, first, 0).logits;
        logits.extend(run(&mut *step, second, cut).logits);
        let found = error(&logits, &known.logits);
        assert!(found <= BOUND, "cut after {cut}: {found:.3e}");
        if found > worst {
            (worst, at) = (found, cut);
        }
    }
    let cuts = known.tokens.len() - 1;
    println!("tiny-a, {cuts} cuts: at most {worst:.2e} of {BOUND:.0e}, after {at}");
}

/// Runs segments of one recurrence of 2 heads, 32 x 128; returns the outputs and final state of one of them.
fn recurrence(lengths: &[usize], named: usize) -> (Vec<u32>, Vec<u32>) {
    let mut backend = crate::emulated::open(&[Order::Forward]);
    let layout = StateLayout {
        layers: 1,
        key_heads: 2,
        value_heads: 2,
        key_width: 32,
        value_width: 128,
        taps: 4,
        slots: lengths.len(),
    };
    let pool = backend.state_pool(layout).unwrap();
    let tokens: usize = lengths.iter().sum();
    let mut tensor = |width, element| {
        let tensor = backend.tensor(Rows::Tokens, tokens, width, element);
        tensor.unwrap()
    };
    let qkv = tensor(layout.channels(), Element::Activation);
    let gates = tensor(64, Element::F32);
    let beta = tensor(2, Element::F32);
    let output = tensor(256, Element::Activation);
    // Every segment has the same tokens, up to its length.
    for (tensor, low, high) in [(qkv, -2.0, 2.0), (gates, -0.2, 0.0), (beta, 0.0, 1.0)] {
        let row = |t: usize| {
            (0..tensor.width).map(move |i| {
                let hash = (t * 7919 + i * 104_729 + 17).wrapping_mul(2_654_435_761) % 4096;
                low + (high - low) * hash as f32 / 4096.0
            })
        };
        let values = lengths.iter().flat_map(|length| (0..*length).flat_map(row));
        let values = TensorValues::F32(values.collect());
        backend.write_tensor(tensor, &values).unwrap();
    }
    let capacity = Capacity {
        tokens,
        segments: lengths.len(),
        outputs: 0,
        blocks: 0,
        checkpoints: 0,
    };
    let form = Form::Chunk;
    let ops = [Op::from(KdaRecurrence {
        qkv,
        gates,
        beta,
        pool,
        layer: 0,
        form,
        output,
    })];
    let program: Program = ops.into_iter().collect();
    let mut step = backend.compile(&program, capacity).unwrap();
    let segments = lengths.iter().enumerate().map(|(i, length)| Segment {
        length: *length,
        position: 0,
        slot_in: None,
        slot_out: Slot(i as u32),
        checkpoints: Vec::new(),
        blocks: Vec::new(),
    });
    let batch = Batch {
        tokens: vec![0; tokens],
        segments: segments.collect(),
        outputs: Vec::new(),
        draws: Vec::new(),
        fed: Vec::new(),
    };
    step.submit(&batch).unwrap().wait().unwrap();
    let TensorValues::F32(rows) = backend.read_tensor(output, tokens).wait().unwrap() else {
        panic!("activations are read as f32");
    };
    let first: usize = lengths[..named].iter().sum();
    let state = backend.read_state(&pool, 0, Slot(named as u32));
    let state = state.wait().unwrap().key_value().into_owned();
    let bits = |values: &[f32]| values.iter().map(|x| x.to_bits()).collect();
    (
        bits(&rows[first * 256..(first + lengths[named]) * 256]),
        bits(&state),
    )
}

/// The number of columns per block depends on the number of segments; its results do not.
#[test]
fn a_recurrence_does_not_depend_on_its_company() {
    let alone = recurrence(&[40], 0);
    assert!(alone.0.iter().any(|bits| *bits != 0));
    let mut lengths = vec![2; 40];
    lengths[11] = 40;
    assert!(recurrence(&lengths, 11) == alone, "40 tokens among others");
    // Long enough for splits.
    let alone = recurrence(&[1540], 0);
    lengths[11] = 1540;
    assert!(recurrence(&lengths, 11) == alone, "splits among others");
}
