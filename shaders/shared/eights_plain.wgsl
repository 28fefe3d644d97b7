// Sums over threads, in workgroup memory: the variant for devices without subgroups. The order of summation is the
// same as with subgroups, so both variants give the same bits. THREADS is the size of the workgroup.

override THREADS: u32 = 64u;

var<workgroup> lanes: array<vec4<f32>, THREADS>;

// The sum over eight threads `8 n .. 8 n + 8`, returned to all of them. Called by every thread.
fn sum_eight(value: vec4<f32>, thread: u32) -> vec4<f32> {
    workgroupBarrier();
    lanes[thread] = value;
    workgroupBarrier();
    let first = thread & ~7u;
    return ((lanes[first] + lanes[first + 4u]) + (lanes[first + 2u] + lanes[first + 6u]))
        + ((lanes[first + 1u] + lanes[first + 5u]) + (lanes[first + 3u] + lanes[first + 7u]));
}

// The greatest of eight threads' values, returned to all of them.
fn max_eight(value: f32, thread: u32) -> f32 {
    workgroupBarrier();
    lanes[thread].x = value;
    workgroupBarrier();
    let first = thread & ~7u;
    var most = lanes[first].x;
    for (var i = 1u; i < 8u; i++) {
        most = max(most, lanes[first + i].x);
    }
    return most;
}
