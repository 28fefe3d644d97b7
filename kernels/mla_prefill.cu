// Latent attention for many queries, on tensor cores: keys and values are expanded from the latents, a window of positions
// at a time, and softmax runs online over them (Milakov and Gimelshein, arXiv 1805.02867). Twin of
// src/backend/cpu/mla_prefill.rs.
//
// For each window of the batch `mla_gather` lays its latents end to end, one dense product with kv_b expands them, and
// `mla_prefill` attends to them. Runs of positions are counted from the sequence's start, so a row's arithmetic depends on
// its position alone. What a row has when its sequence goes on in another window waits in f32.
#include "shared/kernel.h"
#include "shared/fragment.h"
#include "shared/mla.h"

// Positions whose scores are taken together; windows are a multiple of it.
#define RUN 64
// Warps of a block, a tile of sixteen queries each.
#define WARPS 4
#define QUERIES 16

// Words of window `number`: piece, first position, positions, first tile.
static __device__ __forceinline__ const u32* window_words(const u32* batch, u32 number) {
    return batch + batch[AT_WINDOWS] + 4 * number;
}

// Grid (positions of the window), block 64.
//   batch     the batch
//   latents   [blocks, block_tokens, latent + rope] bf16
//   gathered  [positions, latent] bf16
extern "C" __global__ void __launch_bounds__(64) mla_gather(
    const u32* batch, u32 number, const bf16* latents, bf16* gathered, u32 latent, u32 rope, u32 block_tokens) {
    const u32* window = window_words(batch, number);
    if (blockIdx.x >= window[2]) return;
    Attention a{0, latent, 0, rope, 0, block_tokens};
    const bf16* from = latent_row(a, latents, batch + piece_word(batch, window[0], BLOCKS), window[1] + blockIdx.x);
    bf16* to = gathered + (u64)blockIdx.x * latent;
    if (latent % 8 == 0 && rope % 8 == 0) {
        for (u32 i = threadIdx.x; i < latent / 8; i += 64) ((uint4*)to)[i] = ((const uint4*)from)[i];
    } else {
        for (u32 i = threadIdx.x; i < latent; i += 64) to[i] = from[i];
    }
}
ENTRY(mla_gather)

// Where a run's keys and values come from.
struct Expanded {
    const bf16* rows;     // [positions of the window, heads (nope + value)]
    const bf16* latents;
    const u32* table;     // the piece's blocks
    u32 first;            // the window's first position
};

// Keys [RUN, KEY] and values [RUN, VALUE] of `count` positions from `begin` on into tiles; zeros elsewhere.
template <int KEY, int VALUE>
static __device__ __forceinline__ void fetch(
    bf16* keys, bf16* values, const Attention& a, const Expanded& from, u32 head, u32 begin, u32 count) {
    constexpr u32 EIGHTS = (KEY + VALUE) / 8;
    u32 width = a.nope + a.value;
    bool whole = (a.nope | a.rope | a.value | a.latent) % 8 == 0;
    for (u32 i = threadIdx.x; i < RUN * EIGHTS; i += WARPS * 32) {
        u32 n = i / EIGHTS, c = i % EIGHTS * 8;
        bool is_value = c >= KEY;
        if (is_value) c -= KEY;
        bf16* to = is_value ? values + n / 16 * (VALUE / 16) * TILE : keys + n / 16 * (KEY / 16) * TILE;
        to += element_at(n % 16, c);
        const bf16* row = from.rows + ((u64)(begin - from.first + n) * a.heads + head) * width;
        // Keys are the expanded part, then the part that all heads share.
        u32 end = is_value ? a.value : a.nope + a.rope;
        if (whole) {
            bool there = n < count && c < end;
            const bf16* at = row + (is_value ? a.nope + c : c);
            if (there && !is_value && c >= a.nope) {
                at = latent_row(a, from.latents, from.table, begin + n) + a.latent + c - a.nope;
            }
            copy_async(to, there ? at : from.rows, there);
        } else {
            const bf16* shared = n < count ? latent_row(a, from.latents, from.table, begin + n) + a.latent : nullptr;
            for (u32 j = 0; j < 8; j++, c++) {
                bf16 x = {0};
                if (n < count && c < end) {
                    x = is_value ? row[a.nope + c] : c < a.nope ? row[c] : shared[c - a.nope];
                }
                to[j] = x;
            }
        }
    }
    copy_async_commit();
}

