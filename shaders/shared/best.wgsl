// The best of a workgroup's candidates: greatest value, and of equal ones the lower id. Values are compared by keys,
// whole numbers in the order of the floats they stand for, so that nothing depends on how a driver treats NaN.

// Threads that bring a candidate each: the whole workgroup.
const RIVALS: u32 = 64u;

// A candidate.
struct Rival {
    key: u32,
    id: u32,
}

// Below every candidate.
const NOBODY: Rival = Rival(0u, 0xffffffffu);

var<workgroup> rivals: array<Rival, RIVALS>;

// A float's place in the total order of all floats.
fn order_key(bits: u32) -> u32 {
    return bits ^ select(0x80000000u, 0xffffffffu, bits >> 31u == 1u);
}

// The float of a key.
fn key_bits(key: u32) -> u32 {
    return key ^ select(0xffffffffu, 0x80000000u, key >> 31u == 1u);
}

// Whether a comes before b.
fn before(a: Rival, b: Rival) -> bool {
    return a.key > b.key || (a.key == b.key && a.id < b.id);
}

// The best of all threads' candidates, given to all of them.
fn best_of(mine: Rival, thread: u32) -> Rival {
    workgroupBarrier();
    rivals[thread] = mine;
    for (var half = RIVALS / 2u; half > 0u; half /= 2u) {
        workgroupBarrier();
        if (thread < half) {
            let other = rivals[thread + half];
            if (before(other, rivals[thread])) {
                rivals[thread] = other;
            }
        }
    }
    return workgroupUniformLoad(&rivals[0]);
}
