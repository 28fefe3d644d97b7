// Latent attention for few queries, on tensor cores: the expansion is absorbed into query and output (DeepSeek-V2, arXiv
// 2405.04434, section 2.1.2), so that each cached row is read once, for all heads, and never expanded. Counterpart of
// src/backend/cpu/mla_decode.rs.
//
// Three kernels: `mla_absorb` computes the absorbed query, `mla_attend` runs a softmax over a span of positions for 32 heads
// at a time, `mla_merge` merges the spans of a row and expands the weighted latent to a value. Spans are counted from the
// sequence's start, and their length depends on the row's position only, so a row's arithmetic depends on that alone. The
// least time of each kernel is in docs/performance/hopper.md.
#include "shared/kernel.h"
#include "shared/fragment.h"
#include "shared/mla.h"
#include "shared/latents.h"
#include "shared/params_mla.h"

// Positions whose scores are computed together.
#define RUN 32
// Runs in shared memory: one whose values are summed, one whose scores are computed, others in flight.
#define STAGES 5
// Heads per block of `mla_attend`: two tiles' rows.
#define HEADS 32
#define WARPS 8
// Maximum number of columns of latents per block, and a warp's part of them, in tiles.
#define MOST_LATENT 512
#define MOST_ROPE 64
#define WARP_TILES (MOST_LATENT / 16 / WARPS)
// Warps divide a row's columns into four parts for scores; tiles per part.
#define PARTS 4
#define PART_TILES ((MOST_LATENT + MOST_ROPE) / 16 / PARTS)
// Floats from head to head among scores, without bank conflicts for writes and reads.
#define SCORE_STRIDE (RUN + 8)
// Rows of the batch for which the weight is read once.
#define ROWS 4
// Maximum number of spans of a row, as in src/backend/cuda/step.rs.
#define MOST_SPANS 132

// The row of the batch that has index `n` among the processed rows: all, or those of single tokens (`single`).
static __device__ __forceinline__ u32 row_of(const u32* batch, u32 single, u32 n) {
    return batch[batch[AT_ROWS] + (single ? batch[SEVERAL_ROWS] : 0) + n];
}

// Floats that a span writes per head: the weighted latent, and from `mark_at` on the greatest score and the sum of weights.
static __device__ __forceinline__ u32 mark_at(u32 latent) { return (latent + 3) / 4 * 4; }
static __device__ __forceinline__ u32 part_stride(u32 latent) { return mark_at(latent) + 4; }

// Rows of a head's expansion that are read at the same time in `mla_absorb`.
#define ABSORB_GROUPS 16
// Maximum width of the part of a query without position.
#define MOST_NOPE 256

template <bool BF16>
static __device__ __forceinline__ void absorb(const MlaDecodeParams& p, float* q, float* sums) {
    const u32 heads = p.heads, latent = p.latent, nope = p.nope, rope = p.rope, value = p.value;
    u32 head = blockIdx.y, first = blockIdx.z * ROWS, count = min((u32)ROWS, p.rows - first), thread = threadIdx.x;
    // Rows of a thread that are in flight.
    constexpr u32 AHEAD = BF16 ? 8 : 1;
    u32 group = thread / 16, columns = thread % 16 * 8, l = min(blockIdx.x * 128 + columns, (latent - 1) / 8 * 8);
    Eight<BF16> weights[AHEAD];
    // The weights first; rows past the last one are the last, times zero.
    auto load = [&](u32 n) {
        #pragma unroll
        for (u32 i = 0; i < AHEAD; i++) {
            u32 row = head * (nope + value) + min(n + i * ABSORB_GROUPS, nope - 1);
            weights[i].load(p.kv_b, p.format, (u64)row * latent + l, latent, l);
        }
    };
    load(group);
    #pragma unroll
    for (u32 r = 0; r < ROWS; r++) {
        u32 row = row_of(p.batch, p.single, first + min(r, count - 1));
        float x = widen(p.query[((u64)row * heads + head) * (nope + rope) + min(thread, nope - 1)]);
        q[r * MOST_NOPE + thread] = r < count && thread < nope ? x : 0.0f;
    }
    __syncthreads();
    float sum[ROWS][8] = {};
    #pragma unroll 1
    for (u32 n = group; n < nope; n += AHEAD * ABSORB_GROUPS) {
        if (n != group) load(n);
        #pragma unroll
        for (u32 i = 0; i < AHEAD; i++) {
            #pragma unroll
            for (u32 r = 0; r < ROWS; r++) {
                float factor = q[r * MOST_NOPE + n + i * ABSORB_GROUPS];
                #pragma unroll
                for (u32 c = 0; c < 8; c++) sum[r][c] = fmaf(factor, weights[i][c], sum[r][c]);
            }
        }
    }
    #pragma unroll
    for (u32 r = 0; r < ROWS; r++) {
        float4* to = (float4*)(sums + (group * ROWS + r) * 128 + columns);
        to[0] = make_float4(sum[r][0], sum[r][1], sum[r][2], sum[r][3]);
        to[1] = make_float4(sum[r][4], sum[r][5], sum[r][6], sum[r][7]);
    }
    __syncthreads();
    for (u32 i = thread; i < count * 128; i += 256) {
        float whole = 0.0f;
        #pragma unroll
        for (u32 g = 0; g < ABSORB_GROUPS; g++) whole += sums[g * ROWS * 128 + i];
        u32 at = blockIdx.x * 128 + i % 128;
        if (at < latent) p.absorbed[((u64)(first + i / 128) * heads + head) * latent + at] = whole;
    }
}

