//! Generated requests: prompt lengths of a distribution, arrivals of a Poisson process whose rate may change.

use std::time::Duration;

use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use rand_distr::{Distribution, Exp1, StandardUniform};

use super::Trace;
use crate::lengths::Lengths;
use crate::{Error, Result};

/// How the rate of arrivals changes over time.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Shape {
    /// A constant rate.
    Steady,
    /// `factor` times as high for `lasting` out of every `every`; the mean is unchanged.
    Bursts {
        /// The factor of the rate in a burst.
        factor: f64,
        /// From one burst's start to the next.
        every: Duration,
        /// The duration of a burst.
        lasting: Duration,
    },
    /// A sine of `amplitude` (0 to 1) times the mean.
    Diurnal {
        /// The fraction of the mean by which it rises and falls.
        amplitude: f64,
        /// From one peak to the next.
        period: Duration,
    },
}

impl Shape {
    /// The rate at a time, and the maximum rate, both as fractions of the mean.
    fn rates(self, at: f64) -> (f64, f64) {
        match self {
            Self::Steady => (1.0, 1.0),
            Self::Bursts {
                factor,
                every,
                lasting,
            } => {
                let part = lasting.as_secs_f64() / every.as_secs_f64();
                let calm = 1.0 / (1.0 + (factor - 1.0) * part);
                let inside = at % every.as_secs_f64() < lasting.as_secs_f64();
                (if inside { calm * factor } else { calm }, calm * factor)
            }
            Self::Diurnal { amplitude, period } => {
                let angle = std::f64::consts::TAU * at / period.as_secs_f64();
                (1.0 + amplitude * angle.sin(), 1.0 + amplitude)
            }
        }
    }

    fn check(self) -> Result<()> {
        let (text, expected) = match self {
            Self::Bursts {
                factor,
                every,
                lasting,
            } if !(factor >= 1.0
                && factor.is_finite()
                && lasting < every
                && !lasting.is_zero()) =>
            {
                (
                    format!("bursts:{factor}"),
                    "expected a factor of at least 1, and bursts shorter than the time between them",
                )
            }
            Self::Diurnal { amplitude, period }
                if !(0.0..=1.0).contains(&amplitude) || period.is_zero() =>
            {
                (
                    format!("diurnal:{amplitude}"),
                    "expected an amplitude of 0 to 1, and a period above 0",
                )
            }
            _ => return Ok(()),
        };
        Err(Error::Spec {
            text,
            expected: expected.into(),
        })
    }
}

/// What to generate.
#[derive(Debug, Clone, PartialEq)]
pub struct Generate {
    /// Prompt lengths, drawn uniformly.
    pub lengths: Lengths,
    /// Tokens of every answer, as in the paper's case study.
    pub output: u32,
    /// Number of requests.
    pub count: usize,
    /// Mean arrivals per second.
    pub rate: f64,
    /// How the rate changes over time.
    pub shape: Shape,
    /// The seed: equal seeds give equal traces.
    pub seed: u64,
}

impl Generate {
    /// The requests.
    ///
    /// # Errors
    /// An invalid rate or shape, or no requests.
    pub fn trace(&self) -> Result<Trace> {
        self.shape.check()?;
        if !(self.rate.is_finite() && self.rate > 0.0) {
            return Err(Error::Spec {
                text: self.rate.to_string(),
                expected: "expected a rate above 0 requests per second".into(),
            });
        }
        if self.count == 0 {
            return Err(Error::NoRequests);
        }
        let mut rng = ChaCha8Rng::seed_from_u64(self.seed);
        let mut trace = Trace::new(Trace::MOONCAKE_BLOCK);
        let (mut at, lengths) = (0.0f64, self.lengths.sorted());
        for _ in 0..self.count {
            // Thinning (Lewis and Shedler 1979): arrivals at the maximum rate, each kept with probability rate / maximum.
            loop {
                let (_, highest) = self.shape.rates(at);
                let gap: f64 = Exp1.sample(&mut rng);
                at += gap / (self.rate * highest);
                let drawn: f64 = StandardUniform.sample(&mut rng);
                if drawn * highest < self.shape.rates(at).0 {
                    break;
                }
            }
            let drawn: f64 = StandardUniform.sample(&mut rng);
            let tokens = lengths[(drawn * lengths.len() as f64) as usize % lengths.len()];
            trace.push(Duration::from_secs_f64(at), tokens, self.output, &[]);
        }
        Ok(trace)
    }
}

