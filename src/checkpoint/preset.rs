//! Mixes of formats for a whole model: which format each matrix is quantised to.

use super::BlockFormat;
use super::blocks::{IQ4_NL, IQ4_XS, Q3_K, Q4_0, Q4_K, Q5_0, Q5_1, Q5_K, Q6_K, Q8_0};
use crate::config::{Part, Role};

/// A mix of formats. Experts are most of the file and the least sensitive; what every token passes through keeps more bits.
///
/// | preset | experts: gate, up | experts: down | attention, shared experts, dense MLP | head | embedding |
/// |---|---|---|---|---|---|
/// | `q8` | Q8_0 | Q8_0 | Q8_0 | Q8_0 | Q8_0 |
/// | `q5` | Q4_K | Q5_K | Q6_K | Q6_K | Q4_K |
/// | `q4` | Q4_K | Q4_K | Q8_0 | Q6_K | Q4_K |
/// | `q4-fast` | Q4_K | Q4_K | Q6_K | Q6_K | Q4_K |
/// | `q4-small` | IQ4_XS | IQ4_XS | Q8_0 | Q6_K | Q4_K |
/// | `q3` | Q3_K | Q4_K | Q6_K | Q6_K | Q4_K |
///
/// KDA's gates are Q8_0 in each; routers, norms, biases and convolutions are not quantised.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Preset {
    /// Eight bits everywhere.
    Q8,
    /// Experts in four and five bits.
    Q5,
    /// Experts in four bits, eight for what every token passes through.
    Q4,
    /// As `q4`, with six bits in place of eight: fewer bytes a token.
    Q4Fast,
    /// Experts in 4.25 bits.
    Q4Small,
    /// Experts in three and four bits; needs an importance matrix.
    Q3,
}

impl Preset {
    /// Every preset, the most exact first.
    pub const ALL: [Self; 6] = [
        Self::Q8,
        Self::Q5,
        Self::Q4,
        Self::Q4Fast,
        Self::Q4Small,
        Self::Q3,
    ];

    /// Its name.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Q8 => "q8",
            Self::Q5 => "q5",
            Self::Q4 => "q4",
            Self::Q4Fast => "q4-fast",
            Self::Q4Small => "q4-small",
            Self::Q3 => "q3",
        }
    }

    /// Whether the mix is only good with an importance matrix.
    pub const fn needs_importance(self) -> bool {
        matches!(self, Self::Q3)
    }

    /// The label that files of such a mix have as `general.file_type` (llama.cpp's `llama_ftype`): that of the mix which is nearest.
    pub(crate) const fn file_type(self) -> u32 {
        match self {
            Self::Q8 => 7,
            Self::Q5 => 17,
            Self::Q4 => 15,
            Self::Q4Fast => 14,
            Self::Q4Small => 30,
            Self::Q3 => 12,
        }
    }

    /// The format of a matrix with this number of columns, or the one that llama.cpp falls back to where rows are not whole blocks. `None`
    /// for what is not quantised: weights that are no such matrix, and rows that are not a multiple of 32.
    pub fn format(self, role: Role, columns: usize) -> Option<&'static BlockFormat> {
        let wanted = self.wanted(role)?;
        let fits = |format: &&BlockFormat| columns.is_multiple_of(format.length);
        [wanted, smaller_blocks(wanted)].into_iter().find(fits)
    }

    fn wanted(self, role: Role) -> Option<&'static BlockFormat> {
        if !role.is_quantized() {
            return None;
        }
        if self == Self::Q8 {
            return Some(&Q8_0);
        }
        let passed = match self {
            Self::Q8 | Self::Q4 | Self::Q4Small => &Q8_0,
            Self::Q5 | Self::Q4Fast | Self::Q3 => &Q6_K,
        };
        let [gate_up, down] = match self {
            Self::Q8 => [&Q8_0; 2],
            Self::Q5 => [&Q4_K, &Q5_K],
            Self::Q4 | Self::Q4Fast => [&Q4_K; 2],
            Self::Q4Small => [&IQ4_XS; 2],
            Self::Q3 => [&Q3_K, &Q4_K],
        };
        Some(match role {
            Role::Embedding => &Q4_K,
            Role::Head => &Q6_K,
            Role::ExpertGate | Role::ExpertUp => gate_up,
            Role::ExpertDown => down,
            Role::KdaDecayDown
            | Role::KdaDecayUp
            | Role::KdaGateDown
            | Role::KdaGateUp
            | Role::KdaBeta => &Q8_0,
            _ => passed,
        })
    }
}

