// Elements of 16 bits, two to a word, the first in the low half: FORMAT_BF16 or FORMAT_F16 of the layout.

// #import shared/layout

// Two elements of one word, widened exactly.
fn widen_pair(word: u32, format: u32) -> vec2<f32> {
    if (format == FORMAT_F16) {
        return unpack2x16float(word);
    }
    return vec2<f32>(bitcast<f32>(word << 16u), bitcast<f32>(word & 0xffff0000u));
}

// An f32, given as its bits, rounded to 16 bits: to nearest, ties to even; NaN stays NaN, and values beyond the range become
// infinite. Computed on the bits, because the rounding of `pack2x16float` depends on the device.
fn narrow_bits(bits: u32, format: u32) -> u32 {
    let sign = (bits >> 16u) & 0x8000u;
    let magnitude = bits & 0x7fffffffu;
    if (format == FORMAT_BF16) {
        if (magnitude > 0x7f800000u) {
            return (bits >> 16u) | 0x40u;
        }
        return (bits + 0x7fffu + ((bits >> 16u) & 1u)) >> 16u;
    }
    if (magnitude > 0x7f800000u) {
        return sign | 0x7e00u | ((magnitude >> 13u) & 0x3ffu);
    }
    // From halfway between f16's greatest number and the next power of two.
    if (magnitude >= 0x477ff000u) {
        return sign | 0x7c00u;
    }
    let exponent = magnitude >> 23u;
    if (exponent > 112u) {
        // The exponent's bias is smaller by 112; 13 bits are rounded away.
        let moved = magnitude - (112u << 23u);
        return sign | ((moved + 0xfffu + ((moved >> 13u) & 1u)) >> 13u);
    }
    // Subnormal in f16: multiples of 2^-24. Less than half of one is zero.
    if (exponent < 102u) {
        return sign;
    }
    let shift = 126u - exponent;
    let mantissa = (magnitude & 0x7fffffu) | 0x800000u;
    let odd = (mantissa >> shift) & 1u;
    return sign | ((mantissa + (1u << (shift - 1u)) - 1u + odd) >> shift);
}
