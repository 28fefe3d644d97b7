// The best of a workgroup's candidates: the greatest value, and of equal values the lower id. Values are compared as keys,
// integers in the order of the floats, so that results do not depend on a driver's treatment of NaN.

// #import shared/order

// Number of threads with a candidate each: the whole workgroup.
const RIVALS: u32 = 64u;

// A candidate.
struct Rival {
    key: u32,
    id: u32,
}

// Less than every candidate.
const NOBODY: Rival = Rival(0u, 0xffffffffu);

var<workgroup> rivals: array<Rival, RIVALS>;

// Whether a comes before b.
fn before(a: Rival, b: Rival) -> bool {
    return a.key > b.key || (a.key == b.key && a.id < b.id);
}

// The best of all threads' candidates, returned to all of them.
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
