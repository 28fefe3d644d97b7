// Weights as they are stored: packed words, widened exactly. Rows are padded with zeros to a multiple of 8 elements.

// #import shared/halves

// How `weight` is stored: a FORMAT_ of the layout.
override FORMAT: u32 = FORMAT_BF16;

// Eight consecutive elements.
struct Eight {
    a: vec4<f32>,
    b: vec4<f32>,
}

// Two elements of one word, the first in the low half.
fn pair(word: u32) -> vec2<f32> {
    return widen_pair(word, FORMAT);
}

// Eight elements of `weight`: those from 8 `eighth` on of the row that begins at vector `base`.
fn eight(base: u32, eighth: u32) -> Eight {
    if (FORMAT == FORMAT_F32) {
        let at = base + 2u * eighth;
        return Eight(bitcast<vec4<f32>>(weight[at]), bitcast<vec4<f32>>(weight[at + 1u]));
    }
    let words = weight[base + eighth];
    return Eight(
        vec4<f32>(pair(words.x), pair(words.y)),
        vec4<f32>(pair(words.z), pair(words.w)),
    );
}

// Element `column` of the row that begins at vector `base`.
fn element(base: u32, column: u32) -> f32 {
    if (FORMAT == FORMAT_F32) {
        return bitcast<f32>(weight[base + column / 4u][column % 4u]);
    }
    return pair(weight[base + column / 8u][column % 8u / 2u])[column % 2u];
}
