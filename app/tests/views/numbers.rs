//! Through the whole path: what a panel says of one token and one head is what the trace says, and that is what naive
//! double-precision code computes from the checkpoint's weights.

use eframe::egui::Theme;
use kimi_linear::backend::cpu::CpuBackend;
use kimi_linear::checkpoint::Checkpoint;
use kimi_linear::config::{Dtype, ModelConfig};
use kimi_linear::engine::{Engine, EngineHandle, EngineOptions, EngineSizes, Event, Request};
use kimi_linear::model::{Model, TraceChoice, TraceFrame, TraceHead};
use kimi_linear_app::formulas::recurrence::{Recurrence, recurrence};
use kimi_linear_app::history::{History, TokenText};

use crate::panels::says;
use crate::scenes::{MLA, story, tiny, window};

/// The traced head: of the first layer, whose input is the embedding alone.
const FIRST: TraceHead = TraceHead { layer: 0, head: 1 };

const PROMPT: [u32; 12] = [72, 101, 108, 108, 111, 32, 119, 111, 114, 108, 100, 33];

/// Runs the model, every token traced.
fn run() -> (Vec<u32>, Vec<TraceFrame>) {
    let config = ModelConfig::from_file(&tiny().join("config.json")).unwrap();
    let checkpoint = Checkpoint::open(&tiny(), &config).unwrap();
    let limits = EngineSizes::one(256).limits(Dtype::F32);
    let backend = Box::new(CpuBackend::new());
    let model = Model::load(&config, &checkpoint, backend, limits, &mut |_| {}).unwrap();
    let engine = Engine::new(model, EngineOptions::default());
    let request = Request {
        trace: Some(TraceChoice {
            kda: Some(FIRST),
            mla: Some(MLA),
            vectors: false,
        }),
        trace_from: Some(0),
        ..Request::new(PROMPT.to_vec(), 6)
    };
    let answer = EngineHandle::start(engine).unwrap().answer(request);
    let (mut tokens, mut frames) = (PROMPT.to_vec(), Vec::new());
    while let Some(event) = answer.next() {
        match event {
            Event::Token { id, .. } => tokens.push(id),
            Event::Trace { frame, .. } => frames.push(*frame),
            Event::Failed(error) => panic!("{error}"),
            _ => {}
        }
    }
    (tokens, frames)
}

/// A tensor of the checkpoint, widened.
fn tensor(checkpoint: &Checkpoint, name: &str) -> Vec<f64> {
    let tensor = checkpoint.tensor(name).unwrap();
    let mut values = vec![0.0; tensor.elements()];
    tensor.format.widen(&tensor.bytes, &mut values);
    values.into_iter().map(f64::from).collect()
}

/// `W x` with W `[rows, columns]`.
fn product(weight: &[f64], x: &[f64]) -> Vec<f64> {
    weight
        .chunks_exact(x.len())
        .map(|row| row.iter().zip(x).map(|(w, x)| w * x).sum())
        .collect()
}

/// What one head of the first layer reads and does at one token.
struct Step {
    decay: Vec<f64>,
    query: Vec<f64>,
    key: Vec<f64>,
    value: Vec<f64>,
    beta: f64,
    gate: Vec<f64>,
    read: Vec<f64>,
    error: Vec<f64>,
    before: Vec<f64>,
    decayed: Vec<f64>,
    after: Vec<f64>,
    output: Vec<f64>,
}

