// Latent attention for many queries, on tensor cores: keys and values are expanded from the latents, a window of positions
// at a time, and softmax runs online over them (Milakov and Gimelshein, arXiv 1805.02867). Counterpart of
// src/backend/cpu/mla_prefill.rs.
//
// For each window of the batch `mla_gather` copies its latents to consecutive rows, one dense product with kv_b expands them
// in f32, `mla_images` converts each run of them to the form that `mla_prefill` needs in shared memory, and `mla_prefill`
// attends to them. Runs of positions are counted from the sequence's start, so a row's arithmetic depends on its position
// alone. If a sequence continues in another window, a row's unfinished output is kept in f32.
//
// Weights of positions and values are bf16. Queries and keys are f16 times a power of two, which follows from a row's and a
// run's greatest: bf16 queries lose nothing, and an expanded key is rounded eight times as finely as to bf16, which would
// change a weight by two per cent if scores reach several tens.
#include "shared/kernel.h"
#include "shared/fragment.h"
#include "shared/mla.h"
#include "shared/latents.h"
#include "shared/params_mla.h"

// Positions whose scores are computed together; windows are a multiple of it.
#define RUN 64
// Positions of a run whose scores are in registers at the same time.
#define PART 32
// Warps per block, with two tiles of sixteen queries each, so that each read of an image is used for both.
#define WARPS 8
#define TILES 2
#define QUERIES (16 * TILES)
#define LOG2_E 1.4426950408889634f

// The words of window `number`.
static __device__ __forceinline__ const u32* window_words(const u32* batch, u32 number) {
    return batch + batch[AT_WINDOWS] + WINDOW_WORDS * number;
}

template <typename Latent>
static __device__ __forceinline__ void gather(const MlaPrefillParams& p) {
    const u32* window = window_words(p.batch, p.window);
    if (blockIdx.x >= window[WINDOW_POSITIONS]) return;
    Attention a{0, p.latent, 0, p.rope, 0, p.block_tokens};
    const Latent* from = latent_row(
        a, (const Latent*)p.latents, p.batch + segment_word(p.batch, window[WINDOW_SEGMENT], BLOCKS),
        window[WINDOW_FIRST] + blockIdx.x);
    bf16* to = p.gathered + (u64)blockIdx.x * p.latent;
    if (p.latent % 8 == 0 && p.rope % 8 == 0) {
        for (u32 i = threadIdx.x; i < p.latent / 8; i += 64) ((uint4*)to)[i] = eight_operands(from + 8 * i);
    } else {
        for (u32 i = threadIdx.x; i < p.latent; i += 64) to[i] = operand(from[i]);
    }
}

// Grid (positions of the window), block 64.
#define MLA_GATHER(name, Latent)                                                                                      \
    extern "C" __global__ void __launch_bounds__(64) name(const MlaPrefillParams p) {                                 \
        grid_dependency_synchronize();                                                                                \
        gather<Latent>(p);                                                                                            \
    }

MLA_GATHER(mla_gather, bf16)
MLA_GATHER(mla_gather_f16, f16)
MLA_GATHER(mla_gather_f32, float)
ENTRY(mla_gather)
ENTRY(mla_gather_f16)
ENTRY(mla_gather_f32)

// Elements of an image of one head's run: tiles of keys [nope | rope] padded to KEY, of values padded to VALUE, sixteen rows
// after the other; then the factor of the keys, an f32 and padding.
#define IMAGE_END 8
template <int KEY, int VALUE>
static __device__ __forceinline__ u32 image_elements() {
    return (KEY + VALUE) * RUN + IMAGE_END;
}

// A power of two that brings the greatest magnitude to 1 or a little more, and its inverse; 1 if it is not finite.
static __device__ __forceinline__ float tamed(float greatest, float& undo) {
    u32 exponent = __float_as_uint(greatest) & 0x7f800000u;
    if (exponent == 0 || exponent == 0x7f800000u) exponent = 0x3f800000u;
    exponent = min(exponent, 0x7e000000u);
    undo = __uint_as_float(exponent);
    return __uint_as_float(0x7f000000u - exponent);
}

