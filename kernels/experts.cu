// The routed experts. Counterpart of src/backend/cpu/experts.rs.
//
// Rows of segments of a single token use the form for few rows: a block has some rows of one chosen expert's weights, and
// multiplies them with every row that chose the expert. Rows of longer segments are grouped by expert and multiplied in
// tiles. Which form a row uses depends on its segment alone, and its sums on the row alone, so its arithmetic does not depend
// on the rest of the batch. An "assignment" is a token's choice of an expert: token * top_k + choice.
#include "shared/kernel.h"
#include "shared/batch.h"
#include "shared/eights.h"
#include "shared/tile.h"
#include "shared/params_experts.h"

// Assignment number `i` of single rows, and of longer segments.
static __device__ __forceinline__ u32 single_assignment(const u32* batch, u32 top_k, u32 i) {
    return batch[batch[AT_ROWS] + batch[SEVERAL_ROWS] + i / top_k] * top_k + i % top_k;
}
static __device__ __forceinline__ u32 several_assignment(const u32* batch, u32 top_k, u32 i) {
    return batch[batch[AT_ROWS] + i / top_k] * top_k + i % top_k;
}

// Outputs per block in the form for few rows: two tiles of 16. Its warps alternate along the columns; a lane reads eight
// columns in one access, which are the fragment's columns of that lane (as in `linear_few`); the warps' sums are added in the
// warps' order.
#define FEW_OUTPUTS 32
#define FEW_WARPS 8
#define FEW_COLUMNS 32
// Assignments for which the weights are read once: the columns of a fragment. More assignments read the weights again.
#define FEW_ASSIGNMENTS 8
// Floats from one assignment's sums to the next's in shared memory, without bank conflicts for a fragment.
#define FEW_STRIDE 36

// The work of a block in the form for few rows: chosen expert number `blockIdx.y`, and the assignments to it. Shared experts
// are one more expert, the first, whose assignments are the single rows themselves.
struct Chosen {
    u32 expert, count;
    // The list of assignments, or null if there is only one.
    const u32* assignments;
    u32 only;

    __device__ __forceinline__ u32 assignment(u32 i) const { return assignments == nullptr ? only : assignments[i]; }
};

// Reads it from the list; `count` is 0 if there is no such expert. The choices of the only single row need no list: each is a
// different expert.
static __device__ __forceinline__ Chosen chosen(
    const u32* batch, const u32* ids, const u32* list, u32 most, u32 top_k, u32 first, u32 experts, bool shared) {
    u32 rows = batch[TOKENS] - batch[SEVERAL_ROWS], single = batch[AT_ROWS] + batch[SEVERAL_ROWS], n = blockIdx.y;
    if (shared) {
        if (n == 0) return {0, rows, batch + single, NONE};
        n--;
    }
    if (rows < 2) {
        if (n >= rows * top_k) return {NONE, 0, nullptr, NONE};
        u32 assignment = batch[single] * top_k + n, expert = ids[assignment] - first;
        return {expert, expert < experts ? 1u : 0u, nullptr, assignment};
    }
    const u32* entry = list + 1 + 3 * (u64)n;
    return {entry[0], n < list[0] ? entry[2] : 0, list + 1 + 3 * (u64)most + entry[1], NONE};
}

// sums[i] = 16 outputs, tile `i` of two, times eight rows. A lane has rows lane / 4 and lane / 4 + 8 of each tile's weights,
// and row lane / 4 of the input. A row's sums use the same instructions for any other rows.
typedef float FewSums[2][4];

static __device__ __forceinline__ void clear(FewSums& sums) {
#pragma unroll
    for (u32 i = 0; i < 2; i++) {
#pragma unroll
        for (u32 n = 0; n < 4; n++) sums[i][n] = 0.0f;
    }
}

