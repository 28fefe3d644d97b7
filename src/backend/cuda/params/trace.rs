//! Parameters of the operations of a trace, which write rows of single tokens.

use super::{Pointer, params};

params! {
    /// The attention weights of one head.
    TraceAttention[
        "trace_attention_absorb", "trace_attention_score", "trace_attention_score_f16", "trace_attention_score_f32",
        "trace_attention_weigh",
    ] {
        batch: Pointer<'a> as "const u32*" = "the batch",
        query: Pointer<'a> as "const bf16*" = "[T, heads (nope + rope)]",
        kv_b: Pointer<'a> as "const void*" = "[heads (nope + value), latent] of the format",
        format: u32 = "the format of kv_b",
        absorbed: Pointer<'a> as "float*" = "[T, latent], from trace_attention_absorb",
        latents: Pointer<'a> as "const void*" = "[blocks, block_tokens, latent + rope] of the entry's type",
        output: Pointer<'a> as "float*" = "[T, positions]: scores, then weights",
        spans: Pointer<'a> as "float*" = "[T, ceil(positions / 128), 2]: greatest score, sum of exponentials",
        heads: usize = "number of heads",
        head: usize = "the traced head",
        nope: usize = "elements of a key without position",
        rope: usize = "elements of a shared key",
        value: usize = "elements of a value",
        latent: usize = "elements of a latent",
        block_tokens: usize = "tokens per block",
        positions: usize = "elements per row of the output",
    }

    /// The mean output gate of each head.
    TraceGate["trace_gate"] {
        batch: Pointer<'a> as "const u32*" = "the batch",
        gate: Pointer<'a> as "const bf16*" = "[T, heads width], before the sigmoid",
        output: Pointer<'a> as "float*" = "[T, layers, heads]; the part of one layer is written",
        heads: usize = "number of heads",
        width: usize = "elements per head",
        layer: usize = "the layer that is written",
        layers: usize = "number of layers",
    }

    /// Statistics of what a KDA layer will write to its states. K and V are the widths of a head's key and value.
    TraceKda["trace_kda"] {
        batch: Pointer<'a> as "const u32*" = "the batch",
        qkv: Pointer<'a> as "const bf16*" = "[T, 2 key_heads K + heads V]",
        gates: Pointer<'a> as "const float*" = "[T, heads K]: log decay",
        beta: Pointer<'a> as "const float*" = "[T, heads]: write strength",
        states: Pointer<'a> as "const float*" = "[slots, heads, K, V]",
        output: Pointer<'a> as "float*" = "[T, layers, heads, 5 + K]; the part of one layer is written",
        key_heads: usize = "heads of queries and keys",
        heads: usize = "heads of values, gates and states",
        key_width: usize = "K",
        value_width: usize = "V",
        layer: usize = "the layer that is written",
        layers: usize = "number of layers",
    }

    /// The experts that a layer chose.
    TraceRoute["trace_route"] {
        batch: Pointer<'a> as "const u32*" = "the batch",
        experts: Pointer<'a> as "const u32*" = "[T, top]",
        weights: Pointer<'a> as "const float*" = "[T, top]",
        output: Pointer<'a> as "float*" = "[T, layers, 2, top]: experts, then weights; the part of one layer is written",
        top: usize = "choices per token",
        layer: usize = "the layer that is written",
        layers: usize = "number of layers",
    }

    /// One head's state.
    TraceState["trace_state"] {
        batch: Pointer<'a> as "const u32*" = "the batch",
        states: Pointer<'a> as "const float*" = "[slots, heads, size]",
        output: Pointer<'a> as "float*" = "[T, size]",
        heads: usize = "number of heads",
        head: usize = "the traced head",
        size: usize = "elements of a state, K V",
    }
}
