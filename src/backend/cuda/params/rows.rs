//! Parameters of operations on rows: embedding, norms, products, activation, sums, candidates and draws; and of weights that
//! are generated or converted.

use super::{Nullable, Pointer, params};

/// Number of products of a launch for few rows.
pub(in crate::backend::cuda) const PRODUCTS: usize = 4;

params! {
    /// `target += source`, over rows of bf16, or of f32 in `add_f32`.
    Add["add", "add_f32"] {
        batch: Pointer<'a> as "const u32*" = "the batch",
        rows: u32 = "the word of the batch that counts the rows: TOKENS or OUTPUTS",
        source: Pointer<'a> as "const void*" = "[.., width] of the entry's type",
        target: Pointer<'a> as "void*" = "[.., width] of the entry's type",
        width: usize = "elements per row",
    }

    /// `target += source`, and `output` is the norm of the sum.
    AddNorm["add_norm"] {
        batch: Pointer<'a> as "const u32*" = "the batch",
        rows: u32 = "the word of the batch that counts the rows: TOKENS or OUTPUTS",
        source: Pointer<'a> as "const bf16*" = "[.., width]",
        target: Pointer<'a> as "bf16*" = "[.., width]",
        weight: Pointer<'a> as "const void*" = "[width] of the format",
        format: u32 = "the weight's format",
        output: Pointer<'a> as "bf16*" = "[.., width]",
        width: usize = "elements per row",
        eps: f32 = "added to the mean of squares",
    }

    /// A weight in bf16.
    Convert["convert"] {
        weight: Pointer<'a> as "const void*" = "[count] of the format",
        format: u32 = "the weight's format",
        output: Pointer<'a> as "bf16*" = "[..]: elements first to first + count are written",
        first: u64 = "the first element that is written",
        count: u64 = "number of elements",
    }

    /// One row of the weight per token.
    Embed["embed"] {
        batch: Pointer<'a> as "const u32*" = "the batch",
        drawn: Nullable<'a> as "const u32*" = "[draws, 2]: the tokens that the submission before drew, and their logits; null if no token is fed",
        weight: Pointer<'a> as "const void*" = "[vocabulary, width] of the format",
        format: u32 = "the weight's format",
        output: Pointer<'a> as "bf16*" = "[T, width]",
        vocabulary: usize = "rows of the weight",
        width: usize = "elements per row",
    }

    /// Random numbers.
    Fill["fill"] {
        output: Pointer<'a> as "void*" = "[count] of the format",
        format: u32 = "F32, F16 or BF16",
        count: u64 = "number of elements",
        seed: u32 = "of the numbers",
        mean: f32 = "of the numbers",
        scale: f32 = "greatest distance from the mean, a power of two, or 0",
    }

    /// The norm of rows.
    RmsNorm["rms_norm"] {
        batch: Pointer<'a> as "const u32*" = "the batch",
        rows: u32 = "the word of the batch that counts the output's rows: TOKENS or OUTPUTS",
        gather: bool = "1: the input has a row per token and the output one per output row; 0: row r is read from row r",
        input: Pointer<'a> as "const bf16*" = "[.., width]",
        weight: Pointer<'a> as "const void*" = "[width] of the format",
        format: u32 = "the weight's format",
        output: Pointer<'a> as "bf16*" = "[.., width]",
        width: usize = "elements per row",
        eps: f32 = "added to the mean of squares",
    }

    /// `output = silu(gate) * up`, where a row of the input is gate, then up.
    Swiglu["swiglu"] {
        batch: Pointer<'a> as "const u32*" = "the batch",
        rows: u32 = "the word of the batch that counts the rows: TOKENS or OUTPUTS",
        input: Pointer<'a> as "const bf16*" = "[.., 2 width]",
        output: Pointer<'a> as "bf16*" = "[.., width]",
        width: usize = "elements per row of the output",
    }

    /// Some columns of `output = input weight^T`.
    Linear["linear", "linear_few_blocks", "linear_many_blocks"] {
        batch: Pointer<'a> as "const u32*" = "the batch",
        rows: u32 = "the word of the batch that counts the rows: TOKENS, OUTPUTS, or in linear the positions of a window",
        input: Pointer<'a> as "const bf16*" = "[.., columns]",
        weight: Pointer<'a> as "const void*" = "[outputs, columns] of the format",
        format: u32 = "the weight's format",
        output: Pointer<'a> as "void*" = "[.., width], f32 if full, else bf16: columns first to first + outputs are written",
        full: bool = "whether the output is f32",
        columns: usize = "elements per row of the input",
        outputs: usize = "rows of the weight",
        first: usize = "the output's column of the weight's first row",
        width: usize = "elements per row of the output",
    }

    /// Up to four products `output = input weight^T`; those that are not there are null and 0.
    LinearFew["linear_few_8", "linear_few_16", "linear_few_32", "linear_few_64"] {
        batch: Pointer<'a> as "const u32*" = "the batch",
        rows: u32 = "the word of the batch that counts the rows: TOKENS or OUTPUTS",
        full: bool = "whether outputs are f32, else bf16",
        input: [Nullable<'a>; PRODUCTS] as "const bf16*" = "[.., columns], aligned to 16 bytes",
        weight: [Nullable<'a>; PRODUCTS] as "const bf16*" = "[outputs, columns], aligned to 16 bytes",
        output: [Nullable<'a>; PRODUCTS] as "void*" = "[.., outputs]",
        columns: [usize; PRODUCTS] = "elements per row of the input",
        outputs: [usize; PRODUCTS] = "rows of the weight",
    }

    /// The candidates of rows of logits.
    Select["select_slices", "select_merge"] {
        batch: Pointer<'a> as "const u32*" = "the batch",
        logits: Pointer<'a> as "const float*" = "[O, vocabulary]",
        ranks: Pointer<'a> as "u64*" = "[O, slices, candidates]: score and id, see best.h; 0 if a slice has no more",
        sums: Pointer<'a> as "float*" = "[O, slices, 4]: greatest, sum of exponentials, 1 if all are finite, unused",
        choices: Pointer<'a> as "u32*" = "[O, 4 + 2 candidates] words: log-normaliser, 0, whether all are finite, the target's logit; then id, logit",
        vocabulary: usize = "logits per row",
        candidates: usize = "candidates per row",
        slices: usize = "slices per row",
    }

    /// Draws of tokens.
    Sample["sample_change", "sample_best", "sample_narrow", "sample_sum", "sample_draw"] {
        batch: Pointer<'a> as "const u32*" = "the batch",
        logits: Pointer<'a> as "const float*" = "[O, vocabulary]",
        changed: Pointer<'a> as "float*" = "[changed draws, vocabulary]: copies of rows with changes",
        best: Pointer<'a> as "u64*" = "[draws, slices]: each slice's best token, ranked; 0 if none is allowed",
        cells: Pointer<'a> as "u64*" = "[draws, 2, 4, 256]: tokens by number and by weight, in each level",
        sums: Pointer<'a> as "u64*" = "[draws, slices, 2]: the weight of the tokens above the cut, and the number of those at it",
        drawn: Pointer<'a> as "u32*" = "[draws, 2] words: the token, or NONE if none is allowed; its logit in the row",
        vocabulary: usize = "logits per row",
        slice: usize = "logits per slice",
        slices: usize = "slices per row",
        by_weight: bool = "sample_narrow: 0 narrows the number of tokens (top_k), 1 their weight (top_p)",
        level: usize = "sample_narrow: the one of the four levels of eight bits that is counted",
    }
}
