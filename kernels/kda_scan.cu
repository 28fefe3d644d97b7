// The gated delta rule in chunks of sixteen tokens: the scan of the state over the images that `kda_prepare` wrote
// (`kda_chunk.cu`, `shared/kda_image.h`).
//
// `kda_scan` processes a run of chunks in order. A warp has sixteen columns of one head's state, which stay in f32 in its
// registers, transposed, so that the result of one product is an operand of the next; a block has as many warps as the launch
// requests, which share an image's common part. Columns are independent: the number of warps per block changes no bit.
//
// A long segment of few heads is cut into splits, each an affine map of its entry state, S_out = M S_in + B. `kda_operators`
// computes B, the scan from the zero state, and M, the scan from the identity without writes, of all splits in parallel;
// `kda_seeds` computes from them the entry state of each split; `kda_scan` runs all splits.
//
// Images are loaded by the copy engine: common part and values, two copies per chunk.
#include "shared/kernel.h"
#include "shared/kda_image.h"
#include "shared/params_kda.h"

// Maximum number of warps per block, with 16 columns each.
#define MOST_WARPS 8
// Images in shared memory, and those in flight besides the current one.
#define STAGES 5
#define AHEAD 3

// A state, transposed: sixteen columns v by K keys, in the layout of mma's sums: tiles of eight keys.
template <int PADDED>
struct State {
    float at[PADDED / 8][4];
};

template <int PADDED>
static __device__ __forceinline__ void load_state(
    State<PADDED>& state, const float* states, const Heads& h, u32 slot, u32 head, u32 column) {
    u32 lane = threadIdx.x % 32;
    #pragma unroll
    for (u32 n = 0; n < PADDED / 8; n++) {
        #pragma unroll
        for (u32 i = 0; i < 4; i++) {
            u32 d = n * 8 + lane % 4 * 2 + i % 2, e = column + lane / 4 + i / 2 * 8;
            bool inside = slot != NONE && d < h.key_width && e < h.value_width;
            state.at[n][i] = inside ? states[state_at(h, slot, head) + (u64)d * h.value_width + e] : 0.0f;
        }
    }
}

template <int PADDED>
static __device__ __forceinline__ void store_state(
    const State<PADDED>& state, float* states, const Heads& h, u32 slot, u32 head, u32 column) {
    u32 lane = threadIdx.x % 32;
    #pragma unroll
    for (u32 n = 0; n < PADDED / 8; n++) {
        #pragma unroll
        for (u32 i = 0; i < 4; i++) {
            u32 d = n * 8 + lane % 4 * 2 + i % 2, e = column + lane / 4 + i / 2 * 8;
            if (d < h.key_width && e < h.value_width) {
                states[state_at(h, slot, head) + (u64)d * h.value_width + e] = state.at[n][i];
            }
        }
    }
}

// Columns of a split's operator, [columns of B, then of M][PADDED]: B padded to a multiple of 16, M of PADDED columns.
template <int PADDED>
static __device__ __forceinline__ u64 operator_at(const Heads& h, u32 split, u32 head, u32 column) {
    return (((u64)split * h.heads + head) * (value_tiles(h.value_width) * 16 + PADDED) + column) * PADDED;
}

// Sixteen columns of an operator from `at` on: the offset of a lane's pair of keys of column lane / 4.
template <int PADDED>
static __device__ __forceinline__ void load_columns(State<PADDED>& state, const float* at) {
    u32 lane = threadIdx.x % 32;
    #pragma unroll
    for (u32 n = 0; n < PADDED / 8; n++) {
        #pragma unroll
        for (u32 i = 0; i < 2; i++) {
            float2 pair = *(const float2*)(at + (lane / 4 + i * 8) * PADDED + n * 8 + lane % 4 * 2);
            state.at[n][2 * i] = pair.x;
            state.at[n][2 * i + 1] = pair.y;
        }
    }
}
template <int PADDED>
static __device__ __forceinline__ void store_columns(const State<PADDED>& state, float* at) {
    u32 lane = threadIdx.x % 32;
    #pragma unroll
    for (u32 n = 0; n < PADDED / 8; n++) {
        #pragma unroll
        for (u32 i = 0; i < 2; i++) {
            *(float2*)(at + (lane / 4 + i * 8) * PADDED + n * 8 + lane % 4 * 2) =
                make_float2(state.at[n][2 * i], state.at[n][2 * i + 1]);
        }
    }
}

