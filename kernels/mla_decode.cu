// Latent attention for few queries, on tensor cores: the expansion is absorbed into query and output (DeepSeek-V2, arXiv
// 2405.04434, section 2.1.2), so that each cached row is read once, for all heads, and never expanded. Twin of
// src/backend/cpu/mla_decode.rs.
//
// Three kernels: `mla_absorb` makes the query of the latents, `mla_attend` runs a softmax over a span of them for 32 heads
// at once, `mla_merge` puts the spans of a row together and turns the weighted latent into a value. Spans are counted
// from the sequence's start, so a row's arithmetic depends on its position alone.
#include "shared/kernel.h"
#include "shared/fragment.h"
#include "shared/mla.h"
#include "shared/weight.h"

// Positions whose scores are taken together.
#define RUN 32
// Runs under way.
#define STAGES 3
// Heads of a block of `mla_attend`: two tiles' rows.
#define HEADS 32
#define WARPS 8
// Columns of latents that a block has at most, and what a warp has of them, in tiles.
#define MOST_LATENT 512
#define MOST_ROPE 64
#define WARP_TILES (MOST_LATENT / 16 / WARPS)
// Rows of the batch that share one reading of the weight.
#define ROWS 4

// The row of the batch that is number `n` of those worked on: all, or those of single tokens (`single`).
static __device__ __forceinline__ u32 row_of(const u32* batch, u32 single, u32 n) {
    return batch[batch[AT_ROWS] + (single ? batch[SEVERAL_ROWS] : 0) + n];
}

// q_lat = W_UK^T q_nope. Grid (ceil(latent / 128), heads, ceil(rows / 4)), block 128.
//   batch     the batch; `rows` says on how many of its rows to work
//   query     [T, heads (nope + rope)] bf16; nope is at most 256
//   kv_b      [heads (nope + value), latent] of the format
//   absorbed  [rows, heads, latent] f32
extern "C" __global__ void __launch_bounds__(128) mla_absorb(
    const u32* batch, u32 single, u32 rows, const bf16* query, const void* kv_b, u32 format, float* absorbed,
    u32 heads, u32 latent, u32 nope, u32 rope, u32 value) {
    SHARED(float, q, ROWS * 256);
    u32 head = blockIdx.y, first = blockIdx.z * ROWS, count = min((u32)ROWS, rows - first);
    for (u32 i = threadIdx.x; i < ROWS * nope; i += 128) {
        u32 r = i / nope, n = i % nope;
        float x = 0.0f;
        if (r < count) x = widen(query[((u64)row_of(batch, single, first + r) * heads + head) * (nope + rope) + n]);
        q[r * 256 + n] = x;
    }
    __syncthreads();
    u32 l = blockIdx.x * 128 + threadIdx.x;
    if (l >= latent) return;
    u64 column = (u64)head * (nope + value) * latent + l;
    float sum[ROWS] = {};
    for (u32 n = 0; n < nope; n++) {
        float x = weight_at(kv_b, format, column + (u64)n * latent);
        #pragma unroll
        for (u32 r = 0; r < ROWS; r++) sum[r] = fmaf(q[r * 256 + n], x, sum[r]);
    }
    #pragma unroll
    for (u32 r = 0; r < ROWS; r++) {
        if (r < count) absorbed[((u64)(first + r) * heads + head) * latent + l] = sum[r];
    }
}
ENTRY(mla_absorb)

// Where a row of latents lies in tiles: the latent padded to tiles, then the shared key padded to tiles.
struct Tiles {
    u32 latent, all;
};

