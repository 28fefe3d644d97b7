// Emulates the device's instructions on a CPU, so that the same kernels run without a GPU. It checks logic, not speed: one
// block at a time, its threads as fibers that run until they must wait for others.
//
// Errors that it finds besides wrong results: threads that wait forever or at different barriers; reads and writes outside of
// shared memory or of an allocation (guard pages); misaligned vector accesses (traps of the compiler's sanitizers); shared
// memory and copies that are read too early (poisoned with NaN); parameters of another size than the launch's. Threads also run
// in other orders (forward, reverse, seeded), which finds results that depend on the order.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstring>
#include <type_traits>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __restrict__ __restrict
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n) alignas(n)

struct alignas(8) uint2 { u32 x, y; };
struct alignas(16) uint4 { u32 x, y, z, w; };
struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
inline uint2 make_uint2(u32 x, u32 y) { return {x, y}; }
inline uint4 make_uint4(u32 x, u32 y, u32 z, u32 w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

namespace machine {

struct Place { u32 x, y, z; };

struct Fiber {
    void* stack_pointer;
    Place thread;
    u32 lane, warp;
    // The barrier that it waits for, for messages; null while it can run.
    const char* waits;
    int barrier;
    bool ended;
    // Whether it has called `grid_dependency_synchronize`.
    bool synchronised;
};

// Lanes that execute one instruction together. They store pointers to their operands, which are on their stacks.
struct Meeting {
    const char* what;
    u32 mask, arrived;
    const void* in[32];
    void* out[32];
};

// The current thread, and its block.
extern __thread Fiber* running;
struct Block { Place index, size, grid; };
extern __thread Block block;

// Ends the launch with this message.
[[noreturn]] void fail(const char* message);
// The meeting of these lanes, with this lane's pointers; true for the last one to arrive, which then executes the
// instruction.
bool meet(const char* what, u32 mask, const void* in, void* out, Meeting** meeting);
// Called by the last lane: the others may continue.
void dismiss(Meeting& meeting);
// Called by the others: waits until dismissed.
void wait();
void barrier(int number, u32 threads, const char* what);
u8* dynamic_memory();
void* static_memory(int site, size_t bytes);
void copy_begin(void* shared, const void* global, bool valid);
void copy_commit();
void copy_wait(int left);
void phase_init(u64* barrier, u32 arrivals);
void phase_arrive(u64* barrier, u32 bytes);
void phase_wait(u64* barrier, u32 parity);
void copy_bulk(void* shared, const void* global, u32 bytes, u64* barrier);

// Runs `work(in, out)` once for all lanes of the mask; each lane passes `in` and receives `out`.
template <class In, class Out, class Work>
inline void together(const char* what, u32 mask, const In& in, Out& out, Work work) {
    Meeting* meeting;
    if (meet(what, mask, &in, &out, &meeting)) {
        work(*meeting);
        dismiss(*meeting);
    } else {
        wait();
    }
}

template <class T>
struct Sent { T value; u32 from; };

template <class T>
inline T shuffle(const char* what, u32 mask, T value, u32 from) {
    static_assert(sizeof(T) == 4 || sizeof(T) == 8, "words and double words");
    T received;
    together(what, mask, Sent<T>{value, from}, received, [](Meeting& m) {
        for (u32 lane = 0; lane < 32; lane++) {
            if (!(m.mask >> lane & 1)) continue;
            u32 source = static_cast<const Sent<T>*>(m.in[lane])->from;
            // A lane outside of the mask has no value: poison.
            if (m.mask >> source & 1) {
                *static_cast<T*>(m.out[lane]) = static_cast<const Sent<T>*>(m.in[source])->value;
            } else {
                memset(m.out[lane], 0xff, sizeof(T));
            }
        }
    });
    return received;
}

struct Operands { const u32 *a, *b; };
void multiply_bf16(Meeting& meeting);
void multiply_f16(Meeting& meeting);
void multiply_tf32(Meeting& meeting);

struct Rows { const void* row; int matrices; bool transposed; };
void load_matrices(Meeting& meeting);
struct Stored { void* row; const u32* words; };
void store_matrices(Meeting& meeting);

// Entry points by name, called with a pointer to their struct of parameters, as in the driver's launch.
using Call = void (*)(const void* parameters);
struct Entry {
    const char* name;
    Call call;
    size_t bytes;
    Entry* next;
    Entry(const char* name, Call call, size_t bytes);
};

template <auto kernel>
struct Typed;
template <class Params, void (*kernel)(Params)>
struct Typed<kernel> {
    static constexpr size_t bytes = sizeof(Params);
    static void call(const void* parameters) { kernel(*static_cast<const Params*>(parameters)); }
};

}  // namespace machine

#define ENTRY(name) \
    static machine::Entry entry_##name(#name, machine::Typed<&name>::call, machine::Typed<&name>::bytes);
#define SHARED(type, name, count) \
    type* const name = static_cast<type*>(machine::static_memory(__COUNTER__, sizeof(type) * (count)))

#define threadIdx (machine::running->thread)
#define blockIdx (machine::block.index)
#define blockDim (machine::block.size)
#define gridDim (machine::block.grid)

// Kernels run one after the other here: there is nothing to wait for, but every thread must ask.
inline void grid_dependency_synchronize() { machine::running->synchronised = true; }

inline u8* dynamic_shared() { return machine::dynamic_memory(); }

inline float __uint_as_float(u32 x) {
    float y;
    memcpy(&y, &x, 4);
    return y;
}
inline u32 __float_as_uint(float x) {
    u32 y;
    memcpy(&y, &x, 4);
    return y;
}
inline int __float_as_int(float x) { return (int)__float_as_uint(x); }
inline float __int_as_float(int x) { return __uint_as_float((u32)x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz((u32)x); }
inline int __popc(u32 x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
inline float __expf(float x) { return expf(x); }
inline float __fdividef(float x, float y) { return x / y; }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
template <class T>
inline T __ldg(const T* p) { return *p; }
template <class T>
inline T min(T a, T b) { return b < a ? b : a; }
template <class T>
inline T max(T a, T b) { return a < b ? b : a; }

inline bf16 narrow(float x) {
    u32 bits = __float_as_uint(x);
    if (x != x) return {0x7fff};
    return {(u16)((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
inline u32 narrow_pair(float a, float b) { return (u32)narrow(a).bits | (u32)narrow(b).bits << 16; }
inline u32 narrow_tf32(float x) {
    u32 bits = __float_as_uint(x);
    if (x != x) return 0x7fffffff;
    return (bits + 0x1000) & 0xffffe000;
}

inline void __syncthreads() { machine::barrier(0, 0, "__syncthreads"); }
inline void named_barrier(int number, int threads) { machine::barrier(number, (u32)threads, "a named barrier"); }
inline void __threadfence() {}
inline void __syncwarp(u32 mask = EVERY_LANE) {
    u32 none = 0, out;
    machine::together("__syncwarp", mask, none, out, [](machine::Meeting&) {});
}

template <class T>
inline T __shfl_sync(u32 mask, T x, int lane, int width = 32) {
    u32 own = machine::running->lane;
    return machine::shuffle("__shfl_sync", mask, x, (own & ~(u32)(width - 1)) | ((u32)lane & (u32)(width - 1)));
}
template <class T>
inline T __shfl_xor_sync(u32 mask, T x, int with) {
    return machine::shuffle("__shfl_xor_sync", mask, x, (machine::running->lane ^ (u32)with) & 31);
}
template <class T>
inline T __shfl_down_sync(u32 mask, T x, u32 by) {
    u32 own = machine::running->lane;
    return machine::shuffle("__shfl_down_sync", mask, x, own + by > 31 ? own : own + by);
}
template <class T>
inline T __shfl_up_sync(u32 mask, T x, u32 by) {
    u32 own = machine::running->lane;
    return machine::shuffle("__shfl_up_sync", mask, x, own < by ? own : own - by);
}
inline u32 __ballot_sync(u32 mask, int yes) {
    u32 votes;
    machine::together("__ballot_sync", mask, yes, votes, [](machine::Meeting& m) {
        u32 all = 0;
        for (u32 lane = 0; lane < 32; lane++) {
            if (m.mask >> lane & 1 && *static_cast<const int*>(m.in[lane])) all |= 1u << lane;
        }
        for (u32 lane = 0; lane < 32; lane++) {
            if (m.mask >> lane & 1) *static_cast<u32*>(m.out[lane]) = all;
        }
    });
    return votes;
}
template <class T>
inline u32 __match_any_sync(u32 mask, T value) {
    u32 same;
    machine::together("__match_any_sync", mask, value, same, [](machine::Meeting& m) {
        for (u32 lane = 0; lane < 32; lane++) {
            if (!(m.mask >> lane & 1)) continue;
            u32 all = 0;
            for (u32 other = 0; other < 32; other++) {
                if (!(m.mask >> other & 1)) continue;
                if (*static_cast<const T*>(m.in[other]) == *static_cast<const T*>(m.in[lane])) all |= 1u << other;
            }
            *static_cast<u32*>(m.out[lane]) = all;
        }
    });
    return same;
}
inline u32 __reduce_max_sync(u32 mask, u32 value) {
    u32 greatest;
    machine::together("__reduce_max_sync", mask, value, greatest, [](machine::Meeting& m) {
        u32 all = 0;
        for (u32 lane = 0; lane < 32; lane++) {
            if (m.mask >> lane & 1) all = max(all, *static_cast<const u32*>(m.in[lane]));
        }
        for (u32 lane = 0; lane < 32; lane++) {
            if (m.mask >> lane & 1) *static_cast<u32*>(m.out[lane]) = all;
        }
    });
    return greatest;
}
inline int __any_sync(u32 mask, int yes) { return __ballot_sync(mask, yes) != 0; }
inline int __all_sync(u32 mask, int yes) { return __ballot_sync(mask, yes) == mask; }

// Threads run one at a time, so plain operations are atomic.
template <class T>
inline T atomicAdd(T* at, T x) {
    static_assert(std::is_integral_v<T>, "floating-point atomics depend on the order of threads");
    T old = *at;
    *at = old + x;
    return old;
}
template <class T>
inline T atomicMax(T* at, T x) {
    T old = *at;
    *at = old < x ? x : old;
    return old;
}
template <class T>
inline T atomicOr(T* at, T x) {
    T old = *at;
    *at = old | x;
    return old;
}

// Fragments (PTX ISA, "Matrix fragments for mma"): with g = lane / 4 and t = lane % 4,
//   a[0..4] of m16n8k16: rows g, g+8, g, g+8; columns 2t, 2t+1 in [0], [1] and 2t+8, 2t+9 in [2], [3];
//   b[0..2]: column g; rows 2t, 2t+1 in [0] and 2t+8, 2t+9 in [1];
//   c[0..4]: rows g, g, g+8, g+8; columns 2t, 2t+1, 2t, 2t+1.
//   m16n8k8 of tf32: a rows g, g+8, g, g+8, columns t, t, t+4, t+4; b rows t, t+4, column g; c as above.
inline void mma_bf16(float (&c)[4], const u32 (&a)[4], const u32 (&b)[2]) {
    machine::Operands in{a, b};
    machine::together("mma_bf16", EVERY_LANE, in, c, machine::multiply_bf16);
}
inline void mma_f16(float (&c)[4], const u32 (&a)[4], const u32 (&b)[2]) {
    machine::Operands in{a, b};
    machine::together("mma_f16", EVERY_LANE, in, c, machine::multiply_f16);
}
inline void mma_tf32(float (&c)[4], const u32 (&a)[4], const u32 (&b)[2]) {
    machine::Operands in{a, b};
    machine::together("mma_tf32", EVERY_LANE, in, c, machine::multiply_tf32);
}
// Lane l receives from each matrix the halves 2(l%4), 2(l%4)+1 of row l/4; transposed: of column l/4.
template <int matrices>
inline void ldmatrix(u32 (&r)[matrices], const void* row) {
    machine::Rows in{row, matrices, false};
    machine::together("ldmatrix", EVERY_LANE, in, r, machine::load_matrices);
}
template <int matrices>
inline void ldmatrix_transposed(u32 (&r)[matrices], const void* row) {
    machine::Rows in{row, matrices, true};
    machine::together("ldmatrix_transposed", EVERY_LANE, in, r, machine::load_matrices);
}

inline void copy_async(void* shared, const void* global, bool valid = true) {
    machine::copy_begin(shared, global, valid);
}
inline void copy_async_commit() { machine::copy_commit(); }
template <int left>
inline void copy_async_wait() { machine::copy_wait(left); }

inline void stmatrix_transposed(void* row, const u32 (&r)[4]) {
    machine::Stored in{row, r};
    u32 none;
    machine::together("stmatrix_transposed", EVERY_LANE, in, none, machine::store_matrices);
}

inline u32 load_word(const void* at, bool there) { return there ? *static_cast<const u32*>(at) : 0; }
inline void load_words(u32& x, u32& y, const void* at, bool there) {
    uint2 two = there ? *static_cast<const uint2*>(at) : make_uint2(0, 0);
    x = two.x, y = two.y;
}
inline float2 load_two(const float* at, bool there) {
    return there ? *reinterpret_cast<const float2*>(at) : make_float2(0.0f, 0.0f);
}
inline float4 load_four(const float* at, bool there) {
    return there ? *reinterpret_cast<const float4*>(at) : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
}
inline uint4 load_sixteen(const void* at, bool there) {
    return there ? *static_cast<const uint4*>(at) : make_uint4(0, 0, 0, 0);
}
// Subnormal numbers are 0, before and after. The instructions' own error, two units in the last place, is not emulated; that
// of an exponential's argument is.
inline float flushed(float x) { return fabsf(x) < 1.17549435e-38f ? x * 0.0f : x; }
inline float exp_near(float x) { return flushed(exp2f(flushed(x * 1.44269504f))); }
inline float reciprocal_near(float x) { return flushed(1.0f / flushed(x)); }

// g++ before 13 has no _Float16 for ARM.
#if defined(__aarch64__)
using host_half = __fp16;
#else
using host_half = _Float16;
#endif
inline u32 narrow_pair_f16(float a, float b) {
    host_half pair[2] = {(host_half)a, (host_half)b};
    u32 y;
    memcpy(&y, pair, 4);
    return y;
}
inline float2 widen_pair_f16(u32 pair) {
    host_half halves[2];
    memcpy(halves, &pair, 4);
    return {(float)halves[0], (float)halves[1]};
}

// Bytes of a bulk copy are visible once a thread has waited for the phase that they belong to, and poison before. A block
// must not end with any in flight. The order between ordinary stores and the copy engine is not modelled.
inline void phase_init(u64* barrier, u32 arrivals) { machine::phase_init(barrier, arrivals); }
inline void phase_fence() {}
inline void phase_arrive(u64* barrier) { machine::phase_arrive(barrier, 0); }
inline void phase_expect(u64* barrier, u32 bytes) { machine::phase_arrive(barrier, bytes); }
inline void phase_wait(u64* barrier, u32 parity) { machine::phase_wait(barrier, parity); }
inline void copy_bulk(void* shared, const void* global, u32 bytes, u64* barrier) {
    machine::copy_bulk(shared, global, bytes, barrier);
}