// The state's operand for sixteen keys.
template <int PADDED>
static __device__ __forceinline__ void operand_of(u32 (&a)[4], const State<PADDED>& state, u32 tile) {
    const float (&left)[4] = state.at[2 * tile], (&right)[4] = state.at[2 * tile + 1];
    a[0] = narrow_pair(left[0], left[1]);
    a[1] = narrow_pair(left[2], left[3]);
    a[2] = narrow_pair(right[0], right[1]);
    a[3] = narrow_pair(right[2], right[3]);
}

// One chunk through sixteen columns of the state, all transposed: U, O and the next state. `image` is the common part,
// `values` the warp's tile of the image's values, or null without writes; `output` receives O [16 tokens, 16 columns] in bf16
// if OUTPUT.
template <int PADDED, bool OUTPUT>
static __device__ __forceinline__ void advance(
    State<PADDED>& state, const bf16* image, const bf16* values, bf16* output) {
    constexpr u32 TILES = PADDED / 16;
    u32 lane = threadIdx.x % 32, down = unit_down(lane), across = unit_across(lane);
    const bf16* queries = image + 4 * TILES * TILE;
    const float* decay = (const float*)(queries + TILE);

    // U = (I + A_kk)^-1 beta V - W S, in two independent sums whose instructions overlap.
    float write[2][4] = {}, more[2][4] = {};
    if (values != nullptr) {
        u32 v[4];
        ldmatrix_transposed(v, values + down);
        float scale = *(const float*)(values + TILE);
        #pragma unroll
        for (u32 i = 0; i < 4; i++) {
            float2 pair = widen_pair_f16(v[i]);
            write[i / 2][i % 2 * 2] = pair.x * scale;
            write[i / 2][i % 2 * 2 + 1] = pair.y * scale;
        }
    }
    u32 b[4];
    #pragma unroll
    for (u32 tile = 0; tile < TILES; tile++) {
        u32 a[4];
        operand_of(a, state, tile);
        ldmatrix(b, image + in_tile(tile, down));
        multiply_halves(tile % 2 == 0 ? write : more, a, b);
    }
    // While U is computed: the first part of O = (Q exp(G)) S + A_qk U, and of S' = exp(G_16) S + Kr^T U.
    float result[2][4] = {};
    #pragma unroll
    for (u32 tile = 0; tile < TILES; tile++) {
        if (OUTPUT) {
            u32 a[4];
            operand_of(a, state, tile);
            ldmatrix(b, image + TILES * TILE + in_tile(tile, down));
            multiply_halves(result, a, b);
        }
        #pragma unroll
        for (u32 n = 0; n < 2; n++) {
            float (&s)[4] = state.at[2 * tile + n];
            float2 factor = *(const float2*)(decay + tile * 16 + n * 8 + lane % 4 * 2);
            s[0] *= factor.x;
            s[1] *= factor.y;
            s[2] *= factor.x;
            s[3] *= factor.y;
        }
    }
    u32 u[4];
    #pragma unroll
    for (u32 i = 0; i < 4; i++) {
        const float (&x)[4] = write[i / 2], (&y)[4] = more[i / 2];
        u[i] = narrow_pair(x[i % 2 * 2] + y[i % 2 * 2], x[i % 2 * 2 + 1] + y[i % 2 * 2 + 1]);
    }

    #pragma unroll
    for (u32 tile = 0; tile < TILES; tile++) {
        u32 b_rest[4];
        ldmatrix_transposed(b, image + 2 * TILES * TILE + in_tile(tile, across));
        ldmatrix_transposed(b_rest, image + 3 * TILES * TILE + in_tile(tile, across));
        #pragma unroll
        for (u32 n = 0; n < 2; n++) {
            u32 b_n[2] = {b[2 * n], b[2 * n + 1]}, rest_n[2] = {b_rest[2 * n], b_rest[2 * n + 1]};
            mma_bf16(state.at[2 * tile + n], u, rest_n);
            mma_bf16(state.at[2 * tile + n], u, b_n);
        }
    }

    if (OUTPUT) {
        ldmatrix(b, queries + down);
        multiply_halves(result, u, b);
        u32 turned[4];
        #pragma unroll
        for (u32 i = 0; i < 4; i++) turned[i] = narrow_pair(result[i / 2][i % 2 * 2], result[i / 2][i % 2 * 2 + 1]);
        // Matrices: tokens 0 to 7 by both halves of columns, then tokens 8 to 15.
        stmatrix_transposed(output + unit_at(0, lane % 8 + lane / 16 * 8, lane / 8 % 2), turned);
        __syncwarp();
    }
}

