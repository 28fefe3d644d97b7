// Kernels that test the machine: correct ones, and ones with a fault that it must find.
#include "shared/kernel.h"

struct OutParams {
    float* out;
};
struct CopyParams {
    const float* from;
    float* out;
};
struct TurnedParams {
    const bf16* from;
    bf16* out;
};
struct ProductParams {
    const bf16 *a, *b;
    float* c;
};
struct WideProductParams {
    const float *a, *b;
    float* c;
};
struct FromParams {
    const float* from;
};

// c[16, 8] = a[16, 16] b[8, 16]^T: copies, ldmatrix, mma, one warp.
extern "C" __global__ void try_product(const ProductParams p) {
    grid_dependency_synchronize();
    bf16* tile = (bf16*)dynamic_shared();
    u32 lane = threadIdx.x;
    copy_async(tile + 8 * lane, p.a + 8 * lane);
    copy_async(tile + 256 + 8 * lane, p.b + 8 * (lane % 16), lane < 16);
    copy_async_commit();
    copy_async_wait<0>();
    __syncthreads();
    u32 left[4], right[2];
    ldmatrix(left, tile + lane % 16 * 16 + lane / 16 * 8);
    ldmatrix(right, tile + 256 + lane % 8 * 16 + lane / 8 % 2 * 8);
    float sum[4] = {0, 0, 0, 0};
    mma_bf16(sum, left, right);
    for (u32 i = 0; i < 4; i++) p.c[(lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2] = sum[i];
}
ENTRY(try_product)

// The same with b given as [16, 8], transposed by ldmatrix.
extern "C" __global__ void try_product_transposed(const ProductParams p) {
    grid_dependency_synchronize();
    bf16* tile = (bf16*)dynamic_shared();
    u32 lane = threadIdx.x;
    for (u32 i = lane; i < 256; i += 32) tile[i] = p.a[i];
    for (u32 i = lane; i < 128; i += 32) tile[256 + i] = p.b[i];
    __syncwarp();
    u32 left[4], right[2];
    ldmatrix(left, tile + lane % 16 * 16 + lane / 16 * 8);
    ldmatrix_transposed(right, tile + 256 + lane % 16 * 8);
    float sum[4] = {0, 0, 0, 0};
    mma_bf16(sum, left, right);
    for (u32 i = 0; i < 4; i++) p.c[(lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2] = sum[i];
}
ENTRY(try_product_transposed)

// c[16, 8] = a[16, 16] b[8, 16]^T in f16, directly from memory.
extern "C" __global__ void try_product_f16(const WideProductParams p) {
    grid_dependency_synchronize();
    u32 g = threadIdx.x / 4, t = threadIdx.x % 4 * 2, left[4], right[2];
    for (u32 i = 0; i < 4; i++) {
        const float* at = p.a + (g + i % 2 * 8) * 16 + t + i / 2 * 8;
        left[i] = narrow_pair_f16(at[0], at[1]);
    }
    for (u32 i = 0; i < 2; i++) right[i] = narrow_pair_f16(p.b[g * 16 + t + 8 * i], p.b[g * 16 + t + 8 * i + 1]);
    float sum[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    mma_f16(sum, left, right);
    for (u32 i = 0; i < 4; i++) p.c[(g + i / 2 * 8) * 8 + t + i % 2] = sum[i];
}
ENTRY(try_product_f16)

// c[16, 8] = a[16, 8] b[8, 8]^T in tf32, directly from memory.
extern "C" __global__ void try_product_tf32(const WideProductParams p) {
    grid_dependency_synchronize();
    u32 g = threadIdx.x / 4, t = threadIdx.x % 4;
    u32 left[4], right[2];
    for (u32 i = 0; i < 4; i++) left[i] = narrow_tf32(p.a[(g + i % 2 * 8) * 8 + t + i / 2 * 4]);
    for (u32 i = 0; i < 2; i++) right[i] = narrow_tf32(p.b[g * 8 + t + 4 * i]);
    float sum[4] = {0, 0, 0, 0};
    mma_tf32(sum, left, right);
    for (u32 i = 0; i < 4; i++) p.c[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = sum[i];
}
ENTRY(try_product_tf32)

// Two halves of a block exchange numbers with named barriers: out[i] = i + 1.
extern "C" __global__ void try_named_barriers(const OutParams p) {
    grid_dependency_synchronize();
    SHARED(float, slot, 32);
    u32 lane = threadIdx.x % 32;
    if (threadIdx.x < 32) {
        slot[lane] = (float)(lane + 1);
        named_barrier(1, 64);
    } else {
        named_barrier(1, 64);
        p.out[lane] = slot[lane];
    }
}
ENTRY(try_named_barriers)

// Faulty: reads what another warp writes, without a barrier between.
extern "C" __global__ void fault_race(const OutParams p) {
    grid_dependency_synchronize();
    SHARED(float, slot, 64);
    slot[threadIdx.x] = (float)threadIdx.x;
    p.out[threadIdx.x] = slot[63 - threadIdx.x];
}
ENTRY(fault_race)

// Faulty: reads a copy before it waits.
extern "C" __global__ void fault_early(const CopyParams p) {
    grid_dependency_synchronize();
    float* slot = (float*)dynamic_shared();
    copy_async(slot + 4 * threadIdx.x, p.from + 4 * threadIdx.x);
    copy_async_commit();
    p.out[threadIdx.x] = slot[4 * threadIdx.x];
}
ENTRY(fault_early)

// Faulty: reads shared memory that was not written.
extern "C" __global__ void fault_unwritten(const OutParams p) {
    grid_dependency_synchronize();
    SHARED(float, slot, 32);
    p.out[threadIdx.x] = slot[threadIdx.x];
}
ENTRY(fault_unwritten)

// Faulty: reads without waiting for the kernels before.
extern "C" __global__ void fault_unsynchronised(const CopyParams p) { p.out[threadIdx.x] = p.from[threadIdx.x]; }
ENTRY(fault_unsynchronised)

// Faulty: a barrier for more threads than arrive.
extern "C" __global__ void fault_stuck(const OutParams p) {
    grid_dependency_synchronize();
    if (threadIdx.x < 32) named_barrier(1, 64);
    p.out[threadIdx.x] = 0.0f;
}
ENTRY(fault_stuck)

// Faulty: half of a warp shuffles, the other half votes.
extern "C" __global__ void fault_parted(const OutParams p) {
    grid_dependency_synchronize();
    float x = 1.0f;
    if (threadIdx.x < 16) {
        x = __shfl_xor_sync(EVERY_LANE, x, 1);
    } else {
        x = (float)__ballot_sync(EVERY_LANE, 1);
    }
    p.out[threadIdx.x] = x;
}
ENTRY(fault_parted)

// Faulty: 16 bytes at an address of 4.
extern "C" __global__ void fault_misaligned(const CopyParams p) {
    grid_dependency_synchronize();
    float4 four = *(const float4*)(p.from + 1);
    p.out[threadIdx.x] = four.x;
}
ENTRY(fault_misaligned)

// Faulty: one element beyond the shared memory of the launch.
extern "C" __global__ void fault_beyond(const OutParams p) {
    grid_dependency_synchronize();
    float* slot = (float*)dynamic_shared();
    slot[threadIdx.x + 1] = 1.0f;
    p.out[threadIdx.x] = 0.0f;
}
ENTRY(fault_beyond)

// Faulty: one element before it.
extern "C" __global__ void fault_before(const OutParams p) {
    grid_dependency_synchronize();
    float* slot = (float*)dynamic_shared();
    slot[(int)threadIdx.x - 1] = 1.0f;
    p.out[threadIdx.x] = 0.0f;
}
ENTRY(fault_before)

// Faulty: writes outside of one array of several.
extern "C" __global__ void fault_beside(const OutParams p) {
    grid_dependency_synchronize();
    SHARED(float, first, 31);
    SHARED(float, second, 32);
    first[threadIdx.x] = 1.0f;
    second[threadIdx.x] = 1.0f;
    p.out[threadIdx.x] = 0.0f;
}
ENTRY(fault_beside)

// Three runs of 512 bytes through one stage, by the copy engine: out[n][i] = from[n][i] + 1. Two warps read each.
extern "C" __global__ void try_bulk(const CopyParams p) {
    grid_dependency_synchronize();
    SHARED(u64, full, 1);
    SHARED(u64, empty, 1);
    float* stage = (float*)dynamic_shared();
    if (threadIdx.x == 0) {
        phase_init(full, 1);
        phase_init(empty, 2);
        phase_fence();
    }
    __syncthreads();
    for (u32 n = 0; n < 3; n++) {
        if (threadIdx.x == 0) {
            if (n > 0) phase_wait(empty, (n - 1) % 2);
            phase_expect(full, 512);
            copy_bulk(stage, p.from + 128 * n, 256, full);
            copy_bulk(stage + 64, p.from + 128 * n + 64, 256, full);
        }
        __syncwarp();
        phase_wait(full, n % 2);
        for (u32 i = threadIdx.x; i < 128; i += 64) p.out[128 * n + i] = stage[i] + 1.0f;
        __syncwarp();
        if (threadIdx.x % 32 == 0) phase_arrive(empty);
    }
}
ENTRY(try_bulk)

// Four matrices transposed by a load and by a store: out = from, [4][8][8] halves.
extern "C" __global__ void try_turned(const TurnedParams p) {
    grid_dependency_synchronize();
    bf16* tile = (bf16*)dynamic_shared();
    u32 lane = threadIdx.x;
    for (u32 i = lane; i < 256; i += 32) tile[i] = p.from[i];
    __syncwarp();
    u32 r[4];
    ldmatrix_transposed(r, tile + 8 * lane);
    stmatrix_transposed(tile + 256 + 8 * lane, r);
    __syncwarp();
    for (u32 i = lane; i < 256; i += 32) p.out[i] = tile[256 + i];
}
ENTRY(try_turned)

// One thread's copy of `bytes` to `shared`, announced as `announced`; then all threads wait.
static __device__ void bulk(void* shared, const float* from, u32 bytes, u32 announced, bool waits) {
    grid_dependency_synchronize();
    SHARED(u64, full, 1);
    if (threadIdx.x == 0) {
        phase_init(full, 1);
        phase_expect(full, announced);
        copy_bulk(shared, from, bytes, full);
    }
    __syncthreads();
    if (waits) phase_wait(full, 0);
}

// Faulty: reads a bulk copy before it waits.
extern "C" __global__ void fault_bulk_early(const CopyParams p) {
    grid_dependency_synchronize();
    SHARED(u64, full, 1);
    const float* slot = (const float*)dynamic_shared();
    if (threadIdx.x == 0) {
        phase_init(full, 1);
        phase_expect(full, 128);
        copy_bulk(dynamic_shared(), p.from, 128, full);
    }
    __syncthreads();
    p.out[threadIdx.x] = slot[threadIdx.x];
    __syncthreads();
    phase_wait(full, 0);
}
ENTRY(fault_bulk_early)

// Faulty: more bytes announced than copied.
extern "C" __global__ void fault_bulk_short(const FromParams p) { bulk(dynamic_shared(), p.from, 128, 144, true); }
ENTRY(fault_bulk_short)

// Faulty: 12 bytes.
extern "C" __global__ void fault_bulk_odd(const FromParams p) { bulk(dynamic_shared(), p.from, 12, 12, true); }
ENTRY(fault_bulk_odd)

// Faulty: beyond the shared memory of the launch.
extern "C" __global__ void fault_bulk_beyond(const FromParams p) { bulk(dynamic_shared() + 64, p.from, 128, 128, true); }
ENTRY(fault_bulk_beyond)

// Faulty: ends without waiting.
extern "C" __global__ void fault_bulk_left(const FromParams p) { bulk(dynamic_shared(), p.from, 128, 128, false); }
ENTRY(fault_bulk_left)

// Faulty: waits at a barrier that was not initialised.
extern "C" __global__ void fault_unmade(const OutParams p) {
    grid_dependency_synchronize();
    SHARED(u64, full, 1);
    phase_wait(full, 0);
    p.out[threadIdx.x] = 0.0f;
}
ENTRY(fault_unmade)

// sigmoid, silu and softplus of 4,096 numbers: out[3][4096].
extern "C" __global__ void try_near(const CopyParams p) {
    grid_dependency_synchronize();
    for (u32 i = threadIdx.x; i < 4096; i += 256) {
        float x = p.from[i];
        p.out[i] = sigmoid(x);
        p.out[4096 + i] = silu(x);
        p.out[2 * 4096 + i] = softplus(x);
    }
}
ENTRY(try_near)
