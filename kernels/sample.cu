// Draws tokens from rows of logits. Counterpart of src/backend/cpu/sample.rs; src/backend/draw.rs defines what is drawn.
//
// A row is cut into at most 256 slices. `sample_change` writes a copy of a row whose logits a draw changes; `sample_best` finds
// each slice's best token; `sample_narrow` counts or weighs the tokens by eight bits of their keys, from the upper ones on,
// until the key is known at which top_k or top_p is reached; `sample_sum` sums the weights of each slice's kept tokens;
// `sample_draw` finds the token. Weights and their sums are integers, so no result depends on an order.
#include "shared/kernel.h"
#include "shared/batch.h"
#include "shared/best.h"
#include "shared/params_rows.h"

#define SAMPLE_THREADS 256
// Cells of a draw: [2, 4, 256], by number and by weight, in each level.
#define CELLS (2 * 4 * 256)
// A distance of 31 binary orders and more has no weight.
#define FARTHEST 2080374784.0f
// The bits of a logit that is removed; its key is 0.
#define REMOVED 0xffffffffu

// A row as a draw reads it.
struct Row {
    const u32* draw;
    // The row, or its copy with changes.
    const float* logits;
    // The bit mask of allowed tokens; null if all are, or if the copy has it.
    const u32* mask;

    // A token's logit, REMOVED if the draw does not allow it.
    __device__ __forceinline__ u32 bits(u32 i) const {
        if (mask != nullptr && !(mask[i / 32] >> (i % 32) & 1)) return REMOVED;
        return __float_as_uint(logits[i]);
    }
    // A token's key; 0 if it is removed.
    __device__ __forceinline__ u32 key(u32 i) const { return (u32)(ranked(__uint_as_float(bits(i)), 0) >> 32); }
};

static __device__ __forceinline__ Row row_of(const SampleParams& p, u32 draw, const float* changed) {
    const u32* words = p.batch + p.batch[AT_DRAWS] + draw * DRAW_WORDS;
    if (changed != nullptr && words[DRAW_CHANGED] != NONE) {
        return Row{words, changed + (u64)words[DRAW_CHANGED] * p.vocabulary, nullptr};
    }
    const u32* mask = words[DRAW_ALLOWED] == NONE ? nullptr : p.batch + words[DRAW_ALLOWED];
    return Row{words, p.logits + (u64)words[DRAW_ROW] * p.vocabulary, mask};
}

static __device__ __forceinline__ u32 upper(u32 a, u32 b) { return (u32)((u64)a * b >> 32); }

// sum * share / 2^32, rounded down.
static __device__ __forceinline__ u64 share_of(u64 sum, u32 share) { return (sum >> 32) * share + ((sum & 0xffffffffu) * share >> 32); }

// The weight of a key, 2^(31 - distance / 2^26) with the same integers as in draw.rs; `greatest` is the greatest key.
static __device__ __forceinline__ u32 weight_of(const Row& row, u32 greatest, u32 key) {
    float scale = __uint_as_float(row.draw[DRAW_SCALE]);
    float distance = __fmul_rn(ranked_score((u64)greatest << 32) - ranked_score((u64)key << 32), scale);
    if (key == 0 || !(distance < FARTHEST)) return 0;
    u32 units = (u32)distance, y = ~(units << 6);
    u32 sum = 3840493u;
    sum = 19755534u + upper(sum, y);
    sum = 119522614u + upper(sum, y);
    sum = 515841022u + upper(sum, y);
    sum = 1488523067u + upper(sum, y);
    return (0x80000000u + upper(sum, y)) >> ((units >> 26) + 1);
}

// The same, 0 below the least weight that the draw keeps.
static __device__ __forceinline__ u32 kept_weight(const Row& row, u32 greatest, u32 key) {
    u32 weight = weight_of(row, greatest, key);
    return weight >= row.draw[DRAW_LEAST] ? weight : 0;
}

// The sum of the values of this thread and those before it; `all` is the sum of all. `scratch` is 256 words, free again when
// this returns.
static __device__ __forceinline__ u64 scan(u64 value, u64* scratch, u64* all) {
    scratch[threadIdx.x] = value;
    for (u32 step = 1; step < SAMPLE_THREADS; step *= 2) {
        __syncthreads();
        u64 other = threadIdx.x >= step ? scratch[threadIdx.x - step] : 0;
        __syncthreads();
        scratch[threadIdx.x] += other;
    }
    __syncthreads();
    u64 upto = scratch[threadIdx.x];
    *all = scratch[SAMPLE_THREADS - 1];
    __syncthreads();
    return upto;
}

