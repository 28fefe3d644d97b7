//! The frames of models that run in the engine.

use kimi_linear::engine::{Engine, Event, PromptScores, Request, RequestId, TIMED_OF};
use kimi_linear::model::{Limits, StateTrace, StepOptions, TraceChoice, TraceFrame, TraceHead};
use pollster::block_on;

use crate::engine_harness::{
    self, BLOCK, OPTIONS, Outcomes, answer, collect, engine_on, limits, load_on, request, tokens,
};
#[cfg(feature = "wgpu")]
use crate::gpu;
use crate::{BOUND, EMULATED, Make, WHOLE, close, cpu};

fn engine(backend: Make, limits: Limits) -> Engine {
    engine_on(backend(), "tiny-a", limits, OPTIONS)
}

/// The frames of one request that runs alone.
pub(crate) fn frames(backend: Make, name: &str, request: Request) -> Vec<TraceFrame> {
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

pub(crate) fn choice(kda: (usize, usize), mla: (usize, usize)) -> TraceChoice {
    let head = |(layer, head)| Some(TraceHead { layer, head });
    TraceChoice {
        kda: head(kda),
        mla: head(mla),
        vectors: true,
    }
}

#[test]
fn frames_agree_with_the_states_they_show() {
    WHOLE
        .iter()
        .for_each(|(name, backend)| check_frames(name, *backend));
}

fn check_frames(kind: &str, backend: Make) {
    for (name, layer, mla) in [("tiny-a", 0, 3), ("tiny-a", 4, 3), ("tiny-128", 0, 1)] {
        for head in 0..2 {
            let model = load_on(cpu(), name, limits(1, 1, 4));
            let mla = model.config().mla_layers().next().unwrap_or(mla);
            let layer = if model.config().kda_layers().any(|kda| kda == layer) {
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
                let linear = frame
                    .operations
                    .iter()
                    .find(|time| time.operation == "linear");
                if i.is_multiple_of(TIMED_OF) && kind != EMULATED {
                    assert!(
                        linear.unwrap().milliseconds > 0.0,
                        "of {TIMED_OF} one is timed"
                    );
                } else {
                    assert_eq!(frame.operations, [], "{kind}: most are not timed");
                }
            }
            // The difference of two whole states is what was written, besides the decay.
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
                check_vectors(&pair[1], after);
                // Keys have length one, except for the epsilon under their root.
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

/// Every channel's log decay is present, and agrees with the heads' means and with the selected head's own.
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

/// The vectors of all heads are present, and those of the selected head are its own.
fn check_vectors(frame: &TraceFrame, state: &StateTrace) {
    let (k, v) = (state.key.len(), state.width);
    for layer in &frame.kda {
        assert_eq!(layer.qkv.len(), layer.heads.len() * (2 * k + v));
    }
    let layer = frame.kda.iter().find(|kda| kda.layer == state.layer);
    let (keys, values) = layer.unwrap().qkv[layer.unwrap().heads.len() * k..]
        .split_at(layer.unwrap().heads.len() * k);
    let key = &keys[state.head * k..][..k];
    // With the epsilon under the root of its length.
    let square: f64 = key.iter().map(|x| f64::from(*x).powi(2)).sum();
    for (raw, unit) in key.iter().zip(&state.key) {
        let expected = f64::from(*raw) / (square + 1e-6).sqrt();
        assert!(
            (f64::from(*unit) - expected).abs() < BOUND,
            "{unit} against {expected}"
        );
    }
    assert_eq!(values[state.head * v..][..v], state.value);
}

/// The numbers of one head satisfy the recurrence: `S = diag(a) S' + beta k (v - (diag(a) S')^T k)^T`, number by number.
pub(crate) fn check_recurrence(before: &StateTrace, after: &StateTrace) {
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
    WHOLE
        .iter()
        .for_each(|(name, backend)| check_prompt(name, *backend));
}

fn check_prompt(kind: &str, backend: Make) {
    // Maximum difference between two forms of a recurrence; for bf16 the bound of whole models.
    let apart = if kind == EMULATED { 3e-2 } else { 1e-3 };
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
    // The first run's cached state is after the position from which the trace is requested.
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
                (found - expected).abs() < apart,
                "{found} against {expected}"
            );
        }
    }
    for pair in frames.windows(2) {
        let [before, after] = [0, 1].map(|i| pair[i].state.as_ref().unwrap());
        check_recurrence(before, after);
    }
}

/// Maximum difference between two f32 backends at the end of a model.
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
        let model = load_on(cpu(), name, limits(1, 1, 4));
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
    WHOLE
        .iter()
        .for_each(|(name, backend)| check_untraced(name, *backend));
}