/// The first layer's head over the tokens, naively: embedding, norm, projections, convolution, gates, recurrence.
fn oracle(tokens: &[u32]) -> Vec<Step> {
    let config = ModelConfig::from_file(&tiny().join("config.json")).unwrap();
    let checkpoint = Checkpoint::open(&tiny(), &config).unwrap();
    let weight = |name: &str| tensor(&checkpoint, &format!("model.layers.0.{name}"));
    let (d, k, heads) = (
        config.hidden_size,
        config.kda_head_dim,
        config.kda_num_heads,
    );
    let embedding = tensor(&checkpoint, "model.embed_tokens.weight");
    let norm = weight("input_layernorm.weight");
    let inputs: Vec<Vec<f64>> = tokens
        .iter()
        .map(|token| {
            let row = &embedding[*token as usize * d..][..d];
            let mean = row.iter().map(|x| x * x).sum::<f64>() / d as f64;
            let scale = 1.0 / (mean + f64::from(config.rms_norm_eps)).sqrt();
            row.iter().zip(&norm).map(|(x, w)| x * scale * w).collect()
        })
        .collect();
    let taps = config.short_conv_kernel_size;
    let sigmoid = |x: f64| 1.0 / (1.0 + (-x).exp());
    // Projection and convolution of one of q, k, v: the head's channels at each token.
    let head = FIRST.head;
    let convolved = |name: &str| -> Vec<Vec<f64>> {
        let projection = weight(&format!("self_attn.{name}_proj.weight"));
        let taps_of = weight(&format!("self_attn.{name}_conv1d.weight"));
        let rows: Vec<Vec<f64>> = inputs.iter().map(|x| product(&projection, x)).collect();
        (0..rows.len())
            .map(|t| {
                let channel = |c: usize| {
                    let sum: f64 = (0..taps)
                        .filter(|j| t + j + 1 >= taps)
                        .map(|j| taps_of[c * taps + j] * rows[t + j + 1 - taps][c])
                        .sum();
                    sum * sigmoid(sum)
                };
                (head * k..(head + 1) * k).map(channel).collect()
            })
            .collect()
    };
    let [queries, keys, values] = ["q", "k", "v"].map(convolved);
    let (fa, fb) = (
        weight("self_attn.f_a_proj.weight"),
        weight("self_attn.f_b_proj.weight"),
    );
    let (ga, gb) = (
        weight("self_attn.g_a_proj.weight"),
        weight("self_attn.g_b_proj.weight"),
    );
    let (a_log, dt_bias) = (weight("self_attn.A_log"), weight("self_attn.dt_bias"));
    let b = weight("self_attn.b_proj.weight");
    assert_eq!(a_log.len(), heads);
    let unit = |x: &[f64], scale: f64| -> Vec<f64> {
        let norm = (x.iter().map(|x| x * x).sum::<f64>() + 1e-6).sqrt();
        x.iter().map(|x| x / norm * scale).collect()
    };
    let mut state = vec![0.0; k * k];
    let mut steps = Vec::new();
    for (t, x) in inputs.iter().enumerate() {
        let rates = product(&fb, &product(&fa, x));
        let decay: Vec<f64> = (0..k)
            .map(|i| {
                let at = head * k + i;
                (-a_log[head].exp() * (rates[at] + dt_bias[at]).exp().ln_1p()).exp()
            })
            .collect();
        let beta = sigmoid(product(&b, x)[head]);
        let opened = product(&gb, &product(&ga, x));
        let (query, key) = (
            unit(&queries[t], (k as f64).powf(-0.5)),
            unit(&keys[t], 1.0),
        );
        let before = state.clone();
        let decayed: Vec<f64> = (0..k * k).map(|i| decay[i / k] * before[i]).collect();
        let sum = |s: &[f64], x: &[f64], e: usize| (0..k).map(|d| s[d * k + e] * x[d]).sum::<f64>();
        let read: Vec<f64> = (0..k).map(|e| sum(&decayed, &key, e)).collect();
        let error: Vec<f64> = (0..k).map(|e| values[t][e] - read[e]).collect();
        state = (0..k * k)
            .map(|i| decayed[i] + beta * key[i / k] * error[i % k])
            .collect();
        steps.push(Step {
            output: (0..k).map(|e| sum(&state, &query, e)).collect(),
            gate: opened[head * k..(head + 1) * k]
                .iter()
                .map(|x| sigmoid(*x))
                .collect(),
            value: values[t].clone(),
            after: state.clone(),
            decay,
            query,
            key,
            beta,
            read,
            error,
            before,
            decayed,
        });
    }
    steps
}

