// Weights in blocks, as in files: integer codes with scales, widened to the values of `src/checkpoint/blocks`, which defines
// each format's bytes. Rows are whole blocks, padded to 16 bytes; a block may begin at any byte of a row.
//
// A scale (an f16 times an integer of at most 8 bits), its product with a code, and a minimum have at most 24 bits each, so
// all of them are exact in f32, and only the sum with the minimum rounds: a device that contracts it to a fused multiply-add
// gives the same bits. Values below the smallest normal number, which only MXFP4 has, may become zero.

// In the layout, formats in blocks come after plain dtypes, and those with blocks of 256 elements last.
const FIRST_OF_BLOCKS: u32 = FORMAT_Q8_0;
const FIRST_OF_256: u32 = FORMAT_Q2_K;

// Eight consecutive codes.
struct Codes {
    a: vec4<i32>,
    b: vec4<i32>,
}

// The 16 values of the IQ4 formats, and twice the four-bit floats of MXFP4, as signed bytes.
const IQ4_VALUES = vec4<u32>(0xbfad9881u, 0xf6eaddcfu, 0x26190d01u, 0x71594535u);
const E2M1_TWICE = vec4<u32>(0x03020100u, 0x0c080604u, 0xfdfeff00u, 0xf4f8fafcu);

// The word that contains byte `at` of the row that begins at vector `base`.
fn stored_word(base: u32, at: u32) -> u32 {
    return weight[base + at / 16u][at / 4u % 4u];
}

fn byte_at(base: u32, at: u32) -> u32 {
    return (stored_word(base, at) >> (8u * (at % 4u))) & 0xffu;
}

// The two bytes from `at` on, which is even.
fn half_word_at(base: u32, at: u32) -> u32 {
    return (stored_word(base, at) >> (8u * (at % 4u))) & 0xffffu;
}

// The four bytes from `at` on, at any alignment.
fn word_at(base: u32, at: u32) -> u32 {
    let shift = 8u * (at % 4u);
    let low = stored_word(base, at) >> shift;
    if (shift == 0u) {
        return low;
    }
    return low | (stored_word(base, at + 3u) << (32u - shift));
}

fn eight_bytes(base: u32, at: u32) -> vec2<u32> {
    return vec2<u32>(word_at(base, at), word_at(base, at + 4u));
}

// Bits `shift ..` of eight bytes from `at` on, those of `mask` (the same byte four times).
fn eight_fields(base: u32, at: u32, shift: u32, mask: u32) -> vec2<u32> {
    return (eight_bytes(base, at) >> vec2<u32>(shift)) & vec2<u32>(mask);
}

// Eight bits, each in a byte of its own.
fn eight_bits(bits: u32) -> vec2<u32> {
    let four = vec2<u32>(bits, bits >> 4u);
    return (four | (four << vec2<u32>(7u)) | (four << vec2<u32>(14u)) | (four << vec2<u32>(21u))) & vec2<u32>(0x01010101u);
}

// The f16 at byte `at`, which is even, widened without the device's own conversion, which may flush subnormals to zero.
fn half_at(base: u32, at: u32) -> f32 {
    let bits = half_word_at(base, at);
    let rest = bits & 0x7fffu;
    var magnitude = bitcast<u32>(f32(rest) * 5.9604644775390625e-8);  // 2^-24
    if (rest >= 0x7c00u) {
        magnitude = (rest << 13u) | 0x7f800000u;
    } else if (rest >= 0x0400u) {
        magnitude = (rest << 13u) + 0x38000000u;
    }
    return bitcast<f32>(((bits & 0x8000u) << 16u) | magnitude);
}

// Eight unsigned codes minus `zero`.
fn codes_about(bytes: vec2<u32>, zero: i32) -> Codes {
    return Codes(vec4<i32>(unpack4xU8(bytes.x)) - zero, vec4<i32>(unpack4xU8(bytes.y)) - zero);
}

// Four entries of a table of signed bytes.
fn four_of(table: vec4<u32>, codes: vec4<u32>) -> vec4<i32> {
    let words = vec4<u32>(table[codes.x / 4u], table[codes.y / 4u], table[codes.z / 4u], table[codes.w / 4u]);
    let shifts = 8u * (codes % 4u);
    return bitcast<vec4<i32>>(words << (vec4<u32>(24u) - shifts)) >> vec4<u32>(24u);
}

fn codes_of(table: vec4<u32>, bytes: vec2<u32>) -> Codes {
    return Codes(four_of(table, unpack4xU8(bytes.x)), four_of(table, unpack4xU8(bytes.y)));
}