// Adds the products of 32 columns: four rows of weights, then one of the input.
static __device__ __forceinline__ void few_multiply(FewSums& sums, const uint4 (&w)[5]) {
    const uint4& x = w[4];
    u32 b[2][2] = {{x.x, x.y}, {x.z, x.w}};
#pragma unroll
    for (u32 i = 0; i < 2; i++) {
        u32 a[2][4] = {{w[2 * i].x, w[2 * i + 1].x, w[2 * i].y, w[2 * i + 1].y},
                       {w[2 * i].z, w[2 * i + 1].z, w[2 * i].w, w[2 * i + 1].w}};
        mma_bf16(sums[i], a[0], b[0]);
        mma_bf16(sums[i], a[1], b[1]);
    }
}

// Over this warp's columns, with weights in bf16.
template <bool WHOLE>
static __device__ __forceinline__ void few_product(
    FewSums& sums, const bf16* const (&weights)[4], const bf16* row, u32 columns) {
    clear(sums);
    // This warp's first columns, then its next ones: pointers, which cost less to advance than to compute again.
    u32 k = threadIdx.x / 32 * FEW_COLUMNS + threadIdx.x % 4 * 8, first = k / FEW_COLUMNS * FEW_COLUMNS;
    const bf16* from[5] = {weights[0] + k, weights[1] + k, weights[2] + k, weights[3] + k, row + k};
    uint4 now[5], next[5];
    auto load = [&](uint4 (&to)[5]) {
#pragma unroll
        for (u32 i = 0; i < 5; i++) {
            to[i] = k < columns ? eight_of<WHOLE>(from[i], k, columns) : make_uint4(0, 0, 0, 0);
            from[i] += FEW_WARPS * FEW_COLUMNS;
        }
        k += FEW_WARPS * FEW_COLUMNS;
    };
    // The next loads are in flight while these are multiplied; element by element they would need too many registers.
    if (WHOLE) load(next);
    for (; first < columns; first += FEW_WARPS * FEW_COLUMNS) {
        if (WHOLE) {
#pragma unroll
            for (u32 i = 0; i < 5; i++) now[i] = next[i];
            load(next);
        } else {
            load(now);
        }
        few_multiply(sums, now);
    }
}

// A lane's four rows of weights of any format, two of each stack: the index of each row's first element.
struct FewRows {
    const void *first, *second;
    u32 first_format, second_format;
    u64 rows[4];
};

// The same, widened and rounded to bf16 when they are loaded.
static __device__ __forceinline__ void few_product(FewSums& sums, const FewRows& weights, const bf16* row, u32 columns) {
    clear(sums);
    for (u32 k = threadIdx.x / 32 * FEW_COLUMNS + threadIdx.x % 4 * 8; k / FEW_COLUMNS * FEW_COLUMNS < columns;
         k += FEW_WARPS * FEW_COLUMNS) {
        uint4 w[5] = {};
        // Decoding blocks is long code: one loop for the four rows, whose words are selected, not indexed, so that they stay
        // in registers.
#pragma unroll 1
        for (u32 i = 0; i < 4; i++) {
            float x[8] = {0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f};
            const void* weight = i < 2 ? weights.first : weights.second;
            u32 format = i < 2 ? weights.first_format : weights.second_format;
            u64 first = i == 0 ? weights.rows[0] : i == 1 ? weights.rows[1] : i == 2 ? weights.rows[2] : weights.rows[3];
            if (k < columns) weights_at(weight, format, first + k, columns, k, x);
            uint4 eight = make_uint4(
                narrow_pair(x[0], x[1]), narrow_pair(x[2], x[3]), narrow_pair(x[4], x[5]), narrow_pair(x[6], x[7]));
#pragma unroll
            for (u32 j = 0; j < 4; j++) w[j] = i == j ? eight : w[j];
        }
        w[4] = k < columns ? eight_of<true>(row + k, k, columns) : make_uint4(0, 0, 0, 0);
        few_multiply(sums, w);
    }
}