// The images of a run of chunks that are copied into shared memory: whole copies, `AHEAD` of them in flight.
struct Images {
    u64 *full, *empty;
    u8* stages;
    const u8* source;
    u64 pitch;                              // bytes from one chunk's image to the next
    u32 count, common, values, skip, stage; // chunks; bytes per part and per stage; bytes before the block's values

    // By one thread: fetches chunk `n`, once its stage is free.
    __device__ __forceinline__ void fetch(u32 n) const {
        if (n >= count) return;
        u32 at = n % STAGES;
        if (n >= STAGES) phase_wait(empty + at, (n / STAGES - 1) % 2);
        u8* to = stages + at * stage;
        const u8* from = source + n * pitch;
        phase_expect(full + at, common + values);
        copy_bulk(to, from, common, full + at);
        if (values > 0) copy_bulk(to + common, from + common + skip, values, full + at);
    }
    // By every thread.
    __device__ __forceinline__ const u8* wait(u32 n) const {
        phase_wait(full + n % STAGES, n / STAGES % 2);
        return stages + n % STAGES * stage;
    }
    // By one thread of each warp that has read chunk `n`.
    __device__ __forceinline__ void done(u32 n) const { phase_arrive(empty + n % STAGES); }
};

// A run of chunks from the batch's list.
struct Run {
    u32 segment, chunk, count, split;
};
static __device__ __forceinline__ Run run_of(const u32* batch, u32 n) {
    const u32* words = batch + batch[AT_SCANS] + SCAN_WORDS * n;
    return Run{words[SCAN_SEGMENT], words[SCAN_CHUNK], words[SCAN_CHUNKS], words[SCAN_SPLIT]};
}

// A chunk in the batch: its first row, its tokens, and the slot of the checkpoint at its end or NONE.
struct Chunk {
    u32 first, length, slot;
};
static __device__ __forceinline__ Chunk chunk_of(const u32* chunks, u32 n) {
    const u32* words = chunks + CHUNK_WORDS * n;
    return Chunk{words[CHUNK_ROW], words[CHUNK_LENGTH], words[CHUNK_SLOT]};
}

// Images of a run for the block's tiles of values, `tiles` from `first` on; `active` warps read them.
template <int PADDED>
static __device__ __forceinline__ Images begin_images(
    u64* full, u64* empty, const u8* workspace, const Heads& h, const Run& run, u32 head, u32 first, u32 tiles, u32 active) {
    u32 bytes = image_bytes(PADDED, h.value_width), common = common_bytes(PADDED);
    Images images{
        full, empty, dynamic_shared(), workspace + ((u64)run.chunk * h.heads + head) * bytes, (u64)h.heads * bytes,
        run.count, common, tiles * VALUE_STRIDE * 2, first * VALUE_STRIDE * 2,
        common + blockDim.x / 32 * VALUE_STRIDE * 2};
    if (threadIdx.x == 0) {
        for (u32 i = 0; i < STAGES; i++) {
            phase_init(full + i, 1);
            phase_init(empty + i, active);
        }
        phase_fence();
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        for (u32 n = 0; n < AHEAD; n++) images.fetch(n);
    }
    return images;
}