// q_lat = W_UK^T q_nope. Grid (ceil(latent / 128), heads, ceil(rows / 4)), block 256: sixteen groups of rows of the weight,
// each with eight columns per thread.
extern "C" __global__ void __launch_bounds__(256) mla_absorb(const __grid_constant__ MlaDecodeParams p) {
    grid_dependency_synchronize();
    SHARED(float, q, ROWS * MOST_NOPE);
    SHARED(float, sums, ABSORB_GROUPS * ROWS * 128);
    if (p.format == FORMAT_BF16 && p.latent % 8 == 0) {
        absorb<true>(p, q, sums);
    } else {
        absorb<false>(p, q, sums);
    }
}
ENTRY(mla_absorb)

// The layout of a row of latents in shared memory, in tiles of sixteen columns: the latent padded to tiles, then the shared
// key padded to tiles. The stride is 16 bytes more than a multiple of 32, so that ldmatrix has no bank conflicts.
struct Tiles {
    u32 latent, all, stride;
};

// A thread's eighth of a row of each run, by asynchronous copies if tiles are full and nothing must be rounded. `block` is the
// block of the next run's row, read one run ahead.
template <typename Latent>
struct Fetch {
    const Attention& a;
    const Tiles& tiles;
    const Latent* latents;
    const u32* table;
    u32 end, block;

    __device__ __forceinline__ void look(u32 position) {
        if (position < end) block = table[position / a.block_tokens];
    }

    // Copies the row at `position` to `to`; zeros from the end on.
    __device__ __forceinline__ void row(bf16* to, u32 position) {
        bool there = position < end;
        const Latent* from = latents;
        if (there) from += ((u64)block * a.block_tokens + position % a.block_tokens) * (a.latent + a.rope);
        u32 first = threadIdx.x % 8 * 8, width = tiles.all * 16;
        if ((a.latent | a.rope) % 16 == 0) {
            if constexpr (format_of<Latent>() == FORMAT_BF16) {
                #pragma unroll
                for (u32 c = 0; c < MOST_LATENT + MOST_ROPE; c += 64) {
                    if (c + first < width) copy_async(to + first + c, from + first + c, there);
                }
            } else {
                // Two at a time: more in flight would spill registers.
                #pragma unroll 2
                for (u32 c = first; c < width; c += 64) {
                    *(uint4*)(to + c) = there ? eight_operands(from + c) : make_uint4(0, 0, 0, 0);
                }
            }
            return;
        }
        u32 shared = tiles.latent * 16;
        #pragma unroll 1
        for (u32 c = threadIdx.x % 8; c < width; c += 8) {
            bool key = c >= shared;
            u32 at = key ? c - shared + a.latent : c, last = key ? a.latent + a.rope : a.latent;
            to[c] = there && at < last ? operand(from[at]) : bf16{0};
        }
    }
};

