//! Sampling from rows of four logits, on the CPU backend.

use super::*;
use crate::backend::cpu::CpuBackend;
use crate::backend::{
    Backend, Batch, DrawCapacity, Element, OutputRow, Program, Rows, Sample, Segment, Slot,
    TensorValues,
};

const LOGITS: [f32; 4] = [0.0, 2.0, 1.0, -1.0];

/// The tokens of these draws from one row.
fn tokens(logits: &[f32], draws: Vec<Draw>) -> Vec<Option<u32>> {
    let mut backend = CpuBackend::new();
    let row = backend.tensor(Rows::Outputs, 1, logits.len(), Element::F32);
    let row = row.unwrap();
    let values = TensorValues::F32(logits.to_vec());
    backend.write_tensor(row, &values).unwrap();
    let mut program = Program::new();
    program.push(Sample {
        logits: row,
        capacity: DrawCapacity::of(&draws),
        drawn: None,
    });
    let batch = Batch {
        tokens: vec![0],
        segments: vec![Segment {
            length: 1,
            position: 0,
            slot_in: None,
            slot_out: Slot(0),
            checkpoints: Vec::new(),
            blocks: Vec::new(),
        }],
        outputs: vec![OutputRow {
            row: 0,
            target: None,
        }],
        draws,
        fed: Vec::new(),
    };
    let mut step = backend.compile(&program, batch.size()).unwrap();
    let output = step.submit(&batch).unwrap().wait().unwrap();
    let draws = output.draws.into_iter();
    draws.map(|drawn| drawn.map(|drawn| drawn.token)).collect()
}

fn sampler(sampling: &Sampling) -> Sampler {
    Sampler::new(sampling, &Vocabulary::new(4), &[])
}

/// The next token of a sampler, which takes it.
fn next(sampler: &mut Sampler) -> Result<u32, EngineError> {
    let draws = sampler.draws(0, 0..1, 0)?;
    let token = tokens(&LOGITS, draws)[0].unwrap();
    sampler.take(token)?;
    Ok(token)
}

/// The tokens at `count` positions of an answer without penalties.
fn answer(sampling: &Sampling, logits: &[f32], sample: usize, count: usize) -> Vec<u32> {
    let mut sampler = Sampler::new(sampling, &Vocabulary::new(logits.len()), &[]);
    let draws = (0..count).map(|_| {
        let draw = sampler.draws(0, sample..sample + 1, 0).unwrap().remove(0);
        sampler.take(0).unwrap();
        draw
    });
    let found = tokens(logits, draws.collect());
    found.into_iter().map(Option::unwrap).collect()
}

fn counts(sampling: &Sampling, logits: &[f32], sample: usize) -> Vec<u32> {
    let mut counts = vec![0; logits.len()];
    for token in answer(sampling, logits, sample, 20_000) {
        counts[token as usize] += 1;
    }
    counts
}

fn at(temperature: f64) -> Sampling {
    Sampling {
        temperature,
        ..Sampling::GREEDY
    }
}

#[test]
fn greedy_takes_the_best() {
    assert_eq!(counts(&Sampling::GREEDY, &LOGITS, 0), [0, 20_000, 0, 0]);
}

/// The statistic of Pearson's test has a mean of `n - 1` and a variance of `2 (n - 1)`, here with six standard deviations.
#[test]
fn draws_follow_the_softmax() {
    let logits: Vec<f32> = (0..60).map(|i| (i * 37 % 60) as f32 * 0.05).collect();
    for (seed, sample) in [(0, 0), (0, 1), (1, 0), (u64::MAX, 3), (1 << 40, 7)] {
        let sampling = Sampling { seed, ..at(0.7) };
        let counts = counts(&sampling, &logits, sample);
        let weights = logits.iter().map(|logit| (f64::from(*logit) / 0.7).exp());
        let weights: Vec<f64> = weights.collect();
        let total: f64 = weights.iter().sum();
        let terms = counts.iter().zip(weights).map(|(count, weight)| {
            let expected = 20_000.0 * weight / total;
            (f64::from(*count) - expected).powi(2) / expected
        });
        let (found, freedom) = (terms.sum::<f64>(), 59.0_f64);
        let bound = 6.0 * (2.0 * freedom).sqrt();
        assert!((found - freedom).abs() < bound, "{found} for seed {seed}");
    }
}

