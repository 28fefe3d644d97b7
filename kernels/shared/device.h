// Instructions for which CUDA C++ has no function (PTX ISA 8.0 and later, sm_90 and later). Their emulation on a CPU, with
// the layouts of fragments, is in `host.h`.
#pragma once

#define ENTRY(name)
// Aligned for the widest access.
#define SHARED(type, name, count) __shared__ __align__(16) type name[count]

// The block's dynamic shared memory, aligned to 128 bytes.
static __device__ __forceinline__ u8* dynamic_shared() {
    extern __shared__ __align__(128) u8 dynamic_shared_bytes[];
    return dynamic_shared_bytes;
}

// Programmatic dependent launch: waits until the kernels before have ended and their writes are visible, then lets blocks of
// the next kernel start beside those of this one, as soon as all of these have started. After a launch without the attribute
// it does nothing.
static __device__ __forceinline__ void grid_dependency_synchronize() {
    asm volatile("griddepcontrol.wait; griddepcontrol.launch_dependents;" ::: "memory");
}

static __device__ __forceinline__ u32 shared_address(const void* shared) {
    return (u32)__cvta_generic_to_shared(shared);
}

// f32 -> bf16, to nearest even.
static __device__ __forceinline__ bf16 narrow(float x) {
    bf16 y;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
    return y;
}

// Two f32 as a word of two bf16, `a` in the lower half.
static __device__ __forceinline__ u32 narrow_pair(float a, float b) {
    u32 y;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(b), "f"(a));
    return y;
}

// f32 -> tf32 (10 bits of fraction), to nearest, ties away from zero, in the bits of an f32.
static __device__ __forceinline__ u32 narrow_tf32(float x) {
    u32 y;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(y) : "f"(x));
    return y;
}

// c[16, 8] += a[16, 16] b[16, 8]: bf16 operands, f32 sums.
static __device__ __forceinline__ void mma_bf16(float (&c)[4], const u32 (&a)[4], const u32 (&b)[2]) {
    asm(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// c[16, 8] += a[16, 16] b[16, 8]: f16 operands, f32 sums.
static __device__ __forceinline__ void mma_f16(float (&c)[4], const u32 (&a)[4], const u32 (&b)[2]) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// c[16, 8] += a[16, 8] b[8, 8]: tf32 operands, f32 sums.
static __device__ __forceinline__ void mma_tf32(float (&c)[4], const u32 (&a)[4], const u32 (&b)[2]) {
    asm(
        "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Four (two) matrices of 8 x 8 halves from shared memory: lanes 8i..8i+8 pass the addresses of the rows of matrix i, 16 bytes
// each.
static __device__ __forceinline__ void ldmatrix(u32 (&r)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
}
static __device__ __forceinline__ void ldmatrix_transposed(u32 (&r)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
}
static __device__ __forceinline__ void ldmatrix(u32 (&r)[2], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0,%1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1])
                 : "r"(shared_address(row))
                 : "memory");
}
static __device__ __forceinline__ void ldmatrix_transposed(u32 (&r)[2], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0,%1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1])
                 : "r"(shared_address(row))
                 : "memory");
}

// 16 bytes from global to shared memory, both aligned to 16; zeros if not `valid`. Complete after the wait.
static __device__ __forceinline__ void copy_async(void* shared, const void* global, bool valid = true) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                 :
                 : "r"(shared_address(shared)), "l"(global), "r"(valid ? 16 : 0)
                 : "memory");
}
// Ends a group of this thread's copies.
static __device__ __forceinline__ void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most `left` of this thread's newest groups are in flight. Other threads' copies need a barrier too.
template <int left>
static __device__ __forceinline__ void copy_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(left) : "memory");
}

// A barrier of `threads` of the block's threads, a multiple of 32, with a number from 1 to 15.
static __device__ __forceinline__ void named_barrier(int number, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(number), "r"(threads) : "memory");
}

// Four matrices of 8 x 8 halves to shared memory, each transposed: the inverse of `ldmatrix_transposed`.
static __device__ __forceinline__ void stmatrix_transposed(void* row, const u32 (&r)[4]) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1,%2,%3,%4};" ::"r"(shared_address(row)),
                 "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3])
                 : "memory");
}

