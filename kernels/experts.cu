// The routed experts. Twin of src/backend/cpu/experts.rs.
//
// Rows of pieces of a single token take the path for few: a warp has two rows of one chosen expert's weights, and multiplies
// them with every row that chose the expert. Rows of longer pieces are grouped by expert and multiplied on tensor cores.
// Which path a row takes depends on its piece alone, and its sums on itself, so its arithmetic does not depend on what else
// is in the batch. A "place" is a token's choice of an expert: token * top_k + choice.
#include "shared/kernel.h"
#include "shared/batch.h"
#include "shared/tile.h"

// Rows of weights that a warp of the path for few has, and places that share one reading of them.
#define FEW_OUTPUTS 2
#define FEW_PLACES 4

// Place number `i` of single rows.
static __device__ __forceinline__ u32 single_place(const u32* batch, u32 top_k, u32 i) {
    return batch[batch[AT_ROWS] + batch[SEVERAL_ROWS] + i / top_k] * top_k + i % top_k;
}

// Whether place number `own` of single rows is the first of them to have chosen its expert. `mask` has a bit for each place
// from `own` on that chose it: ceil(places / 32) words of shared memory. Every thread must come.
static __device__ __forceinline__ bool sharers(
    const u32* batch, const u32* ids, u32 top_k, u32 own, u32 places, u32* mask) {
    u32 expert = ids[single_place(batch, top_k, own)];
    int before = 0;
    for (u32 first = threadIdx.x / 32 * 32; first < places; first += blockDim.x) {
        u32 i = first + threadIdx.x % 32;
        int same = i < places && ids[single_place(batch, top_k, i)] == expert;
        u32 ballot = __ballot_sync(EVERY_LANE, same);
        if (threadIdx.x % 32 == 0) mask[first / 32] = ballot;
    }
    __syncthreads();
    for (u32 word = 0; word <= own / 32; word++) {
        before |= mask[word] & (word < own / 32 ? EVERY_LANE : (1u << own % 32) - 1);
    }
    return before == 0;
}

// Sums over a warp of FEW_OUTPUTS rows of weights times each of `count` rows, all of `width` elements: sums[place][output],
// the same bits whatever `count` is.
template <int MATRICES>
static __device__ __forceinline__ void warp_dots(
    float (&sums)[FEW_PLACES][FEW_OUTPUTS][MATRICES], const bf16* const (&weights)[FEW_OUTPUTS][MATRICES],
    const bf16* const (&rows)[FEW_PLACES], u32 count, u32 width) {
    u32 lane = threadIdx.x % 32;
#pragma unroll
    for (u32 p = 0; p < FEW_PLACES; p++) {
#pragma unroll
        for (u32 n = 0; n < FEW_OUTPUTS; n++) {
#pragma unroll
            for (u32 m = 0; m < MATRICES; m++) sums[p][n][m] = 0.0f;
        }
    }
    if (width % 8 == 0) {
#pragma unroll 2
        for (u32 i = lane * 8; i < width; i += 256) {
            uint4 w[FEW_OUTPUTS][MATRICES];
#pragma unroll
            for (u32 n = 0; n < FEW_OUTPUTS; n++) {
#pragma unroll
                for (u32 m = 0; m < MATRICES; m++) w[n][m] = *(const uint4*)(weights[n][m] + i);
            }
#pragma unroll
            for (u32 p = 0; p < FEW_PLACES; p++) {
                if (p >= count) continue;
                uint4 x = *(const uint4*)(rows[p] + i);
#pragma unroll
                for (u32 n = 0; n < FEW_OUTPUTS; n++) {
#pragma unroll
                    for (u32 m = 0; m < MATRICES; m++) {
                        float& sum = sums[p][n][m];
                        sum = fmaf(low(x.x), low(w[n][m].x), sum);
                        sum = fmaf(high(x.x), high(w[n][m].x), sum);
                        sum = fmaf(low(x.y), low(w[n][m].y), sum);
                        sum = fmaf(high(x.y), high(w[n][m].y), sum);
                        sum = fmaf(low(x.z), low(w[n][m].z), sum);
                        sum = fmaf(high(x.z), high(w[n][m].z), sum);
                        sum = fmaf(low(x.w), low(w[n][m].w), sum);
                        sum = fmaf(high(x.w), high(w[n][m].w), sum);
                    }
                }
            }
        }
    } else {
        for (u32 i = lane; i < width; i += 32) {
#pragma unroll
            for (u32 p = 0; p < FEW_PLACES; p++) {
                if (p >= count) continue;
#pragma unroll
                for (u32 n = 0; n < FEW_OUTPUTS; n++) {
#pragma unroll
                    for (u32 m = 0; m < MATRICES; m++) {
                        sums[p][n][m] = fmaf(widen(rows[p][i]), widen(weights[n][m][i]), sums[p][n][m]);
                    }
                }
            }
        }
    }
#pragma unroll
    for (u32 p = 0; p < FEW_PLACES; p++) {
        if (p >= count) continue;
#pragma unroll
        for (u32 n = 0; n < FEW_OUTPUTS; n++) {
#pragma unroll
            for (u32 m = 0; m < MATRICES; m++) sums[p][n][m] = warp_sum(sums[p][n][m]);
        }
    }
}