// Softmax over a span of positions for 32 heads. PUBLISHED: the widths are those of the published model, known at compile
// time.
template <bool PUBLISHED, typename Latent>
static __device__ __forceinline__ void attend(const MlaDecodeParams& p) {
    Attention a{p.heads, p.latent, p.nope, p.rope, p.value, p.block_tokens};
    if (PUBLISHED) {
        a.latent = MOST_LATENT;
        a.rope = MOST_ROPE;
    }
    u32 heads = a.heads, latent = a.latent, nope = a.nope, rope = a.rope;
    Tiles tiles;
    tiles.latent = (latent + 15) / 16;
    tiles.all = tiles.latent + (rope + 15) / 16;
    tiles.stride = tiles.all * 16 + 8;
    u32 thread = threadIdx.x, warp = thread / 32, lane = thread % 32, g = lane / 4, t = lane % 4;
    u32 number = blockIdx.x, begin = 0, span = NONE;
    if (p.single) {
        if (blockIdx.x >= p.batch[SPAN_TOTAL]) return;
        const u32* spans = p.batch + p.batch[AT_SPANS];
        number = spans[SPAN_WORDS * blockIdx.x + SPAN_ROW];
        begin = spans[SPAN_WORDS * blockIdx.x + SPAN_FIRST];
        // A row's spans have the length at which its second one begins.
        const u32* own = p.batch + p.batch[AT_SPANNED] + SPANNED_WORDS * number;
        if (own[SPANNED_COUNT] > 1) span = spans[SPAN_WORDS * (own[SPANNED_FIRST] + 1) + SPAN_FIRST];
    }
    u32 row = row_of(p.batch, p.single, number), segment = owner(p.batch, row);
    u32 end = segment_word(p.batch, segment, POSITION) + row - segment_word(p.batch, segment, START) + 1;
    if (span != NONE) end = min(end, begin + span);
    u32 first_head = blockIdx.y * HEADS, own_heads = min((u32)HEADS, heads - first_head);
    u32 runs = (end - begin + RUN - 1) / RUN;

    // Latents [STAGES][RUN][stride], weights [2][RUN / 16] tiles, scores of the parts, factors of the earlier sums.
    bf16* stages = (bf16*)dynamic_shared();
    bf16* chances = stages + STAGES * RUN * tiles.stride;
    float* scores = (float*)(chances + 2 * (RUN / 16) * TILE);  // [PARTS][HEADS][SCORE_STRIDE]
    float* keep = scores + PARTS * HEADS * SCORE_STRIDE;         // [HEADS]

    Fetch<Latent> fetch{a, tiles, (const Latent*)p.latents, p.batch + segment_word(p.batch, segment, BLOCKS), end, 0};
    u32 own_row = thread / 8;
    fetch.look(begin + own_row);
    auto fetch_run = [&](u32 run) {
        u32 position = begin + run * RUN + own_row;
        if (run < runs) fetch.row(stages + (run % STAGES * RUN + own_row) * tiles.stride, position);
        copy_async_commit();
        fetch.look(position + RUN);
    };
    for (u32 n = 0; n + 2 < STAGES; n++) fetch_run(n);

    // A warp computes the scores of sixteen heads over a part of the columns, whose queries it keeps. A thread has four
    // positions of a head's softmax; a warp has every eighth tile of the weighted latents' columns.
    u32 score_rows = warp / PARTS, score_part = warp % PARTS;
    u32 part_tiles = (tiles.all + PARTS - 1) / PARTS, first_tile = score_part * part_tiles;
    u32 part[PART_TILES][4], rest[PART_TILES][4];
    #pragma unroll
    for (u32 n = 0; n < PART_TILES; n++) {
        #pragma unroll
        for (u32 i = 0; i < 4; i++) {
            u32 head = score_rows * 16 + g + i % 2 * 8, c = (first_tile + n) * 16 + i / 2 * 8 + 2 * t;
            float pair[2] = {0.0f, 0.0f};
            #pragma unroll
            for (u32 j = 0; j < 2; j++) {
                u32 shared = c + j - tiles.latent * 16;
                if (head >= own_heads || n >= part_tiles) continue;
                if (c + j < latent) pair[j] = p.absorbed[((u64)number * heads + first_head + head) * latent + c + j];
                if (c + j >= tiles.latent * 16 && shared < rope) {
                    pair[j] = widen(p.query[((u64)row * heads + first_head + head) * (nope + rope) + nope + shared]);
                }
            }
            split_pair(pair[0], pair[1], part[n][i], rest[n][i]);
        }
    }
    u32 down = (lane % 8 + lane / 16 * 8) * tiles.stride + lane / 8 % 2 * 8;
    u32 over = lane % 16 * tiles.stride + lane / 16 * 8, across = lane_across(lane);
    u32 soft_head = thread / 8, soft_first = thread % 8 * 4;
    float scale = score_scale(a), greatest = LOWEST, total = 0.0f;
    float sum[2][WARP_TILES][2][4];
    #pragma unroll
    for (u32 m = 0; m < 2; m++) {
        #pragma unroll
        for (u32 n = 0; n < WARP_TILES; n++) {
            #pragma unroll
            for (u32 i = 0; i < 8; i++) sum[m][n][i / 4][i % 4] = 0.0f;
        }
    }
    for (u32 turn = 0; turn <= runs; turn++) {
        copy_async_wait<STAGES - 3>();
        // Before this barrier the scores and the stage that is filled next were read, and the weights written.
        __syncthreads();
        fetch_run(turn + STAGES - 2);
        if (turn < runs && score_rows * 16 < own_heads) {
            const bf16* stage = stages + turn % STAGES * RUN * tiles.stride + first_tile * 16 + down;
            float score[RUN / 16][2][4] = {};
            #pragma unroll
            for (u32 n = 0; n < PART_TILES; n++) {
                if (n >= part_tiles || first_tile + n >= tiles.all) continue;
                u32 b[RUN / 16][4];
                #pragma unroll
                for (u32 j = 0; j < RUN / 16; j++) ldmatrix(b[j], stage + j * 16 * tiles.stride + n * 16);
                #pragma unroll
                for (u32 j = 0; j < RUN / 16; j++) multiply_halves(score[j], rest[n], b[j]);
                #pragma unroll
                for (u32 j = 0; j < RUN / 16; j++) multiply_halves(score[j], part[n], b[j]);
            }
            float* to = scores + (score_part * HEADS + score_rows * 16 + g) * SCORE_STRIDE + 2 * t;
            #pragma unroll
            for (u32 j = 0; j < RUN / 16; j++) {
                #pragma unroll
                for (u32 i = 0; i < 4; i++) {
                    float* at = to + i % 2 * 8 * SCORE_STRIDE + j * 16 + i / 2 * 8;
                    *(float2*)at = make_float2(score[j][i / 2][i % 2 * 2], score[j][i / 2][i % 2 * 2 + 1]);
                }
            }
        }
        if (turn > 0) {
            const bf16* stage = stages + (turn - 1) % STAGES * RUN * tiles.stride + over;
            #pragma unroll
            for (u32 m = 0; m < 2; m++) {
                if (m * 16 >= own_heads) continue;
                float low_keep = keep[m * 16 + g], high_keep = keep[m * 16 + g + 8];
                // A product with one changes nothing.
                if (!__any_sync(EVERY_LANE, low_keep != 1.0f || high_keep != 1.0f)) continue;
                #pragma unroll
                for (u32 n = 0; n < WARP_TILES; n++) {
                    #pragma unroll
                    for (u32 i = 0; i < 8; i++) sum[m][n][i / 4][i % 4] *= i % 4 < 2 ? low_keep : high_keep;
                }
            }
            #pragma unroll
            for (u32 j = 0; j < RUN / 16; j++) {
                u32 left[2][4];
                ldmatrix(left[0], chances + j * TILE + across);
                ldmatrix(left[1], chances + (RUN / 16 + j) * TILE + across);
                #pragma unroll
                for (u32 n = 0; n < WARP_TILES; n++) {
                    u32 column = n * WARPS + warp;
                    if (column >= tiles.latent) continue;
                    u32 b[4];
                    ldmatrix_transposed(b, stage + j * 16 * tiles.stride + column * 16);
                    multiply_halves(sum[0][n], left[0], b);
                    if (own_heads > 16) multiply_halves(sum[1][n], left[1], b);
                }
            }
        }
        __syncthreads();
        if (turn < runs) {
            u32 count = min((u32)RUN, end - begin - turn * RUN);
            float x[4] = {0.0f, 0.0f, 0.0f, 0.0f};
            if (soft_head < own_heads) {
                const float* from = scores + soft_head * SCORE_STRIDE + soft_first;
                #pragma unroll
                for (u32 n = 0; n < PARTS; n++) {
                    float4 y = *(const float4*)(from + n * HEADS * SCORE_STRIDE);
                    x[0] += y.x;
                    x[1] += y.y;
                    x[2] += y.z;
                    x[3] += y.w;
                }
            }
            float best = greatest;
            #pragma unroll
            for (u32 i = 0; i < 4; i++) {
                x[i] = soft_head < own_heads && soft_first + i < count ? x[i] * scale : LOWEST;
                best = fmaxf(best, x[i]);
            }
            #pragma unroll
            for (int step = 1; step < 8; step *= 2) best = fmaxf(best, __shfl_xor_sync(EVERY_LANE, best, step));
            float kept = expf(greatest - best);
            greatest = best;
            total *= kept;
            #pragma unroll
            for (u32 i = 0; i < 4; i++) {
                x[i] = x[i] > LOWEST ? expf(x[i] - best) : 0.0f;
                total += x[i];
            }
            bf16* to = chances + soft_head / 16 * (RUN / 16) * TILE + element_at(soft_head % 16, soft_first);
            *(uint2*)to = make_uint2(narrow_pair(x[0], x[1]), narrow_pair(x[2], x[3]));
            if (soft_first == 0) keep[soft_head] = kept;
        }
    }
    u64 stride = part_stride(latent);
    float* parts = p.parts + ((u64)blockIdx.x * heads + first_head) * stride;
    #pragma unroll
    for (u32 m = 0; m < 2; m++) {
        #pragma unroll
        for (u32 n = 0; n < WARP_TILES; n++) {
            #pragma unroll
            for (u32 i = 0; i < 8; i++) {
                u32 head = m * 16 + g + i % 4 / 2 * 8, l = (n * WARPS + warp) * 16 + i / 4 * 8 + 2 * t + i % 2;
                // `mla_merge` reads the parts in groups of four.
                if (head < own_heads && l < mark_at(latent)) parts[head * stride + l] = l < latent ? sum[m][n][i / 4][i % 4] : 0.0f;
            }
        }
    }
    #pragma unroll
    for (int step = 1; step < 8; step *= 2) total += __shfl_xor_sync(EVERY_LANE, total, step);
    if (soft_first == 0 && soft_head < own_heads) {
        *(float2*)(parts + soft_head * stride + mark_at(latent)) = make_float2(greatest, total);
    }
}