// Rows of `count` positions from `begin` on into tiles [RUN / 16][tiles.all]; zeros elsewhere.
static __device__ __forceinline__ void fetch(
    bf16* stage, const Attention& a, const Tiles& tiles, const bf16* latents, const u32* table, u32 begin, u32 count) {
    bool whole = (a.latent | a.rope) % 8 == 0;
    u32 eights = tiles.all * 2;
    for (u32 i = threadIdx.x; i < RUN * eights; i += WARPS * 32) {
        u32 n = i / eights, c = i % eights * 8;
        bf16* to = stage + n / 16 * tiles.all * TILE + element_at(n % 16, c);
        const bf16* row = n < count ? latent_row(a, latents, table, begin + n) : nullptr;
        bool shared = c >= tiles.latent * 16;
        u32 at = shared ? c - tiles.latent * 16 : c, end = shared ? a.rope : a.latent;
        if (shared && row != nullptr) row += a.latent;
        if (whole) {
            bool there = row != nullptr && at < end;
            copy_async(to, there ? row + at : latents, there);
        } else {
            for (u32 j = 0; j < 8; j++) to[j] = row != nullptr && at + j < end ? row[at + j] : bf16{0};
        }
    }
}

// Softmax over a span of positions for 32 heads. Grid (spans, ceil(heads / 32)), block 256; dynamic shared memory
// 10624 + 5120 (ceil(latent / 16) + ceil(rope / 16)). The latent is at most 512 wide, the shared key 64. Where `single`,
// spans are the batch's, of `span` positions each; else each row has one.
//   batch     the batch
//   query     [T, heads (nope + rope)] bf16
//   absorbed  [rows, heads, latent] f32
//   latents   [blocks, block_tokens, latent + rope] bf16, aligned to 16 bytes
//   parts     [spans, heads, latent + 2] f32: weighted latent, greatest score, sum of weights
extern "C" __global__ void __launch_bounds__(WARPS * 32, 1) mla_attend(
    const u32* batch, u32 single, u32 span, const bf16* query, const float* absorbed, const bf16* latents, float* parts,
    u32 heads, u32 latent, u32 nope, u32 rope, u32 value, u32 block_tokens) {
    Attention a{heads, latent, nope, rope, value, block_tokens};
    Tiles tiles;
    tiles.latent = (latent + 15) / 16;
    tiles.all = tiles.latent + (rope + 15) / 16;
    u32 thread = threadIdx.x, warp = thread / 32, lane = thread % 32, g = lane / 4, t = lane % 4;
    u32 number = blockIdx.x, begin = 0;
    if (single) {
        if (blockIdx.x >= batch[SPAN_TOTAL]) return;
        const u32* words = batch + batch[AT_SPANS] + 2 * blockIdx.x;
        number = words[0];
        begin = words[1];
    }
    u32 row = row_of(batch, single, number), piece = owner(batch, row);
    u32 end = piece_word(batch, piece, POSITION) + row - piece_word(batch, piece, START) + 1;
    if (single) end = min(end, begin + span);
    const u32* table = batch + piece_word(batch, piece, BLOCKS);
    u32 first_head = blockIdx.y * HEADS, own_heads = min((u32)HEADS, heads - first_head);

    // Latents [STAGES][RUN / 16][tiles], queries [2][tiles] and their rests, weights [2][RUN / 16], scores, what is kept.
    bf16* stages = (bf16*)dynamic_shared();
    u32 stage_elements = RUN / 16 * tiles.all * TILE;
    bf16* queries = stages + STAGES * stage_elements;
    bf16* chances = queries + 4 * tiles.all * TILE;
    float* scores = (float*)(chances + 2 * (RUN / 16) * TILE);  // [2][HEADS][RUN + 1]
    float* keep = scores + 2 * HEADS * (RUN + 1);               // [HEADS]

    auto fetch_run = [&](u32 run, u32 from) {
        bf16* stage = stages + run % STAGES * stage_elements;
        if (from < end) fetch(stage, a, tiles, latents, table, from, min((u32)RUN, end - from));
        copy_async_commit();
    };
    for (u32 n = 0; n + 1 < STAGES; n++) fetch_run(n, begin + n * RUN);
    for (u32 i = thread; i < HEADS * tiles.all * 16; i += WARPS * 32) {
        u32 head = i / (tiles.all * 16), c = i % (tiles.all * 16);
        float x = 0.0f;
        if (head < own_heads) {
            u32 shared = c - tiles.latent * 16;
            if (c < latent) x = absorbed[((u64)number * heads + first_head + head) * latent + c];
            if (c >= tiles.latent * 16 && shared < rope) {
                x = widen(query[((u64)row * heads + first_head + head) * (nope + rope) + nope + shared]);
            }
        }
        bf16* to = queries + head / 16 * tiles.all * TILE + element_at(head % 16, c);
        split(x, to[0], to[2 * tiles.all * TILE]);
    }

    // A warp scores sixteen heads by sixteen positions over half of the columns. It runs the softmax of four heads, and has
    // every eighth tile of the weighted latents' columns.
    u32 down = lane_down(lane), across = lane_across(lane);
    u32 score_rows = warp / 4, score_columns = warp / 2 % 2, score_half = warp % 2, half = (tiles.all + 1) / 2;
    float scale = score_scale(a);
    float greatest[HEADS / WARPS], total[HEADS / WARPS];
    #pragma unroll
    for (u32 n = 0; n < HEADS / WARPS; n++) {
        greatest[n] = LOWEST;
        total[n] = 0.0f;
    }
    float sum[2][WARP_TILES][2][4];
    #pragma unroll
    for (u32 m = 0; m < 2; m++) {
        #pragma unroll
        for (u32 n = 0; n < WARP_TILES; n++) {
            #pragma unroll
            for (u32 i = 0; i < 8; i++) sum[m][n][i / 4][i % 4] = 0.0f;
        }
    }
    for (u32 turn = 0; begin < end; begin += RUN, turn++) {
        copy_async_wait<STAGES - 2>();
        // The stage that is filled next and the weights were read before this barrier, the queries written.
        __syncthreads();
        u32 count = min((u32)RUN, end - begin);
        fetch_run(turn + STAGES - 1, begin + (STAGES - 1) * RUN);
        const bf16* stage = stages + turn % STAGES * stage_elements;
        if (score_rows * 16 < own_heads) {
            float score[2][4] = {};
            const bf16* left = queries + score_rows * tiles.all * TILE + across;
            const bf16* right = stage + score_columns * tiles.all * TILE + down;
            for (u32 n = score_half * half; n < min(tiles.all, (score_half + 1) * half); n++) {
                u32 part[4], rest[4], b[4];
                ldmatrix(part, left + n * TILE);
                ldmatrix(rest, left + (2 * tiles.all + n) * TILE);
                ldmatrix(b, right + n * TILE);
                multiply_halves(score, rest, b);
                multiply_halves(score, part, b);
            }
            #pragma unroll
            for (u32 i = 0; i < 8; i++) {
                u32 head = score_half * HEADS + score_rows * 16 + g + i % 4 / 2 * 8;
                scores[head * (RUN + 1) + score_columns * 16 + i / 4 * 8 + 2 * t + i % 2] = score[i / 4][i % 4];
            }
        }
        __syncthreads();
        #pragma unroll
        for (u32 n = 0; n < HEADS / WARPS; n++) {
            u32 head = warp * (HEADS / WARPS) + n;
            bf16* to = chances + head / 16 * (RUN / 16) * TILE;
            float x = LOWEST;
            if (head < own_heads && lane < count) {
                x = (scores[head * (RUN + 1) + lane] + scores[(HEADS + head) * (RUN + 1) + lane]) * scale;
            }
            float best = fmaxf(greatest[n], warp_max(x));
            x = x > LOWEST ? expf(x - best) : 0.0f;
            float kept = expf(greatest[n] - best);
            greatest[n] = best;
            total[n] = total[n] * kept + warp_sum(x);
            to[element_at(head % 16, lane)] = narrow(x);
            if (lane == 0) keep[head] = kept;
        }
        __syncthreads();
        #pragma unroll
        for (u32 m = 0; m < 2; m++) {
            if (m * 16 >= own_heads) continue;
            float low_keep = keep[m * 16 + g], high_keep = keep[m * 16 + g + 8];
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
                ldmatrix_transposed(b, stage + (j * tiles.all + column) * TILE + across);
                multiply_halves(sum[0][n], left[0], b);
                if (own_heads > 16) multiply_halves(sum[1][n], left[1], b);
            }
        }
    }
    u64 part = ((u64)blockIdx.x * heads + first_head) * (latent + 2);
    #pragma unroll
    for (u32 m = 0; m < 2; m++) {
        #pragma unroll
        for (u32 n = 0; n < WARP_TILES; n++) {
            #pragma unroll
            for (u32 i = 0; i < 8; i++) {
                u32 head = m * 16 + g + i % 4 / 2 * 8, l = (n * WARPS + warp) * 16 + i / 4 * 8 + 2 * t + i % 2;
                if (head < own_heads && l < latent) parts[part + (u64)head * (latent + 2) + l] = sum[m][n][i / 4][i % 4];
            }
        }
    }
    #pragma unroll
    for (u32 n = 0; n < HEADS / WARPS; n++) {
        u32 head = warp * (HEADS / WARPS) + n;
        if (lane == 0 && head < own_heads) {
            parts[part + (u64)head * (latent + 2) + latent] = greatest[n];
            parts[part + (u64)head * (latent + 2) + latent + 1] = total[n];
        }
    }
}
ENTRY(mla_attend)