fn check_untraced(kind: &str, backend: Make) {
    let mut model = load_on(backend(), "tiny-a", limits(2, 4, 16));
    let step_options = StepOptions {
        candidates: 1,
        keep_rows: false,
        probe_hidden: false,
        draws: kimi_linear::backend::DrawCapacity::NONE,
    };
    let record = |model: &mut kimi_linear::model::Model| {
        model
            .step(model.limits().step, step_options)
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
        .traced_step(choice((0, 0), (3, 1)), step_options)
        .unwrap();
    let rest = traced.step.operations().iter();
    let rest = rest.filter(|name| !name.starts_with("trace") && **name != "probe");
    // GPUs run blocks as a whole in a step that is not traced.
    if kind == "cpu" {
        assert!(
            rest.eq(&before),
            "{kind}: a traced step does the same, and tells of it"
        );
    }
    assert!(traced.step.operations().len() > before.len());
    assert_eq!(
        record(&mut model),
        before,
        "nor does one that was traced leave anything behind"
    );
}

#[test]
fn traced_and_untraced_run_beside_each_other() {
    WHOLE
        .iter()
        .for_each(|(name, backend)| check_beside(name, *backend));
}

fn check_beside(kind: &str, backend: Make) {
    let mut alone = engine(backend, limits(1, 4, 16));
    let cold = |seed: u64| Request {
        reuse: false,
        ..request(tokens(seed, 20 + 9 * seed as usize), 12)
    };
    let trace = |seed: u64| {
        seed.is_multiple_of(2)
            .then(|| choice((0, seed as usize % 2), (3, 0)))
    };
    let expected: Vec<_> = (0..5)
        .map(|seed| {
            let trace = trace(seed).filter(|_| kind == EMULATED);
            answer(
                &mut alone,
                Request {
                    trace,
                    ..cold(seed)
                },
            )
        })
        .collect();
    let mut engine = engine(backend, limits(4, 6, 24));
    for seed in 0..5 {
        let request = Request {
            trace: trace(seed),
            ..cold(seed)
        };
        engine.submit(RequestId(seed), request).unwrap();
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
            "trace: the KDA layer should be one of [0, 1, 2, 4], but is 3",
        ),
        (
            choice((0, 2), (3, 0)),
            "trace: the KDA head should be below 2, but is 2",
        ),
        (
            choice((0, 0), (9, 0)),
            "trace: the MLA layer should be one of [3], but is 9",
        ),
        (
            choice((0, 0), (3, 7)),
            "trace: the MLA head should be below 2, but is 7",
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
    // The names for `--backend`.
    let names = WHOLE.iter().map(|(name, _)| *name);
    names
        .filter(|name| *name != EMULATED)
        .for_each(check_generate);
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

#[test]
fn a_conversation_that_was_traced_again_goes_on_from_its_memory() {
    // With a whole block: the last token of an answer has not run, and the traced token has run again.
    for length in BLOCK - 2..=BLOCK + 2 {
        for saved in [false, true] {
            check_again(length, saved);
        }
    }
}

fn check_again(length: usize, saved: bool) {
    let what = format!("{length} tokens, saved after they were traced again: {saved}");
    let trace = Some(choice((0, 1), (3, 1)));
    let again = |said: &[u32]| Request {
        trace,
        trace_from: Some(0),
        ..Request::new(said.to_vec(), 0)
    };
    let mut first = engine(cpu, limits(1, 6, 16));
    let prompt = tokens(7, length - 4);
    let outcome = answer(&mut first, request(prompt.clone(), 4));
    let said = [prompt, outcome.tokens].concat();
    assert_eq!(said.len(), length);
    if saved {
        answer(&mut first, again(&said));
    }
    let snapshot = block_on(first.snapshot(&said[..length - 1])).unwrap();
    assert_eq!(snapshot.tokens.len(), length - 1, "{what}");
    let mut second = engine(cpu, limits(1, 6, 16));
    second.restore(snapshot).unwrap();
    answer(&mut second, again(&said));
    let next = Request {
        trace,
        trace_from: Some(length - 1),
        ..request([said, tokens(9, 12)].concat(), 3)
    };
    let outcome = answer(&mut second, next);
    assert_eq!(outcome.usage.cached_tokens, length - 1, "{what}");
}
