// Weights as they are stored: packed words or blocks, widened exactly. Rows of plain elements are padded with zeros to a
// multiple of 8 elements, rows of blocks to a multiple of 16 bytes.

// #import shared/halves
// #import shared/blocks

// The format of `weight`: a FORMAT_ of the layout.
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
    if (FORMAT >= FIRST_OF_BLOCKS) {
        return eight_of_blocks(base, eighth);
    }
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
    if (FORMAT >= FIRST_OF_BLOCKS) {
        let all = eight_of_blocks(base, column / 8u);
        return select(all.a, all.b, column % 8u >= 4u)[column % 4u];
    }
    if (FORMAT == FORMAT_F32) {
        return bitcast<f32>(weight[base + column / 4u][column % 4u]);
    }
    return pair(weight[base + column / 8u][column % 8u / 2u])[column % 2u];
}
