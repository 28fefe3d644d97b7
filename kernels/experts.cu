// The routed experts. Twin of src/backend/cpu/experts.rs.
//
// Rows of pieces of a single token take the path for few: a warp reads one row of one chosen expert's weights. Rows of
// longer pieces are grouped by expert and multiplied on tensor cores. Which path a row takes depends on its piece alone,
// so its arithmetic does not depend on what else is in the batch. A "place" is a token's choice of an expert: token * top_k
// + choice.
#include "shared/kernel.h"
#include "shared/batch.h"
#include "shared/tile.h"

// Place number `i` of single rows, or NONE past the last.
static __device__ __forceinline__ u32 single_row(const u32* batch, u32 i) {
    u32 at = batch[SEVERAL_ROWS] + i;
    return at < batch[TOKENS] ? batch[batch[AT_ROWS] + at] : NONE;
}

// The sum over a warp of a row of bf16 times another; both of `width` elements, two at a time where both are aligned.
static __device__ __forceinline__ float warp_dot(const bf16* a, const bf16* b, u32 width) {
    u32 lane = threadIdx.x % 32;
    float sum = 0.0f;
    if (width % 8 == 0) {
        for (u32 i = lane * 8; i < width; i += 256) {
            uint4 x = *(const uint4*)(a + i), y = *(const uint4*)(b + i);
            sum += low(x.x) * low(y.x);
            sum += high(x.x) * high(y.x);
            sum += low(x.y) * low(y.y);
            sum += high(x.y) * high(y.y);
            sum += low(x.z) * low(y.z);
            sum += high(x.z) * high(y.z);
            sum += low(x.w) * low(y.w);
            sum += high(x.w) * high(y.w);
        }
    } else {
        for (u32 i = lane; i < width; i += 32) sum += widen(a[i]) * widen(b[i]);
    }
    return warp_sum(sum);
}

// hidden = silu(gate x) * (up x) for single rows: a warp an element, eight a block; blockIdx.y counts their places.
//   batch    the batch
//   ids      [T, top_k] u32
//   input    [T, width] bf16
//   gate     [experts, hidden_width, width] bf16
//   up       [experts, hidden_width, width] bf16
//   hidden   [T, top_k, hidden_width] bf16
extern "C" __global__ void __launch_bounds__(256) experts_few_in(
    const u32* batch, const u32* ids, const bf16* input, const bf16* gate, const bf16* up, bf16* hidden, u32 width,
    u32 hidden_width, u32 top_k, u32 first, u32 experts) {
    u32 n = blockIdx.x * 8 + threadIdx.x / 32;
    u32 row = single_row(batch, blockIdx.y / top_k);
    if (row == NONE || n >= hidden_width) return;
    u64 place = (u64)row * top_k + blockIdx.y % top_k;
    u32 expert = ids[place] - first;
    if (expert >= experts) return;
    u64 at = ((u64)expert * hidden_width + n) * width;
    float open = warp_dot(input + (u64)row * width, gate + at, width);
    float value = warp_dot(input + (u64)row * width, up + at, width);
    if (threadIdx.x % 32 == 0) hidden[place * hidden_width + n] = narrow(silu(open) * value);
}
ENTRY(experts_few_in)

// output = sum over choices of weight * (down hidden), in the order of the choices; a warp an element, eight a block;
// blockIdx.y counts single rows.
//   down     [experts, width, hidden_width] bf16
//   weights  [T, top_k] f32
//   output   [T, width] bf16
extern "C" __global__ void __launch_bounds__(256) experts_few_out(
    const u32* batch, const u32* ids, const float* weights, const bf16* hidden, const bf16* down, bf16* output, u32 width,
    u32 hidden_width, u32 top_k, u32 first, u32 experts) {
    u32 n = blockIdx.x * 8 + threadIdx.x / 32;
    u32 row = single_row(batch, blockIdx.y);
    if (row == NONE || n >= width) return;
    float sum = 0.0f;
    for (u32 choice = 0; choice < top_k; choice++) {
        u64 place = (u64)row * top_k + choice;
        u32 expert = ids[place] - first;
        if (expert >= experts) continue;
        u64 at = ((u64)expert * width + n) * hidden_width;
        sum += weights[place] * warp_dot(hidden + place * hidden_width, down + at, hidden_width);
    }
    if (threadIdx.x % 32 == 0) output[(u64)row * width + n] = narrow(sum);
}
ENTRY(experts_few_out)