// Multiplies FEW_OUTPUTS rows of weights with the rows of all assignments to the expert, eight at a time with
// `product(sums, row)`, and calls `store(assignment, n, sum)` in every thread for each: output number threadIdx.x % 32 of an
// assignment, or of NONE.
template <class P, class R, class S>
static __device__ __forceinline__ void few(const Chosen& chosen, P product, R row_of, S store) {
    SHARED(float, parts, FEW_WARPS * FEW_ASSIGNMENTS * FEW_STRIDE);
    u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    for (u32 first = 0; first < chosen.count; first += FEW_ASSIGNMENTS) {
        // If fewer rows are left, the last is multiplied again and not stored.
        const bf16* row = row_of(chosen.assignment(min(first + g, chosen.count - 1)));
        FewSums sums;
        product(sums, row);
        // The sums of the previous assignments were read before this barrier.
        if (first > 0) __syncthreads();
#pragma unroll
        for (u32 i = 0; i < 2; i++) {
#pragma unroll
            for (u32 n = 0; n < 4; n++) {
                parts[(warp * FEW_ASSIGNMENTS + 2 * t + n % 2) * FEW_STRIDE + 16 * i + g + n / 2 * 8] = sums[i][n];
            }
        }
        __syncthreads();
        float sum = 0.0f;
#pragma unroll
        for (u32 from = 0; from < FEW_WARPS; from++) sum += parts[(from * FEW_ASSIGNMENTS + warp) * FEW_STRIDE + lane];
        // Read here, not before the products, for the sake of a register.
        store(first + warp < chosen.count ? chosen.assignment(first + warp) : NONE, lane, sum);
    }
}

// The product with weights in bf16 of any width.
struct FewDense {
    const bf16* weights[4];
    u32 columns;

    __device__ __forceinline__ void operator()(FewSums& sums, const bf16* row) const {
        if (columns % 8 == 0) {
            few_product<true>(sums, weights, row, columns);
        } else {
            few_product<false>(sums, weights, row, columns);
        }
    }
};

// Whether a block has the shared experts, if there are any. Asked where it is used, it occupies no register between.
static __device__ __forceinline__ bool is_shared(const void* shared) { return shared != nullptr && blockIdx.y == 0; }

// The common part of the input kernels for single rows: the product's outputs are those of gate from `unit` on, then those of
// up. Those of shared experts go to `shared_hidden`.
template <class P>
static __device__ __forceinline__ void few_in(
    const ExpertsFewInParams& p, const Chosen& own, P product, u32 unit, bf16* shared_hidden) {
    auto row_of = [&](u32 assignment) {
        return p.input + (u64)(is_shared(shared_hidden) ? assignment : assignment / p.top_k) * p.width;
    };
    few(own, product, row_of, [&](u32 assignment, u32 n, float sum) {
        float other = __shfl_down_sync(EVERY_LANE, sum, FEW_OUTPUTS / 2);
        if (n >= FEW_OUTPUTS / 2 || assignment == NONE || unit + n >= p.hidden_width) return;
        bf16* to = is_shared(shared_hidden) ? shared_hidden : p.hidden;
        to[(u64)assignment * p.hidden_width + unit + n] = narrow(silu(sum) * other);
    });
}

// hidden = silu(gate x) * (up x) for single rows. Grid (ceil(hidden_width / 16), maximum number of chosen experts, one more with
// shared experts), block 256.
extern "C" __global__ void __launch_bounds__(256, 3) experts_few_in(const __grid_constant__ ExpertsFewInParams p) {
    grid_dependency_synchronize();
    Chosen own = chosen(p.batch, p.ids, p.list, p.most, p.top_k, p.first_expert, p.experts, p.shared != nullptr);
    if (own.count == 0) return;
    const bf16 *gate = (const bf16*)p.gate, *up = (const bf16*)p.up;
    if (is_shared(p.shared)) {
        gate = p.shared;
        up = p.shared + (u64)p.hidden_width * p.width;
    }
    u32 unit = blockIdx.x * (FEW_OUTPUTS / 2);
    FewDense product{{}, p.width};
#pragma unroll
    for (u32 i = 0; i < 4; i++) {
        u32 n = min(unit + threadIdx.x % 32 / 4 + i % 2 * 8, p.hidden_width - 1);
        product.weights[i] = (i < 2 ? gate : up) + ((u64)own.expert * p.hidden_width + n) * p.width;
    }
    few_in(p, own, product, unit, p.shared_hidden);
}
ENTRY(experts_few_in)

