//! Parameters of the router and of the experts.

use super::{Nullable, Pointer, params};

params! {
    /// The router's scores and choice.
    Route["route_scores", "route_choose", "route_one"] {
        batch: Pointer<'a> as "const u32*" = "the batch",
        input: Pointer<'a> as "const bf16*" = "[T, width]",
        weight: Pointer<'a> as "const void*" = "[experts, width] of the format",
        format: u32 = "the weight's format",
        bias: Pointer<'a> as "const void*" = "[experts] of its format",
        bias_format: u32 = "the bias's format",
        scores: Pointer<'a> as "float*" = "[T, experts], before the sigmoid",
        finished: Pointer<'a> as "u32*" = "one word, 0 between launches: route_one counts its blocks",
        ids: Pointer<'a> as "u32*" = "[T, top_k]: best biased score first",
        weights: Pointer<'a> as "float*" = "[T, top_k]: sigmoids without the bias; all NaN if a biased score is not finite",
        width: usize = "elements per row of the input",
        experts: usize = "number of experts",
        top_k: usize = "choices per token",
        groups: usize = "groups of experts",
        top_groups: usize = "groups that experts are chosen from",
        renormalize: bool = "whether a token's weights are divided by their sum + 1e-20",
        scale: f32 = "factor of the weights",
        all: bool = "route_scores: whether all rows are scored, else those of single tokens",
    }

    /// Lists of assignments by expert. An assignment is a token's choice of an expert: token * top_k + choice.
    ExpertsGroup["experts_count", "experts_group", "experts_list"] {
        batch: Pointer<'a> as "const u32*" = "the batch",
        ids: Pointer<'a> as "const u32*" = "[T, top_k]",
        counts: Nullable<'a> as "u32*" = "[shares, experts]: assignments of each share to each expert; null in experts_list",
        groups: Pointer<'a> as "u32*" = "number of runs; [most_tiles, 3]: expert, first assignment, number of assignments; then the assignments",
        most_tiles: usize = "maximum number of runs: tiles, or experts in experts_list",
        top_k: usize = "choices per token",
        first_expert: usize = "id of the first local expert",
        experts: usize = "number of local experts",
    }

    /// `hidden = silu(gate x) * (up x)` for rows of single tokens.
    ExpertsFewIn["experts_few_in", "experts_few_in_blocks"] {
        batch: Pointer<'a> as "const u32*" = "the batch",
        ids: Pointer<'a> as "const u32*" = "[T, top_k]",
        list: Pointer<'a> as "const u32*" = "from experts_list, if there are several single rows",
        most: usize = "maximum number of experts in the list",
        input: Pointer<'a> as "const bf16*" = "[T, width]",
        gate: Pointer<'a> as "const void*" = "[experts, hidden_width, width]: bf16, or blocks of its format",
        gate_format: u32 = "the gate's format, for blocks",
        up: Pointer<'a> as "const void*" = "[experts, hidden_width, width]: bf16, or blocks of its format",
        up_format: u32 = "up's format, for blocks",
        shared: Nullable<'a> as "const bf16*" = "[2, hidden_width, width]: gate and up of the shared experts, or null; not for blocks",
        hidden: Pointer<'a> as "bf16*" = "[T, top_k, hidden_width]",
        shared_hidden: Nullable<'a> as "bf16*" = "[T, hidden_width], or null",
        width: usize = "elements per row of the input",
        hidden_width: usize = "elements per row of the hidden activations",
        top_k: usize = "choices per token",
        first_expert: usize = "id of the first local expert",
        experts: usize = "number of local experts",
    }

    /// `results = down hidden` for rows of single tokens.
    ExpertsFewOut["experts_few_out", "experts_few_out_blocks"] {
        batch: Pointer<'a> as "const u32*" = "the batch",
        ids: Pointer<'a> as "const u32*" = "[T, top_k]",
        list: Pointer<'a> as "const u32*" = "from experts_list, if there are several single rows",
        most: usize = "maximum number of experts in the list",
        hidden: Pointer<'a> as "const bf16*" = "[T, top_k, hidden_width]",
        down: Pointer<'a> as "const void*" = "[experts, width, hidden_width]: bf16, or blocks of its format",
        format: u32 = "down's format, for blocks",
        shared: Nullable<'a> as "const bf16*" = "[width, hidden_width]: down of the shared experts, or null; not for blocks",
        results: Pointer<'a> as "float*" = "[T, top_k, width]",
        shared_hidden: Nullable<'a> as "const bf16*" = "[T, hidden_width], or null",
        shared_output: Nullable<'a> as "bf16*" = "[T, width], or null",
        width: usize = "elements per row of the results",
        hidden_width: usize = "elements per row of the hidden activations",
        top_k: usize = "choices per token",
        first_expert: usize = "id of the first local expert",
        experts: usize = "number of local experts",
    }

    /// `hidden = silu(gate x) * (up x)` for tiles of assignments of longer segments.
    ExpertsManyIn["experts_many_in", "experts_many_in_blocks"] {
        groups: Pointer<'a> as "const u32*" = "from experts_group",
        most_tiles: usize = "maximum number of tiles in groups",
        input: Pointer<'a> as "const bf16*" = "[T, width]",
        gate: Pointer<'a> as "const void*" = "[experts, hidden_width, width]: bf16, or blocks of its format",
        gate_format: u32 = "the gate's format, for blocks",
        up: Pointer<'a> as "const void*" = "[experts, hidden_width, width]: bf16, or blocks of its format",
        up_format: u32 = "up's format, for blocks",
        hidden: Pointer<'a> as "bf16*" = "[T, top_k, hidden_width]",
        width: usize = "elements per row of the input",
        hidden_width: usize = "elements per row of the hidden activations",
        top_k: usize = "choices per token",
    }

    /// `results = down hidden` for tiles of assignments of longer segments.
    ExpertsManyOut["experts_many_out", "experts_many_out_blocks"] {
        groups: Pointer<'a> as "const u32*" = "from experts_group",
        most_tiles: usize = "maximum number of tiles in groups",
        hidden: Pointer<'a> as "const bf16*" = "[T, top_k, hidden_width]",
        down: Pointer<'a> as "const void*" = "[experts, width, hidden_width]: bf16, or blocks of its format",
        format: u32 = "down's format, for blocks",
        results: Pointer<'a> as "float*" = "[T, top_k, width]",
        width: usize = "elements per row of the results",
        hidden_width: usize = "elements per row of the hidden activations",
    }

    /// The sum of a token's experts; in `experts_combine_norm` also the residual sum `target += output` and its norm.
    ExpertsCombine["experts_combine", "experts_combine_norm"] {
        batch: Pointer<'a> as "const u32*" = "the batch",
        ids: Pointer<'a> as "const u32*" = "[T, top_k]",
        weights: Pointer<'a> as "const float*" = "[T, top_k]",
        results: Pointer<'a> as "const float*" = "[T, top_k, width]",
        shared: Nullable<'a> as "const bf16*" = "[T, width]: what is added to the sum, or null",
        output: Pointer<'a> as "bf16*" = "[T, width]",
        width: usize = "elements per row",
        top_k: usize = "choices per token",
        first_expert: u32 = "id of the first local expert",
        experts: u32 = "number of local experts",
        target: Nullable<'a> as "bf16*" = "[T, width]; null without the norm, like norm and normed",
        norm: Nullable<'a> as "const void*" = "[width] of the format",
        format: u32 = "the norm's format",
        normed: Nullable<'a> as "bf16*" = "[T, width]",
        eps: f32 = "added to the mean of squares",
    }
}