#[test]
fn cuts_leave_out_what_they_say() {
    let zero = |sampling: &Sampling| {
        let counts = counts(sampling, &LOGITS, 0);
        counts.iter().map(|count| *count == 0).collect::<Vec<_>>()
    };
    let top_k = |top_k| Sampling { top_k, ..at(1.0) };
    let top_p = |top_p| Sampling { top_p, ..at(1.0) };
    let min_p = |min_p| Sampling { min_p, ..at(1.0) };
    assert_eq!(zero(&top_k(2)), [true, false, false, true]);
    // Probabilities 0.64, 0.24, 0.09, 0.03.
    assert_eq!(zero(&top_p(0.6)), [true, false, true, true]);
    assert_eq!(zero(&top_p(0.9)), [false, false, false, true]);
    assert_eq!(zero(&min_p(0.3)), [true, false, false, true]);
}

#[test]
fn a_seed_repeats_and_another_differs() {
    let at = |seed| answer(&Sampling { seed, ..at(1.0) }, &LOGITS, 0, 64);
    assert_eq!(at(1), at(1));
    assert_ne!(at(1), at(2));
    assert_ne!(at(1), at(1 << 32 | 1));
}

#[test]
fn samples_of_one_seed_differ() {
    let of = |sample| answer(&at(1.0), &LOGITS, sample, 64);
    assert_eq!(of(1), of(1));
    assert_ne!(of(0), of(1));
}

/// A draw depends on the seed, the answer and the number of tokens before, not on how the answer came to be there.
#[test]
fn a_sampler_that_takes_tokens_over_continues_as_the_other() {
    let mut one = sampler(&at(1.0));
    let first: Vec<u32> = (0..5).map(|_| next(&mut one).unwrap()).collect();
    let mut other = sampler(&at(1.0));
    for token in first {
        other.take(token).unwrap();
    }
    assert_eq!(one.draws(0, 0..3, 0), other.draws(0, 0..3, 0));
}

/// The greedy tokens of four steps over the same row.
fn greedy(sampling: &Sampling, prompt: &[u32]) -> Vec<u32> {
    let mut sampler = Sampler::new(sampling, &Vocabulary::new(4), prompt);
    (0..4).map(|_| next(&mut sampler).unwrap()).collect()
}

#[test]
fn penalties_and_biases_change_the_logits() {
    // LOGITS are 0, 2, 1, -1.
    let with = |change: &dyn Fn(&mut Sampling)| {
        let mut sampling = Sampling::GREEDY;
        change(&mut sampling);
        sampling
    };
    let presence = with(&|s| s.presence_penalty = 1.5);
    assert_eq!(greedy(&presence, &[]), [1, 2, 1, 1]);
    let frequency = with(&|s| s.frequency_penalty = 0.8);
    assert_eq!(greedy(&frequency, &[]), [1, 1, 2, 1]);
    // 2 / 4 = 0.5 for the token of the prompt.
    let repetition = with(&|s| s.repetition_penalty = 4.0);
    assert_eq!(greedy(&repetition, &[1]), [2, 1, 1, 1]);
    let bias = with(&|s| s.logit_bias = vec![(1, -100.0), (3, 2.0), (3, 1.0)]);
    assert_eq!(greedy(&bias, &[]), [3, 3, 3, 3]);
    let far = with(&|s| s.logit_bias = vec![(3, 1e300), (1, -1e300)]);
    assert_eq!(greedy(&far, &[]), [3, 3, 3, 3]);
    assert!(with(&|s| s.logit_bias = vec![(4, 1.0)]).check(4).is_err());
}

