// The gated delta rule in chunks of sixteen tokens, the chunkwise form of Kimi Linear (section 3.2), for prefill, on tensor
// cores: the part that does not depend on the state. Counterpart of src/backend/cpu/kda_chunk.rs.
//
// `kda_prepare` processes all chunks in parallel and writes an image for each chunk and head (`shared/kda_image.h`);
// `kda_scan.cu` processes them in order.
//
// With G the inclusive sum of gates in a chunk, S the state before it:
//
//   A_kk[i][j] = beta_i k_i . (k_j exp(G_i - G_j))  i > j        A_qk[i][j] = q_i . (k_j exp(G_i - G_j))  i >= j
//   U = (I + A_kk)^-1 beta (V - (K exp(G)) S)       O = (Q exp(G)) S + A_qk U       S' = exp(G_16) S + Kr^T U
//
// The inverse is multiplied with K exp(G) and V here, so that the scan's dependent chain has one product less.
//
// Gates have no lower bound, so exp(G_i - G_j) is never computed as exp(G_i) exp(-G_j). If the sums of both halves of a chunk
// are small, the anchor is its middle: one product. Otherwise each block of the matrices has an anchor between its rows and
// columns (dyadic anchors): four products, and every factor is at most 1.
//
// Operands are bf16. Those whose rounding would exceed the error bounds (both matrices' factors, the inverse and what it
// multiplies, Kr) are pairs of a bf16 and its rounding error: docs/performance/hopper.md has the effect of each.
#include "shared/kernel.h"
#include "shared/kda_image.h"
#include "shared/kda_input.h"
#include "shared/params_kda.h"

#define PREPARE_THREADS 128
#define PREPARE_WARPS 4
// Greatest sum of half a chunk's gates for the anchor in the middle: exp(60) times the rounding error of a bf16 keeps its
// digits.
#define MIDDLE_LIMIT 60.0f

// Factors of rows and columns with the anchor in the chunk's middle. `forward` has products of exp(gate) from the thread's
// first token on, `backward` those of the tokens after: outwards from the middle, and their reciprocals on the other side.
static __device__ __forceinline__ void anchor_middle(Own& row, Own& column, const Own& forward, const Own& backward, u32 half) {
    #pragma unroll
    for (u32 i = 0; i < OWN; i++) {
        #pragma unroll
        for (u32 j = 0; j < PAIR; j++) {
            float near = half ? forward[i][j] : backward[i][j], far = reciprocal_near(near);
            row[i][j] = half ? near : far;
            column[i][j] = half ? far : near;
        }
    }
}

// Factors for a dyadic level, of blocks of `span` by `span` tokens: products of exp(gate) outwards from the anchor before a
// block's rows, zeros if a token is not a row (a column) of the level.
static __device__ __forceinline__ void anchor_level(Own& row, Own& column, const Own& kept, u32 half, u32 span) {
    #pragma unroll
    for (u32 j = 0; j < PAIR; j++) {
        float down = 1.0f, up = 1.0f;
        #pragma unroll
        for (u32 i = 0; i < OWN; i++) {
            down = i % span == 0 ? kept[i][j] : down * kept[i][j];
            row[i][j] = (half * OWN + i) & span ? down : 0.0f;
        }
        #pragma unroll
        for (u32 n = 0; n < OWN; n++) {
            u32 i = OWN - 1 - n;
            up = (i + 1) % span == 0 ? 1.0f : up * kept[(i + 1) % OWN][j];
            column[i][j] = (half * OWN + i) & span ? 0.0f : up;
        }
    }
}

// Six matrices [16, K] between phases: rows (k, then q) and columns (k) of the products, each a bf16 and its rounding error.
// The last one shares its memory with W.
template <int PADDED>
struct Operands {
    static constexpr u32 TILES = PADDED / 16;
    bf16 *image, *more;
    __device__ __forceinline__ bf16* operator[](u32 set) const { return set == 5 ? image : more + set * TILES * TILE; }
};

