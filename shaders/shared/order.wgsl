// Floats as integers in the same order.

// An integer key in the total order of all floats.
fn order_key(bits: u32) -> u32 {
    return bits ^ select(0x80000000u, 0xffffffffu, bits >> 31u == 1u);
}

// The float of a key.
fn key_bits(key: u32) -> u32 {
    return key ^ select(0xffffffffu, 0x80000000u, key >> 31u == 1u);
}