// The same if a stack is in blocks: each has its own format, rows are whole blocks.
extern "C" __global__ void __launch_bounds__(256, 2) experts_few_in_blocks(const ExpertsFewInParams p) {
    grid_dependency_synchronize();
    Chosen own = chosen(p.batch, p.ids, p.list, p.most, p.top_k, p.first_expert, p.experts, false);
    if (own.count == 0) return;
    u32 unit = blockIdx.x * (FEW_OUTPUTS / 2);
    FewRows weights{p.gate, p.up, p.gate_format, p.up_format, {}};
#pragma unroll
    for (u32 i = 0; i < 4; i++) {
        u32 n = min(unit + threadIdx.x % 32 / 4 + i % 2 * 8, p.hidden_width - 1);
        weights.rows[i] = ((u64)own.expert * p.hidden_width + n) * p.width;
    }
    auto product = [&](FewSums& sums, const bf16* row) { few_product(sums, weights, row, p.width); };
    few_in(p, own, product, unit, nullptr);
}
ENTRY(experts_few_in_blocks)

// The common part of the output kernels for single rows: the product's outputs are those of down from `output` on. Those of
// shared experts go to `shared_output`.
template <class P>
static __device__ __forceinline__ void few_out(
    const ExpertsFewOutParams& p, const Chosen& own, P product, u32 output, bf16* shared_output) {
    auto row_of = [&](u32 assignment) {
        return (is_shared(shared_output) ? p.shared_hidden : p.hidden) + (u64)assignment * p.hidden_width;
    };
    few(own, product, row_of, [&](u32 assignment, u32 n, float sum) {
        if (assignment == NONE || output + n >= p.width) return;
        u64 at = (u64)assignment * p.width + output + n;
        if (is_shared(shared_output)) {
            shared_output[at] = narrow(sum);
        } else {
            p.results[at] = sum;
        }
    });
}

// results = down hidden for single rows. Grid (ceil(width / 32), maximum number of chosen experts, one more with shared
// experts), block 256.
extern "C" __global__ void __launch_bounds__(256, 3) experts_few_out(const __grid_constant__ ExpertsFewOutParams p) {
    grid_dependency_synchronize();
    Chosen own = chosen(p.batch, p.ids, p.list, p.most, p.top_k, p.first_expert, p.experts, p.shared != nullptr);
    if (own.count == 0) return;
    const bf16* down = is_shared(p.shared) ? p.shared : (const bf16*)p.down;
    u32 output = blockIdx.x * FEW_OUTPUTS;
    FewDense product{{}, p.hidden_width};
#pragma unroll
    for (u32 i = 0; i < 4; i++) {
        u32 n = min(output + threadIdx.x % 32 / 4 + i * 8, p.width - 1);
        product.weights[i] = down + ((u64)own.expert * p.width + n) * p.hidden_width;
    }
    few_out(p, own, product, output, p.shared_output);
}
ENTRY(experts_few_out)

// The same with a stack in blocks.
extern "C" __global__ void __launch_bounds__(256, 2) experts_few_out_blocks(const ExpertsFewOutParams p) {
    grid_dependency_synchronize();
    Chosen own = chosen(p.batch, p.ids, p.list, p.most, p.top_k, p.first_expert, p.experts, false);
    if (own.count == 0) return;
    u32 output = blockIdx.x * FEW_OUTPUTS;
    FewRows weights{p.down, p.down, p.format, p.format, {}};
#pragma unroll
    for (u32 i = 0; i < 4; i++) {
        u32 n = min(output + threadIdx.x % 32 / 4 + i * 8, p.width - 1);
        weights.rows[i] = ((u64)own.expert * p.width + n) * p.hidden_width;
    }
    auto product = [&](FewSums& sums, const bf16* row) { few_product(sums, weights, row, p.hidden_width); };
    few_out(p, own, product, output, nullptr);
}
ENTRY(experts_few_out_blocks)

// Assignments of longer segments that a block counts and lists.
#define SHARE 2048