// Places of rows of longer pieces, sorted by expert, in one block. Their order within an expert is that of the batch.
//   batch    the batch
//   ids      [T, top_k] u32
//   groups   words: the number of tiles; then [most_tiles, 3]: expert, first place in the list, places (at most TILE_ROWS);
//            then the list of places
// Dynamic shared memory: 12 bytes an expert.
extern "C" __global__ void __launch_bounds__(256) experts_group(
    const u32* batch, const u32* ids, u32* groups, u32 most_tiles, u32 top_k, u32 first, u32 experts) {
    u32* counts = (u32*)dynamic_shared();
    u32* starts = counts + experts;
    u32* tiles = starts + experts;
    u32* list = groups + 1 + 3 * (u64)most_tiles;
    u32 rows = batch[SEVERAL_ROWS], warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const u32* order = batch + batch[AT_ROWS];
    u32 places = rows * top_k;
    // A warp takes an expert at a time and goes through all places: no atomics, so the order is fixed.
    for (u32 e = warp; e < experts; e += blockDim.x / 32) {
        u32 count = 0;
        for (u32 i = 0; i < places; i += 32) {
            u32 p = i + lane;
            int mine = p < places && ids[order[p / top_k] * top_k + p % top_k] - first == e;
            count += __popc(__ballot_sync(EVERY_LANE, mine));
        }
        if (lane == 0) counts[e] = count;
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        u32 at = 0, tile = 0;
        for (u32 e = 0; e < experts; e++) {
            starts[e] = at;
            tiles[e] = tile;
            at += counts[e];
            tile += (counts[e] + TILE_ROWS - 1) / TILE_ROWS;
        }
        groups[0] = tile;
    }
    __syncthreads();
    for (u32 e = warp; e < experts; e += blockDim.x / 32) {
        u32 at = starts[e];
        for (u32 i = 0; i < places && at < starts[e] + counts[e]; i += 32) {
            u32 p = i + lane;
            u32 place = p < places ? order[p / top_k] * top_k + p % top_k : 0;
            int mine = p < places && ids[place] - first == e;
            u32 ballot = __ballot_sync(EVERY_LANE, mine);
            if (mine) list[at + __popc(ballot & ((1u << lane) - 1))] = place;
            at += __popc(ballot);
        }
        for (u32 tile = lane; tile * TILE_ROWS < counts[e]; tile += 32) {
            u32* entry = groups + 1 + 3 * (u64)(tiles[e] + tile);
            entry[0] = e;
            entry[1] = starts[e] + tile * TILE_ROWS;
            entry[2] = min(counts[e] - tile * TILE_ROWS, (u32)TILE_ROWS);
        }
    }
}
ENTRY(experts_group)

// hidden = silu(gate x) * (up x) for a tile of places (y) and TILE_COLUMNS columns (x), on tensor cores; 128 threads.
//   groups   from `experts_group`
//   input    [T, width] bf16
//   gate     [experts, hidden_width, width] bf16
//   up       [experts, hidden_width, width] bf16
//   hidden   [T, top_k, hidden_width] bf16
// Dynamic shared memory: 2 stages of three tiles.
extern "C" __global__ void __launch_bounds__(128) experts_many_in(
    const u32* groups, u32 most_tiles, const bf16* input, const bf16* gate, const bf16* up, bf16* hidden, u32 width,
    u32 hidden_width, u32 top_k) {
    bf16* shared = (bf16*)dynamic_shared();
    if (blockIdx.y >= groups[0]) return;
    const u32* tile = groups + 1 + 3 * (u64)blockIdx.y;
    const u32* list = groups + 1 + 3 * (u64)most_tiles + tile[1];
    u32 rows = tile[2], column = blockIdx.x * TILE_COLUMNS;
    u64 matrix = (u64)tile[0] * hidden_width * width;
    float open[2][4][4], value[2][4][4];
    clear(open);
    clear(value);
    u32 steps = (width + TILE_DEPTH - 1) / TILE_DEPTH;
    auto load = [&](u32 step) {
        bf16* stage = shared + step % 2 * 3 * TILE_ELEMENTS;
        u32 k = step * TILE_DEPTH;
        tile_load(stage, k, width, [&](u32 r) { return r < rows ? input + (u64)(list[r] / top_k) * width : nullptr; });
        tile_load(stage + TILE_ELEMENTS, k, width, [&](u32 r) {
            return column + r < hidden_width ? gate + matrix + (u64)(column + r) * width : nullptr;
        });
        tile_load(stage + 2 * TILE_ELEMENTS, k, width, [&](u32 r) {
            return column + r < hidden_width ? up + matrix + (u64)(column + r) * width : nullptr;
        });
        copy_async_commit();
    };
    load(0);
    for (u32 step = 0; step < steps; step++) {
        if (step + 1 < steps) {
            load(step + 1);
            copy_async_wait<1>();
        } else {
            copy_async_wait<0>();
        }
        __syncthreads();
        const bf16* stage = shared + step % 2 * 3 * TILE_ELEMENTS;
        tile_multiply(open, stage, stage + TILE_ELEMENTS);
        tile_multiply(value, stage, stage + 2 * TILE_ELEMENTS);
        __syncthreads();
    }
    tile_each([&](u32 r, u32 c, u32 i, u32 j, u32 n) {
        if (r >= rows || column + c >= hidden_width) return;
        hidden[(u64)list[r] * hidden_width + column + c] = narrow(silu(open[i][j][n]) * value[i][j][n]);
    });
}
ENTRY(experts_many_in)

