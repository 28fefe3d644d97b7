// Rows of the latent cache in their pool's dtype. A row begins at a whole word, so that no two rows share one. The including
// shader declares `latents`, an array<u32>.

// #import shared/halves

// The dtype of the pool: a FORMAT_ of the layout.
override CACHE: u32 = FORMAT_F32;

// Words per row of `width` elements.
fn latent_words(width: u32) -> u32 {
    if (CACHE == FORMAT_F32) {
        return width;
    }
    return (width + 1u) / 2u;
}

// Element `i` of the row that begins at word `row`.
fn latent_element(row: u32, i: u32) -> f32 {
    if (CACHE == FORMAT_F32) {
        return bitcast<f32>(latents[row + i]);
    }
    return widen_pair(latents[row + i / 2u], CACHE)[i % 2u];
}

// Elements `i` to `i + 4` of the row; `i` is even.
fn latent_four(row: u32, i: u32) -> vec4<f32> {
    if (CACHE == FORMAT_F32) {
        let at = row + i;
        return bitcast<vec4<f32>>(vec4<u32>(latents[at], latents[at + 1u], latents[at + 2u], latents[at + 3u]));
    }
    let at = row + i / 2u;
    return vec4<f32>(widen_pair(latents[at], CACHE), widen_pair(latents[at + 1u], CACHE));
}