// Calls `f(places, count)` for the places of `mask`, FEW_PLACES at a time, in their order.
template <class F>
static __device__ __forceinline__ void each_few(
    const u32* batch, u32 top_k, const u32* mask, u32 own, u32 places, F f) {
    u32 found[FEW_PLACES], count = 0;
    for (u32 word = own / 32; word * 32 < places; word++) {
        u32 left = mask[word];
        while (left != 0) {
            u32 place = single_place(batch, top_k, word * 32 + (u32)__ffs((int)left) - 1);
            left &= left - 1;
#pragma unroll
            for (u32 p = 0; p < FEW_PLACES; p++) {
                if (p == count) found[p] = place;
            }
            if (++count < FEW_PLACES) continue;
            f(found, count);
            count = 0;
        }
    }
#pragma unroll
    for (u32 p = 0; p < FEW_PLACES; p++) {
        if (p >= count) found[p] = 0;
    }
    if (count > 0) f(found, count);
}

// hidden = silu(gate x) * (up x) for single rows: sixteen elements a block; blockIdx.y counts their places, the first that
// chose an expert works for all that did.
//   batch    the batch
//   ids      [T, top_k] u32
//   input    [T, width] bf16
//   gate     [experts, hidden_width, width] bf16
//   up       [experts, hidden_width, width] bf16
//   hidden   [T, top_k, hidden_width] bf16
// Dynamic shared memory: a bit for each place of single rows, in words.
extern "C" __global__ void __launch_bounds__(256) experts_few_in(
    const u32* batch, const u32* ids, const bf16* input, const bf16* gate, const bf16* up, bf16* hidden, u32 width,
    u32 hidden_width, u32 top_k, u32 first, u32 experts) {
    u32* mask = (u32*)dynamic_shared();
    u32 own = blockIdx.y, places = (batch[TOKENS] - batch[SEVERAL_ROWS]) * top_k;
    if (own >= places) return;
    u32 expert = ids[single_place(batch, top_k, own)] - first;
    if (expert >= experts || !sharers(batch, ids, top_k, own, places, mask)) return;
    u32 n = (blockIdx.x * 8 + threadIdx.x / 32) * FEW_OUTPUTS;
    if (n >= hidden_width) return;
    const bf16* weights[FEW_OUTPUTS][2];
#pragma unroll
    for (u32 i = 0; i < FEW_OUTPUTS; i++) {
        u64 at = ((u64)expert * hidden_width + min(n + i, hidden_width - 1)) * width;
        weights[i][0] = gate + at;
        weights[i][1] = up + at;
    }
    each_few(batch, top_k, mask, own, places, [&](const u32 (&found)[FEW_PLACES], u32 count) {
        const bf16* rows[FEW_PLACES];
#pragma unroll
        for (u32 p = 0; p < FEW_PLACES; p++) rows[p] = input + (u64)(found[p] / top_k) * width;
        float sums[FEW_PLACES][FEW_OUTPUTS][2];
        warp_dots<2>(sums, weights, rows, count, width);
        if (threadIdx.x % 32 != 0) return;
#pragma unroll
        for (u32 p = 0; p < FEW_PLACES; p++) {
#pragma unroll
            for (u32 i = 0; i < FEW_OUTPUTS; i++) {
                if (p >= count || n + i >= hidden_width) continue;
                hidden[(u64)found[p] * hidden_width + n + i] = narrow(silu(sums[p][i][0]) * sums[p][i][1]);
            }
        }
    });
}
ENTRY(experts_few_in)