// Grid (spans, ceil(heads / 32)), block 256; dynamic shared memory 25216 + 5120 (ceil(latent / 16) + ceil(rope / 16)). The
// latent has at most 512 columns, the shared key 64; `mla_attend_512` requires exactly these widths. If `single`, spans are
// the batch's; otherwise each row has one.
#define MLA_ATTEND(name, published, Latent)                                                                           \
    extern "C" __global__ void __launch_bounds__(WARPS * 32, 1) name(const MlaDecodeParams p) {                       \
        grid_dependency_synchronize();                                                                                \
        attend<published, Latent>(p);                                                                                 \
    }

MLA_ATTEND(mla_attend, false, bf16)
MLA_ATTEND(mla_attend_f16, false, f16)
MLA_ATTEND(mla_attend_f32, false, float)
MLA_ATTEND(mla_attend_512, true, bf16)
MLA_ATTEND(mla_attend_512_f16, true, f16)
MLA_ATTEND(mla_attend_512_f32, true, float)
ENTRY(mla_attend)
ENTRY(mla_attend_f16)
ENTRY(mla_attend_f32)
ENTRY(mla_attend_512)
ENTRY(mla_attend_512_f16)
ENTRY(mla_attend_512_f32)

// Warps per block of `mla_merge`, groups of spans that are added separately, and spans of a group in flight.
#define MERGE_WARPS 16
#define MERGE_GROUPS 4
#define MERGE_AHEAD 8
// The most that a warp reads of a latent in one access of eight columns per lane.
#define LATENT_HALVES (MOST_LATENT / 256)
// Maximum number of spans of a row per lane.
#define LANE_SPANS ((MOST_SPANS + 31) / 32)