// results = down hidden for a tile of places (y) and TILE_COLUMNS columns (x), on tensor cores; 128 threads.
//   groups   from `experts_group`
//   hidden   [T, top_k, hidden_width] bf16
//   down     [experts, width, hidden_width] bf16
//   results  [T, top_k, width] f32
// Dynamic shared memory: 2 stages of two tiles.
extern "C" __global__ void __launch_bounds__(128) experts_many_out(
    const u32* groups, u32 most_tiles, const bf16* hidden, const bf16* down, float* results, u32 width, u32 hidden_width) {
    bf16* shared = (bf16*)dynamic_shared();
    if (blockIdx.y >= groups[0]) return;
    const u32* tile = groups + 1 + 3 * (u64)blockIdx.y;
    const u32* list = groups + 1 + 3 * (u64)most_tiles + tile[1];
    u32 rows = tile[2], column = blockIdx.x * TILE_COLUMNS;
    u64 matrix = (u64)tile[0] * width * hidden_width;
    float sums[2][4][4];
    clear(sums);
    u32 steps = (hidden_width + TILE_DEPTH - 1) / TILE_DEPTH;
    auto load = [&](u32 step) {
        bf16* stage = shared + step % 2 * 2 * TILE_ELEMENTS;
        u32 k = step * TILE_DEPTH;
        tile_load(stage, k, hidden_width, [&](u32 r) { return r < rows ? hidden + (u64)list[r] * hidden_width : nullptr; });
        tile_load(stage + TILE_ELEMENTS, k, hidden_width, [&](u32 r) {
            return column + r < width ? down + matrix + (u64)(column + r) * hidden_width : nullptr;
        });
        copy_async_commit();
    };
    load(0);
    for (u32 step = 0; step < steps; step++) {
        if (step + 1 < steps) {
            load(step + 1);
            copy_async_wait<1>();
        } else {
            copy_async_wait<0>();
        }
        __syncthreads();
        const bf16* stage = shared + step % 2 * 2 * TILE_ELEMENTS;
        tile_multiply(sums, stage, stage + TILE_ELEMENTS);
        __syncthreads();
    }
    tile_each([&](u32 r, u32 c, u32 i, u32 j, u32 n) {
        if (r < rows && column + c < width) results[(u64)list[r] * width + column + c] = sums[i][j][n];
    });
}
ENTRY(experts_many_out)

// output = sum over choices of weight * result, in the order of the choices, for rows of longer pieces; 256 elements a
// block.
//   batch    the batch
//   ids      [T, top_k] u32
//   weights  [T, top_k] f32
//   results  [T, top_k, width] f32
//   output   [T, width] bf16
extern "C" __global__ void __launch_bounds__(256) experts_combine(
    const u32* batch, const u32* ids, const float* weights, const float* results, bf16* output, u32 width, u32 top_k,
    u32 first, u32 experts) {
    u64 i = (u64)blockIdx.x * 256 + threadIdx.x;
    if (i >= (u64)batch[SEVERAL_ROWS] * width) return;
    u32 row = batch[batch[AT_ROWS] + i / width], column = (u32)(i % width);
    float sum = 0.0f;
    for (u32 choice = 0; choice < top_k; choice++) {
        u64 place = (u64)row * top_k + choice;
        if (ids[place] - first < experts) sum += weights[place] * results[place * width + column];
    }
    output[(u64)row * width + column] = narrow(sum);
}
ENTRY(experts_combine)