/// The format with blocks of 32 that takes the place of one with blocks of 256.
fn smaller_blocks(format: &'static BlockFormat) -> &'static BlockFormat {
    match format.name {
        "Q3_K" => &Q4_0,
        "Q4_K" => &Q5_0,
        "Q5_K" => &Q5_1,
        "Q6_K" => &Q8_0,
        "IQ4_XS" => &IQ4_NL,
        _ => format,
    }
}

impl Role {
    /// Whether it is a matrix that may be quantised: routers decide between experts whose scores are close, and norms, biases and
    /// convolutions are small.
    pub(crate) fn is_quantized(self) -> bool {
        let small = matches!(
            self,
            Role::KdaQueryConv
                | Role::KdaKeyConv
                | Role::KdaValueConv
                | Role::KdaALog
                | Role::KdaDtBias
                | Role::KdaOutputNorm
                | Role::MlaLatentNorm
        );
        !small && !matches!(self.part(), Part::Norms | Part::Router)
    }
}

impl std::fmt::Display for Preset {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

impl std::str::FromStr for Preset {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        let found = Self::ALL.into_iter().find(|preset| preset.name() == name);
        found.ok_or_else(|| {
            let names = Self::ALL.map(Self::name).join(", ");
            format!("there is no preset `{name}`; presets are {names}")
        })
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn names(preset: Preset, columns: usize) -> Vec<&'static str> {
        let roles = [
            Role::Embedding,
            Role::Head,
            Role::KdaQuery,
            Role::KdaBeta,
            Role::ExpertUp,
            Role::ExpertDown,
        ];
        let formats = roles.map(|role| preset.format(role, columns));
        formats
            .iter()
            .map(|format| format.map_or("", |format| format.name))
            .collect()
    }

    #[test]
    fn rows_that_are_not_whole_blocks_fall_back() {
        let q5 = ["Q4_K", "Q6_K", "Q6_K", "Q8_0", "Q4_K", "Q5_K"];
        assert_eq!(names(Preset::Q5, 2304), q5);
        let q5 = ["Q5_0", "Q8_0", "Q8_0", "Q8_0", "Q5_0", "Q5_1"];
        assert_eq!(names(Preset::Q5, 96), q5);
        assert_eq!(names(Preset::Q4Small, 96)[4..], ["IQ4_NL", "IQ4_NL"]);
        assert_eq!(names(Preset::Q3, 96)[4..], ["Q4_0", "Q5_0"]);
        assert_eq!(names(Preset::Q8, 40), [""; 6]);
    }

    #[test]
    fn small_and_sensitive_weights_stay() {
        for role in Role::all() {
            let expected = match role.part() {
                Part::Norms | Part::Router => false,
                _ => !["conv1d", "A_log", "dt_bias", "norm"]
                    .iter()
                    .any(|word| role.pattern().contains(word)),
            };
            assert_eq!(Preset::Q8.format(role, 256).is_some(), expected, "{role:?}");
        }
    }

    #[test]
    fn names_are_parsed() {
        for preset in Preset::ALL {
            assert_eq!(preset.name().parse::<Preset>().unwrap(), preset);
        }
        assert!("q7".parse::<Preset>().unwrap_err().contains("q4-small"));
    }
}
