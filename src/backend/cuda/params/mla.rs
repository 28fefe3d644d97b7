//! Parameters of latent attention. The latents' type is that of the entry: bf16, f16 or f32.

use super::{Pointer, params};

params! {
    /// Writes to the latent cache.
    MlaAppend["mla_append", "mla_append_f16", "mla_append_f32"] {
        batch: Pointer<'a> as "const u32*" = "the batch",
        input: Pointer<'a> as "const bf16*" = "[T, latent + rope]",
        weight: Pointer<'a> as "const void*" = "[latent] of the format",
        format: u32 = "the weight's format",
        latents: Pointer<'a> as "void*" = "[blocks, block_tokens, latent + rope] of the entry's type",
        latent: usize = "elements of a latent",
        rope: usize = "elements of a shared key",
        block_tokens: usize = "tokens per block",
        eps: f32 = "added to the mean of squares",
    }

    /// Attention of many queries to one window of positions. P and Q are the maximum widths of key and value of
    /// `mla_images` and `mla_prefill`.
    MlaPrefill[
        "mla_gather", "mla_gather_f16", "mla_gather_f32", "mla_images_64", "mla_images_64_f16", "mla_images_64_f32",
        "mla_images_192", "mla_images_192_f16", "mla_images_192_f32", "mla_prefill_64", "mla_prefill_192",
    ] {
        batch: Pointer<'a> as "const u32*" = "the batch",
        window: u32 = "index of the window",
        query: Pointer<'a> as "const bf16*" = "[T, heads (nope + rope)], aligned to 16 bytes",
        latents: Pointer<'a> as "const void*" = "[blocks, block_tokens, latent + rope] of the entry's type",
        gathered: Pointer<'a> as "bf16*" = "[positions, latent]: the window's latents",
        expanded: Pointer<'a> as "const float*" = "[positions, heads (nope + value)]: the window's latents times kv_b",
        images: Pointer<'a> as "bf16*" = "[runs, heads, 64 (P + Q) + 8] halves, aligned to 16 bytes",
        output: Pointer<'a> as "bf16*" = "[T, heads value]",
        marks: Pointer<'a> as "float*" = "[T, heads, 2]: greatest score and sum for the next window; unused if each sequence has one window, like partial",
        partial: Pointer<'a> as "float*" = "[T, heads, value]: the output's sum for the next window",
        heads: u32 = "number of heads",
        latent: u32 = "elements of a latent",
        nope: u32 = "elements of a key without position",
        rope: u32 = "elements of a shared key",
        value: u32 = "elements of a value",
        block_tokens: u32 = "tokens per block",
    }

    /// Attention of few queries in the absorbed form.
    MlaDecode[
        "mla_absorb", "mla_attend", "mla_attend_f16", "mla_attend_f32", "mla_attend_512", "mla_attend_512_f16",
        "mla_attend_512_f32", "mla_merge",
    ] {
        batch: Pointer<'a> as "const u32*" = "the batch",
        single: bool = "whether rows are those of single tokens, whose spans are the batch's; else each row has one span",
        rows: usize = "number of rows",
        query: Pointer<'a> as "const bf16*" = "[T, heads (nope + rope)]",
        kv_b: Pointer<'a> as "const void*" = "[heads (nope + value), latent] of the format",
        format: u32 = "the format of kv_b",
        absorbed: Pointer<'a> as "float*" = "[rows, heads, latent]",
        latents: Pointer<'a> as "const void*" = "[blocks, block_tokens, latent + rope] of the entry's type, aligned to 16 bytes",
        parts: Pointer<'a> as "float*" = "[spans, heads, 4 ceil(latent / 4) + 4]: weighted latent, then greatest score, sum of weights",
        output: Pointer<'a> as "bf16*" = "[T, heads value]",
        heads: u32 = "number of heads",
        latent: u32 = "elements of a latent, at most 512",
        nope: u32 = "elements of a key without position, at most 256",
        rope: u32 = "elements of a shared key, at most 64",
        value: u32 = "elements of a value",
        block_tokens: u32 = "tokens per block",
    }
}