// Both products of rows with columns, by all threads. Warps 0 and 1 compute 16 rows by 8 columns each of A_kk, 2 and 3 of
// A_qk; `found` gets the elements below the diagonal whose row and column first differ at bit `span`: all elements for 16.
template <int PADDED>
static __device__ __forceinline__ void multiply_anchored(
    float (&found)[4], const Operands<PADDED>& operands, const Own& query, const Own& key, const Own& row, const Own& column,
    u32 span) {
    u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32, d = warp * 32 + lane % 16 * 2;
    __syncthreads();
    if (d < PADDED) {
        u32 first = pair_at(lane / 16, d);
        #pragma unroll
        for (u32 i = 0; i < OWN; i++) {
            u32 at = first ^ row_bits(i), part, rest;
            split_pair(key[i][0] * row[i][0], key[i][1] * row[i][1], part, rest);
            *(u32*)(operands[0] + at) = part;
            *(u32*)(operands[1] + at) = rest;
            split_pair(query[i][0] * row[i][0], query[i][1] * row[i][1], part, rest);
            *(u32*)(operands[2] + at) = part;
            *(u32*)(operands[3] + at) = rest;
            split_pair(key[i][0] * column[i][0], key[i][1] * column[i][1], part, rest);
            *(u32*)(operands[4] + at) = part;
            *(u32*)(operands[5] + at) = rest;
        }
    }
    __syncthreads();
    const bf16* rows = operands[warp / 2 * 2];
    const bf16 *columns = operands[4], *columns_rest = operands[5];
    u32 across = unit_across(lane), eight = unit_at(0, warp % 2 * 8 + lane % 8, lane / 8 % 2);
    // Independent sums, so that their instructions overlap.
    float left[4] = {}, right[4] = {}, both[4] = {};
    #pragma unroll
    for (u32 tile = 0; tile < Operands<PADDED>::TILES; tile++) {
        u32 a[4], a_rest[4], b[2], b_rest[2], at = in_tile(tile, across), from = in_tile(tile, eight);
        ldmatrix(a, rows + at);
        ldmatrix(a_rest, rows + Operands<PADDED>::TILES * TILE + at);
        ldmatrix(b, columns + from);
        ldmatrix(b_rest, columns_rest + from);
        mma_bf16(left, a_rest, b);
        mma_bf16(right, a, b_rest);
        mma_bf16(both, a, b);
    }
    #pragma unroll
    for (u32 n = 0; n < 4; n++) {
        u32 i = lane / 4 + n / 2 * 8, j = warp % 2 * 8 + lane % 4 * 2 + n % 2;
        // A select, because elements of other levels may be infinite or NaN.
        bool mine = i > j && (span == 16 || ((i ^ j) >= span && (i ^ j) < 2 * span));
        if (mine) found[n] = left[n] + right[n] + both[n];
    }
}

// Sums over sixteen lanes of eight numbers each: number `lane % 8` is the result of lane `lane`. Each step halves the
// remaining work of a lane.
static __device__ __forceinline__ float sum_eight(float (&x)[OWN], u32 lane) {
    #pragma unroll
    for (u32 step = 4; step > 0; step /= 2) {
        #pragma unroll
        for (u32 i = 0; i < step; i++) {
            float kept = lane & step ? x[i + step] : x[i], sent = lane & step ? x[i] : x[i + step];
            x[i] = kept + __shfl_xor_sync(EVERY_LANE, sent, (int)step);
        }
    }
    return x[0] + __shfl_xor_sync(EVERY_LANE, x[0], 8);
}

