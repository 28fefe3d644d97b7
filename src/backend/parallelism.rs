//! How a model is divided among devices: the degrees, what they must divide, and the layers of each pipeline stage.

use std::ops::Range;

#[cfg(not(target_arch = "wasm32"))]
use super::Shard;
use crate::config::{Attention, Ffn, ModelConfig};
use crate::error::BackendError;

/// Degrees of parallelism. A pipeline stage has as many ranks as the greater of the first two degrees.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Parallelism {
    /// Ranks that divide heads, hidden units and vocabulary; 1, or all ranks of a stage.
    pub tensor: usize,
    /// Ranks that divide the routed experts, each of which stays whole; 1, or all ranks of a stage. With 1, tensor parallelism
    /// divides the hidden units of every expert.
    pub expert: usize,
    /// Pipeline stages, each of which has consecutive layers.
    pub pipeline: usize,
}

impl Parallelism {
    /// A single device.
    pub const SINGLE: Self = Self {
        tensor: 1,
        expert: 1,
        pipeline: 1,
    };

    /// Ranks of a pipeline stage.
    #[must_use]
    pub fn width(&self) -> usize {
        self.tensor.max(self.expert)
    }

    /// Ranks of all stages.
    #[must_use]
    pub fn ranks(&self) -> usize {
        self.width() * self.pipeline
    }

    /// The part of heads, hidden units and vocabulary of a rank of a stage.
    #[cfg(not(target_arch = "wasm32"))]
    pub(crate) fn tensor_shard(&self, rank: usize) -> Shard {
        match self.tensor {
            1 => Shard::WHOLE,
            ranks => Shard { rank, ranks },
        }
    }

    /// The part of the routed experts of a rank of a stage.
    #[cfg(not(target_arch = "wasm32"))]
    pub(crate) fn expert_shard(&self, rank: usize) -> Shard {
        match self.expert {
            1 => Shard::WHOLE,
            ranks => Shard { rank, ranks },
        }
    }

    /// The layers of each stage: equal numbers, and one more in the first stages where they do not come out even.
    #[must_use]
    pub fn stages(&self, layers: usize) -> Vec<Range<usize>> {
        let (each, more) = (layers / self.pipeline, layers % self.pipeline);
        let mut first = 0;
        let stage = |stage| {
            let end = first + each + usize::from(stage < more);
            std::mem::replace(&mut first, end)..end
        };
        (0..self.pipeline).map(stage).collect()
    }

    /// Checks that a model can be divided in this way.
    ///
    /// # Errors
    /// Degrees that do not divide what they cut, or that do not go together; the message has the degrees that work.
    pub fn check(&self, config: &ModelConfig) -> Result<(), BackendError> {
        for (what, degree, most) in [
            ("the tensor parallel size", self.tensor, usize::MAX),
            ("the expert parallel size", self.expert, usize::MAX),
            (
                "the pipeline parallel size",
                self.pipeline,
                config.layers.len(),
            ),
        ] {
            if degree == 0 || degree > most {
                let expected = match most {
                    usize::MAX => "at least 1".to_owned(),
                    most => format!("1 to {most}, the number of layers"),
                };
                return Err(wrong(what, expected, degree));
            }
        }
        let width = self.width();
        for (what, degree) in [
            ("the tensor parallel size", self.tensor),
            ("the expert parallel size", self.expert),
        ] {
            if degree != 1 && degree != width {
                return Err(wrong(what, format!("1 or {width}"), degree));
            }
        }
        let has = |kind: Attention| config.layers.iter().any(|layer| layer.attention == kind);
        let has_ffn = |kind: Ffn| config.layers.iter().any(|layer| layer.ffn == kind);
        let moe = has_ffn(Ffn::Moe);
        let cut = [
            (has(Attention::Kda), "KDA heads", config.kda_num_heads),
            (
                has(Attention::Mla),
                "attention heads",
                config.num_attention_heads,
            ),
            (
                has_ffn(Ffn::Dense),
                "hidden units of dense layers",
                config.intermediate_size,
            ),
            (
                moe,
                "hidden units of shared experts",
                config.shared_intermediate_size(),
            ),
            (
                moe && self.expert == 1,
                "hidden units of an expert",
                config.moe_intermediate_size,
            ),
            (true, "tokens of the vocabulary", config.vocab_size),
        ];
        let cut = cut.into_iter().filter(|(there, ..)| *there);
        let cut: Vec<_> = cut.map(|(_, what, number)| (what, number)).collect();
        divides("tensor", self.tensor, &cut)?;
        if moe {
            divides("expert", self.expert, &[("experts", config.num_experts)])?;
        }
        Ok(())
    }
}

