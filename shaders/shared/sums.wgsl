// Sums and maxima over a workgroup of 64 threads: groups of eight first, then the eight results. The order is the same on
// every device.

// #import shared/eights

var<workgroup> eights: array<f32, 8>;

// The sum over all 64 threads, returned to all of them.
fn sum_all(value: f32, thread: u32) -> f32 {
    let part = sum_eight(vec4<f32>(value, 0.0, 0.0, 0.0), thread).x;
    workgroupBarrier();
    if (thread % 8u == 0u) {
        eights[thread / 8u] = part;
    }
    workgroupBarrier();
    return ((eights[0] + eights[4]) + (eights[2] + eights[6]))
        + ((eights[1] + eights[5]) + (eights[3] + eights[7]));
}

// The greatest of all 64 threads' values.
fn max_all(value: f32, thread: u32) -> f32 {
    let part = max_eight(value, thread);
    workgroupBarrier();
    if (thread % 8u == 0u) {
        eights[thread / 8u] = part;
    }
    workgroupBarrier();
    var most = eights[0];
    for (var i = 1u; i < 8u; i++) {
        most = max(most, eights[i]);
    }
    return most;
}