// The convolution states, if `kda_prepare_fused` read them: the block's channels of V; one block writes those of a key head.
static __device__ __forceinline__ void keep_block_conv_states(
    const Conv& conv, const u32* batch, const Heads& h, u32 segment, u32 head, u32 first_column) {
    u32 channels = channels_of(h), threads = blockDim.x;
    u32 end = min(first_column + threads / 2, h.value_width);
    for (u32 e = first_column + threadIdx.x; e < end; e += threads) {
        keep_conv_states(conv, channels, batch, segment, value_channel(h, head) + e);
    }
    if (blockIdx.x == 0 && head % (h.heads / h.key_heads) == 0) {
        for (u32 d = threadIdx.x; d < h.key_width; d += threads) {
            keep_conv_states(conv, channels, batch, segment, query_channel(h, head) + d);
            keep_conv_states(conv, channels, batch, segment, query_channel(h, head) + h.key_heads * h.key_width + d);
        }
    }
}

template <int PADDED>
static __device__ __forceinline__ void scan(
    const u32* batch, const u8* workspace, const float* operators, float* states, bf16* output, const Heads& h, u32 form,
    const Conv& conv) {
    SHARED(u64, full, STAGES);
    SHARED(u64, empty, STAGES);
    SHARED(uint4, outputs, MOST_WARPS * TILE / 8);
    u32 head = blockIdx.y, thread = threadIdx.x, warp = thread / 32, lane = thread % 32, warps = blockDim.x / 32;
    if (blockIdx.z >= batch[form == ALL_CHUNKS ? SCAN_TOTAL : SEVERAL_SCANS]) return;
    Run run = run_of(batch, blockIdx.z);
    u32 first = blockIdx.x * warps, tiles = min(warps, value_tiles(h.value_width) - first), column = (first + warp) * 16;
    Images images = begin_images<PADDED>(full, empty, workspace, h, run, head, first, tiles, tiles);
    bf16* own = (bf16*)outputs + warp * TILE;
    u32 end = segment_word(batch, run.segment, CHUNKS) + segment_word(batch, run.segment, CHUNK_COUNT);
    const u32* chunks = batch + batch[AT_CHUNKS] + CHUNK_WORDS * run.chunk;
    if (warp < tiles) {
        // Words of a chunk are loaded while the previous chunk is processed.
        Chunk next = {0, 0, NONE};
        if (run.count > 0) next = chunk_of(chunks, 0);
        State<PADDED> state;
        if (run.split == NONE) {
            load_state(state, states, h, segment_word(batch, run.segment, SLOT_IN), head, column);
        } else {
            load_columns(state, operators + operator_at<PADDED>(h, run.split, head, column));
        }
        for (u32 n = 0; n < run.count; n++) {
            Chunk chunk = next;
            next = chunk_of(chunks, min(n + 1, run.count - 1));
            if (thread == 0) images.fetch(n + AHEAD);
            __syncwarp();
            const u8* stage = images.wait(n);
            __syncwarp();
            const bf16* values = (const bf16*)(stage + images.common) + warp * VALUE_STRIDE;
            advance<PADDED, true>(state, (const bf16*)stage, values, own);
            if (lane == 0) images.done(n);
            // A lane has half a row: eight columns.
            u32 t = lane / 2, e = column + lane % 2 * 8;
            if (t < chunk.length) {
                bf16* to = output + ((u64)(chunk.first + t) * h.heads + head) * h.value_width + e;
                const bf16* eight = own + unit_at(0, t, lane % 2);
                if (h.value_width % 8 == 0) {
                    if (e < h.value_width) *(uint4*)to = *(const uint4*)eight;
                } else {
                    for (u32 i = 0; i < 8 && e + i < h.value_width; i++) to[i] = eight[i];
                }
            }
            if (chunk.slot != NONE) store_state(state, states, h, chunk.slot, head, column);
            __syncwarp();
        }
        // The segment's last run.
        if (run.chunk + run.count == end) {
            store_state(state, states, h, segment_word(batch, run.segment, SLOT_OUT), head, column);
        }
    }
    if (conv.input != nullptr && run.chunk + run.count == end) {
        keep_block_conv_states(conv, batch, h, run.segment, head, first * 16);
    }
}