impl Trace {
    /// The same arrivals with other lengths of prompts and answers, drawn uniformly; `None` keeps the trace's. Drawn prompts
    /// share no prefixes.
    #[must_use]
    pub fn redrawn(
        mut self,
        prompts: Option<&Lengths>,
        answers: Option<&Lengths>,
        seed: u64,
    ) -> Self {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let mut draw = |lengths: &Lengths| {
            let drawn: f64 = StandardUniform.sample(&mut rng);
            lengths.sorted()[(drawn * lengths.count() as f64) as usize % lengths.count()].max(1)
        };
        for request in &mut self.requests {
            if let Some(lengths) = prompts {
                request.tokens = draw(lengths);
                request.blocks = (0, 0);
            }
            if let Some(lengths) = answers {
                request.output = draw(lengths);
            }
        }
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lengths::LogNormal;

    fn lengths() -> Lengths {
        LogNormal::case_study().lengths().unwrap()
    }

    fn generate(shape: Shape, seed: u64) -> Trace {
        let generate = Generate {
            lengths: lengths(),
            output: 1024,
            count: 40_000,
            rate: 4.0,
            shape,
            seed,
        };
        generate.trace().unwrap()
    }

    #[test]
    fn lengths_and_rate_are_those_asked_for_and_a_seed_says_all() {
        let trace = generate(Shape::Steady, 1);
        // Standard errors: 0.5 % of the rate, 0.45 % of the mean length.
        assert!((trace.rate() / 4.0 - 1.0).abs() < 0.02, "{}", trace.rate());
        let mean = trace.uncached().unwrap().mean();
        assert!((mean / 27_313.0 - 1.0).abs() < 0.02, "{mean}");
        assert_eq!(trace, generate(Shape::Steady, 1));
        assert_ne!(trace, generate(Shape::Steady, 2));
    }

    #[test]
    fn bursts_and_days_keep_the_mean_rate() {
        let bursts = Shape::Bursts {
            factor: 4.0,
            every: Duration::from_secs(600),
            lasting: Duration::from_secs(60),
        };
        let day = Shape::Diurnal {
            amplitude: 0.8,
            period: Duration::from_secs(1000),
        };
        for shape in [bursts, day] {
            let trace = generate(shape, 3);
            assert!(
                (trace.rate() / 4.0 - 1.0).abs() < 0.04,
                "{shape:?}: {}",
                trace.rate()
            );
        }
        let counted = |trace: &Trace, inside: &dyn Fn(f64) -> bool| {
            let all = trace.requests().iter();
            all.filter(|request| inside(request.at.as_secs_f64()))
                .count() as f64
        };
        // A tenth of the time at four times the rate is 4 in 13 of the requests.
        let trace = generate(bursts, 3);
        let inside = counted(&trace, &|at| at % 600.0 < 60.0) / 40_000.0;
        assert!((inside - 4.0 / 13.0).abs() < 0.02, "{inside}");
        let trace = generate(day, 3);
        let high = counted(&trace, &|at| at % 1000.0 < 500.0) / 40_000.0;
        assert!(
            (high - (0.5 + 0.8 / std::f64::consts::PI)).abs() < 0.02,
            "{high}"
        );
    }

    #[test]
    fn redrawn_lengths_leave_the_arrivals_alone() {
        let trace = generate(Shape::Steady, 1);
        let answers = Lengths::observed(vec![10, 20, 30]).unwrap();
        let drawn = trace.clone().redrawn(None, Some(&answers), 5);
        for (before, after) in trace.requests().iter().zip(drawn.requests()) {
            assert_eq!((before.at, before.tokens), (after.at, after.tokens));
            assert!([10, 20, 30].contains(&after.output));
        }
        assert!((drawn.output_tokens() - 20.0).abs() < 0.2);
        assert_eq!(drawn, trace.clone().redrawn(None, Some(&answers), 5));
        let prompts = trace.redrawn(Some(&answers), None, 5);
        assert!((prompts.prompt_tokens() - 20.0).abs() < 0.2);
    }

    #[test]
    fn shapes_that_cannot_be_are_refused() {
        let base = Generate {
            lengths: lengths(),
            output: 1,
            count: 1,
            rate: 1.0,
            shape: Shape::Steady,
            seed: 0,
        };
        let minute = Duration::from_secs(60);
        let bad = [
            Generate {
                rate: 0.0,
                ..base.clone()
            },
            Generate {
                count: 0,
                ..base.clone()
            },
            Generate {
                shape: Shape::Bursts {
                    factor: 2.0,
                    every: minute,
                    lasting: minute,
                },
                ..base.clone()
            },
            Generate {
                shape: Shape::Diurnal {
                    amplitude: 1.5,
                    period: minute,
                },
                ..base
            },
        ];
        for generate in bad {
            assert!(generate.trace().is_err(), "{generate:?}");
        }
    }
}