// Spans of one row, for one head.
struct Spans {
    const float* parts;
    u32 count;
};

// A warp computes a row's factors, by which the sums of spans are multiplied.
static __device__ __forceinline__ void weigh_spans(float* factors, const Spans& spans, u64 stride, u32 latent) {
    u32 lane = threadIdx.x % 32;
    float greatest[LANE_SPANS], sum[LANE_SPANS], most = LOWEST, total = 0.0f;
    #pragma unroll
    for (u32 i = 0; i < LANE_SPANS; i++) {
        const float* mark = spans.parts + min(lane + i * 32, spans.count - 1) * stride + mark_at(latent);
        greatest[i] = mark[0];
        sum[i] = mark[1];
    }
    #pragma unroll
    for (u32 i = 0; i < LANE_SPANS; i++) most = fmaxf(most, greatest[i]);
    most = warp_max(most);
    #pragma unroll
    for (u32 i = 0; i < LANE_SPANS; i++) {
        greatest[i] = lane + i * 32 < spans.count ? expf(greatest[i] - most) : 0.0f;
        total = fmaf(sum[i], greatest[i], total);
    }
    total = warp_sum(total);
    #pragma unroll
    for (u32 i = 0; i < LANE_SPANS; i++) {
        if (lane + i * 32 < spans.count) factors[lane + i * 32] = greatest[i] / total;
    }
}

