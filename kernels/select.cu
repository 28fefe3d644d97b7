// The next token of a row: its best candidates, its log-normaliser, and whether all logits are finite. Counterpart of
// src/backend/cpu/select.rs.
//
// Two kernels: `select_slices` cuts a row into slices of 1024 logits and writes each slice's candidates and partial sums;
// `select_merge` merges the slices of a row.
#include "shared/kernel.h"
#include "shared/batch.h"
#include "shared/best.h"
#include "shared/params_rows.h"

#define SLICE 1024
#define SELECT_THREADS 256
#define OWN (SLICE / SELECT_THREADS)

// One block of 256 threads per slice (x) of a row (y).
extern "C" __global__ void __launch_bounds__(SELECT_THREADS) select_slices(const SelectParams p) {
    grid_dependency_synchronize();
    SHARED(float, scratch, 32);
    SHARED(u64, best_scratch, 32);
    u32 row = blockIdx.y, slices = gridDim.x;
    if (row >= p.batch[OUTPUTS]) return;
    const float* logits = p.logits + (u64)row * p.vocabulary;
    u64 slice = (u64)row * slices + blockIdx.x;
    u64 own[OWN];
    float values[OWN];
    float wrong = 0.0f;
#pragma unroll
    for (u32 n = 0; n < OWN; n++) {
        u32 i = blockIdx.x * SLICE + n * SELECT_THREADS + threadIdx.x;
        own[n] = 0;
        values[n] = -INFINITE;
        if (i < p.vocabulary) {
            values[n] = logits[i];
            own[n] = ranked(values[n], i);
            if (!(fabsf(values[n]) < INFINITE)) wrong = 1.0f;
        }
    }
    wrong = block_sum(wrong, scratch);
    float greatest = 0.0f;
    for (u32 c = 0; c < p.candidates; c++) {
        u64 best = 0;
#pragma unroll
        for (u32 n = 0; n < OWN; n++) best = max(best, own[n]);
        best = block_best(best, best_scratch);
        if (c == 0) greatest = ranked_score(best);
#pragma unroll
        for (u32 n = 0; n < OWN; n++) {
            if (own[n] == best) own[n] = 0;
        }
        if (threadIdx.x == 0) p.ranks[slice * p.candidates + c] = best;
    }
    float sum = 0.0f;
#pragma unroll
    for (u32 n = 0; n < OWN; n++) sum += expf(values[n] - greatest);
    sum = block_sum(sum, scratch);
    if (threadIdx.x == 0) {
        p.sums[4 * slice] = greatest;
        p.sums[4 * slice + 1] = sum;
        p.sums[4 * slice + 2] = wrong == 0.0f ? 1.0f : 0.0f;
    }
}
ENTRY(select_slices)

// One block of 256 threads per row.
extern "C" __global__ void __launch_bounds__(SELECT_THREADS) select_merge(const SelectParams p) {
    grid_dependency_synchronize();
    SHARED(float, scratch, 32);
    SHARED(u64, best_scratch, 32);
    u32 row = blockIdx.x;
    if (row >= p.batch[OUTPUTS]) return;
    u64* ranks = p.ranks + (u64)row * p.slices * p.candidates;
    const float* sums = p.sums + (u64)row * p.slices * 4;
    u32* choices = p.choices + (u64)row * (4 + 2 * p.candidates);
    float wrong = 0.0f;
    u64 most_rank = 0;
    for (u32 s = threadIdx.x; s < p.slices; s += SELECT_THREADS) {
        if (sums[4 * s + 2] != 1.0f) wrong = 1.0f;
        most_rank = max(most_rank, ranked(sums[4 * s], 0));
    }
    wrong = block_sum(wrong, scratch);
    float most = ranked_score(block_best(most_rank, best_scratch));
    float sum = 0.0f;
    for (u32 s = threadIdx.x; s < p.slices; s += SELECT_THREADS) sum += sums[4 * s + 1] * expf(sums[4 * s] - most);
    sum = block_sum(sum, scratch);
    if (threadIdx.x == 0) {
        u32 target = p.batch[p.batch[AT_OUTPUTS] + OUTPUT_WORDS * row + OUTPUT_TARGET];
        choices[0] = __float_as_uint(most + logf(sum));
        choices[1] = 0;
        choices[2] = wrong == 0.0f;
        choices[3] = target < p.vocabulary ? __float_as_uint(p.logits[(u64)row * p.vocabulary + target]) : 0;
    }
    for (u32 c = 0; c < p.candidates; c++) {
        u64 best = 0;
        u32 from = 0;
        // A slice's candidates are in order: the first one that is left is its best.
        for (u32 s = threadIdx.x; s < p.slices; s += SELECT_THREADS) {
            for (u32 n = 0; n < p.candidates; n++) {
                u64 rank = ranks[(u64)s * p.candidates + n];
                if (rank == 0) continue;
                if (rank > best) {
                    best = rank;
                    from = s * p.candidates + n;
                }
                break;
            }
        }
        u64 chosen = block_best(best, best_scratch);
        if (chosen == best && best != 0) {
            ranks[from] = 0;
            choices[4 + 2 * c] = ranked_id(best);
            choices[5 + 2 * c] = __float_as_uint(ranked_score(best));
        }
    }
}
ENTRY(select_merge)