/// Fails unless a degree divides all these numbers.
fn divides(
    kind: &'static str,
    degree: usize,
    numbers: &[(&'static str, usize)],
) -> Result<(), BackendError> {
    let Some((what, number)) = numbers.iter().find(|(_, number)| number % degree != 0) else {
        return Ok(());
    };
    let most = numbers.iter().map(|(_, number)| *number).max().unwrap_or(1);
    let works = |degree: &usize| numbers.iter().all(|(_, number)| number % degree == 0);
    Err(BackendError::Parallelism {
        kind,
        degree,
        what: format!("the model has {number} {what}"),
        works: list((1..=most).filter(works)),
    })
}

/// `1, 2 and 4`.
pub(crate) fn list(degrees: impl Iterator<Item = usize>) -> String {
    let degrees: Vec<String> = degrees.map(|degree| degree.to_string()).collect();
    match degrees.split_last() {
        Some((last, rest)) if !rest.is_empty() => format!("{} and {last}", rest.join(", ")),
        Some((last, _)) => last.clone(),
        None => "none".to_owned(),
    }
}

fn wrong(what: &'static str, expected: String, found: usize) -> BackendError {
    BackendError::Shape {
        operation: "several devices",
        what,
        expected,
        found: found.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn degrees(tensor: usize, expert: usize, pipeline: usize) -> Parallelism {
        Parallelism {
            tensor,
            expert,
            pipeline,
        }
    }

    #[test]
    fn stages_are_consecutive_and_even() {
        assert_eq!(degrees(1, 1, 4).stages(27), [0..7, 7..14, 14..21, 21..27]);
        assert_eq!(degrees(4, 4, 1).stages(27), vec![0..27; 1]);
        assert_eq!(degrees(2, 1, 3).stages(3), [0..1, 1..2, 2..3]);
    }

    #[test]
    fn ranks_are_those_of_all_stages() {
        assert_eq!(degrees(4, 1, 2).ranks(), 8);
        assert_eq!(degrees(1, 4, 2).ranks(), 8);
        assert_eq!(degrees(4, 4, 1).ranks(), 4);
    }

    #[test]
    fn degrees_that_do_not_divide_are_refused_with_those_that_do()
    -> Result<(), Box<dyn std::error::Error>> {
        let config = ModelConfig::published()?;
        for (tensor, expert, pipeline) in [(8, 1, 1), (8, 8, 1), (1, 8, 2), (4, 1, 27), (32, 32, 1)]
        {
            degrees(tensor, expert, pipeline).check(&config)?;
        }
        for ((tensor, expert, pipeline), message) in [
            (
                (3, 1, 1),
                "32 KDA heads: the degrees 1, 2, 4, 8, 16 and 32 work",
            ),
            (
                (1, 3, 1),
                "256 experts: the degrees 1, 2, 4, 8, 16, 32, 64, 128 and 256 work",
            ),
            (
                (4, 2, 1),
                "the expert parallel size should be 1 or 4, but is 2",
            ),
            (
                (2, 4, 1),
                "the tensor parallel size should be 1 or 4, but is 2",
            ),
            (
                (1, 1, 28),
                "the pipeline parallel size should be 1 to 27, the number of layers, but is 28",
            ),
            (
                (0, 1, 1),
                "the tensor parallel size should be at least 1, but is 0",
            ),
            ((1, 1, 0), "the pipeline parallel size should be 1 to 27"),
        ] {
            let error = degrees(tensor, expert, pipeline).check(&config);
            let error = error
                .err()
                .map(|error| error.to_string())
                .unwrap_or_default();
            assert!(error.contains(message), "{error}");
        }
        Ok(())
    }
}