/// `||x - expected|| / ||expected||` at most `bound`.
#[track_caller]
fn close<T: Copy + Into<f64>>(what: &str, found: &[T], expected: &[f64], bound: f64) {
    assert_eq!(found.len(), expected.len(), "{what}");
    let squares = |x: &dyn Fn(usize) -> f64| {
        (0..expected.len())
            .map(|i| x(i).powi(2))
            .sum::<f64>()
            .sqrt()
    };
    let apart = squares(&|i| found[i].into() - expected[i]);
    let size = squares(&|i| expected[i]);
    assert!(apart <= bound * size.max(1e-6), "{what}: {apart} of {size}");
}

/// The bound of `spec` for f32 activations through one projection and the recurrence.
const BOUND: f64 = 2e-5;

#[test]
fn the_panel_says_what_the_trace_says_and_the_trace_what_naive_code_computes() {
    let (tokens, frames) = run();
    assert_eq!(frames.len(), tokens.len() - 1, "every token that ran");
    let steps = oracle(&tokens);
    for (frame, step) in frames.iter().zip(&steps) {
        let trace = frame.state.as_ref().unwrap();
        close("decay", &trace.decay, &step.decay, BOUND);
        close("query", &trace.query, &step.query, BOUND);
        close("key", &trace.key, &step.key, BOUND);
        close("value", &trace.value, &step.value, BOUND);
        close("beta", &[trace.beta], &[step.beta], BOUND);
        close("gate", &trace.gate, &step.gate, BOUND);
        close("state", &trace.state, &step.after, BOUND);
    }
    // The panel at one token.
    let position = 9;
    let mut scene = story("State", Some(position));
    scene.history = History::default();
    let text = |id: &u32| TokenText {
        id: *id,
        text: id.to_string(),
        ..TokenText::default()
    };
    scene.history.set_tokens(tokens.iter().map(text).collect());
    frames
        .iter()
        .cloned()
        .for_each(|frame| scene.history.push_frame(frame));
    scene.selection.kda = Some(FIRST);
    let before = scene.history.before(position, FIRST).unwrap().into_owned();
    let lines: Recurrence = recurrence(&before, frames[position].state.as_ref().unwrap()).unwrap();
    let step = &steps[position];
    close("S before", &lines.before, &step.before, BOUND);
    close("S decayed", &lines.decayed, &step.decayed, BOUND);
    close("r", &lines.read, &step.read, BOUND);
    close("e", &lines.error, &step.error, BOUND);
    close("S after", &lines.after, &step.after, BOUND);
    close("o", &lines.output, &step.output, BOUND);
    let mut harness = window(scene, [700.0, 700.0], Theme::Dark);
    harness.run_ok();
    // Three digits are shown: these are the oracle's, not the panel's own.
    let size = |x: &[f64]| digits(x.iter().map(|x| x * x).sum::<f64>().sqrt());
    let mean = |x: &[f64]| digits(x.iter().sum::<f64>() / x.len() as f64);
    let written: Vec<f64> = (0..step.after.len())
        .map(|i| step.after[i] - step.decayed[i])
        .collect();
    for text in [
        format!(
            "|S| {} → {}, mean a {}",
            size(&step.before),
            size(&step.decayed),
            mean(&step.decay)
        ),
        format!("|r| {}", size(&step.read)),
        format!("|v| {}, |e| {}", size(&step.value), size(&step.error)),
        format!(
            "b {}, |b k × e| {}, |S| {}",
            digits(step.beta),
            size(&written),
            size(&step.after)
        ),
        format!("|o| {}, mean gate {}", size(&step.output), mean(&step.gate)),
    ] {
        assert!(says(&harness, &text), "the panel does not say {text}");
    }
    // The matrix that is drawn is the trace's own.
    let shown = harness.state().history.head(position, FIRST).unwrap();
    assert_eq!(shown.state, frames[position].state.as_ref().unwrap().state);
}

/// Three significant digits.
fn digits(x: f64) -> String {
    kimi_linear_app::views::format::short(x)
}
