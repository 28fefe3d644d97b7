// Writes to the latent cache: normalises the latent, copies the shared key part, and appends both to the sequence's blocks.
// Counterpart of `src/backend/cpu/mla_append.rs`.

// #import shared/batch
// #import shared/latents
// #import shared/sums

struct Params {
    latent: u32,
    rope: u32,
    block_tokens: u32,
    eps: f32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(2) var<storage, read> input: array<f32>;           // [T, latent + rope]
@group(0) @binding(3) var<storage, read> weight: array<f32>;          // [latent]
@group(0) @binding(4) var<storage, read_write> latents: array<u32>;   // [blocks, block_tokens, latent + rope]

// Element `i` of row `row`, as it is cached except for its dtype; zero past the row's end.
fn appended(row: u32, i: u32, scale: f32) -> f32 {
    let width = params.latent + params.rope;
    if (i >= width) {
        return 0.0;
    }
    var x = input[row * width + i];
    if (i < params.latent) {
        x = x * scale * weight[i];
    }
    return x;
}

// One workgroup per token.
@compute @workgroup_size(64)
fn mla_append(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
    let row = group.x;
    let width = params.latent + params.rope;
    let segment = owner(row);
    let position = segment_word(segment, POSITION) + row - segment_word(segment, START);
    let block = batch[segment_word(segment, BLOCKS) + position / params.block_tokens];
    let words = latent_words(width);
    let to = (block * params.block_tokens + position % params.block_tokens) * words;
    var sum = 0.0;
    for (var i = thread; i < params.latent; i += 64u) {
        let x = input[row * width + i];
        sum = fma(x, x, sum);
    }
    let scale = 1.0 / sqrt(sum_all(sum, thread) / f32(params.latent) + params.eps);
    for (var word = thread; word < words; word += 64u) {
        if (CACHE == FORMAT_F32) {
            latents[to + word] = bitcast<u32>(appended(row, word, scale));
        } else {
            let low = narrow_bits(bitcast<u32>(appended(row, 2u * word, scale)), CACHE);
            let high = narrow_bits(bitcast<u32>(appended(row, 2u * word + 1u, scale)), CACHE);
            latents[to + word] = low | (high << 16u);
        }
    }
}
