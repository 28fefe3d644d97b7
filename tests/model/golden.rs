//! The reference checkpoints compared with results of another implementation.

use crate::common::caches::check_caches;
use crate::common::{Fixture, close};
use crate::harness;
use kimi_linear::backend::cpu::CpuBackend;
use kimi_linear::backend::{Slot, StepOutput};
use kimi_linear::config::Dtype;
use kimi_linear::model::{Model, StepOptions};

/// Bound on f32 results against the oracle, whose own error is 2e-6.
const BOUND: f64 = 1e-5;

const BLOCKS: usize = 64;

fn load(name: &str, tokens: usize) -> Model {
    let limits = harness::limits(tokens, BLOCKS, Dtype::F32);
    harness::load(name, Box::new(CpuBackend::new()), limits)
}

const ALL: StepOptions = StepOptions {
    candidates: 1,
    keep_rows: true,
    probe_hidden: true,
    draws: kimi_linear::backend::DrawCapacity::NONE,
};

/// Logits at every position, with the prompt cut into segments of at most `segment` tokens.
fn prefill(model: &mut Model, tokens: &[u32], segment: usize) -> (Vec<f32>, StepOutput) {
    let mut step = model.step(model.limits().step, ALL).unwrap();
    let (mut logits, mut last) = (Vec::new(), StepOutput::default());
    for (i, tokens) in tokens.chunks(segment).enumerate() {
        last = step
            .submit(&harness::batch(tokens, i * segment, BLOCKS))
            .unwrap()
            .wait()
            .unwrap();
        logits.extend_from_slice(&last.logits);
    }
    (logits, last)
}

fn check(name: &str, lengths: &[usize], traced: usize) {
    let expected = Fixture::open(&format!("{name}/expected.safetensors"));
    let mut model = load(name, 200);
    for n in lengths {
        let of = |what: &str| format!("prompt.{n}.{what}");
        let tokens = expected.ids(&of("tokens"));
        for segment in [200, 1, 7, 16, 64] {
            let (logits, output) = prefill(&mut model, &tokens, segment);
            let label = |what: &str| format!("{name}, {what} of {n} tokens by {segment}");
            close(
                &label("logits"),
                &logits,
                &expected.f32(&of("logits")),
                BOUND,
            );
            if *n == traced {
                let blocks = harness::batch(&vec![0; *n], 0, BLOCKS)
                    .segments
                    .remove(0)
                    .blocks;
                check_caches(&mut model, &expected, *n, Slot(1), &blocks, BOUND, &label);
                if segment >= *n {
                    for i in 0..model.config().layers.len() {
                        let hidden = output.probes[i + 1].as_f32().unwrap();
                        close(
                            &label("hidden"),
                            hidden,
                            &expected.f32(&of(&format!("hidden.{i}"))),
                            BOUND,
                        );
                    }
                }
            }
            let mut greedy = vec![output.choices.last().unwrap().candidates[0].0];
            let mut step = model.step(model.limits().step, ALL).unwrap();
            while greedy.len() < 24 {
                let last = &greedy[greedy.len() - 1..];
                let output = step
                    .submit(&harness::batch(last, n + greedy.len() - 1, BLOCKS))
                    .unwrap()
                    .wait()
                    .unwrap();
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

#[test]
fn tiny_a_computes_what_it_must() {
    check("tiny-a", &[1, 7, 65, 200], 65);
}

#[test]
fn tiny_128_computes_what_it_must() {
    check("tiny-128", &[5, 130], 130);
}

#[test]
fn tiny_256_computes_what_it_must() {
    check("tiny-256", &[1, 37], 37);
}

#[test]
fn planned_activations_are_what_inspect_estimates() {
    for name in ["tiny-a", "tiny-128", "tiny-256"] {
        let model = load(name, 200);
        // The drawn tokens of a step are a few bytes, which the estimate leaves out.
        let drawn = 8 * model.limits().step.segments as u64;
        assert_eq!(
            model.activation_bytes() - drawn,
            model.config().activation_bytes(200, 200)
        );
    }
}