// Images of the runs of one window; zeros without a position or a column.
template <int KEY, int VALUE, typename Latent>
static __device__ __forceinline__ void images(const MlaPrefillParams& p) {
    Attention a{p.heads, p.latent, p.nope, p.rope, p.value, p.block_tokens};
    SHARED(float, greatest, 4);
    const u32* window = window_words(p.batch, p.window);
    u32 run = blockIdx.x, head = blockIdx.y, first = run * RUN;
    if (first >= window[WINDOW_POSITIONS]) return;
    u32 count = min((u32)RUN, window[WINDOW_POSITIONS] - first);
    const u32* table = p.batch + segment_word(p.batch, window[WINDOW_SEGMENT], BLOCKS);
    bf16* image = p.images + ((u64)run * a.heads + head) * image_elements<KEY, VALUE>();
    bf16* values = image + KEY * RUN;
    // Eight columns of a key or a value at a position, zeros if there are none.
    auto load = [&](u32 n, u32 c, float (&x)[8]) {
        bool is_value = c >= KEY, there = n < count;
        if (is_value) c -= KEY;
        const float* row = p.expanded + ((u64)(first + n) * a.heads + head) * (a.nope + a.value);
        const Latent* latents = (const Latent*)p.latents;
        const Latent* shared = there ? latent_row(a, latents, table, window[WINDOW_FIRST] + first + n) + a.latent : nullptr;
        #pragma unroll
        for (u32 j = 0; j < 8; j++) {
            u32 at = c + j;
            x[j] = 0.0f;
            if (there && is_value && at < a.value) x[j] = row[a.nope + at];
            if (there && !is_value && at < a.nope) x[j] = row[at];
            if (there && !is_value && at >= a.nope && at < a.nope + a.rope) x[j] = widen(shared[at - a.nope]);
        }
    };
    float most = 0.0f;
    for (u32 i = threadIdx.x; i < RUN * (KEY / 8); i += 128) {
        float x[8];
        load(i / (KEY / 8), i % (KEY / 8) * 8, x);
        #pragma unroll
        for (u32 j = 0; j < 8; j++) most = fmaxf(most, fabsf(x[j]));
    }
    most = warp_max(most);
    if (threadIdx.x % 32 == 0) greatest[threadIdx.x / 32] = most;
    __syncthreads();
    float undo, factor = tamed(fmaxf(fmaxf(greatest[0], greatest[1]), fmaxf(greatest[2], greatest[3])), undo);
    if (threadIdx.x == 0) *(float4*)(image + (KEY + VALUE) * RUN) = make_float4(undo, 0.0f, 0.0f, 0.0f);
    u32 eights = (KEY + VALUE) / 8;
    for (u32 i = threadIdx.x; i < RUN * eights; i += 128) {
        u32 n = i / eights, c = i % eights * 8, parts[4];
        bool is_value = c >= KEY;
        float x[8];
        load(n, c, x);
        #pragma unroll
        for (u32 j = 0; j < 4; j++) {
            parts[j] = is_value ? narrow_pair(x[2 * j], x[2 * j + 1]) : narrow_pair_f16(x[2 * j] * factor, x[2 * j + 1] * factor);
        }
        if (is_value) c -= KEY;
        bf16* to = (is_value ? values + n / 16 * VALUE * 16 : image + n / 16 * KEY * 16) + element_at(n % 16, c);
        *(uint4*)to = make_uint4(parts[0], parts[1], parts[2], parts[3]);
    }
}

// Grid (ceil(positions of the window / 64), heads), block 128.
#define MLA_IMAGES(name, key, value_width, Latent)                                                                    \
    extern "C" __global__ void __launch_bounds__(128) name(const MlaPrefillParams p) {                                \
        grid_dependency_synchronize();                                                                                \
        images<key, value_width, Latent>(p);                                                                          \
    }

