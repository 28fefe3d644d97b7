//! Sampling from rows of four logits.

use super::*;

fn choice(logits: &[f32]) -> Choice {
    let mut candidates: Vec<(u32, f32)> = (0..).zip(logits.iter().copied()).collect();
    candidates.sort_by(|a, b| b.1.total_cmp(&a.1));
    Choice {
        candidates,
        log_normaliser: 0.0,
        target_logit: None,
        finite: true,
    }
}

fn draws(sampling: Sampling, logits: &[f32]) -> Vec<usize> {
    let (mut sampler, mut counts) = (Sampler::new(&sampling, 0, &[]), vec![0; logits.len()]);
    for _ in 0..20_000 {
        counts[sampler.choose(&choice(logits), logits).unwrap() as usize] += 1;
    }
    counts
}

const LOGITS: [f32; 4] = [0.0, 2.0, 1.0, -1.0];

#[test]
fn greedy_takes_the_best() {
    assert_eq!(draws(Sampling::GREEDY, &LOGITS), [0, 20_000, 0, 0]);
}

#[test]
fn draws_follow_the_softmax() {
    let temperature = 0.7;
    let counts = draws(
        Sampling {
            temperature,
            ..Sampling::GREEDY
        },
        &LOGITS,
    );
    let weights = LOGITS.map(|logit| (f64::from(logit) / temperature).exp());
    let total: f64 = weights.iter().sum();
    for (count, weight) in counts.iter().zip(weights) {
        let (p, seen) = (weight / total, *count as f64 / 20_000.0);
        // Five standard deviations.
        assert!(
            (seen - p).abs() < 5.0 * (p * (1.0 - p) / 20_000.0).sqrt(),
            "{seen} against {p}"
        );
    }
}

#[test]
fn cuts_leave_out_what_they_say() {
    let at = || Sampling {
        temperature: 1.0,
        ..Sampling::GREEDY
    };
    let zero = |counts: &[usize]| counts.iter().map(|count| *count == 0).collect::<Vec<_>>();
    assert_eq!(
        zero(&draws(Sampling { top_k: 2, ..at() }, &LOGITS)),
        [true, false, false, true]
    );
    // Probabilities 0.64, 0.24, 0.09, 0.03.
    assert_eq!(
        zero(&draws(Sampling { top_p: 0.6, ..at() }, &LOGITS)),
        [true, false, true, true]
    );
    assert_eq!(
        zero(&draws(Sampling { top_p: 0.9, ..at() }, &LOGITS)),
        [false, false, false, true]
    );
    assert_eq!(
        zero(&draws(Sampling { min_p: 0.3, ..at() }, &LOGITS)),
        [true, false, false, true]
    );
}

#[test]
fn a_seed_repeats_and_another_differs() {
    let at = |seed| {
        draws(
            Sampling {
                temperature: 1.0,
                seed,
                ..Sampling::GREEDY
            },
            &LOGITS,
        )
    };
    assert_eq!(at(1), at(1));
    assert_ne!(at(1), at(2));
}

#[test]
fn samples_of_one_seed_differ() {
    let sampling = Sampling {
        temperature: 1.0,
        ..Sampling::GREEDY
    };
    let draws = |sample| {
        let mut sampler = Sampler::new(&sampling, sample, &[]);
        (0..32)
            .map(|_| sampler.choose(&choice(&LOGITS), &LOGITS).unwrap())
            .collect::<Vec<_>>()
    };
    assert_eq!(draws(1), draws(1));
    assert_ne!(draws(0), draws(1));
}

/// The greedy tokens of four steps over the same row.
fn greedy(sampling: Sampling, prompt: &[u32]) -> Vec<u32> {
    let mut sampler = Sampler::new(&sampling, 0, prompt);
    (0..4)
        .map(|_| sampler.choose(&choice(&LOGITS), &LOGITS).unwrap())
        .collect()
}

#[test]
fn penalties_and_biases_change_the_logits() {
    // LOGITS are 0, 2, 1, -1.
    let with = |change: &dyn Fn(&mut Sampling)| {
        let mut sampling = Sampling::GREEDY;
        change(&mut sampling);
        sampling
    };
    assert_eq!(
        greedy(with(&|s| s.presence_penalty = 1.5), &[]),
        [1, 2, 1, 1]
    );
    assert_eq!(
        greedy(with(&|s| s.frequency_penalty = 0.8), &[]),
        [1, 1, 2, 1]
    );
    // 2 / 4 = 0.5 for the token of the prompt.
    assert_eq!(
        greedy(with(&|s| s.repetition_penalty = 4.0), &[1]),
        [2, 1, 1, 1]
    );
    assert_eq!(
        greedy(with(&|s| s.logit_bias = vec![(1, -100.0), (3, 3.0)]), &[]),
        [3, 3, 3, 3]
    );
    assert!(with(&|s| s.logit_bias = vec![(4, 1.0)]).check(4).is_err());
}

