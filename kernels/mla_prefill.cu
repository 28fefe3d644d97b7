// Latent attention for many queries, on tensor cores: keys and values are expanded from the latents, a window of positions
// at a time, and softmax runs online over them (Milakov and Gimelshein, arXiv 1805.02867). Twin of
// src/backend/cpu/mla_prefill.rs.
//
// For each window of the batch `mla_gather` lays its latents end to end, one dense product with kv_b expands them in f32,
// `mla_images` makes of each run of them what `mla_prefill` needs in shared memory, and that attends to them. Runs of
// positions are counted from the sequence's start, so a row's arithmetic depends on its position alone. What a row has
// when its sequence goes on in another window waits in f32.
//
// Operands are bf16. Expanded keys come as two, a part and the rest of it: where scores reach several tens, rounding a key
// once moves a weight by two per cent.
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

// Tiles of an image of one head's run, each of RUN / 16 rows of them: keys [nope | rope] padded to KEY, the rests of their
// expanded part, values padded to VALUE.
static __device__ __forceinline__ u32 rest_tiles(const Attention& a) { return (a.nope + 15) / 16; }
template <int KEY, int VALUE>
static __device__ __forceinline__ u32 image_elements(const Attention& a) {
    return (KEY / 16 + rest_tiles(a) + VALUE / 16) * (RUN / 16) * TILE;
}

// Images of the runs of one window; zeros where there is no position or no column.
template <int KEY, int VALUE>
static __device__ __forceinline__ void images(
    const u32* batch, u32 number, const float* rows, const bf16* latents, bf16* images, const Attention& a) {
    const u32* window = window_words(batch, number);
    u32 run = blockIdx.x, head = blockIdx.y, first = run * RUN;
    if (first >= window[2]) return;
    u32 count = min((u32)RUN, window[2] - first), rests = rest_tiles(a);
    const u32* table = batch + piece_word(batch, window[0], BLOCKS);
    bf16* image = images + ((u64)run * a.heads + head) * image_elements<KEY, VALUE>(a);
    bf16* rest = image + KEY / 16 * (RUN / 16) * TILE;
    bf16* values = rest + rests * (RUN / 16) * TILE;
    u32 eights = (KEY + VALUE) / 8;
    for (u32 i = threadIdx.x; i < RUN * eights; i += 128) {
        u32 n = i / eights, c = i % eights * 8;
        bool is_value = c >= KEY, there = n < count;
        if (is_value) c -= KEY;
        const float* row = rows + ((u64)(first + n) * a.heads + head) * (a.nope + a.value);
        const bf16* shared = there ? latent_row(a, latents, table, window[1] + first + n) + a.latent : nullptr;
        u32 parts[4], others[4];
        #pragma unroll
        for (u32 j = 0; j < 4; j++) {
            float pair[2];
            #pragma unroll
            for (u32 m = 0; m < 2; m++) {
                u32 at = c + 2 * j + m;
                pair[m] = 0.0f;
                if (there && is_value && at < a.value) pair[m] = row[a.nope + at];
                if (there && !is_value && at < a.nope) pair[m] = row[at];
                if (there && !is_value && at >= a.nope && at < a.nope + a.rope) pair[m] = widen(shared[at - a.nope]);
            }
            split_pair(pair[0], pair[1], parts[j], others[j]);
        }
        u32 tiles = is_value ? VALUE / 16 : KEY / 16;
        bf16* to = (is_value ? values : image) + n / 16 * tiles * TILE + element_at(n % 16, c);
        *(uint4*)to = make_uint4(parts[0], parts[1], parts[2], parts[3]);
        if (!is_value && c < rests * 16) {
            // Shared keys are bf16 already: their rests are zeros.
            *(uint4*)(rest + n / 16 * rests * TILE + element_at(n % 16, c)) =
                make_uint4(others[0], others[1], others[2], others[3]);
        }
    }
}