// One window for some tiles of queries of one head. Keys have at most KEY columns, values VALUE. Scores are in units of log2,
// so that a weight is a power of two.
template <int KEY, int VALUE>
static __device__ __forceinline__ void attend(const MlaPrefillParams& p) {
    Attention a{p.heads, 0, p.nope, p.rope, p.value, 1};
    const u32 stage_elements = image_elements<KEY, VALUE>();
    bf16* stages = (bf16*)dynamic_shared();
    u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, head = blockIdx.y;
    const u32* window = window_words(p.batch, p.window);
    u32 segment = window[WINDOW_SEGMENT], first = window[WINDOW_FIRST], window_end = first + window[WINDOW_POSITIONS];
    u32 position = segment_word(p.batch, segment, POSITION), length = segment_word(p.batch, segment, LENGTH);
    u32 start = segment_word(p.batch, segment, START);
    // This block's tokens of the segment, and this warp's. The longest work comes first.
    u32 block_token = (gridDim.x - 1 - blockIdx.x) * WARPS * QUERIES;
    if (block_token >= length) return;
    u32 end = min(window_end, position + min(block_token + WARPS * QUERIES, length));
    if (first >= end) return;
    u32 token = block_token + warp * QUERIES;
    u32 warp_end = token < length ? min(window_end, position + min(token + QUERIES, length)) : 0;
    u32 key = a.nope + a.rope;

    u32 down = lane_down(lane), across = lane_across(lane);
    auto fetch = [&](u32 turn, u32 begin) {
        const bf16* from = p.images + ((u64)((begin - first) / RUN) * a.heads + head) * stage_elements;
        bf16* to = stages + turn * stage_elements;
        for (u32 i = threadIdx.x * 8; i < stage_elements; i += WARPS * 32 * 8) copy_async(to + i, from + i);
        copy_async_commit();
    };
    // A warp's queries, [TILES][KEY / 16] tiles of f16: a lane loads one row, divided by a power of two.
    bf16* own_queries = stages + 2 * stage_elements + warp * QUERIES * KEY;
    float query_scale;
    {
        const bf16* from = p.query + ((u64)(start + token + lane) * a.heads + head) * key;
        u32 columns = token + lane < length ? key : 0;
        auto load = [&](u32 c, float (&x)[8]) {
            weights_at(from, FORMAT_BF16, c, columns, c, x);
        };
        float most = 0.0f;
        for (u32 c = 0; c < columns; c += 8) {
            float x[8];
            load(c, x);
            #pragma unroll
            for (u32 j = 0; j < 8; j++) most = fmaxf(most, fabsf(x[j]));
        }
        float factor = tamed(most, query_scale);
        for (u32 c = 0; c < KEY; c += 8) {
            float x[8] = {};
            if (c < columns) load(c, x);
            *(uint4*)(own_queries + lane / 16 * KEY * 16 + element_at(lane % 16, c)) = make_uint4(
                narrow_pair_f16(x[0] * factor, x[1] * factor), narrow_pair_f16(x[2] * factor, x[3] * factor),
                narrow_pair_f16(x[4] * factor, x[5] * factor), narrow_pair_f16(x[6] * factor, x[7] * factor));
        }
    }
    fetch(0, first);

    // A lane has the rows g and g + 8 of each tile.
    u32 first_own = token + g;
    auto own = [&](u32 m, u32 r) { return position + first_own + m * 16 + 8 * r; };
    // A row whose own position is before this window is finished.
    auto mine = [&](u32 m, u32 r) { return first_own + m * 16 + 8 * r < length && own(m, r) >= first; };
    float greatest[TILES][2], total[TILES][2];
    float sum[TILES][VALUE / 8][4];
    #pragma unroll
    for (u32 m = 0; m < TILES; m++) {
        #pragma unroll
        for (u32 r = 0; r < 2; r++) {
            u64 row = (u64)(start + first_own + m * 16 + 8 * r) * a.heads + head;
            bool before = first > 0 && mine(m, r);
            greatest[m][r] = before ? p.marks[2 * row] : LOWEST;
            // The lanes of a row share the total; only one adds the earlier total.
            total[m][r] = before && t == 0 ? p.marks[2 * row + 1] : 0.0f;
            #pragma unroll
            for (u32 e = 0; e < VALUE / 8; e++) {
                #pragma unroll
                for (u32 i = 0; i < 2; i++) {
                    u32 at = e * 8 + 2 * t + i;
                    sum[m][e][2 * r + i] = before && at < a.value ? p.partial[row * a.value + at] : 0.0f;
                }
            }
        }
    }

    // The factor of the scores of a lane's own row, besides their run's factor.
    query_scale *= score_scale(a) * LOG2_E;
    u32 turn = 0;
    for (u32 begin = first; begin < end; begin += RUN, turn ^= 1) {
        copy_async_wait<0>();
        // The other stage was read before this barrier.
        __syncthreads();
        if (begin + RUN < end) fetch(turn ^ 1, begin + RUN);
        if (begin >= warp_end) continue;
        #pragma unroll 1
        for (u32 part = 0; part < RUN / PART; part++) {
            u32 first_position = begin + part * PART;
            if (first_position >= warp_end) continue;
            const bf16* keys = stages + turn * stage_elements + part * (PART / 16) * (KEY / 16) * TILE + down;
            const bf16* values = stages + turn * stage_elements + RUN * KEY + part * PART * VALUE + across;
            float run_scale = *(const float*)(stages + turn * stage_elements + (KEY + VALUE) * RUN);
            float scores[TILES][PART / 16][2][4];
            #pragma unroll
            for (u32 m = 0; m < TILES; m++) {
                #pragma unroll
                for (u32 j = 0; j < PART / 16; j++) {
                    #pragma unroll
                    for (u32 i = 0; i < 8; i++) scores[m][j][i / 4][i % 4] = 0.0f;
                }
            }
            // A partial unroll, because a full one loads ahead and spills registers.
            #pragma unroll 4
            for (u32 n = 0; n < KEY / 16; n++) {
                u32 q[TILES][4];
                #pragma unroll
                for (u32 m = 0; m < TILES; m++) ldmatrix(q[m], own_queries + (m * (KEY / 16) + n) * TILE + across);
                #pragma unroll
                for (u32 j = 0; j < PART / 16; j++) {
                    u32 b[4];
                    ldmatrix(b, keys + (j * (KEY / 16) + n) * TILE);
                    u32 left[2] = {b[0], b[1]}, right[2] = {b[2], b[3]};
                    #pragma unroll
                    for (u32 m = 0; m < TILES; m++) {
                        mma_f16(scores[m][j][0], q[m], left);
                        mma_f16(scores[m][j][1], q[m], right);
                    }
                }
            }
            // Causal: positions past the window's end are past every row that attends to them. In most runs every position is
            // visible.
            bool edge = first_position + PART > position + token + 1 || first_position + PART > window_end;
            #pragma unroll
            for (u32 m = 0; m < TILES; m++) {
                float best[2] = {greatest[m][0], greatest[m][1]};
                float scale[2];
                #pragma unroll
                for (u32 r = 0; r < 2; r++) {
                    scale[r] = __shfl_sync(EVERY_LANE, query_scale, (int)(m * 16 + g + 8 * r)) * run_scale;
                }
                #pragma unroll
                for (u32 j = 0; j < PART / 16; j++) {
                    #pragma unroll
                    for (u32 i = 0; i < 8; i++) {
                        float& score = scores[m][j][i / 4][i % 4];
                        u32 r = i % 4 / 2, at = first_position + j * 16 + i / 4 * 8 + 2 * t + i % 2;
                        score *= scale[r];
                        if (edge) score = at <= own(m, r) && at < window_end ? score : LOWEST;
                        best[r] = fmaxf(best[r], score);
                    }
                }
                float keep[2];
                #pragma unroll
                for (u32 r = 0; r < 2; r++) {
                    best[r] = fmaxf(best[r], __shfl_xor_sync(EVERY_LANE, best[r], 1));
                    best[r] = fmaxf(best[r], __shfl_xor_sync(EVERY_LANE, best[r], 2));
                    keep[r] = exp2f(greatest[m][r] - best[r]);
                    greatest[m][r] = best[r];
                    total[m][r] *= keep[r];
                }
                // A product with one changes nothing.
                if (__any_sync(EVERY_LANE, keep[0] != 1.0f || keep[1] != 1.0f)) {
                    #pragma unroll
                    for (u32 n = 0; n < VALUE / 8; n++) {
                        #pragma unroll
                        for (u32 i = 0; i < 4; i++) sum[m][n][i] *= keep[i / 2];
                    }
                }
            }
            #pragma unroll
            for (u32 j = 0; j < PART / 16; j++) {
                u32 chances[TILES][4];
                #pragma unroll
                for (u32 m = 0; m < TILES; m++) {
                    #pragma unroll
                    for (u32 i = 0; i < 4; i++) {
                        float (&half)[4] = scores[m][j][i / 2];
                        u32 r = i % 2;
                        // 0 for positions that are not visible: every row that is processed in a window attends to the
                        // window's first position.
                        float x = exp2f(half[2 * r] - greatest[m][r]), y = exp2f(half[2 * r + 1] - greatest[m][r]);
                        total[m][r] += x;
                        total[m][r] += y;
                        chances[m][i] = narrow_pair(x, y);
                    }
                }
                #pragma unroll
                for (u32 n = 0; n < VALUE / 16; n++) {
                    u32 b[4];
                    ldmatrix_transposed(b, values + (j * (VALUE / 16) + n) * TILE);
                    u32 left[2] = {b[0], b[1]}, right[2] = {b[2], b[3]};
                    #pragma unroll
                    for (u32 m = 0; m < TILES; m++) {
                        mma_bf16(sum[m][2 * n], chances[m], left);
                        mma_bf16(sum[m][2 * n + 1], chances[m], right);
                    }
                }
            }
        }
    }

    #pragma unroll
    for (u32 m = 0; m < TILES; m++) {
        #pragma unroll
        for (u32 r = 0; r < 2; r++) {
            float all = total[m][r];
            all += __shfl_xor_sync(EVERY_LANE, all, 1);
            all += __shfl_xor_sync(EVERY_LANE, all, 2);
            if (!mine(m, r)) continue;
            u64 row = (u64)(start + token + m * 16 + g + 8 * r) * a.heads + head;
            bool done = own(m, r) < window_end;
            #pragma unroll
            for (u32 n = 0; n < VALUE / 8; n++) {
                u32 e = n * 8 + 2 * t;
                float x = sum[m][n][2 * r], y = sum[m][n][2 * r + 1];
                if (!done) {
                    if (e < a.value) p.partial[row * a.value + e] = x;
                    if (e + 1 < a.value) p.partial[row * a.value + e + 1] = y;
                } else if (a.value % 2 == 0) {
                    if (e < a.value) *(u32*)(p.output + row * a.value + e) = narrow_pair(x / all, y / all);
                } else {
                    if (e < a.value) p.output[row * a.value + e] = narrow(x / all);
                    if (e + 1 < a.value) p.output[row * a.value + e + 1] = narrow(y / all);
                }
            }
            if (!done && t == 0) {
                p.marks[2 * row] = greatest[m][r];
                p.marks[2 * row + 1] = all;
            }
        }
    }
}