// The number of assignments to each expert in each share of longer segments' assignments. Grid (ceil(assignments / 2048)),
// block 256; dynamic shared memory: 4 bytes per expert.
extern "C" __global__ void __launch_bounds__(256) experts_count(const ExpertsGroupParams p) {
    grid_dependency_synchronize();
    u32* own = (u32*)dynamic_shared();
    u32 assignments = p.batch[SEVERAL_ROWS] * p.top_k, start = blockIdx.x * SHARE;
    if (start >= assignments) return;
    for (u32 e = threadIdx.x; e < p.experts; e += 256) own[e] = 0;
    __syncthreads();
    for (u32 i = start + threadIdx.x; i < min(start + SHARE, assignments); i += 256) {
        u32 expert = p.ids[several_assignment(p.batch, p.top_k, i)] - p.first_expert;
        if (expert < p.experts) atomicAdd(own + expert, 1u);
    }
    __syncthreads();
    for (u32 e = threadIdx.x; e < p.experts; e += 256) p.counts[(u64)blockIdx.x * p.experts + e] = own[e];
}
ENTRY(experts_count)

// Sorts assignments by expert, and within an expert in the batch's order, with 256 threads: a block sorts those from `start`
// to `end` of `assignments`, which `assignment_of` returns. `groups` is words: the number of runs; then [most, 3]: expert,
// index of the first assignment in the list, number of assignments (at most `run`); then the list of assignments. `counts`
// has the counts of other blocks; null for a single block. Dynamic shared memory: 40 bytes per expert.
template <class P>
static __device__ __forceinline__ void sort_assignments(
    const u32* ids, const u32* counts, u32* groups, u32 most, u32 run, u32 first, u32 experts, u32 start, u32 end,
    u32 assignments, P assignment_of) {
    u32* starts = (u32*)dynamic_shared();  // [experts]: number of assignments, then the index of the first one
    u32* runs = starts + experts;          // [experts]: an expert's first run
    u32* next = runs + experts;            // [8, experts]: index of a warp's next assignment to an expert
    u32* list = groups + 1 + 3 * (u64)most;
    u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32, shares = (assignments + SHARE - 1) / SHARE;
    for (u32 i = threadIdx.x; i < 8 * experts; i += 256) next[i] = 0;
    __syncthreads();
    // Counts of each warp per expert, and of all shares, with those before this one separate.
    u32 share = (end - start + 255) / 256 * 32, begin = min(start + warp * share, end);
    end = min(begin + share, end);
    for (u32 i = begin + lane; i < end; i += 32) {
        u32 expert = ids[assignment_of(i)] - first;
        if (expert < experts) atomicAdd(next + warp * experts + expert, 1u);
    }
    __syncthreads();
    for (u32 e = threadIdx.x; e < experts; e += 256) {
        u32 all = 0, before = 0;
        if (counts != nullptr) {
#pragma unroll 8
            for (u32 s = 0; s < shares; s++) {
                u32 count = counts[(u64)s * experts + e];
                if (s < blockIdx.x) before += count;
                all += count;
            }
        }
        for (u32 w = 0; w < 8; w++) {
            u32 count = next[w * experts + e];
            next[w * experts + e] = before;
            before += count;
        }
        starts[e] = counts != nullptr ? all : before;
    }
    __syncthreads();
    // Counts become prefix sums; the first block also writes the runs.
    if (warp == 0) {
        u32 at = 0, number = 0;
        for (u32 base = 0; base < experts; base += 32) {
            u32 e = base + lane, count = e < experts ? starts[e] : 0;
            u32 own_runs = (count + run - 1) / run, sum = count, run_sum = own_runs;
#pragma unroll
            for (u32 step = 1; step < 32; step *= 2) {
                u32 other = __shfl_up_sync(EVERY_LANE, sum, step), more = __shfl_up_sync(EVERY_LANE, run_sum, step);
                if (lane >= step) {
                    sum += other;
                    run_sum += more;
                }
            }
            if (e < experts) {
                starts[e] = at + sum - count;
                runs[e] = number + run_sum - own_runs;
                for (u32 n = 0; blockIdx.x == 0 && n < own_runs; n++) {
                    u32* entry = groups + 1 + 3 * (u64)(runs[e] + n);
                    entry[0] = e;
                    entry[1] = starts[e] + n * run;
                    entry[2] = min(count - n * run, run);
                }
            }
            at += __shfl_sync(EVERY_LANE, sum, 31);
            number += __shfl_sync(EVERY_LANE, run_sum, 31);
        }
        if (blockIdx.x == 0 && lane == 0) groups[0] = number;
    }
    __syncthreads();
    for (u32 base = begin; base < end; base += 32) {
        u32 i = base + lane, assignment = i < end ? assignment_of(i) : 0;
        u32 expert = i < end ? ids[assignment] - first : NONE;
        u32 peers = __match_any_sync(EVERY_LANE, expert), rank = (u32)__popc(peers & ((1u << lane) - 1));
        u32* to = next + warp * experts + expert;
        if (expert < experts) list[starts[expert] + *to + rank] = assignment;
        __syncwarp();
        if (expert < experts && rank == 0) *to += (u32)__popc(peers);
        __syncwarp();
    }
}