// One window for some tiles of queries of one head. Keys are at most KEY wide, values VALUE.
template <int KEY, int VALUE>
static __device__ __forceinline__ void attend(
    const u32* batch, u32 number, const bf16* query, const bf16* rows, const bf16* latents, bf16* output, float* marks,
    float* partial, const Attention& a) {
    constexpr u32 STAGE = RUN * (KEY + VALUE);
    bf16* stages = (bf16*)dynamic_shared();
    u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, head = blockIdx.y;
    const u32* window = window_words(batch, number);
    u32 piece = window[0], first = window[1], window_end = first + window[2];
    u32 position = piece_word(batch, piece, POSITION), length = piece_word(batch, piece, LENGTH);
    u32 start = piece_word(batch, piece, START);
    Expanded from = {rows, latents, batch + piece_word(batch, piece, BLOCKS), first};
    // This block's tokens of the piece, and this warp's.
    u32 block_token = blockIdx.x * WARPS * QUERIES;
    if (block_token >= length) return;
    u32 end = min(window_end, position + min(block_token + WARPS * QUERIES, length));
    if (first >= end) return;
    u32 token = block_token + warp * QUERIES;
    u32 warp_end = min(window_end, position + min(token + QUERIES, length));
    u32 key = a.nope + a.rope;

    // A lane has the rows g and g + 8 of its warp's sixteen.
    u32 own[2];
    bool mine[2];
    #pragma unroll
    for (u32 r = 0; r < 2; r++) {
        own[r] = position + token + g + 8 * r;
        // A row whose own position came before this window is done.
        mine[r] = token + g + 8 * r < length && own[r] >= first;
    }
    u32 q[KEY / 16][4];
    #pragma unroll
    for (u32 n = 0; n < KEY / 16; n++) {
        #pragma unroll
        for (u32 i = 0; i < 4; i++) {
            u32 c = n * 16 + i / 2 * 8 + 2 * t;
            const bf16* at = query + ((u64)(start + token + g + i % 2 * 8) * a.heads + head) * key + c;
            bf16 none = {0};
            bool there = token + g + i % 2 * 8 < length;
            q[n][i] = pair_of(there && c < key ? at[0] : none, there && c + 1 < key ? at[1] : none);
        }
    }
    float greatest[2] = {LOWEST, LOWEST}, total[2] = {0.0f, 0.0f};
    float sum[VALUE / 8][4];
    #pragma unroll
    for (u32 n = 0; n < VALUE / 8; n++) {
        #pragma unroll
        for (u32 i = 0; i < 4; i++) {
            u32 e = n * 8 + 2 * t + i % 2;
            bool there = first > 0 && mine[i / 2] && e < a.value;
            u64 row = (u64)(start + token + g + i / 2 * 8) * a.heads + head;
            sum[n][i] = there ? partial[row * a.value + e] : 0.0f;
        }
    }
    #pragma unroll
    for (u32 r = 0; r < 2; r++) {
        u64 row = (u64)(start + token + g + 8 * r) * a.heads + head;
        if (first == 0 || !mine[r]) continue;
        greatest[r] = marks[2 * row];
        // Lanes of a row share the total; only one brings what was there.
        if (t == 0) total[r] = marks[2 * row + 1];
    }

    float scale = score_scale(a);
    u32 down = lane_down(lane), across = lane_across(lane);
    fetch<KEY, VALUE>(stages, stages + RUN * KEY, a, from, head, first, min((u32)RUN, window_end - first));
    u32 turn = 0;
    for (u32 begin = first; begin < end; begin += RUN, turn ^= 1) {
        copy_async_wait<0>();
        // The other stage was read before this barrier.
        __syncthreads();
        if (begin + RUN < end) {
            bf16* next = stages + (turn ^ 1) * STAGE;
            fetch<KEY, VALUE>(next, next + RUN * KEY, a, from, head, begin + RUN, min((u32)RUN, window_end - begin - RUN));
        }
        if (begin >= warp_end) continue;
        const bf16* keys = stages + turn * STAGE;
        const bf16* values = keys + RUN * KEY;
        float scores[RUN / 16][2][4];
        #pragma unroll
        for (u32 j = 0; j < RUN / 16; j++) {
            #pragma unroll
            for (u32 i = 0; i < 8; i++) scores[j][i / 4][i % 4] = 0.0f;
            #pragma unroll
            for (u32 n = 0; n < KEY / 16; n++) {
                u32 b[4];
                ldmatrix(b, keys + (j * (KEY / 16) + n) * TILE + down);
                multiply_halves(scores[j], q[n], b);
            }
        }
        float best[2] = {greatest[0], greatest[1]};
        #pragma unroll
        for (u32 j = 0; j < RUN / 16; j++) {
            #pragma unroll
            for (u32 i = 0; i < 8; i++) {
                float& score = scores[j][i / 4][i % 4];
                u32 r = i % 4 / 2, at = begin + j * 16 + i / 4 * 8 + 2 * t + i % 2;
                // Causal; what lies past the window's end is past every row that sees it.
                score = at <= own[r] && at < window_end ? score * scale : LOWEST;
                best[r] = fmaxf(best[r], score);
            }
        }
        #pragma unroll
        for (u32 r = 0; r < 2; r++) {
            best[r] = fmaxf(best[r], __shfl_xor_sync(EVERY_LANE, best[r], 1));
            best[r] = fmaxf(best[r], __shfl_xor_sync(EVERY_LANE, best[r], 2));
            float keep = expf(greatest[r] - best[r]);
            greatest[r] = best[r];
            total[r] *= keep;
            #pragma unroll
            for (u32 n = 0; n < VALUE / 8; n++) {
                sum[n][2 * r] *= keep;
                sum[n][2 * r + 1] *= keep;
            }
        }
        #pragma unroll
        for (u32 j = 0; j < RUN / 16; j++) {
            #pragma unroll
            for (u32 i = 0; i < 8; i++) {
                float& score = scores[j][i / 4][i % 4];
                u32 r = i % 4 / 2;
                score = score > LOWEST ? expf(score - greatest[r]) : 0.0f;
                total[r] += score;
            }
            u32 chances[4];
            #pragma unroll
            for (u32 i = 0; i < 4; i++) {
                const float (&half)[4] = scores[j][i / 2];
                chances[i] = narrow_pair(half[i % 2 * 2], half[i % 2 * 2 + 1]);
            }
            #pragma unroll
            for (u32 n = 0; n < VALUE / 16; n++) {
                u32 b[4];
                ldmatrix_transposed(b, values + (j * (VALUE / 16) + n) * TILE + across);
                u32 left[2] = {b[0], b[1]}, right[2] = {b[2], b[3]};
                mma_bf16(sum[2 * n], chances, left);
                mma_bf16(sum[2 * n + 1], chances, right);
            }
        }
    }

    #pragma unroll
    for (u32 r = 0; r < 2; r++) {
        total[r] += __shfl_xor_sync(EVERY_LANE, total[r], 1);
        total[r] += __shfl_xor_sync(EVERY_LANE, total[r], 2);
        if (!mine[r]) continue;
        u64 row = (u64)(start + token + g + 8 * r) * a.heads + head;
        bool done = own[r] < window_end;
        #pragma unroll
        for (u32 n = 0; n < VALUE / 8; n++) {
            u32 e = n * 8 + 2 * t;
            float x = sum[n][2 * r], y = sum[n][2 * r + 1];
            if (!done) {
                if (e < a.value) partial[row * a.value + e] = x;
                if (e + 1 < a.value) partial[row * a.value + e + 1] = y;
            } else if (a.value % 2 == 0) {
                if (e < a.value) *(u32*)(output + row * a.value + e) = narrow_pair(x / total[r], y / total[r]);
            } else {
                if (e < a.value) output[row * a.value + e] = narrow(x / total[r]);
                if (e + 1 < a.value) output[row * a.value + e + 1] = narrow(y / total[r]);
            }
        }
        if (!done && t == 0) {
            marks[2 * row] = greatest[r];
            marks[2 * row + 1] = total[r];
        }
    }
}