/// A suppressed token is never sampled, however tokens are sampled, and whatever a bias or a grammar says.
#[test]
fn suppressed_tokens_are_never_drawn() {
    let drawn = Sampling {
        temperature: 1.0,
        ..Sampling::GREEDY
    };
    let biased = Sampling {
        logit_bias: vec![(1, 50.0)],
        ..Sampling::GREEDY
    };
    let top_k = |top_k| Sampling {
        top_k,
        ..drawn.clone()
    };
    let (top_1, top_2) = (top_k(1), top_k(2));
    let guide = || Box::new(Steps(vec![vec![0, 1, 3]; 2_000])) as Box<dyn Guide>;
    // LOGITS are 0, 2, 1, -1; 1 and 2 are suppressed.
    for (sampling, guided, expected) in [
        (Sampling::GREEDY, false, vec![0]),
        (biased, false, vec![0]),
        (top_1, false, vec![0]),
        (top_2, false, vec![0, 3]),
        (drawn.clone(), false, vec![0, 3]),
        (drawn, true, vec![0, 3]),
    ] {
        let mut sampler = Sampler::new(&sampling, 0, &[]).suppressing([1, 2].into());
        if guided {
            sampler = sampler.guided(Some(guide()));
        }
        // Only as much is read back as was asked for.
        let mut read = choice(&LOGITS);
        read.candidates.truncate(sampler.candidates());
        let row = if sampler.needs_full_logits() {
            &LOGITS[..]
        } else {
            &[]
        };
        let mut found: Vec<u32> = (0..500)
            .map(|_| sampler.choose(&read, row).unwrap())
            .collect();
        found.sort_unstable();
        found.dedup();
        assert_eq!(found, expected, "{sampling:?}, guided: {guided}");
    }
}

/// Beyond the candidates that are read back, whole rows are read.
#[test]
fn many_suppressed_tokens_take_whole_rows() {
    let read = |top_k, suppressed: u32| {
        let sampling = Sampling {
            temperature: 1.0,
            top_k,
            ..Sampling::GREEDY
        };
        let sampler = Sampler::new(&sampling, 0, &[]).suppressing((0..suppressed).collect());
        (sampler.candidates(), sampler.needs_full_logits())
    };
    assert_eq!(read(40, 24), (64, false));
    assert_eq!(read(40, 25), (1, true));
    assert_eq!(read(64, 0), (64, false));
    assert_eq!(read(65, 0), (1, true));
    assert_eq!(read(0, 0), (1, true));
    assert_eq!(read(usize::MAX, 2), (1, true));
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

#[test]
fn a_grammar_leaves_out_what_it_does_not_allow() {
    let steps = || Some(Box::new(Steps(vec![vec![0, 3], vec![2, 3], vec![1]])) as Box<dyn Guide>);
    // LOGITS are 0, 2, 1, -1.
    let mut sampler = Sampler::new(&Sampling::GREEDY, 0, &[]).guided(steps());
    for expected in [0, 2, 1] {
        assert!(!sampler.is_complete());
        assert_eq!(sampler.choose(&choice(&LOGITS), &LOGITS), Ok(expected));
    }
    assert!(sampler.is_complete());
    // A bias counts among allowed tokens; it cannot bring back others.
    let logit_bias = vec![(1, 50.0), (3, 3.0)];
    let sampling = Sampling {
        logit_bias,
        ..Sampling::GREEDY
    };
    let mut sampler = Sampler::new(&sampling, 0, &[]).guided(steps());
    assert_eq!(sampler.choose(&choice(&LOGITS), &LOGITS), Ok(3));
    // Draws follow the softmax over the allowed tokens alone.
    let drawn = Sampling {
        temperature: 1.0,
        ..Sampling::GREEDY
    };
    let mut counts = [0; 4];
    for sample in 0..2_000 {
        let mut sampler = Sampler::new(&drawn, sample, &[]).guided(steps());
        counts[sampler.choose(&choice(&LOGITS), &LOGITS).unwrap() as usize] += 1;
    }
    assert_eq!((counts[1], counts[2]), (0, 0));
    let p = 1.0 / (1.0 + (-1.0_f64).exp());
    assert!((f64::from(counts[0]) / 2_000.0 - p).abs() < 5.0 * (p * (1.0 - p) / 2_000.0).sqrt());
}

#[test]
fn a_grammar_without_a_token_is_an_error() {
    let mut sampler =
        Sampler::new(&Sampling::GREEDY, 0, &[]).guided(Some(Box::new(Steps(vec![vec![]]))));
    let error = sampler.choose(&choice(&LOGITS), &LOGITS).unwrap_err();
    assert!(error.to_string().contains("no token"), "{error}");
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
