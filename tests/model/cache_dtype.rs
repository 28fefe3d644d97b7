//! Whole models with latents in each dtype, on every backend.

use crate::backends::BACKENDS;
use crate::common::Fixture;
use crate::harness;
use crate::rounded::round_latents;
use crate::wrapped::{Part, Wrap, Wrapped};
use kimi_linear::backend::{Backend, Op, Result};
use kimi_linear::config::Dtype;
use kimi_linear::model::{Model, StepOptions};

const BLOCKS: usize = 32;

/// Rounds latents after they are appended to a pool with a wider dtype.
#[derive(Clone)]
struct RoundedLatents(Dtype);

impl RoundedLatents {
    fn part(&self, op: &Op) -> Part {
        let Op::MlaAppend(append) = op else {
            return Part::plain(op.clone());
        };
        let (append, dtype) = (*append, self.0);
        Part::after(op.clone(), move |backend, batch| {
            round_latents(backend, &append, batch, dtype)
        })
    }
}

impl Wrap for RoundedLatents {
    fn parts(&mut self, op: &Op, _backend: &mut dyn Backend) -> Result<Vec<Part>> {
        match op {
            Op::MlaBlock(block) => Ok(block.ops().iter().map(|op| self.part(op)).collect()),
            op => Ok(vec![self.part(op)]),
        }
    }
}

fn load(name: &str, backend: Box<dyn Backend>, cache: Dtype) -> Model {
    harness::load(name, backend, harness::limits(200, BLOCKS, cache))
}

/// Logits at every position: a prompt in one segment, then the tokens after it one by one.
fn logits(model: &mut Model, tokens: &[u32], prompt: usize) -> Vec<f32> {
    let step_options = StepOptions {
        candidates: 1,
        keep_rows: true,
        probe_hidden: false,
        draws: kimi_linear::backend::DrawCapacity::NONE,
    };
    let mut step = model.step(model.limits().step, step_options).unwrap();
    let mut run = |tokens: &[u32], position: usize| {
        let batch = harness::batch(tokens, position, BLOCKS);
        step.submit(&batch).unwrap().wait().unwrap().logits
    };
    let mut logits = run(&tokens[..prompt], 0);
    for position in prompt..tokens.len() {
        logits.extend(run(&tokens[position..=position], position));
    }
    logits
}

fn bits(logits: &[f32]) -> Vec<u32> {
    assert!(logits.iter().all(|logit| logit.is_finite()));
    logits.iter().map(|logit| logit.to_bits()).collect()
}

/// A pool of 16 bits per number has the same bits as an f32 pool whose rows are rounded after each append: rows are widened
/// exactly, and nothing else depends on the dtype. f32 pools are compared with the reference in other tests; on CUDA, whose
/// operands are bf16, an f32 pool has the bits of a bf16 pool.
#[test]
fn a_narrow_pool_is_an_f32_pool_with_rounded_rows() {
    for (name, prompt) in [("tiny-a", 65), ("tiny-128", 130)] {
        let expected = Fixture::open(&format!("{name}/expected.safetensors"));
        let mut tokens = expected.ids(&format!("prompt.{prompt}.tokens"));
        tokens.extend(&expected.ids(&format!("prompt.{prompt}.greedy"))[..20]);
        for (on, open) in BACKENDS {
            let wide = bits(&logits(
                &mut load(name, open(), Dtype::F32),
                &tokens,
                prompt,
            ));
            for dtype in [Dtype::F16, Dtype::Bf16] {
                let rounded = Wrapped::new(open(), RoundedLatents(dtype));
                let mut rounded = load(name, Box::new(rounded), Dtype::F32);
                let rounded = bits(&logits(&mut rounded, &tokens, prompt));
                let narrow = bits(&logits(&mut load(name, open(), dtype), &tokens, prompt));
                assert!(narrow == rounded, "{name} on {on}, latents in {dtype}");
                let same = narrow == wide;
                let operands = open().device().precision;
                assert_eq!(
                    same,
                    operands == dtype,
                    "{name} on {on}, {dtype} beside f32"
                );
            }
        }
    }
}