// Assignments of longer segments in tiles, sorted by expert. Grid (ceil(assignments / 2048)), block 256.
// Dynamic shared memory: 40 bytes per expert.
extern "C" __global__ void __launch_bounds__(256) experts_group(const ExpertsGroupParams p) {
    grid_dependency_synchronize();
    u32 assignments = p.batch[SEVERAL_ROWS] * p.top_k, start = blockIdx.x * SHARE;
    if (start >= assignments) return;
    auto assignment_of = [&](u32 i) { return several_assignment(p.batch, p.top_k, i); };
    u32 end = min(start + SHARE, assignments);
    sort_assignments(
        p.ids, p.counts, p.groups, p.most_tiles, TILE_ROWS, p.first_expert, p.experts, start, end, assignments, assignment_of);
}
ENTRY(experts_group)

// Assignments of single rows, sorted by expert, one run per expert. One block of 256.
// Dynamic shared memory: 40 bytes per expert.
extern "C" __global__ void __launch_bounds__(256) experts_list(const ExpertsGroupParams p) {
    grid_dependency_synchronize();
    u32 assignments = (p.batch[TOKENS] - p.batch[SEVERAL_ROWS]) * p.top_k;
    auto assignment_of = [&](u32 i) { return single_assignment(p.batch, p.top_k, i); };
    u32 run = max(assignments, 1u);
    sort_assignments(
        p.ids, nullptr, p.groups, p.most_tiles, run, p.first_expert, p.experts, 0, assignments, assignments, assignment_of);
}
ENTRY(experts_list)