// (I + A)^-1 of a strictly lower triangular A [16, 17], by one warp: both halves by forward substitution, then the part below
// them, [A 0; B D]^-1 = [A^-1 0; -D^-1 B A^-1, D^-1].
static __device__ __forceinline__ void invert(float* inverse, float* matrix, u32 lane) {
    constexpr u32 STRIDE = CHUNK + 1;
    u32 c = lane % 8;
    if (lane < 16) {
        const float* from = matrix + lane / 8 * 8 * (STRIDE + 1);
        float* to = inverse + lane / 8 * 8 * (STRIDE + 1);
        float column[8];
        #pragma unroll
        for (u32 i = 0; i < 8; i++) {
            float sum = i == c ? 1.0f : 0.0f;
            #pragma unroll
            for (u32 j = 0; j < i; j++) sum = fmaf(-from[i * STRIDE + j], column[j], sum);
            column[i] = sum;
            to[i * STRIDE + c] = sum;
        }
    }
    __syncwarp();
    // B A^-1 is written to the matrix's unused upper part.
    #pragma unroll
    for (u32 i = lane / 8; i < 8; i += 4) {
        float sum = 0.0f;
        #pragma unroll
        for (u32 j = 0; j < 8; j++) sum = fmaf(matrix[(8 + i) * STRIDE + j], inverse[j * STRIDE + c], sum);
        matrix[i * STRIDE + 8 + c] = sum;
    }
    __syncwarp();
    #pragma unroll
    for (u32 i = lane / 8; i < 8; i += 4) {
        float sum = 0.0f;
        #pragma unroll
        for (u32 j = 0; j < 8; j++) sum = fmaf(-inverse[(8 + i) * STRIDE + 8 + j], matrix[j * STRIDE + 8 + c], sum);
        inverse[(8 + i) * STRIDE + c] = sum;
        inverse[i * STRIDE + 8 + c] = 0.0f;
    }
    __syncwarp();
}

// Replaces a tile of V by (I + A_kk)^-1 beta V: f16 with a scale that brings the greatest below 2^15.
static __device__ __forceinline__ void solve_values(
    bf16* tile, const u32 (&inverse)[4], const u32 (&inverse_rest)[4], u32 lane) {
    u32 b[4];
    ldmatrix_transposed(b, tile + unit_across(lane));
    __syncwarp();
    float sum[2][4] = {};
    multiply_halves(sum, inverse_rest, b);
    multiply_halves(sum, inverse, b);
    float most = 0.0f;
    #pragma unroll
    for (u32 i = 0; i < 8; i++) most = fmaxf(most, fabsf(sum[i / 4][i % 4]));
    u32 exponent = max(__float_as_uint(warp_max(most)) >> 23, 20u);
    float shrink = __uint_as_float((268 - exponent) << 23);
    #pragma unroll
    for (u32 n = 0; n < 4; n++) {
        u32 row = lane / 4 + n % 2 * 8, half = n / 2;
        float first = sum[half][n % 2 * 2] * shrink, second = sum[half][n % 2 * 2 + 1] * shrink;
        *(u32*)(tile + unit_at(0, row, half) + lane % 4 * 2) = narrow_pair_f16(first, second);
    }
    if (lane == 0) *(float*)(tile + TILE) = __uint_as_float((exponent - 14) << 23);
}