// The best token of a draw, ranked as in best.h.
static __device__ __forceinline__ u64 best_token(const u64* best, u32 draw, u32 slices, u64* scratch) {
    return block_best(threadIdx.x < slices ? best[(u64)draw * slices + threadIdx.x] : 0, scratch);
}

// The key's upper bits at which a goal is reached, how much of the goal greater keys leave, and whether it is reached.
struct Narrowed {
    u32 key;
    u64 left;
    bool reached;
};

// Follows the first `levels` levels. `extra` is added to the weight of all tokens, which the goal of a top_p is a share of.
// `scratch` is 258 words.
static __device__ Narrowed narrowed(const Row& row, const u64* cells, u32 by_weight, u32 levels, u64 extra, u64* scratch) {
    u64* crossing = scratch + SAMPLE_THREADS;
    Narrowed found{0, row.draw[DRAW_TOP_K], true};
    for (u32 level = 0; level < levels; level++) {
        // Greater keys first.
        u32 digit = 255 - threadIdx.x;
        u64 own = cells[(by_weight * 4 + level) * 256 + digit], sum;
        u64 upto = scan(own, scratch, &sum);
        if (level == 0 && by_weight) found.left = max(share_of(sum + extra, row.draw[DRAW_TOP_P]), (u64)1);
        if (threadIdx.x == 0) {
            crossing[0] = NONE;
            crossing[1] = found.left - sum;
        }
        __syncthreads();
        if (upto - own < found.left && found.left <= upto) {
            crossing[0] = digit;
            crossing[1] = found.left - (upto - own);
        }
        __syncthreads();
        u32 reached = (u32)crossing[0];
        found.left = crossing[1];
        __syncthreads();
        if (reached == NONE) return Narrowed{0, found.left, false};
        found.key |= reached << (24 - 8 * level);
    }
    return found;
}

// The last key that is kept, and how many tokens with that key are, those with the lowest ids.
struct Cut {
    u32 key;
    u32 ties;
};

static __device__ Cut cut_by_count(const Row& row, const u64* cells, u64* scratch) {
    if (row.draw[DRAW_TOP_K] == 0) return Cut{0, 0};
    Narrowed found = narrowed(row, cells, 0, 4, 0, scratch);
    return found.reached ? Cut{found.key, (u32)found.left} : Cut{0, 0};
}

static __device__ Cut cut_of(const Row& row, const u64* cells, u32 greatest, u64* scratch) {
    Cut most = cut_by_count(row, cells, scratch);
    if (row.draw[DRAW_TOP_P] == 0) return most;
    u64 extra = (u64)most.ties * weight_of(row, greatest, most.key);
    Narrowed found = narrowed(row, cells, 1, 4, extra, scratch);
    // Keys above the one that top_k ends at were weighed: a goal that they do not reach is reached among its ties.
    u32 key = found.reached ? found.key : most.key;
    u32 each = max(weight_of(row, greatest, key), 1u);
    return Cut{key, (u32)((found.left + each - 1) / each)};
}

// One block of 256 threads per slice (x) of a draw (y). Writes `changed`.
extern "C" __global__ void __launch_bounds__(SAMPLE_THREADS) sample_change(const SampleParams p) {
    grid_dependency_synchronize();
    if (blockIdx.y >= p.batch[DRAWS]) return;
    Row row = row_of(p, blockIdx.y, nullptr);
    if (row.draw[DRAW_CHANGED] == NONE) return;
    u32 first = blockIdx.x * p.slice, end = min(p.vocabulary, first + p.slice);
    float* changed = p.changed + (u64)row.draw[DRAW_CHANGED] * p.vocabulary;
    for (u32 i = first + threadIdx.x; i < end; i += SAMPLE_THREADS) changed[i] = __uint_as_float(row.bits(i));
    __syncthreads();
    const u32* changes = p.batch + row.draw[DRAW_CHANGES];
    for (u32 n = threadIdx.x; n < row.draw[DRAW_CHANGE_COUNT]; n += SAMPLE_THREADS) {
        const u32* change = changes + n * CHANGE_WORDS;
        u32 i = change[CHANGE_TOKEN];
        if (i < first || i >= end || row.bits(i) == REMOVED) continue;
        float logit = row.logits[i];
        float factor = __uint_as_float(logit > 0.0f ? change[CHANGE_POSITIVE] : change[CHANGE_NEGATIVE]);
        float moved = __fadd_rn(__fmul_rn(logit, factor), __uint_as_float(change[CHANGE_ADD]));
        changed[i] = fminf(fmaxf(moved, -3.40282347e38f), 3.40282347e38f);
    }
}
ENTRY(sample_change)