// Grid (ceil(positions of the window / 64), heads), block 128.
//   batch     the batch; `number` is the window's
//   rows      [positions, heads (nope + value)] f32: the window's latents times kv_b
//   latents   [blocks, block_tokens, latent + rope] bf16
//   images    [runs, heads, 64 (P + 16 ceil(nope / 16) + Q)] bf16, aligned to 16 bytes; P and Q are the widths of key and
//             value that the entry takes at most
#define MLA_IMAGES(name, key, value_width)                                                                            \
    extern "C" __global__ void __launch_bounds__(128) name(                                                           \
        const u32* batch, u32 number, const float* rows, const bf16* latents, bf16* out, u32 heads, u32 latent,       \
        u32 nope, u32 rope, u32 value, u32 block_tokens) {                                                            \
        Attention a{heads, latent, nope, rope, value, block_tokens};                                                  \
        images<key, value_width>(batch, number, rows, latents, out, a);                                               \
    }

// One window for some tiles of queries of one head. Keys are at most KEY wide, values VALUE.
template <int KEY, int VALUE>
static __device__ __forceinline__ void attend(
    const u32* batch, u32 number, const bf16* query, const bf16* images, bf16* output, float* marks, float* partial,
    const Attention& a) {
    u32 rests = rest_tiles(a), stage_elements = image_elements<KEY, VALUE>(a);
    bf16* stages = (bf16*)dynamic_shared();
    u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, head = blockIdx.y;
    const u32* window = window_words(batch, number);
    u32 piece = window[0], first = window[1], window_end = first + window[2];
    u32 position = piece_word(batch, piece, POSITION), length = piece_word(batch, piece, LENGTH);
    u32 start = piece_word(batch, piece, START);
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
    auto fetch = [&](u32 turn, u32 begin) {
        const bf16* from = images + ((u64)((begin - first) / RUN) * a.heads + head) * stage_elements;
        bf16* to = stages + turn * stage_elements;
        for (u32 i = threadIdx.x * 8; i < stage_elements; i += WARPS * 32 * 8) copy_async(to + i, from + i);
        copy_async_commit();
    };
    fetch(0, first);
    u32 turn = 0;
    for (u32 begin = first; begin < end; begin += RUN, turn ^= 1) {
        copy_async_wait<0>();
        // The other stage was read before this barrier.
        __syncthreads();
        if (begin + RUN < end) fetch(turn ^ 1, begin + RUN);
        if (begin >= warp_end) continue;
        const bf16* keys = stages + turn * stage_elements;
        const bf16* others = keys + RUN * KEY;
        const bf16* values = others + rests * (RUN / 16) * TILE;
        float scores[RUN / 16][2][4];
        #pragma unroll
        for (u32 j = 0; j < RUN / 16; j++) {
            #pragma unroll
            for (u32 i = 0; i < 8; i++) scores[j][i / 4][i % 4] = 0.0f;
            #pragma unroll
            for (u32 n = 0; n < KEY / 16; n++) {
                u32 b[4];
                if (n < rests) {
                    ldmatrix(b, others + (j * rests + n) * TILE + down);
                    multiply_halves(scores[j], q[n], b);
                }
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

// Grid (ceil(tokens of the window's piece / 64), heads), block 128; dynamic shared memory 256 (P + 16 ceil(nope / 16) + Q)
// bytes, with P and Q the widths of key and value that the entry takes at most.
//   batch     the batch; `number` is the window's
//   query     [T, heads (nope + rope)] bf16
//   images    what `mla_images` left of the window
//   output    [T, heads value] bf16
//   marks     [T, heads, 2] f32 and
//   partial   [T, heads, value] f32: what waits for the next window; not touched where no sequence has more than one
#define MLA_PREFILL(name, key, value_width)                                                                           \
    extern "C" __global__ void __launch_bounds__(WARPS * 32, 1) name(                                                 \
        const u32* batch, u32 number, const bf16* query, const bf16* in, bf16* output, float* marks, float* partial,  \
        u32 heads, u32 nope, u32 rope, u32 value) {                                                                   \
        Attention a{heads, 0, nope, rope, value, 1};                                                                  \
        attend<key, value_width>(batch, number, query, in, output, marks, partial, a);                                \
    }

MLA_IMAGES(mla_images_64, 64, 64)
MLA_IMAGES(mla_images_192, 192, 128)
MLA_PREFILL(mla_prefill_64, 64, 64)
MLA_PREFILL(mla_prefill_192, 192, 128)
ENTRY(mla_images_64)
ENTRY(mla_images_192)
ENTRY(mla_prefill_64)
ENTRY(mla_prefill_192)