/// A suppressed token is never sampled, however tokens are sampled, and whatever a bias or a grammar says.
#[test]
fn suppressed_tokens_are_never_drawn() {
    let biased = Sampling {
        logit_bias: vec![(1, 50.0)],
        ..Sampling::GREEDY
    };
    let top_k = |top_k| Sampling { top_k, ..at(1.0) };
    // LOGITS are 0, 2, 1, -1; 1 and 2 are suppressed.
    let vocabulary = Vocabulary::new(4).suppressing(&[1, 2]);
    for (sampling, guided, expected) in [
        (Sampling::GREEDY, false, vec![0]),
        (biased, false, vec![0]),
        (top_k(1), false, vec![0]),
        (top_k(2), false, vec![0, 3]),
        (at(1.0), false, vec![0, 3]),
        (at(1.0), true, vec![0, 3]),
    ] {
        let guide = || Box::new(Steps(vec![vec![0, 1, 3]])) as Box<dyn Guide>;
        let sampler = Sampler::new(&sampling, &vocabulary, &[]);
        let mut sampler = sampler.guided(guided.then(guide));
        let found = tokens(&LOGITS, sampler.draws(0, 0..500, 0).unwrap());
        let mut found: Vec<u32> = found.into_iter().map(Option::unwrap).collect();
        found.sort_unstable();
        found.dedup();
        assert_eq!(found, expected, "{sampling:?}, guided: {guided}");
    }
}

/// Allows exactly these tokens, one step after the other.
struct Steps(Vec<Vec<u32>>);

impl Guide for Steps {
    fn allowed(&mut self) -> Result<Vec<u32>, String> {
        Ok(vec![self.0[0].iter().fold(0, |bits, id| bits | 1 << id)])
    }

    fn take(&mut self, token: u32) -> Result<bool, String> {
        assert!(self.0.remove(0).contains(&token));
        Ok(self.0.is_empty())
    }
}

fn guided(sampling: &Sampling, steps: Vec<Vec<u32>>) -> Sampler {
    sampler(sampling).guided(Some(Box::new(Steps(steps))))
}

#[test]
fn a_grammar_leaves_out_what_it_does_not_allow() {
    let steps = || vec![vec![0, 3], vec![2, 3], vec![1]];
    // LOGITS are 0, 2, 1, -1.
    let mut sampler = guided(&Sampling::GREEDY, steps());
    for expected in [0, 2, 1] {
        assert!(!sampler.is_complete());
        assert_eq!(next(&mut sampler), Ok(expected));
    }
    assert!(sampler.is_complete());
    // A bias counts among allowed tokens; it cannot bring back others.
    let logit_bias = vec![(1, 50.0), (3, 3.0)];
    let sampling = Sampling {
        logit_bias,
        ..Sampling::GREEDY
    };
    assert_eq!(next(&mut guided(&sampling, steps())), Ok(3));
    // Draws follow the softmax over the allowed tokens alone.
    let draws = guided(&at(1.0), steps()).draws(0, 0..2_000, 0).unwrap();
    let mut counts = [0; 4];
    for token in tokens(&LOGITS, draws) {
        counts[token.unwrap() as usize] += 1;
    }
    assert_eq!((counts[1], counts[2]), (0, 0));
    let p = 1.0 / (1.0 + (-1.0_f64).exp());
    assert!((f64::from(counts[0]) / 2_000.0 - p).abs() < 5.0 * (p * (1.0 - p) / 2_000.0).sqrt());
}

#[test]
fn a_grammar_without_a_token_draws_none() {
    // Token 4 is none of the model's.
    for steps in [vec![vec![]], vec![vec![4]]] {
        let draws = guided(&Sampling::GREEDY, steps).draws(0, 0..1, 0).unwrap();
        assert_eq!(tokens(&LOGITS, draws), [None]);
    }
}

#[test]
fn parameters_outside_their_range_are_named() {
    for (sampling, name) in [
        (
            Sampling {
                temperature: -1.0,
                ..Sampling::GREEDY
            },
            "temperature",
        ),
        (
            Sampling {
                temperature: f64::NAN,
                ..Sampling::GREEDY
            },
            "temperature",
        ),
        (
            Sampling {
                top_p: 0.0,
                ..Sampling::GREEDY
            },
            "top_p",
        ),
        (
            Sampling {
                min_p: 1.5,
                ..Sampling::GREEDY
            },
            "min_p",
        ),
    ] {
        assert!(sampling.check(4).unwrap_err().to_string().starts_with(name));
    }
}
