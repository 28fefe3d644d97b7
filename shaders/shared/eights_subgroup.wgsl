// Sums over threads by subgroup shuffles: the variant for devices whose subgroups hold eight threads or more. The
// order of summation is the same as without, so both variants give the same bits. THREADS is the size of the workgroup.

override THREADS: u32 = 64u;

// The sum over eight threads `8 n .. 8 n + 8`, returned to all of them. Called by every thread.
fn sum_eight(value: vec4<f32>, thread: u32) -> vec4<f32> {
    var sum = value;
    sum += subgroupShuffleXor(sum, 4u);
    sum += subgroupShuffleXor(sum, 2u);
    sum += subgroupShuffleXor(sum, 1u);
    return sum;
}

// The greatest of eight threads' values, returned to all of them.
fn max_eight(value: f32, thread: u32) -> f32 {
    var most = value;
    most = max(most, subgroupShuffleXor(most, 4u));
    most = max(most, subgroupShuffleXor(most, 2u));
    most = max(most, subgroupShuffleXor(most, 1u));
    return most;
}
