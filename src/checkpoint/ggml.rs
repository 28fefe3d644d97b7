//! The types of ggml's tensors: their numbers in GGUF files, their names, and our formats for them.

use super::blocks::{
    IQ2_S, IQ2_XS, IQ2_XXS, IQ3_S, IQ3_XXS, IQ4_NL, IQ4_XS, MXFP4, Q2_K, Q3_K, Q4_0, Q4_1, Q4_K,
    Q5_0, Q5_1, Q5_K, Q6_K, Q8_0,
};
use super::{BlockFormat, Format};

/// A tensor type of GGUF files.
#[derive(Debug, Clone, Copy)]
pub struct GgmlType {
    /// Its number.
    pub number: u32,
    /// Its name.
    pub name: &'static str,
    /// Our format; `None` for unsupported types.
    pub format: Option<Format>,
}

const fn block(number: u32, block: &'static BlockFormat) -> GgmlType {
    GgmlType {
        number,
        name: block.name,
        format: Some(Format::Block(block)),
    }
}

const fn dense(number: u32, name: &'static str, format: Format) -> GgmlType {
    GgmlType {
        number,
        name,
        format: Some(format),
    }
}

const fn unread(number: u32, name: &'static str) -> GgmlType {
    GgmlType {
        number,
        name,
        format: None,
    }
}

/// Every type of `ggml.h` that files may have, by number.
pub static TYPES: &[GgmlType] = &[
    dense(0, "F32", Format::F32),
    dense(1, "F16", Format::F16),
    block(2, &Q4_0),
    block(3, &Q4_1),
    block(6, &Q5_0),
    block(7, &Q5_1),
    block(8, &Q8_0),
    block(10, &Q2_K),
    block(11, &Q3_K),
    block(12, &Q4_K),
    block(13, &Q5_K),
    block(14, &Q6_K),
    block(16, &IQ2_XXS),
    block(17, &IQ2_XS),
    block(18, &IQ3_XXS),
    unread(19, "IQ1_S"),
    block(20, &IQ4_NL),
    block(21, &IQ3_S),
    block(22, &IQ2_S),
    block(23, &IQ4_XS),
    unread(24, "I8"),
    unread(25, "I16"),
    unread(26, "I32"),
    unread(27, "I64"),
    unread(28, "F64"),
    unread(29, "IQ1_M"),
    dense(30, "BF16", Format::BF16),
    unread(34, "TQ1_0"),
    unread(35, "TQ2_0"),
    block(39, &MXFP4),
    unread(40, "NVFP4"),
    unread(41, "Q1_0"),
    unread(42, "Q2_0"),
];

impl GgmlType {
    /// The type with this number; `None` if files cannot have it.
    pub fn numbered(number: u32) -> Option<&'static Self> {
        TYPES.iter().find(|known| known.number == number)
    }
}