// results = down hidden for single rows, as above.
//   hidden   [T, top_k, hidden_width] bf16
//   down     [experts, width, hidden_width] bf16
//   results  [T, top_k, width] f32
extern "C" __global__ void __launch_bounds__(256) experts_few_out(
    const u32* batch, const u32* ids, const bf16* hidden, const bf16* down, float* results, u32 width, u32 hidden_width,
    u32 top_k, u32 first, u32 experts) {
    u32* mask = (u32*)dynamic_shared();
    u32 own = blockIdx.y, places = (batch[TOKENS] - batch[SEVERAL_ROWS]) * top_k;
    if (own >= places) return;
    u32 expert = ids[single_place(batch, top_k, own)] - first;
    if (expert >= experts || !sharers(batch, ids, top_k, own, places, mask)) return;
    u32 n = (blockIdx.x * 8 + threadIdx.x / 32) * FEW_OUTPUTS;
    if (n >= width) return;
    const bf16* weights[FEW_OUTPUTS][1];
#pragma unroll
    for (u32 i = 0; i < FEW_OUTPUTS; i++) weights[i][0] = down + ((u64)expert * width + min(n + i, width - 1)) * hidden_width;
    each_few(batch, top_k, mask, own, places, [&](const u32 (&found)[FEW_PLACES], u32 count) {
        const bf16* rows[FEW_PLACES];
#pragma unroll
        for (u32 p = 0; p < FEW_PLACES; p++) rows[p] = hidden + (u64)found[p] * hidden_width;
        float sums[FEW_PLACES][FEW_OUTPUTS][1];
        warp_dots<1>(sums, weights, rows, count, hidden_width);
        if (threadIdx.x % 32 != 0) return;
#pragma unroll
        for (u32 p = 0; p < FEW_PLACES; p++) {
#pragma unroll
            for (u32 i = 0; i < FEW_OUTPUTS; i++) {
                if (p < count && n + i < width) results[(u64)found[p] * width + n + i] = sums[p][i][0];
            }
        }
    });
}
ENTRY(experts_few_out)

// Places of longer pieces that a block counts and lists, and what a warp of it has of them.
#define SHARE 2048
#define WARP_SHARE (SHARE / 8)

// Place number `i` of longer pieces.
static __device__ __forceinline__ u32 several_place(const u32* batch, u32 top_k, u32 i) {
    return batch[batch[AT_ROWS] + i / top_k] * top_k + i % top_k;
}

// How often each share of the places of longer pieces chose each expert. Grid (ceil(places / 2048)), block 256.
//   batch    the batch
//   ids      [T, top_k] u32
//   counts   [shares, experts] u32
// Dynamic shared memory: 4 bytes an expert.
extern "C" __global__ void __launch_bounds__(256) experts_count(
    const u32* batch, const u32* ids, u32* counts, u32 top_k, u32 first, u32 experts) {
    u32* own = (u32*)dynamic_shared();
    u32 places = batch[SEVERAL_ROWS] * top_k, start = blockIdx.x * SHARE;
    if (start >= places) return;
    for (u32 e = threadIdx.x; e < experts; e += 256) own[e] = 0;
    __syncthreads();
    for (u32 i = start + threadIdx.x; i < min(start + SHARE, places); i += 256) {
        u32 expert = ids[several_place(batch, top_k, i)] - first;
        if (expert < experts) atomicAdd(own + expert, 1u);
    }
    __syncthreads();
    for (u32 e = threadIdx.x; e < experts; e += 256) counts[(u64)blockIdx.x * experts + e] = own[e];
}
ENTRY(experts_count)

