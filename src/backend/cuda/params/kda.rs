//! Parameters of a KDA layer. K and V are the widths of a head's key and value, `channels` is
//! `2 key_heads K + heads V`.

use super::{Nullable, Pointer, params};

params! {
    /// The short convolution, and its states at the end of segments and at checkpoints.
    ShortConv["short_conv", "short_conv_states"] {
        batch: Pointer<'a> as "const u32*" = "the batch",
        input: Pointer<'a> as "const bf16*" = "[T, channels]",
        weight: Pointer<'a> as "const void*" = "[channels, taps] of the format; the last tap multiplies the current token",
        format: u32 = "the weight's format",
        conv_states: Pointer<'a> as "float*" = "[slots, channels, taps - 1], oldest input first",
        output: Pointer<'a> as "bf16*" = "[T, channels]",
        channels: usize = "elements per row",
        taps: usize = "inputs of an output",
    }

    /// Log decay per channel and write strength per head.
    KdaGates["kda_gates"] {
        batch: Pointer<'a> as "const u32*" = "the batch",
        decay: Pointer<'a> as "const bf16*" = "[T, heads K]",
        write: Pointer<'a> as "const bf16*" = "[T, heads]",
        a_log: Pointer<'a> as "const void*" = "[heads] of its format",
        a_log_format: u32 = "the format of a_log",
        dt_bias: Pointer<'a> as "const void*" = "[heads K] of its format",
        dt_bias_format: u32 = "the format of dt_bias",
        gates: Pointer<'a> as "float*" = "[T, heads K]: log decay",
        beta: Pointer<'a> as "float*" = "[T, heads]: write strength",
        heads: usize = "number of heads",
        key_width: usize = "K",
    }

    /// The norm of each head, times a sigmoid gate.
    GatedNorm["gated_norm"] {
        batch: Pointer<'a> as "const u32*" = "the batch",
        input: Pointer<'a> as "const bf16*" = "[T, heads width]",
        gate: Pointer<'a> as "const bf16*" = "[T, heads width], before the sigmoid",
        weight: Pointer<'a> as "const void*" = "[width] of the format",
        format: u32 = "the weight's format",
        output: Pointer<'a> as "bf16*" = "[T, heads width]",
        heads: usize = "number of heads",
        width: usize = "elements per head, V",
        eps: f32 = "added to the mean of squares",
    }

    /// Images of chunks, from the outputs of the convolution and the gates.
    KdaPrepare["kda_prepare_32", "kda_prepare_64", "kda_prepare_128"] {
        batch: Pointer<'a> as "const u32*" = "the batch; its chunks are those of segments that run by chunks",
        qkv: Pointer<'a> as "const bf16*" = "[T, channels], after the convolution",
        gates: Pointer<'a> as "const float*" = "[T, heads K]: log decay",
        beta: Pointer<'a> as "const float*" = "[T, heads]: write strength",
        workspace: Pointer<'a> as "u8*" = "[chunks, heads, image_bytes], aligned to 16 bytes",
        key_heads: usize = "heads of queries and keys",
        heads: usize = "heads of values, gates and states",
        key_width: usize = "K",
        value_width: usize = "V",
        form: u32 = "BY_LENGTH, ALL_CHUNKS or ALL_STEPS",
    }

    /// Images of chunks, from the inputs of the convolution and the gates.
    KdaPrepareFused["kda_prepare_fused_32", "kda_prepare_fused_64", "kda_prepare_fused_128"] {
        batch: Pointer<'a> as "const u32*" = "the batch; its chunks are those of segments that run by chunks",
        input: Pointer<'a> as "const bf16*" = "[T, channels], before the convolution",
        weight: Pointer<'a> as "const void*" = "[channels, 4] of the format",
        format: u32 = "the weight's format",
        conv_states: Pointer<'a> as "float*" = "[slots, channels, 3], read",
        decay: Pointer<'a> as "const bf16*" = "[T, heads K]",
        write: Pointer<'a> as "const bf16*" = "[T, heads]",
        a_log: Pointer<'a> as "const void*" = "[heads] of its format",
        a_log_format: u32 = "the format of a_log",
        dt_bias: Pointer<'a> as "const void*" = "[heads K] of its format",
        dt_bias_format: u32 = "the format of dt_bias",
        workspace: Pointer<'a> as "u8*" = "[chunks, heads, image_bytes], aligned to 16 bytes",
        key_heads: usize = "heads of queries and keys",
        heads: usize = "heads of values, gates and states",
        key_width: usize = "K, even",
        value_width: usize = "V, even",
        form: u32 = "BY_LENGTH, ALL_CHUNKS or ALL_STEPS",
    }

    /// The scan of the state over the images of chunks. P is the entry's width of keys, at least K.
    KdaScan["kda_scan_32", "kda_scan_64", "kda_scan_128"] {
        batch: Pointer<'a> as "const u32*" = "the batch; its scans are those of segments that run by chunks",
        workspace: Pointer<'a> as "const u8*" = "[chunks, heads, image_bytes], written by kda_prepare",
        operators: Nullable<'a> as "const float*" = "[splits, heads, 16 ceil(V / 16) + P, P], written by kda_seeds; null if no segment is cut into splits",
        states: Pointer<'a> as "float*" = "[slots, heads, K, V]",
        output: Pointer<'a> as "bf16*" = "[T, heads V], aligned to 16 bytes",
        input: Nullable<'a> as "const bf16*" = "[T, channels], before the convolution, if kda_prepare_fused ran: then convolution states are written; else null",
        conv_states: Nullable<'a> as "float*" = "[slots, channels, 3], or null",
        key_heads: usize = "heads of queries and keys",
        heads: usize = "heads of values, gates and states",
        key_width: usize = "K",
        value_width: usize = "V",
        form: u32 = "BY_LENGTH, ALL_CHUNKS or ALL_STEPS",
    }

    /// Splits of long segments: their affine maps, then their entry states. P is the entry's width of keys, at least K.
    KdaSplits[
        "kda_operators_32", "kda_operators_64", "kda_operators_128", "kda_seeds_32", "kda_seeds_64", "kda_seeds_128",
    ] {
        batch: Pointer<'a> as "const u32*" = "the batch",
        workspace: Pointer<'a> as "const u8*" = "[chunks, heads, image_bytes], written by kda_prepare",
        operators: Pointer<'a> as "float*" = "[splits, heads, 16 ceil(V / 16) + P, P]: columns of B, which kda_seeds replaces, then of M",
        states: Pointer<'a> as "const float*" = "[slots, heads, K, V]",
        heads: usize = "heads of values, gates and states",
        key_width: usize = "K",
        value_width: usize = "V",
    }

    /// The recurrence by steps.
    KdaStep["kda_step"] {
        batch: Pointer<'a> as "const u32*" = "the batch",
        qkv: Pointer<'a> as "const bf16*" = "[T, channels], after the convolution",
        gates: Pointer<'a> as "const float*" = "[T, heads K]: log decay",
        beta: Pointer<'a> as "const float*" = "[T, heads]: write strength",
        states: Pointer<'a> as "float*" = "[slots, heads, K, V], aligned to 16 bytes",
        output: Pointer<'a> as "bf16*" = "[T, heads V]",
        key_heads: usize = "heads of queries and keys",
        heads: usize = "heads of values, gates and states",
        key_width: usize = "K, at most 128",
        value_width: usize = "V, at most 128",
        form: u32 = "BY_LENGTH, ALL_CHUNKS or ALL_STEPS",
    }

    /// A decode in one kernel; with the second projections of decay and output gate in `kda_decode_projected`.
    KdaDecode["kda_decode", "kda_decode_projected"] {
        batch: Pointer<'a> as "const u32*" = "the batch",
        input: Pointer<'a> as "const bf16*" = "[T, channels], before the convolution",
        weight: Pointer<'a> as "const void*" = "[channels, 4] of the format",
        format: u32 = "the weight's format",
        conv_states: Pointer<'a> as "float*" = "[slots, channels, 3]",
        decay: Nullable<'a> as "const bf16*" = "[T, heads K]; null if projected",
        decay_rank: Nullable<'a> as "const bf16*" = "[T, rank]; null unless projected, like the next",
        decay_up: Nullable<'a> as "const bf16*" = "[heads K, rank]",
        write: Pointer<'a> as "const bf16*" = "[T, heads]",
        a_log: Pointer<'a> as "const void*" = "[heads] of its format",
        a_log_format: u32 = "the format of a_log",
        dt_bias: Pointer<'a> as "const void*" = "[heads K] of its format",
        dt_bias_format: u32 = "the format of dt_bias",
        gate: Nullable<'a> as "const bf16*" = "[T, heads V], before the sigmoid; null if projected",
        gate_rank: Nullable<'a> as "const bf16*" = "[T, rank]; null unless projected, like the next",
        gate_up: Nullable<'a> as "const bf16*" = "[heads V, rank]",
        rank: usize = "a multiple of eight, at most 128; 0 unless projected",
        norm: Pointer<'a> as "const void*" = "[V] of its format",
        norm_format: u32 = "the norm's format",
        eps: f32 = "added to the mean of squares",
        states: Pointer<'a> as "float*" = "[slots, heads, K, V], aligned to 16 bytes",
        output: Pointer<'a> as "bf16*" = "[T, heads V], gated and normalised",
        heads: usize = "heads of queries, keys and values",
        key_width: usize = "K, at most 128",
        value_width: usize = "V, at most 128",
    }
}