// Runs of chunks, each in order. Grid (ceil(V / 16 W), heads, scans), block 32 W, W at most 8; dynamic shared memory 5 (512
// (P/4 + 1) + 4 P + 528 W). K is at most P. A grid may be larger than the number of scans; for a run of no chunks the state
// is copied.
#define KDA_SCAN(name, padded)                                                                                        \
    extern "C" __global__ void __launch_bounds__(MOST_WARPS * 32, 1) name(const KdaScanParams p) {                    \
        grid_dependency_synchronize();                                                                                \
        Heads h{p.key_heads, p.heads, p.key_width, p.value_width};                                                    \
        Conv conv{p.input, nullptr, 0, p.conv_states};                                                                \
        scan<padded>(p.batch, p.workspace, p.operators, p.states, p.output, h, p.form, conv);                         \
    }

KDA_SCAN(kda_scan_32, 32)
KDA_SCAN(kda_scan_64, 64)
KDA_SCAN(kda_scan_128, 128)
ENTRY(kda_scan_32)
ENTRY(kda_scan_64)
ENTRY(kda_scan_128)

template <int PADDED>
static __device__ __forceinline__ void find_operators(
    const u32* batch, const u8* workspace, float* operators, const Heads& h) {
    SHARED(u64, full, STAGES);
    SHARED(u64, empty, STAGES);
    u32 head = blockIdx.y, thread = threadIdx.x, warp = thread / 32, lane = thread % 32, warps = blockDim.x / 32;
    if (blockIdx.z >= batch[SPLIT_TOTAL]) return;
    // Splits are first in the list.
    Run run = run_of(batch, blockIdx.z);
    u32 first = blockIdx.x * warps, written = value_tiles(h.value_width), every = written + PADDED / 16;
    u32 tiles = first < written ? min(warps, written - first) : 0, active = min(warps, every - first);
    Images images = begin_images<PADDED>(full, empty, workspace, h, run, head, first, tiles, active);
    if (warp >= active) return;
    u32 tile = first + warp;
    State<PADDED> state;
    #pragma unroll
    for (u32 n = 0; n < PADDED / 8; n++) {
        #pragma unroll
        for (u32 i = 0; i < 4; i++) {
            u32 d = n * 8 + lane % 4 * 2 + i % 2, column = tile * 16 + lane / 4 + i / 2 * 8;
            state.at[n][i] = column == written * 16 + d ? 1.0f : 0.0f;
        }
    }
    for (u32 n = 0; n < run.count; n++) {
        if (thread == 0) images.fetch(n + AHEAD);
        __syncwarp();
        const u8* stage = images.wait(n);
        __syncwarp();
        const bf16* values = (const bf16*)(stage + images.common) + warp * VALUE_STRIDE;
        advance<PADDED, false>(state, (const bf16*)stage, tile < written ? values : nullptr, nullptr);
        __syncwarp();
        if (lane == 0) images.done(n);
    }
    store_columns(state, operators + operator_at<PADDED>(h, run.split, head, tile * 16));
}