template <int PADDED, class From>
static __device__ __forceinline__ void prepare(const From& from, const u32* batch, u8* workspace, const Heads& h, u32 form) {
    SHARED(float, sums, 3 * CHUNK * PREPARE_WARPS);  // [warps, 3, tokens]: sums of q^2, k^2, q k
    SHARED(float, scales, 2 * CHUNK);                // of q and k
    SHARED(float, diagonal, CHUNK);
    SHARED(float, beta, CHUNK);
    SHARED(float, square, CHUNK * (CHUNK + 1));      // A_kk
    SHARED(float, inverse, CHUNK * (CHUNK + 1));
    SHARED(float, early, PADDED);                    // decay over the first half, if W must still be scaled by it
    SHARED(u32, safe, PREPARE_WARPS);
    constexpr u32 TILES = PADDED / 16;
    u32 chunk = blockIdx.x, head = blockIdx.y, thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
    Words header = words_at(batch, HEADER);
    u32 chunks = header[form == ALL_CHUNKS ? CHUNK_TOTAL : SEVERAL_CHUNKS];
    Words words = words_at(batch + header[AT_CHUNKS] + CHUNK_WORDS * min(chunk, max(chunks, 1u) - 1), CHUNK_WORDS);
    const u32* segment = batch + header[AT_SEGMENTS] + words[CHUNK_SEGMENT] * SEGMENT;
    Place place = {words[CHUNK_ROW], words[CHUNK_LENGTH], segment[START], segment[SLOT_IN]};
    if (chunk >= chunks) return;
    u32 channels = channels_of(h);

    bf16* image = (bf16*)dynamic_shared();
    float* decay = (float*)(image + (4 * TILES + 1) * TILE);
    bf16* values = (bf16*)(decay + PADDED);
    u32 bytes = image_bytes(PADDED, h.value_width);
    Operands<PADDED> operands{image, (bf16*)(dynamic_shared() + bytes)};

    // Lanes 0 to 15 of a warp have the chunk's first eight tokens of 32 channels, lanes 16 to 31 the other eight.
    u32 half = lane / 16, t = half * OWN, d = warp * 32 + lane % 16 * 2;
    bool mine = d < PADDED;
    u32 own = pair_at(half, d);
    // All loads are issued before the first of them is used.
    u32 query_c = query_channel(h, head), key_c = query_c + h.key_heads * h.key_width, value_c = value_channel(h, head);
    typename From::Channels queries_read, keys_read, values_read;
    typename From::Decays decays_read;
    load_channels(queries_read, from, channels, place, query_c, d, h.key_width, t);
    load_channels(keys_read, from, channels, place, key_c, d, h.key_width, t);
    load_gates(decays_read, from, h, place, head, d, t);
    load_channels(values_read, from, channels, place, value_c, d, h.value_width, t);
    u32 token = min(thread, place.length - 1);
    typename From::Write write = load_write(from, (u64)(place.first + token) * h.heads + head);

    Own query, key, gate;
    make_channels(query, queries_read, from, channels, place, query_c, d, h.key_width, t);
    make_channels(key, keys_read, from, channels, place, key_c, d, h.key_width, t);
    make_gates(gate, decays_read, from, h, place, head, d, t);
    for (u32 e = d; e < value_tiles(h.value_width) * 16; e += PREPARE_THREADS) {
        Own value;
        if (From::WIDE && e > d) load_channels(values_read, from, channels, place, value_c, e, h.value_width, t);
        make_channels(value, values_read, from, channels, place, value_c, e, h.value_width, t);
        bf16* tile = values + e / 16 * VALUE_STRIDE;
        u32 at = pair_at(half, e % 16);
        #pragma unroll
        for (u32 i = 0; i < OWN; i++) *(u32*)(tile + (at ^ row_bits(i))) = narrow_pair(value[i][0], value[i][1]);
        if (!From::WIDE) break;
    }
    if (thread < CHUNK) beta[thread] = thread < place.length ? make_beta(write) : 0.0f;

    float first[OWN], second[OWN], third[OWN];
    #pragma unroll
    for (u32 i = 0; i < OWN; i++) {
        first[i] = fmaf(query[i][0], query[i][0], query[i][1] * query[i][1]);
        second[i] = fmaf(key[i][0], key[i][0], key[i][1] * key[i][1]);
        third[i] = fmaf(query[i][0], key[i][0], query[i][1] * key[i][1]);
    }
    float parts[3] = {sum_eight(first, lane), sum_eight(second, lane), sum_eight(third, lane)};
    if (lane / 8 % 2 == 0) {
        for (u32 i = 0; i < 3; i++) sums[(i * CHUNK + t + lane % 8) * PREPARE_WARPS + warp] = parts[i];
    }
    // The sums of half a chunk decide on the anchor; a NaN is not small.
    float total[PAIR] = {0.0f, 0.0f};
    #pragma unroll
    for (u32 i = 0; i < OWN; i++) {
        total[0] += gate[i][0];
        total[1] += gate[i][1];
    }
    int small = __all_sync(EVERY_LANE, total[0] > -MIDDLE_LIMIT && total[1] > -MIDDLE_LIMIT);
    if (lane == 0) safe[warp] = (u32)small;
    __syncthreads();
    if (thread < CHUNK) {
        float sum[3];
        for (u32 i = 0; i < 3; i++) {
            const float* part = sums + (i * CHUNK + thread) * PREPARE_WARPS;
            sum[i] = part[0] + part[1] + (part[2] + part[3]);
        }
        float q = 1.0f / (sqrtf(sum[0] + L2_EPS) * sqrtf((float)h.key_width)), k = 1.0f / sqrtf(sum[1] + L2_EPS);
        scales[thread] = q;
        scales[CHUNK + thread] = k;
        diagonal[thread] = sum[2] * q * k;
    }
    __syncthreads();

    // Decays as running products: `forward` of the thread's tokens up to this one, `backward` of those after it.
    Own kept, forward, backward;
    float before[PAIR], after[PAIR];
    #pragma unroll
    for (u32 j = 0; j < PAIR; j++) {
        #pragma unroll
        for (u32 i = 0; i < OWN; i++) {
            query[i][j] *= scales[t + i];
            key[i][j] *= scales[CHUNK + t + i];
            kept[i][j] = exp_near(gate[i][j]);
        }
        forward[0][j] = kept[0][j];
        backward[OWN - 1][j] = 1.0f;
        #pragma unroll
        for (u32 i = 1; i < OWN; i++) {
            forward[i][j] = forward[i - 1][j] * kept[i][j];
            backward[OWN - 1 - i][j] = backward[OWN - i][j] * kept[OWN - i][j];
        }
        // The other half's decay and sum of gates.
        float other = __shfl_xor_sync(EVERY_LANE, forward[OWN - 1][j], 16);
        before[j] = half ? other : 1.0f;
        after[j] = half ? 1.0f : other;
        total[j] += __shfl_xor_sync(EVERY_LANE, total[j], 16);
    }
    bool middle = safe[0] & safe[1] & safe[2] & safe[3];
    if (mine) {
        // The factor that is multiplied over thousands of chunks is a single exponential of a sum.
        if (half == 0) {
            *(float2*)(decay + d) = make_float2(expf(total[0]), expf(total[1]));
        } else {
            *(float2*)(early + d) = middle ? make_float2(before[0], before[1]) : make_float2(1.0f, 1.0f);
        }
        #pragma unroll
        for (u32 i = 0; i < OWN; i++) {
            u32 at = own ^ row_bits(i), part, rest;
            *(u32*)(image + TILES * TILE + at) = narrow_pair(
                query[i][0] * (forward[i][0] * before[0]), query[i][1] * (forward[i][1] * before[1]));
            split_pair(
                key[i][0] * (backward[i][0] * after[0]), key[i][1] * (backward[i][1] * after[1]), part, rest);
            *(u32*)(image + 2 * TILES * TILE + at) = part;
            *(u32*)(image + 3 * TILES * TILE + at) = rest;
        }
    }

    float found[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    Own row, column;
    if (middle) {
        anchor_middle(row, column, forward, backward, half);
        multiply_anchored(found, operands, query, key, row, column, 16);
    } else {
        #pragma unroll 1
        for (u32 span = 8; span > 0; span /= 2) {
            anchor_level(row, column, kept, half, span);
            multiply_anchored(found, operands, query, key, row, column, span);
        }
        // W needs K exp(G): the factors of the middle's rows, times the decay over the first half, which W is multiplied by
        // later; with other anchors the rows are replaced here.
        __syncthreads();
        if (mine) {
            #pragma unroll
            for (u32 i = 0; i < OWN; i++) {
                u32 at = own ^ row_bits(i), part, rest;
                split_pair(
                    key[i][0] * (forward[i][0] * before[0]), key[i][1] * (forward[i][1] * before[1]), part, rest);
                *(u32*)(operands[0] + at) = part;
                *(u32*)(operands[1] + at) = rest;
            }
        }
    }
    bf16* queries = image + 4 * TILES * TILE;
    #pragma unroll
    for (u32 n = 0; n < 2; n++) {
        u32 i = lane / 4 + n * 8, j = warp % 2 * 8 + lane % 4 * 2;
        float left = found[2 * n], right = found[2 * n + 1];
        if (warp < 2) {
            square[i * (CHUNK + 1) + j] = beta[i] * left;
            square[i * (CHUNK + 1) + j + 1] = beta[i] * right;
        } else {
            if (i == j) left = diagonal[i];
            if (i == j + 1) right = diagonal[i];
            put_pair(queries, i, j, narrow_pair(left, right));
        }
    }
    __syncthreads();
    bf16* solver = operands[2];
    if (warp == 0) {
        invert(inverse, square, lane);
        for (u32 n = lane; n < CHUNK * CHUNK / 2; n += 32) {
            u32 i = n / 8, j = n % 8 * 2, part, rest;
            const float* row = inverse + i * (CHUNK + 1) + j;
            // The factor without beta.
            split_pair(row[0] * beta[j], row[1] * beta[j + 1], part, rest);
            put_pair(solver, i, j, part);
            put_pair(solver + TILE, i, j, rest);
        }
    }
    __syncthreads();
    u32 across = unit_across(lane), a[4], a_rest[4];
    ldmatrix(a, solver + across);
    ldmatrix(a_rest, solver + TILE + across);
    for (u32 tile = warp; tile < TILES; tile += PREPARE_WARPS) {
        u32 b[4], b_rest[4];
        ldmatrix_transposed(b, operands[0] + in_tile(tile, across));
        ldmatrix_transposed(b_rest, operands[1] + in_tile(tile, across));
        float sum[2][4] = {};
        multiply_halves(sum, a_rest, b);
        multiply_halves(sum, a, b_rest);
        multiply_halves(sum, a, b);
        #pragma unroll
        for (u32 n = 0; n < 4; n++) {
            u32 column = tile * 16 + n / 2 * 8 + lane % 4 * 2;
            float2 scale = *(const float2*)(early + column);
            u32 pair = narrow_pair(-sum[n / 2][n % 2 * 2] * scale.x, -sum[n / 2][n % 2 * 2 + 1] * scale.y);
            put_pair(image, lane / 4 + n % 2 * 8, column, pair);
        }
    }
    for (u32 tile = warp; tile < value_tiles(h.value_width); tile += PREPARE_WARPS) {
        solve_values(values + tile * VALUE_STRIDE, a, a_rest, lane);
    }
    __syncthreads();
    uint4* to = (uint4*)(workspace + ((u64)chunk * h.heads + head) * bytes);
    const uint4* finished = (const uint4*)image;
    for (u32 i = thread; i < bytes / 16; i += PREPARE_THREADS) to[i] = finished[i];
}

// `kda_prepare`: images of chunks, from the outputs of the convolution and the gates. Grid (chunks, heads), block 128;
// dynamic shared memory image_bytes + 160 P, with P the padded K. A grid may be larger than the number of chunks.
//
// `kda_prepare_fused`: the same from the inputs of the convolution and the gates. Reads convolution states and does not
// change them: `kda_scan` writes them. K and V are even and at most 128.
#define KDA_PREPARE(plain_name, fused_name, padded)                                                                   \
    extern "C" __global__ void __launch_bounds__(PREPARE_THREADS, 4) plain_name(const KdaPrepareParams p) {           \
        grid_dependency_synchronize();                                                                                \
        Heads h{p.key_heads, p.heads, p.key_width, p.value_width};                                                    \
        prepare<padded>(Plain{p.qkv, p.gates, p.beta}, p.batch, p.workspace, h, p.form);                              \
    }                                                                                                                 \
    extern "C" __global__ void __launch_bounds__(PREPARE_THREADS, 4) fused_name(const KdaPrepareFusedParams p) {      \
        grid_dependency_synchronize();                                                                                \
        Gates gates{p.decay, p.write, p.a_log, p.dt_bias, p.a_log_format, p.dt_bias_format};                          \
        Heads h{p.key_heads, p.heads, p.key_width, p.value_width};                                                    \
        Conv conv{p.input, p.weight, p.format, p.conv_states};                                                        \
        prepare<padded>(Fused{conv, gates}, p.batch, p.workspace, h, p.form);                                         \
    }

KDA_PREPARE(kda_prepare_32, kda_prepare_fused_32, 32)
KDA_PREPARE(kda_prepare_64, kda_prepare_fused_64, 64)
KDA_PREPARE(kda_prepare_128, kda_prepare_fused_128, 128)
ENTRY(kda_prepare_32)
ENTRY(kda_prepare_64)
ENTRY(kda_prepare_128)
ENTRY(kda_prepare_fused_32)
ENTRY(kda_prepare_fused_64)
ENTRY(kda_prepare_fused_128)