// One word, two words, or two f32, of memory that is not written meanwhile; zeros if not `there`. A predicate, not a branch.
// `volatile` keeps loads in source order; NVRTC moves plain ones towards their use, after other waits.
static __device__ __forceinline__ u32 load_word(const void* at, bool there) {
    u32 x;
    asm volatile("{.reg .pred p; setp.ne.u32 p, %2, 0; mov.u32 %0, 0; @p ld.global.nc.u32 %0, [%1];}"
        : "=r"(x)
        : "l"(at), "r"((u32)there));
    return x;
}
static __device__ __forceinline__ void load_words(u32& x, u32& y, const void* at, bool there) {
    asm volatile("{.reg .pred p; setp.ne.u32 p, %3, 0; mov.u32 %0, 0; mov.u32 %1, 0; @p ld.global.nc.v2.u32 {%0, %1}, [%2];}"
        : "=r"(x), "=r"(y)
        : "l"(at), "r"((u32)there));
}
static __device__ __forceinline__ float2 load_two(const float* at, bool there) {
    float2 x;
    asm volatile("{.reg .pred p; setp.ne.u32 p, %3, 0; mov.f32 %0, 0f00000000; mov.f32 %1, 0f00000000;"
        " @p ld.global.nc.v2.f32 {%0, %1}, [%2];}"
        : "=f"(x.x), "=f"(x.y)
        : "l"(at), "r"((u32)there));
    return x;
}
// Four f32 of memory that only this thread writes, later; as above.
static __device__ __forceinline__ float4 load_four(const float* at, bool there) {
    float4 x;
    asm volatile(
        "{.reg .pred p; setp.ne.u32 p, %5, 0; mov.f32 %0, 0f00000000; mov.f32 %1, 0f00000000; mov.f32 %2, 0f00000000;"
        " mov.f32 %3, 0f00000000; @p ld.global.v4.f32 {%0, %1, %2, %3}, [%4];}"
        : "=f"(x.x), "=f"(x.y), "=f"(x.z), "=f"(x.w)
        : "l"(at), "r"((u32)there)
        : "memory");
    return x;
}

// Sixteen bytes, aligned; zeros if not `there`. The compiler moves loads to their uses, to save registers, and then one is in
// flight instead of many. These stay before the next barrier of the warp, unlike the others.
static __device__ __forceinline__ uint4 load_sixteen(const void* at, bool there) {
    uint4 x;
    asm volatile(
        "{.reg .pred p; setp.ne.u32 p, %5, 0; mov.u32 %0, 0; mov.u32 %1, 0; mov.u32 %2, 0; mov.u32 %3, 0;"
        " @p ld.global.v4.u32 {%0, %1, %2, %3}, [%4];}"
        : "=&r"(x.x), "=&r"(x.y), "=&r"(x.z), "=&r"(x.w)
        : "l"(at), "r"((u32)there)
        : "memory");
    return x;
}

// exp(x) and 1 / x in two instructions, to about 2 in 10^7 (exp: times |x|); subnormal results are 0.
static __device__ __forceinline__ float exp_near(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x * 1.44269504f));
    return y;
}
static __device__ __forceinline__ float reciprocal_near(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// Two f32 as a word of two f16, to nearest even, `a` in the lower half; and f32 of both halves.
static __device__ __forceinline__ u32 narrow_pair_f16(float a, float b) {
    u32 y;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(b), "f"(a));
    return y;
}
static __device__ __forceinline__ float2 widen_pair_f16(u32 pair) {
    float2 y;
    asm("{.reg .f16 a, b; mov.b32 {a, b}, %2; cvt.f32.f16 %0, a; cvt.f32.f16 %1, b;}" : "=f"(y.x), "=f"(y.y) : "r"(pair));
    return y;
}

// The copy engine (sm_90): copies bytes to shared memory and counts their arrival on an mbarrier. It has not been run on a
// GPU. A phase of a barrier is complete when all threads that it was initialised for have arrived and all announced bytes
// have been copied; then the next phase begins. Phases are distinguished by their parity, 0 for the first.
//
// Shared memory that ordinary stores wrote must not be a destination: that would require a fence between the two proxies.
static __device__ __forceinline__ void phase_init(u64* barrier, u32 arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}
// After a thread has initialised barriers, before the block's own barrier: makes them visible to the copy engine.
static __device__ __forceinline__ void phase_fence() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
static __device__ __forceinline__ void phase_arrive(u64* barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}
// Arrives, and announces this number of bytes.
static __device__ __forceinline__ void phase_expect(u64* barrier, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
                 : "memory");
}
// Waits until a phase of this parity is complete.
static __device__ __forceinline__ void phase_wait(u64* barrier, u32 parity) {
    u32 over = 0;
    while (over == 0) {
        asm volatile("{.reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p;}"
                     : "=r"(over)
                     : "r"(shared_address(barrier)), "r"(parity)
                     : "memory");
    }
}
// `bytes` from global to shared memory, both aligned to 16 and a multiple of 16.
static __device__ __forceinline__ void copy_bulk(void* shared, const void* global, u32 bytes, u64* barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                     shared_address(shared)),
                 "l"(global), "r"(bytes), "r"(shared_address(barrier))
                 : "memory");
}