template <int PADDED>
static __device__ __forceinline__ void find_seeds(const u32* batch, float* operators, const float* states, const Heads& h) {
    constexpr u32 TILES = PADDED / 16;
    u32 head = blockIdx.y, lane = threadIdx.x % 32, column = (blockIdx.x * 4 + threadIdx.x / 32) * 16;
    u32 written = value_tiles(h.value_width) * 16;
    if (blockIdx.z >= batch[CUT_TOTAL] || column >= written) return;
    const u32* words = batch + batch[AT_CUTS] + CUT_WORDS * blockIdx.z;
    u32 split = words[CUT_SPLIT], splits = words[CUT_SPLITS];
    State<PADDED> state;
    load_state(state, states, h, segment_word(batch, words[CUT_SEGMENT], SLOT_IN), head, column);
    for (u32 n = 0; n < splits; n++) {
        // The entry state replaces B.
        float* at = operators + operator_at<PADDED>(h, split + n, head, column);
        State<PADDED> next;
        load_columns(next, at);
        store_columns(state, at);
        if (n + 1 == splits) break;
        // M S + B, with operands that are pairs of a bf16 and its rounding error.
        u32 part[TILES][4], rest[TILES][4];
        #pragma unroll
        for (u32 tile = 0; tile < TILES; tile++) {
            #pragma unroll
            for (u32 i = 0; i < 4; i++) {
                const float (&s)[4] = state.at[2 * tile + i / 2];
                split_pair(s[i % 2 * 2], s[i % 2 * 2 + 1], part[tile][i], rest[tile][i]);
            }
        }
        const float* map = operators + operator_at<PADDED>(h, split + n, head, written) + lane / 4;
        #pragma unroll
        for (u32 to = 0; to < PADDED / 8; to++) {
            #pragma unroll
            for (u32 tile = 0; tile < TILES; tile++) {
                u32 b[2], b_rest[2];
                #pragma unroll
                for (u32 i = 0; i < 2; i++) {
                    const float* pair = map + (tile * 16 + i * 8 + lane % 4 * 2) * PADDED + to * 8;
                    split_pair(pair[0], pair[PADDED], b[i], b_rest[i]);
                }
                mma_bf16(next.at[to], rest[tile], b);
                mma_bf16(next.at[to], part[tile], b_rest);
                mma_bf16(next.at[to], part[tile], b);
            }
        }
        state = next;
    }
}

// `kda_operators`: the affine maps of all splits. Grid (ceil((ceil(V / 16) + P / 16) / W), heads, splits), block and shared
// memory as for `kda_scan`. `kda_seeds`: the entry states of splits, which replace B. Grid (ceil(V / 64), heads, cuts), block
// 128. Grids may be larger than the batch requires.
#define KDA_SPLITS(operators_name, seeds_name, padded)                                                                \
    extern "C" __global__ void __launch_bounds__(MOST_WARPS * 32, 1) operators_name(const KdaSplitsParams p) {        \
        grid_dependency_synchronize();                                                                                \
        Heads h{p.heads, p.heads, p.key_width, p.value_width};                                                        \
        find_operators<padded>(p.batch, p.workspace, p.operators, h);                                                 \
    }                                                                                                                 \
    extern "C" __global__ void __launch_bounds__(128) seeds_name(const KdaSplitsParams p) {                           \
        grid_dependency_synchronize();                                                                                \
        Heads h{p.heads, p.heads, p.key_width, p.value_width};                                                        \
        find_seeds<padded>(p.batch, p.operators, p.states, h);                                                        \
    }

KDA_SPLITS(kda_operators_32, kda_seeds_32, 32)
KDA_SPLITS(kda_operators_64, kda_seeds_64, 64)
KDA_SPLITS(kda_operators_128, kda_seeds_128, 128)
ENTRY(kda_operators_32)
ENTRY(kda_operators_64)
ENTRY(kda_operators_128)
ENTRY(kda_seeds_32)
ENTRY(kda_seeds_64)
ENTRY(kda_seeds_128)