// Places of longer pieces, sorted by expert; their order within an expert is that of the batch. Grid (ceil(places / 2048)),
// block 256.
//   batch    the batch
//   ids      [T, top_k] u32
//   counts   from `experts_count`
//   groups   words: the number of tiles; then [most_tiles, 3]: expert, first place in the list, places (at most TILE_ROWS);
//            then the list of places
// Dynamic shared memory: 40 bytes an expert.
extern "C" __global__ void __launch_bounds__(256) experts_group(
    const u32* batch, const u32* ids, const u32* counts, u32* groups, u32 most_tiles, u32 top_k, u32 first, u32 experts) {
    u32* starts = (u32*)dynamic_shared();  // how many chose an expert, then where its places begin
    u32* tiles = starts + experts;         // its first tile
    u32* next = tiles + experts;           // [8, experts]: where a warp's next place of an expert goes
    u32* list = groups + 1 + 3 * (u64)most_tiles;
    u32 places = batch[SEVERAL_ROWS] * top_k, start = blockIdx.x * SHARE, shares = (places + SHARE - 1) / SHARE;
    if (start >= places) return;
    u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    for (u32 i = threadIdx.x; i < 8 * experts; i += 256) next[i] = 0;
    __syncthreads();
    // What each warp has of each expert, and what all shares have, those before this one apart.
    u32 begin = min(start + warp * WARP_SHARE, places), end = min(begin + WARP_SHARE, places);
    for (u32 i = begin + lane; i < end; i += 32) {
        u32 expert = ids[several_place(batch, top_k, i)] - first;
        if (expert < experts) atomicAdd(next + warp * experts + expert, 1u);
    }
    __syncthreads();
    for (u32 e = threadIdx.x; e < experts; e += 256) {
        u32 all = 0, before = 0;
#pragma unroll 8
        for (u32 s = 0; s < shares; s++) {
            u32 count = counts[(u64)s * experts + e];
            if (s < blockIdx.x) before += count;
            all += count;
        }
        starts[e] = all;
        for (u32 w = 0; w < 8; w++) {
            u32 count = next[w * experts + e];
            next[w * experts + e] = before;
            before += count;
        }
    }
    __syncthreads();
    // Counts become sums of those before; the first block writes tiles while it is at it.
    if (warp == 0) {
        u32 at = 0, tile = 0;
        for (u32 base = 0; base < experts; base += 32) {
            u32 e = base + lane, count = e < experts ? starts[e] : 0;
            u32 own_tiles = (count + TILE_ROWS - 1) / TILE_ROWS, sum = count, tile_sum = own_tiles;
#pragma unroll
            for (u32 step = 1; step < 32; step *= 2) {
                u32 other = __shfl_up_sync(EVERY_LANE, sum, step), more = __shfl_up_sync(EVERY_LANE, tile_sum, step);
                if (lane >= step) {
                    sum += other;
                    tile_sum += more;
                }
            }
            if (e < experts) {
                starts[e] = at + sum - count;
                tiles[e] = tile + tile_sum - own_tiles;
                for (u32 n = 0; blockIdx.x == 0 && n < own_tiles; n++) {
                    u32* entry = groups + 1 + 3 * (u64)(tiles[e] + n);
                    entry[0] = e;
                    entry[1] = starts[e] + n * TILE_ROWS;
                    entry[2] = min(count - n * TILE_ROWS, (u32)TILE_ROWS);
                }
            }
            at += __shfl_sync(EVERY_LANE, sum, 31);
            tile += __shfl_sync(EVERY_LANE, tile_sum, 31);
        }
        if (blockIdx.x == 0 && lane == 0) groups[0] = tile;
    }
    __syncthreads();
    for (u32 base = begin; base < end; base += 32) {
        u32 i = base + lane, place = i < end ? several_place(batch, top_k, i) : 0;
        u32 expert = i < end ? ids[place] - first : NONE;
        u32 peers = __match_any_sync(EVERY_LANE, expert), rank = (u32)__popc(peers & ((1u << lane) - 1));
        u32* to = next + warp * experts + expert;
        if (expert < experts) list[starts[expert] + *to + rank] = place;
        __syncwarp();
        if (expert < experts && rank == 0) *to += (u32)__popc(peers);
        __syncwarp();
    }
}
ENTRY(experts_group)