// One block of 256 threads per slice (x) of a draw (y). Writes `best`, and sets `cells` to 0.
extern "C" __global__ void __launch_bounds__(SAMPLE_THREADS) sample_best(const SampleParams p) {
    grid_dependency_synchronize();
    SHARED(u64, scratch, 32);
    if (blockIdx.y >= p.batch[DRAWS]) return;
    Row row = row_of(p, blockIdx.y, p.changed);
    u32 first = blockIdx.x * p.slice, end = min(p.vocabulary, first + p.slice);
    u64 mine = 0;
    for (u32 i = first + threadIdx.x; i < end; i += SAMPLE_THREADS) {
        u32 key = row.key(i);
        if (key > 0) mine = max(mine, (u64)key << 32 | (u32)~i);
    }
    mine = block_best(mine, scratch);
    if (threadIdx.x == 0) p.best[(u64)blockIdx.y * gridDim.x + blockIdx.x] = mine;
    if (blockIdx.x == 0) {
        for (u32 i = threadIdx.x; i < CELLS; i += SAMPLE_THREADS) p.cells[(u64)blockIdx.y * CELLS + i] = 0;
    }
}
ENTRY(sample_best)

// One block of 256 threads per slice (x) of a draw (y). Reads the `cells` of the levels before and adds
// to those of this level.
extern "C" __global__ void __launch_bounds__(SAMPLE_THREADS) sample_narrow(const SampleParams p) {
    grid_dependency_synchronize();
    SHARED(u64, scratch, SAMPLE_THREADS + 2);
    SHARED(u64, counts, 256);
    if (blockIdx.y >= p.batch[DRAWS]) return;
    Row row = row_of(p, blockIdx.y, p.changed);
    if (row.draw[p.by_weight ? DRAW_TOP_P : DRAW_TOP_K] == 0) return;
    u64* cells = p.cells + (u64)blockIdx.y * CELLS;
    u32 greatest = (u32)(best_token(p.best, blockIdx.y, gridDim.x, scratch) >> 32);
    u32 above = 0;
    u64 extra = 0;
    if (p.by_weight) {
        Cut most = cut_by_count(row, cells, scratch);
        above = most.key;
        extra = (u64)most.ties * weight_of(row, greatest, most.key);
    }
    Narrowed found = narrowed(row, cells, p.by_weight, p.level, extra, scratch);
    if (!found.reached) return;
    counts[threadIdx.x] = 0;
    __syncthreads();
    u32 shift = 24 - 8 * p.level;
    // The bits of the levels before.
    u32 known = p.level == 0 ? 0 : ~0u << (shift + 8);
    u32 first = blockIdx.x * p.slice, end = min(p.vocabulary, first + p.slice);
    for (u32 i = first + threadIdx.x; i < end; i += SAMPLE_THREADS) {
        u32 key = row.key(i);
        if (key > above && (key & known) == found.key) {
            u64 amount = p.by_weight ? weight_of(row, greatest, key) : 1;
            atomicAdd(counts + (key >> shift & 255), amount);
        }
    }
    __syncthreads();
    u64 count = counts[threadIdx.x];
    if (count > 0) atomicAdd(cells + (p.by_weight * 4 + p.level) * 256 + threadIdx.x, count);
}
ENTRY(sample_narrow)

// One block of 256 threads per slice (x) of a draw (y). Writes `sums`.
extern "C" __global__ void __launch_bounds__(SAMPLE_THREADS) sample_sum(const SampleParams p) {
    grid_dependency_synchronize();
    SHARED(u64, scratch, SAMPLE_THREADS + 2);
    if (blockIdx.y >= p.batch[DRAWS]) return;
    Row row = row_of(p, blockIdx.y, p.changed);
    if (row.draw[DRAW_SCALE] == 0) return;
    const u64* cells = p.cells + (u64)blockIdx.y * CELLS;
    u32 greatest = (u32)(best_token(p.best, blockIdx.y, gridDim.x, scratch) >> 32);
    Cut cut = cut_of(row, cells, greatest, scratch);
    u32 first = blockIdx.x * p.slice, end = min(p.vocabulary, first + p.slice);
    u64 sum = 0, ties = 0, whole, tied;
    for (u32 i = first + threadIdx.x; i < end; i += SAMPLE_THREADS) {
        u32 key = row.key(i);
        if (key > cut.key) sum += kept_weight(row, greatest, key);
        ties += key == cut.key;
    }
    scan(sum, scratch, &whole);
    scan(ties, scratch, &tied);
    if (threadIdx.x == 0) {
        u64* to = p.sums + 2 * ((u64)blockIdx.y * gridDim.x + blockIdx.x);
        to[0] = whole;
        to[1] = tied;
    }
}
ENTRY(sample_sum)