// Grid (ceil(tokens of the window's segment / 256), heads), block 256; dynamic shared memory 256 (P + Q) + 32 + 512 P bytes,
// with P and Q the entry's maximum widths of key and value.
#define MLA_PREFILL(name, key, value_width)                                                                           \
    extern "C" __global__ void __launch_bounds__(WARPS * 32, 1) name(const MlaPrefillParams p) {                      \
        grid_dependency_synchronize();                                                                                \
        attend<key, value_width>(p);                                                                                  \
    }

MLA_IMAGES(mla_images_64, 64, 64, bf16)
MLA_IMAGES(mla_images_64_f16, 64, 64, f16)
MLA_IMAGES(mla_images_64_f32, 64, 64, float)
MLA_IMAGES(mla_images_192, 192, 128, bf16)
MLA_IMAGES(mla_images_192_f16, 192, 128, f16)
MLA_IMAGES(mla_images_192_f32, 192, 128, float)
MLA_PREFILL(mla_prefill_64, 64, 64)
MLA_PREFILL(mla_prefill_192, 192, 128)
ENTRY(mla_images_64)
ENTRY(mla_images_64_f16)
ENTRY(mla_images_64_f32)
ENTRY(mla_images_192)
ENTRY(mla_images_192_f16)
ENTRY(mla_images_192_f32)
ENTRY(mla_prefill_64)
ENTRY(mla_prefill_192)