// Four columns of every fourth span from `group` on, `MERGE_AHEAD` of them in flight: spans past the last one are the last.
struct Parts {
    float4 at[MERGE_AHEAD];
    __device__ __forceinline__ void load(const Spans& spans, u64 stride, u32 l, u32 first) {
        #pragma unroll
        for (u32 i = 0; i < MERGE_AHEAD; i++) {
            at[i] = *(const float4*)(spans.parts + min(first + i * MERGE_GROUPS, spans.count - 1) * stride + l);
        }
    }
};

// Rows `first` to `first + count` of the processed rows, for one head, as `mla_merge` writes them.
struct Merged {
    const u32* batch;
    u32 single, first, count, heads, head, value;
    bf16* output;
};

// Outputs of a warp from `e` on, every `MERGE_WARPS`th, of `COUNT` rows' weighted latents [COUNT][MOST_LATENT].
template <u32 COUNT, bool BF16, u32 OUTPUTS>
static __device__ __forceinline__ void expand(
    const Merged& to, const Eight<BF16> (&weights)[OUTPUTS][LATENT_HALVES], const float* context, u32 e) {
    u32 lane = threadIdx.x % 32;
    float sum[OUTPUTS][COUNT] = {};
    #pragma unroll
    for (u32 n = 0; n < 2 * LATENT_HALVES; n++) {
        // Columns past the latent are zero.
        float x[COUNT][4];
        #pragma unroll
        for (u32 r = 0; r < COUNT; r++) {
            u32 own = min(r, to.count - 1), column = n / 2 * 256 + lane * 8 + n % 2 * 4;
            float4 four = *(const float4*)(context + own * MOST_LATENT + column);
            x[r][0] = four.x, x[r][1] = four.y, x[r][2] = four.z, x[r][3] = four.w;
        }
        #pragma unroll
        for (u32 i = 0; i < OUTPUTS; i++) {
            #pragma unroll
            for (u32 c = 0; c < 4; c++) {
                float weight = weights[i][n / 2][n % 2 * 4 + c];
                #pragma unroll
                for (u32 r = 0; r < COUNT; r++) sum[i][r] = fmaf(weight, x[r][c], sum[i][r]);
            }
        }
    }
    #pragma unroll
    for (u32 r = 0; r < COUNT; r++) {
        if (r >= to.count) continue;
        bf16* row = to.output + ((u64)row_of(to.batch, to.single, to.first + r) * to.heads + to.head) * to.value;
        #pragma unroll
        for (u32 i = 0; i < OUTPUTS; i++) {
            float whole = warp_sum(sum[i][r]);
            u32 own = e + i * MERGE_WARPS;
            if (lane == 0 && own < to.value) row[own] = narrow(whole);
        }
    }
}