// The spans of each row in their order, then W_UV times the weighted latent. Grid (heads, ceil(rows / 4)), block 128; the
// latent is at most 512 wide.
//   batch   the batch
//   parts   what `mla_attend` left
//   kv_b    [heads (nope + value), latent] of the format
//   output  [T, heads value] bf16
extern "C" __global__ void __launch_bounds__(128) mla_merge(
    const u32* batch, u32 single, u32 rows, const float* parts, const void* kv_b, u32 format, bf16* output,
    u32 heads, u32 latent, u32 nope, u32 value) {
    SHARED(float, context, ROWS * MOST_LATENT);
    u32 head = blockIdx.x, first = blockIdx.y * ROWS, count = min((u32)ROWS, rows - first);
    u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    for (u32 r = 0; r < count; r++) {
        u32 span = first + r, spans = 1;
        if (single) {
            const u32* words = batch + batch[AT_SPANNED] + 2 * (first + r);
            span = words[0];
            spans = words[1];
        }
        float greatest = LOWEST, total = 0.0f;
        const float* part = parts + ((u64)span * heads + head) * (latent + 2);
        u64 stride = (u64)heads * (latent + 2);
        for (u32 n = 0; n < spans; n++) greatest = fmaxf(greatest, part[n * stride + latent]);
        for (u32 n = 0; n < spans; n++) {
            total = fmaf(part[n * stride + latent + 1], expf(part[n * stride + latent] - greatest), total);
        }
        for (u32 l = threadIdx.x; l < latent; l += 128) {
            float sum = 0.0f;
            for (u32 n = 0; n < spans; n++) {
                sum = fmaf(part[n * stride + l], expf(part[n * stride + latent] - greatest), sum);
            }
            context[r * MOST_LATENT + l] = sum / total;
        }
    }
    __syncthreads();
    for (u32 e = warp; e < value; e += 4) {
        u64 weight = ((u64)head * (nope + value) + nope + e) * latent;
        float sum[ROWS] = {};
        for (u32 l = lane; l < latent; l += 32) {
            float x = weight_at(kv_b, format, weight + l);
            #pragma unroll
            for (u32 r = 0; r < ROWS; r++) {
                if (r < count) sum[r] = fmaf(x, context[r * MOST_LATENT + l], sum[r]);
            }
        }
        #pragma unroll
        for (u32 r = 0; r < ROWS; r++) {
            float whole = warp_sum(sum[r]);
            if (lane == 0 && r < count) {
                output[((u64)row_of(batch, single, first + r) * heads + head) * value + e] = narrow(whole);
            }
        }
    }
}
ENTRY(mla_merge)