// Grid (ceil(tokens of the window's piece / 64), heads), block 128; dynamic shared memory 256 (P + Q) bytes, with P and Q
// the widths of key and value that the entry takes at most.
//   batch     the batch; `number` is the window's
//   query     [T, heads (nope + rope)] bf16
//   rows      [positions, heads (nope + value)] bf16: the window's latents times kv_b, aligned to 16 bytes
//   latents   [blocks, block_tokens, latent + rope] bf16, aligned to 16 bytes
//   output    [T, heads value] bf16
//   marks     [T, heads, 2] f32 and
//   partial   [T, heads, value] f32: what waits for the next window; null where no sequence has more than one
#define MLA_PREFILL(name, key, value_width)                                                                           \
    extern "C" __global__ void __launch_bounds__(WARPS * 32, 1) name(                                                 \
        const u32* batch, u32 number, const bf16* query, const bf16* rows, const bf16* latents, bf16* output,         \
        float* marks, float* partial, u32 heads, u32 latent, u32 nope, u32 rope, u32 value, u32 block_tokens) {       \
        Attention a{heads, latent, nope, rope, value, block_tokens};                                                  \
        attend<key, value_width>(batch, number, query, rows, latents, output, marks, partial, a);                     \
    }

MLA_PREFILL(mla_prefill_64, 64, 64)
MLA_PREFILL(mla_prefill_192, 192, 128)
ENTRY(mla_prefill_64)
ENTRY(mla_prefill_192)