// hidden = silu(gate x) * (up x) for a tile of places (y) and 64 columns (x), on tensor cores; 128 threads.
//   groups   from `experts_group`
//   input    [T, width] bf16
//   gate     [experts, hidden_width, width] bf16
//   up       [experts, hidden_width, width] bf16
//   hidden   [T, top_k, hidden_width] bf16
// Dynamic shared memory: TILE_STAGES of two tiles.
extern "C" __global__ void __launch_bounds__(128, 2) experts_many_in(
    const u32* groups, u32 most_tiles, const bf16* input, const bf16* gate, const bf16* up, bf16* hidden, u32 width,
    u32 hidden_width, u32 top_k) {
    if (blockIdx.y >= groups[0]) return;
    const u32* tile = groups + 1 + 3 * (u64)blockIdx.y;
    const u32* list = groups + 1 + 3 * (u64)most_tiles + tile[1];
    u32 rows = tile[2], column = blockIdx.x * (TILE_COLUMNS / 2);
    u64 matrix = (u64)tile[0] * hidden_width * width;
    const bf16 *a[TILE_OWN], *b[TILE_OWN];
#pragma unroll
    for (u32 i = 0; i < TILE_OWN; i++) {
        u32 r = tile_row(i), n = column + r % 64;
        a[i] = r < rows ? input + (u64)(list[r] / top_k) * width : nullptr;
        b[i] = n < hidden_width ? (r < 64 ? gate : up) + matrix + (u64)n * width : nullptr;
    }
    // Columns 0 to 31 of a warp's are of the gate, the others the same of up.
    TileSums sums;
    tile_product<true>(sums, (bf16*)dynamic_shared(), a, b, width, rows);
    column += threadIdx.x / 32 % 2 * 32 + threadIdx.x % 4 * 2;
    tile_rows([&](u32 r, u32 i, u32 n) {
        if (r >= rows) return;
        bf16* to = hidden + (u64)list[r] * hidden_width;
#pragma unroll
        for (u32 j = 0; j < 4; j++) {
            u32 c = column + j * 8;
            float x = silu(sums[i][j][n]) * sums[i][j + 4][n], y = silu(sums[i][j][n + 1]) * sums[i][j + 4][n + 1];
            if (hidden_width % 2 == 0) {
                if (c < hidden_width) *(u32*)(to + c) = narrow_pair(x, y);
            } else {
                if (c < hidden_width) to[c] = narrow(x);
                if (c + 1 < hidden_width) to[c + 1] = narrow(y);
            }
        }
    });
}
ENTRY(experts_many_in)

// results = down hidden for a tile of places (y) and TILE_COLUMNS columns (x), on tensor cores; 128 threads.
//   groups   from `experts_group`
//   hidden   [T, top_k, hidden_width] bf16
//   down     [experts, width, hidden_width] bf16
//   results  [T, top_k, width] f32
// Dynamic shared memory: TILE_STAGES of two tiles.
extern "C" __global__ void __launch_bounds__(128, 2) experts_many_out(
    const u32* groups, u32 most_tiles, const bf16* hidden, const bf16* down, float* results, u32 width, u32 hidden_width) {
    if (blockIdx.y >= groups[0]) return;
    const u32* tile = groups + 1 + 3 * (u64)blockIdx.y;
    const u32* list = groups + 1 + 3 * (u64)most_tiles + tile[1];
    u32 rows = tile[2], column = blockIdx.x * TILE_COLUMNS;
    u64 matrix = (u64)tile[0] * width * hidden_width;
    const bf16 *a[TILE_OWN], *b[TILE_OWN];
#pragma unroll
    for (u32 i = 0; i < TILE_OWN; i++) {
        u32 r = tile_row(i);
        a[i] = r < rows ? hidden + (u64)list[r] * hidden_width : nullptr;
        b[i] = column + r < width ? down + matrix + (u64)(column + r) * hidden_width : nullptr;
    }
    TileSums sums;
    tile_product<false>(sums, (bf16*)dynamic_shared(), a, b, hidden_width, rows);
    column += threadIdx.x / 32 % 2 * 64 + threadIdx.x % 4 * 2;
    tile_rows([&](u32 r, u32 i, u32 n) {
        if (r >= rows) return;
        float* to = results + (u64)list[r] * width;
#pragma unroll
        for (u32 j = 0; j < 8; j++) {
            u32 c = column + j * 8;
            if (width % 2 == 0) {
                if (c < width) *(float2*)(to + c) = make_float2(sums[i][j][n], sums[i][j][n + 1]);
            } else {
                if (c < width) to[c] = sums[i][j][n];
                if (c + 1 < width) to[c + 1] = sums[i][j][n + 1];
            }
        }
    });
}
ENTRY(experts_many_out)

// output = sum over choices of weight * result, in the order of the choices; 256 elements a block.
//   batch    the batch
//   ids      [T, top_k] u32
//   weights  [T, top_k] f32
//   results  [T, top_k, width] f32
//   output   [T, width] bf16
extern "C" __global__ void __launch_bounds__(256) experts_combine(
    const u32* batch, const u32* ids, const float* weights, const float* results, bf16* output, u32 width, u32 top_k,
    u32 first, u32 experts) {
    u64 i = (u64)blockIdx.x * 256 + threadIdx.x;
    if (i >= (u64)batch[TOKENS] * width) return;
    u64 row = i / width;
    u32 column = (u32)(i % width);
    float sum = 0.0f;
    for (u32 choice = 0; choice < top_k; choice++) {
        u64 place = row * top_k + choice;
        if (ids[place] - first < experts) sum += weights[place] * results[place * width + column];
    }
    output[i] = narrow(sum);
}
ENTRY(experts_combine)