fn times(scale: f32, codes: Codes) -> Eight {
    return Eight(scale * vec4<f32>(codes.a), scale * vec4<f32>(codes.b));
}

fn plus(values: Eight, minimum: f32) -> Eight {
    return Eight(values.a + minimum, values.b + minimum);
}

// Element j of 32 in the low four bits of byte j, element j + 16 in the high ones: eight from element `i` on.
fn nibbles_of_32(base: u32, at: u32, i: u32) -> vec2<u32> {
    return eight_fields(base, at + i % 16u, i / 16u * 4u, 0x0f0f0f0fu);
}

// Eight elements from `i` on of the block of 32 elements at byte `at`, or of 64.
fn eight_of_32_or_64(base: u32, at: u32, i: u32) -> Eight {
    if (FORMAT == FORMAT_Q4_0) {
        return times(half_at(base, at), codes_about(nibbles_of_32(base, at + 2u, i), 8));
    }
    if (FORMAT == FORMAT_Q4_1) {
        let values = times(half_at(base, at), codes_about(nibbles_of_32(base, at + 4u, i), 0));
        return plus(values, half_at(base, at + 2u));
    }
    if (FORMAT == FORMAT_Q4_1_64) {
        let values = times(half_at(base, at), codes_about(nibbles_of_32(base, at + 4u + i / 32u * 16u, i % 32u), 0));
        return plus(values, half_at(base, at + 2u));
    }
    if (FORMAT == FORMAT_Q5_0) {
        let fifth = eight_bits(byte_at(base, at + 2u + i / 8u)) << vec2<u32>(4u);
        return times(half_at(base, at), codes_about(nibbles_of_32(base, at + 6u, i) | fifth, 16));
    }
    if (FORMAT == FORMAT_Q5_1) {
        let fifth = eight_bits(byte_at(base, at + 4u + i / 8u)) << vec2<u32>(4u);
        let values = times(half_at(base, at), codes_about(nibbles_of_32(base, at + 8u, i) | fifth, 0));
        return plus(values, half_at(base, at + 2u));
    }
    if (FORMAT == FORMAT_IQ4_NL) {
        return times(half_at(base, at), codes_of(IQ4_VALUES, nibbles_of_32(base, at + 2u, i)));
    }
    if (FORMAT == FORMAT_MXFP4) {
        // 2^(e - 128) is subnormal for the smallest e: then the scale is multiplied by 2^64, and the codes are divided by it.
        let e = byte_at(base, at);
        let small = e < 64u;
        let scale = bitcast<f32>(select(e - 1u, e + 63u, small) << 23u);
        let codes = times(select(1.0, 5.421010862427522e-20, small), codes_of(E2M1_TWICE, nibbles_of_32(base, at + 1u, i)));
        return Eight(scale * codes.a, scale * codes.b);
    }
    // FORMAT_Q8_0
    let bytes = eight_bytes(base, at + 2u + i);
    return times(half_at(base, at), Codes(unpack4xI8(bytes.x), unpack4xI8(bytes.y)));
}

// Two bits per element: four elements that are 32 apart share a byte.
fn two_bits(base: u32, at: u32, i: u32) -> vec2<u32> {
    return eight_fields(base, at + 32u * (i / 128u) + i % 32u, i % 128u / 32u * 2u, 0x03030303u);
}

// Four bits per element: two elements that are 32 apart share a byte.
fn four_bits(base: u32, at: u32, i: u32) -> vec2<u32> {
    return eight_fields(base, at + 32u * (i / 64u) + i % 32u, i % 64u / 32u * 4u, 0x0f0f0f0fu);
}

// One bit per element: eight elements that are 32 apart share a byte.
fn one_bit(base: u32, at: u32, i: u32) -> vec2<u32> {
    return eight_fields(base, at + i % 32u, i / 32u, 0x01010101u);
}

// The values of codes of Q4_K and Q5_K: two f16, then eight pairs of six bits in twelve bytes, scale and minimum of 32.
fn by_six_bits(base: u32, at: u32, group: u32, codes: Codes) -> Eight {
    let packed = at + 4u;
    var scale = byte_at(base, packed + group) & 63u;
    var minimum = byte_at(base, packed + group + 4u) & 63u;
    if (group >= 4u) {
        let low = byte_at(base, packed + group + 4u);
        scale = (low & 15u) | ((byte_at(base, packed + group - 4u) >> 6u) << 4u);
        minimum = (low >> 4u) | ((byte_at(base, packed + group) >> 6u) << 4u);
    }
    let values = times(half_at(base, at) * f32(scale), codes);
    return plus(values, -(half_at(base, at + 2u) * f32(minimum)));
}