// The common part of the input kernels for tiles: rows of gate and up from `column` on.
template <class B>
static __device__ __forceinline__ void many_in(
    const bf16* const (&a)[TILE_OWN], const B& b, const u32* list, bf16* hidden, u32 rows, u32 column, u32 width,
    u32 hidden_width) {
    // A warp's columns 0 to 31 are those of the gate, the others the same columns of up.
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

// hidden = silu(gate x) * (up x) for a tile of assignments (y) and 64 columns (x), on tensor cores; 128 threads.
// Dynamic shared memory: TILE_STAGES of two tiles.
extern "C" __global__ void __launch_bounds__(128, 2) experts_many_in(const ExpertsManyInParams p) {
    grid_dependency_synchronize();
    if (blockIdx.y >= p.groups[0]) return;
    const u32* tile = p.groups + 1 + 3 * (u64)blockIdx.y;
    const u32* list = p.groups + 1 + 3 * (u64)p.most_tiles + tile[1];
    u32 rows = tile[2], column = blockIdx.x * (TILE_COLUMNS / 2);
    u64 matrix = (u64)tile[0] * p.hidden_width * p.width;
    const bf16 *a[TILE_OWN], *b[TILE_OWN];
#pragma unroll
    for (u32 i = 0; i < TILE_OWN; i++) {
        u32 r = tile_row(i), n = column + r % 64;
        a[i] = r < rows ? p.input + (u64)(list[r] / p.top_k) * p.width : nullptr;
        b[i] = n < p.hidden_width ? (const bf16*)(r < 64 ? p.gate : p.up) + matrix + (u64)n * p.width : nullptr;
    }
    many_in(a, b, list, p.hidden, rows, column, p.width, p.hidden_width);
}
ENTRY(experts_many_in)

// The same if a stack is in blocks: each has its own format, rows are whole blocks.
extern "C" __global__ void __launch_bounds__(128, 2) experts_many_in_blocks(const ExpertsManyInParams p) {
    grid_dependency_synchronize();
    if (blockIdx.y >= p.groups[0]) return;
    const u32* tile = p.groups + 1 + 3 * (u64)blockIdx.y;
    const u32* list = p.groups + 1 + 3 * (u64)p.most_tiles + tile[1];
    u32 rows = tile[2], column = blockIdx.x * (TILE_COLUMNS / 2);
    const bf16* a[TILE_OWN];
#pragma unroll
    for (u32 i = 0; i < TILE_OWN; i++) {
        u32 r = tile_row(i);
        a[i] = r < rows ? p.input + (u64)(list[r] / p.top_k) * p.width : nullptr;
    }
    u64 from = ((u64)tile[0] * p.hidden_width + column) * p.width;
    u32 there = min(p.hidden_width - column, TILE_ROWS / 2u);
    StoredRows b[2] = {{p.gate, p.gate_format, from, there}, {p.up, p.up_format, from, there}};
    many_in(a, b, list, p.hidden, rows, column, p.width, p.hidden_width);
}
ENTRY(experts_many_in_blocks)

// The common part of the output kernels for tiles: rows of down from `column` on.
template <class B>
static __device__ __forceinline__ void many_out(
    const bf16* const (&a)[TILE_OWN], const B& b, const u32* list, float* results, u32 rows, u32 column, u32 width,
    u32 hidden_width) {
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

// results = down hidden for a tile of assignments (y) and TILE_COLUMNS columns (x), on tensor cores; 128 threads.
// Dynamic shared memory: TILE_STAGES of two tiles.
extern "C" __global__ void __launch_bounds__(128, 2) experts_many_out(const ExpertsManyOutParams p) {
    grid_dependency_synchronize();
    if (blockIdx.y >= p.groups[0]) return;
    const u32* tile = p.groups + 1 + 3 * (u64)blockIdx.y;
    const u32* list = p.groups + 1 + 3 * (u64)p.most_tiles + tile[1];
    u32 rows = tile[2], column = blockIdx.x * TILE_COLUMNS;
    u64 matrix = (u64)tile[0] * p.width * p.hidden_width;
    const bf16 *a[TILE_OWN], *b[TILE_OWN];
#pragma unroll
    for (u32 i = 0; i < TILE_OWN; i++) {
        u32 r = tile_row(i);
        a[i] = r < rows ? p.hidden + (u64)list[r] * p.hidden_width : nullptr;
        b[i] = column + r < p.width ? (const bf16*)p.down + matrix + (u64)(column + r) * p.hidden_width : nullptr;
    }
    many_out(a, b, list, p.results, rows, column, p.width, p.hidden_width);
}
ENTRY(experts_many_out)

// The same with a stack in blocks.
extern "C" __global__ void __launch_bounds__(128, 2) experts_many_out_blocks(const ExpertsManyOutParams p) {
    grid_dependency_synchronize();
    if (blockIdx.y >= p.groups[0]) return;
    const u32* tile = p.groups + 1 + 3 * (u64)blockIdx.y;
    const u32* list = p.groups + 1 + 3 * (u64)p.most_tiles + tile[1];
    u32 rows = tile[2], column = blockIdx.x * TILE_COLUMNS;
    const bf16* a[TILE_OWN];
#pragma unroll
    for (u32 i = 0; i < TILE_OWN; i++) {
        u32 r = tile_row(i);
        a[i] = r < rows ? p.hidden + (u64)list[r] * p.hidden_width : nullptr;
    }
    StoredRows b[2];
#pragma unroll
    for (u32 half = 0; half < 2; half++) {
        u32 n = column + half * (TILE_ROWS / 2);
        u64 from = ((u64)tile[0] * p.width + n) * p.hidden_width;
        b[half] = {p.down, p.format, from, n < p.width ? min(p.width - n, TILE_ROWS / 2u) : 0};
    }
    many_out(a, b, list, p.results, rows, column, p.width, p.hidden_width);
}
ENTRY(experts_many_out_blocks)