// The number of a part's `ties` that are kept, after `before` others.
static __device__ __forceinline__ u64 kept_ties(Cut cut, u64 ties, u64 before) {
    return min(ties, before < cut.ties ? cut.ties - before : (u64)0);
}

// Sets a draw's result: the token that is ranked best, or none.
static __device__ __forceinline__ void put_best(const SampleParams& p, const Row& row, u64 best, u32* drawn) {
    drawn[0] = best == 0 ? NONE : ranked_id(best);
    drawn[1] = best == 0 ? 0 : __float_as_uint(p.logits[(u64)row.draw[DRAW_ROW] * p.vocabulary + ranked_id(best)]);
}

// One block of 256 threads per draw. Writes `drawn`.
extern "C" __global__ void __launch_bounds__(SAMPLE_THREADS) sample_draw(const SampleParams p) {
    grid_dependency_synchronize();
    SHARED(u64, scratch, SAMPLE_THREADS + 2);
    SHARED(u64, crossing, 3);
    u32 draw = blockIdx.x;
    if (draw >= p.batch[DRAWS]) return;
    Row row = row_of(p, draw, p.changed);
    const u64* cells = p.cells + (u64)draw * CELLS;
    u32* drawn = p.drawn + 2 * draw;
    u64 top = best_token(p.best, draw, p.slices, scratch);
    if (row.draw[DRAW_SCALE] == 0) {
        if (threadIdx.x == 0) put_best(p, row, top, drawn);
        return;
    }
    u32 greatest = (u32)(top >> 32);
    Cut cut = cut_of(row, cells, greatest, scratch);
    u32 each = kept_weight(row, greatest, cut.key);
    const u64* part = p.sums + 2 * ((u64)draw * p.slices + min(threadIdx.x, p.slices - 1));
    u64 own = threadIdx.x < p.slices ? part[0] : 0, ties = threadIdx.x < p.slices ? part[1] : 0, all;
    u64 before = scan(ties, scratch, &all) - ties;
    own += kept_ties(cut, ties, before) * each;
    u64 start = scan(own, scratch, &all) - own;
    u64 left = share_of(all, row.draw[DRAW_RANDOM]);
    if (threadIdx.x == 0) crossing[0] = NONE;
    __syncthreads();
    if (start <= left && left < start + own) {
        crossing[0] = threadIdx.x;
        crossing[1] = left - start;
        crossing[2] = before;
    }
    __syncthreads();
    if (crossing[0] == NONE) {
        // Without any weight: no token is allowed, or the row is not finite.
        if (threadIdx.x == 0) put_best(p, row, top, drawn);
        return;
    }
    // Consecutive tokens of the slice for each thread.
    u32 many = (p.slice + SAMPLE_THREADS - 1) / SAMPLE_THREADS;
    u32 end = min(p.vocabulary, ((u32)crossing[0] + 1) * p.slice);
    u32 first = min(end, (u32)crossing[0] * p.slice + threadIdx.x * many), last = min(end, first + many);
    own = ties = 0;
    for (u32 i = first; i < last; i++) {
        u32 key = row.key(i);
        if (key > cut.key) own += kept_weight(row, greatest, key);
        ties += key == cut.key;
    }
    before = crossing[2] + scan(ties, scratch, &all) - ties;
    own += kept_ties(cut, ties, before) * each;
    start = scan(own, scratch, &all) - own;
    left = crossing[1];
    if (left < start || left >= start + own) return;
    left -= start;
    for (u32 i = first; i < last; i++) {
        u32 key = row.key(i);
        u32 weight = key > cut.key ? kept_weight(row, greatest, key) : key == cut.key && before < cut.ties ? each : 0;
        before += key == cut.key;
        if (left < weight) {
            drawn[0] = i;
            drawn[1] = __float_as_uint(p.logits[(u64)row.draw[DRAW_ROW] * p.vocabulary + i]);
            return;
        }
        left -= weight;
    }
}
ENTRY(sample_draw)