// Eight elements from `i` on of the block of 256 elements at byte `at`.
fn eight_of_256(base: u32, at: u32, i: u32) -> Eight {
    if (FORMAT == FORMAT_Q2_K) {
        let packed = byte_at(base, at + i / 16u);
        let scale = half_at(base, at + 80u) * f32(packed & 15u);
        let values = times(scale, codes_about(two_bits(base, at + 16u, i), 0));
        return plus(values, -(half_at(base, at + 82u) * f32(packed >> 4u)));
    }
    if (FORMAT == FORMAT_Q3_K) {
        let group = i / 16u;
        let low = (byte_at(base, at + 96u + group % 8u) >> (group / 8u * 4u)) & 15u;
        let top = (byte_at(base, at + 104u + group % 4u) >> (group / 4u * 2u)) & 3u;
        let scale = half_at(base, at + 108u) * f32(i32(low | (top << 4u)) - 32);
        // The third bit adds four if it is set, and the zero point is four.
        let third = one_bit(base, at, i) << vec2<u32>(2u);
        return times(scale, codes_about(two_bits(base, at + 32u, i) | third, 4));
    }
    if (FORMAT == FORMAT_Q4_K) {
        return by_six_bits(base, at, i / 32u, codes_about(four_bits(base, at + 16u, i), 0));
    }
    if (FORMAT == FORMAT_Q5_K) {
        let fifth = one_bit(base, at + 16u, i) << vec2<u32>(4u);
        return by_six_bits(base, at, i / 32u, codes_about(four_bits(base, at + 48u, i) | fifth, 0));
    }
    if (FORMAT == FORMAT_IQ4_XS) {
        let group = i / 32u;
        let low = (byte_at(base, at + 4u + group / 2u) >> (group % 2u * 4u)) & 15u;
        let top = (half_word_at(base, at + 2u) >> (2u * group)) & 3u;
        let scale = half_at(base, at) * f32(i32(low | (top << 4u)) - 32);
        return times(scale, codes_of(IQ4_VALUES, nibbles_of_32(base, at + 8u + 16u * group, i % 32u)));
    }
    // FORMAT_Q6_K
    let half = i / 128u;
    let group = i % 128u / 32u;
    let low = eight_fields(base, at + 64u * half + 32u * (group & 1u) + i % 32u, group / 2u * 4u, 0x0f0f0f0fu);
    let top = eight_fields(base, at + 128u + 32u * half + i % 32u, 2u * group, 0x03030303u);
    let scale = unpack4xI8(byte_at(base, at + 192u + i / 16u)).x;
    return times(half_at(base, at + 208u) * f32(scale), codes_about(low | (top << vec2<u32>(4u)), 32));
}

// Bytes per block.
fn block_bytes() -> u32 {
    switch (FORMAT) {
        case FORMAT_MXFP4: { return 17u; }
        case FORMAT_Q4_0, FORMAT_IQ4_NL: { return 18u; }
        case FORMAT_Q4_1: { return 20u; }
        case FORMAT_Q5_0: { return 22u; }
        case FORMAT_Q4_1_64: { return 36u; }
        case FORMAT_Q5_1: { return 24u; }
        case FORMAT_Q8_0: { return 34u; }
        case FORMAT_Q2_K: { return 84u; }
        case FORMAT_Q3_K: { return 110u; }
        case FORMAT_IQ4_XS: { return 136u; }
        case FORMAT_Q4_K: { return 144u; }
        case FORMAT_Q5_K: { return 176u; }
        default: { return 210u; }  // FORMAT_Q6_K
    }
}

// Eight elements: those from 8 `eighth` on of the row of blocks that begins at vector `base`.
fn eight_of_blocks(base: u32, eighth: u32) -> Eight {
    if (FORMAT >= FIRST_OF_256) {
        return eight_of_256(base, eighth / 32u * block_bytes(), eighth % 32u * 8u);
    }
    if (FORMAT == FORMAT_Q4_1_64) {
        return eight_of_32_or_64(base, eighth / 8u * block_bytes(), eighth % 8u * 8u);
    }
    return eight_of_32_or_64(base, eighth / 4u * block_bytes(), eighth % 4u * 8u);
}