template <bool BF16>
static __device__ __forceinline__ void merge(const MlaDecodeParams& p, float* factors, float* sums, float* context) {
    const u32 heads = p.heads, latent = p.latent, nope = p.nope, value = p.value;
    // Outputs of a warp whose rows of the expansion are loaded at the same time, in sets.
    constexpr u32 AHEAD = BF16 ? 4 : 1, SETS = BF16 ? 2 : 1;
    u32 head = blockIdx.x, first = blockIdx.y * ROWS, count = min((u32)ROWS, p.rows - first);
    u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    u64 stride = (u64)heads * part_stride(latent);
    Eight<BF16> weights[SETS][AHEAD][LATENT_HALVES];
    auto load = [&](u32 set, u32 e) {
        #pragma unroll
        for (u32 i = 0; i < AHEAD; i++) {
            u32 row = head * (nope + value) + nope + min(e + (set * AHEAD + i) * MERGE_WARPS, value - 1);
            #pragma unroll
            for (u32 n = 0; n < LATENT_HALVES; n++) {
                u32 c = min(n * 256 + lane * 8, (latent - 1) / 8 * 8);
                weights[set][i][n].load(p.kv_b, p.format, (u64)row * latent + c, latent, c);
            }
        }
    };
    // These loads depend on no result: the first set is loaded from here on, the last one after the parts.
    load(0, warp);
    auto spans_of = [&](u32 r) {
        u32 span = first + r, spans = 1;
        if (p.single) {
            const u32* words = p.batch + p.batch[AT_SPANNED] + SPANNED_WORDS * (first + r);
            span = words[SPANNED_FIRST];
            spans = words[SPANNED_COUNT];
        }
        return Spans{p.parts + ((u64)span * heads + head) * part_stride(latent), spans};
    };
    // A warp has a quarter of the columns, four per lane, and every fourth span.
    u32 group = warp / (MERGE_WARPS / MERGE_GROUPS), l = (warp % (MERGE_WARPS / MERGE_GROUPS) * 32 + lane) * 4;
    u32 near = min(l, mark_at(latent) - 4);
    Parts ahead;
    Spans spans = spans_of(0);
    ahead.load(spans, stride, near, group);
    if (warp < count) weigh_spans(factors + warp * MOST_SPANS, spans_of(warp), stride, latent);
    __syncthreads();
    for (u32 r = 0; r < count; r++) {
        float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        if (r > 0) {
            spans = spans_of(r);
            ahead.load(spans, stride, near, group);
        }
        #pragma unroll 1
        for (u32 n = group; n < spans.count; n += MERGE_AHEAD * MERGE_GROUPS) {
            if (n != group) ahead.load(spans, stride, near, n);
            #pragma unroll
            for (u32 i = 0; i < MERGE_AHEAD; i++) {
                u32 span = n + i * MERGE_GROUPS;
                float factor = span < spans.count ? factors[r * MOST_SPANS + min(span, spans.count - 1)] : 0.0f;
                sum.x = fmaf(ahead.at[i].x, factor, sum.x);
                sum.y = fmaf(ahead.at[i].y, factor, sum.y);
                sum.z = fmaf(ahead.at[i].z, factor, sum.z);
                sum.w = fmaf(ahead.at[i].w, factor, sum.w);
            }
        }
        *(float4*)(sums + (r * MERGE_GROUPS + group) * MOST_LATENT + l) = sum;
    }
    if (SETS > 1) load(SETS - 1, warp);
    __syncthreads();
    for (u32 i = threadIdx.x; i < count * MOST_LATENT; i += MERGE_WARPS * 32) {
        const float* from = sums + i / MOST_LATENT * MERGE_GROUPS * MOST_LATENT + i % MOST_LATENT;
        float whole = from[0] + from[MOST_LATENT] + (from[2 * MOST_LATENT] + from[3 * MOST_LATENT]);
        // Past the latent a part is undefined.
        context[i] = i % MOST_LATENT < latent ? whole : 0.0f;
    }
    __syncthreads();
    Merged to{p.batch, p.single, first, count, heads, head, value, p.output};
    #pragma unroll 1
    for (u32 e = warp; e < value; e += SETS * AHEAD * MERGE_WARPS) {
        #pragma unroll
        for (u32 set = 0; set < SETS; set++) {
            if (e != warp) load(set, e);
            if (count == 1) {
                expand<1>(to, weights[set], context, e + set * AHEAD * MERGE_WARPS);
            } else {
                expand<ROWS>(to, weights[set], context, e + set * AHEAD * MERGE_WARPS);
            }
        }
    }
}

// Merges the spans of each row, then W_UV times the weighted latent. Grid (heads, ceil(rows / 4)), block 512; the latent has
// at most 512 columns, a row has at most MOST_SPANS spans.
extern "C" __global__ void __launch_bounds__(MERGE_WARPS * 32) mla_merge(const __grid_constant__ MlaDecodeParams p) {
    grid_dependency_synchronize();
    SHARED(float, factors, ROWS * MOST_SPANS);
    SHARED(float, sums, ROWS * MERGE_GROUPS * MOST_LATENT);
    SHARED(float, context, ROWS * MOST_LATENT);
    if (p.format == FORMAT_BF16 && p.latent % 8 == 0) {
        merge<true>(p, factors, sums, context);
    } else {
        merge<false>(p, factors, sums, context);
    }
}
ENTRY(mla_merge)
