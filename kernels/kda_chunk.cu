// The gated delta rule in chunks of sixteen tokens, the chunkwise form of Kimi Linear (section 3.2), for prefill, on tensor
// cores. Twin of src/backend/cpu/kda_chunk.rs.
//
// Two kernels. `kda_prepare` works on all chunks at once, on whatever does not depend on the state, and leaves for each
// chunk and head an image of the shared memory that the other needs. `kda_scan` walks through the chunks of a piece: a
// block for 32 columns of one head's state, which stays in f32 in its registers, transposed, so that what one product
// leaves is an operand of the next.
//
// With G the inclusive sum of gates in a chunk, S the state before it:
//
//   A_kk[i][j] = beta_i k_i . (k_j exp(G_i - G_j))  i > j        A_qk[i][j] = q_i . (k_j exp(G_i - G_j))  i >= j
//   U = (I + A_kk)^-1 beta (V - (K exp(G)) S)       O = (Q exp(G)) S + A_qk U       S' = exp(G_16) S + Kr^T U
//
// Gates have no lower bound, so exp(G_i - G_j) is never split as exp(G_i) exp(-G_j). Where the sums of both halves of a
// chunk are small, the anchor is its middle: one product. Elsewhere each block of the matrices has an anchor between its
// rows and columns (dyadic anchors): four products, and every factor is at most 1.
//
// Operands are bf16. Those whose rounding would show (both matrices' factors, the inverse, U and Kr where they make the
// next state) come as two, a part and the rest of it: with single ones repeated keys end 7e-3 from the definition.
#include "shared/kernel.h"
#include "shared/fragment.h"
#include "shared/kda.h"

// Tokens a chunk.
#define CHUNK 16
// Threads of `kda_prepare`: one a key channel at the widest, and a warp an 8 columns of each of the two matrices.
#define PREPARE_THREADS 128
// Warps of `kda_scan`, of 16 columns each.
#define SCAN_WARPS 2
// Chunk images under way in `kda_scan`.
#define STAGES 3
// Greatest sum of half a chunk's gates for the anchor in the middle: exp(60) times a rest of a bf16 keeps its digits.
#define MIDDLE_LIMIT 60.0f

// An image: tiles of 16 rows (tokens) by 16 columns of bf16, 512 bytes each, in this order:
//   K exp(G)  Q exp(G)  Kr  rest of Kr     [16, K] each, K padded to 32, 64 or 128
//   (I + A_kk)^-1 beta  its rest  A_qk     [16, 16] each
//   exp(G_16)                              [K] f32
//   V                                      [16, V], V padded to a multiple of 16

static __device__ __forceinline__ u32 padded_key(u32 k) { return k <= 32 ? 32 : k <= 64 ? 64 : 128; }
// Bytes of an image before V, and of all of it.
static __device__ __forceinline__ u32 common_bytes(u32 padded) { return (4 * padded / 16 + 3) * TILE * 2 + padded * 4; }
static __device__ __forceinline__ u32 image_bytes(u32 padded, u32 v) {
    return common_bytes(padded) + (v + 15) / 16 * TILE * 2;
}

// Factors of rows and columns for anchors in steps of `SPAN`: 16 is the middle of the chunk for all, else the dyadic
// level of blocks of SPAN by SPAN; zeros where a token is not a row (a column) of that level.
template <int SPAN>
static __device__ __forceinline__ void anchor(const float (&gate)[CHUNK], float (&row)[CHUNK], float (&column)[CHUNK]) {
    constexpr int half = SPAN == 16 ? 8 : SPAN;
    #pragma unroll
    for (int at = half; at < CHUNK; at += 2 * half) {
        // Sums outwards from the anchor: differences of a longer sum would lose what hard gates leave.
        float sum = 0.0f;
        #pragma unroll
        for (int t = at - 1; t >= at - half; t--) {
            column[t] = expf(sum);
            row[t] = SPAN == 16 ? expf(-sum) : 0.0f;
            sum += gate[t];
        }
        sum = 0.0f;
        #pragma unroll
        for (int t = at; t < at + half; t++) {
            sum += gate[t];
            row[t] = expf(sum);
            column[t] = SPAN == 16 ? expf(-sum) : 0.0f;
        }
    }
}

// Lays rows (k, then q) and columns (k) with their factors out as tiles, [3][2][tiles]: parts, then rests.
static __device__ __forceinline__ void lay_out(
    bf16* operands, u32 tiles, u32 d, const float (&query)[CHUNK], const float (&key)[CHUNK],
    const float (&row)[CHUNK], const float (&column)[CHUNK]) {
    u32 set = tiles * TILE;
    #pragma unroll
    for (u32 t = 0; t < CHUNK; t++) {
        bf16* at = operands + element_at(t, d);
        split(key[t] * row[t], at[0], at[set]);
        split(query[t] * row[t], at[2 * set], at[3 * set]);
        split(key[t] * column[t], at[4 * set], at[5 * set]);
    }
}

// 16 rows by 8 columns of a matrix: warps 0 and 1 have those of A_kk, 2 and 3 of A_qk.
static __device__ __forceinline__ void multiply_anchored(float (&sum)[4], const bf16* operands, u32 tiles, u32 warp, u32 lane) {
    u32 set = tiles * TILE;
    const bf16* rows = operands + warp / 2 * 2 * set + lane_across(lane);
    const bf16* columns = operands + 4 * set + eight_at(warp % 2 * 8 + lane % 8, lane / 8 % 2);
    for (int i = 0; i < 4; i++) sum[i] = 0.0f;
    for (u32 tile = 0; tile < tiles; tile++) {
        u32 a[4], a_rest[4], b[2], b_rest[2];
        ldmatrix(a, rows + tile * TILE);
        ldmatrix(a_rest, rows + set + tile * TILE);
        ldmatrix(b, columns + tile * TILE);
        ldmatrix(b_rest, columns + set + tile * TILE);
        mma_bf16(sum, a_rest, b);
        mma_bf16(sum, a, b_rest);
        mma_bf16(sum, a, b);
    }
}

// One dyadic level: blocks whose rows and columns part at bit `SPAN`.
template <int SPAN>
static __device__ __forceinline__ void level(
    float (&found)[4], bf16* operands, u32 tiles, const float (&query)[CHUNK], const float (&key)[CHUNK],
    const float (&gate)[CHUNK], u32 padded) {
    u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    __syncthreads();
    if (threadIdx.x < padded) {
        float row[CHUNK], column[CHUNK];
        anchor<SPAN>(gate, row, column);
        lay_out(operands, tiles, threadIdx.x, query, key, row, column);
    }
    __syncthreads();
    float sum[4];
    multiply_anchored(sum, operands, tiles, warp, lane);
    #pragma unroll
    for (u32 n = 0; n < 4; n++) {
        u32 i = lane / 4 + n / 2 * 8, j = warp % 2 * 8 + lane % 4 * 2 + n % 2;
        // A select: what is not of this level may be infinite or NaN.
        bool mine = i > j && (SPAN == 16 || ((i ^ j) >= SPAN && (i ^ j) < 2 * SPAN));
        if (mine) found[n] = sum[n];
    }
}

// Where a chunk's numbers come from: after the convolution and the gates, or before them.
struct Plain {
    const bf16* qkv;
    const float* gates;
    const float* beta;
};
struct Fused {
    Conv conv;
    Gates gates;
};

// Where a chunk lies.
struct Place {
    u32 first, length, start, slot;  // first row, tokens, first row of its piece, the slot that the piece starts from
};

static __device__ __forceinline__ void read_channel(
    float (&x)[CHUNK], const Plain& from, u32 channels, const Place& place, u32 c) {
    #pragma unroll
    for (u32 t = 0; t < CHUNK; t++) {
        x[t] = t < place.length ? widen(from.qkv[(u64)(place.first + t) * channels + c]) : 0.0f;
    }
}
static __device__ __forceinline__ void read_channel(
    float (&x)[CHUNK], const Fused& from, u32 channels, const Place& place, u32 c) {
    convolve(x, from.conv, channels, place.start, place.slot, c, place.first - place.start, place.length);
}

static __device__ __forceinline__ void read_gates(
    float (&gate)[CHUNK], const Plain& from, const Heads& h, const Place& place, u32 head, u32 d) {
    #pragma unroll
    for (u32 t = 0; t < CHUNK; t++) {
        gate[t] = t < place.length ? from.gates[((u64)(place.first + t) * h.heads + head) * h.key_width + d] : 0.0f;
    }
}
static __device__ __forceinline__ void read_gates(
    float (&gate)[CHUNK], const Fused& from, const Heads& h, const Place& place, u32 head, u32 d) {
    float rate = rate_of(from.gates, head);
    float bias = weight_at(from.gates.dt_bias, from.gates.dt_bias_format, head * h.key_width + d);
    #pragma unroll
    for (u32 t = 0; t < CHUNK; t++) {
        u64 at = ((u64)(place.first + t) * h.heads + head) * h.key_width + d;
        gate[t] = t < place.length ? rate * softplus(widen(from.gates.decay[at]) + bias) : 0.0f;
    }
}

static __device__ __forceinline__ float read_beta(const Plain& from, u64 at) { return from.beta[at]; }
static __device__ __forceinline__ float read_beta(const Fused& from, u64 at) {
    return sigmoid(widen(from.gates.write[at]));
}

template <class From>
static __device__ __forceinline__ void prepare(const From& from, const u32* batch, u8* workspace, const Heads& h, u32 form) {
    SHARED(float, sums, 3 * CHUNK);              // of q^2, k^2, q k, a token each
    SHARED(float, beta, CHUNK);
    SHARED(float, squares, 2 * CHUNK * (CHUNK + 1));  // A_kk, A_qk
    SHARED(u32, safe, PREPARE_THREADS / 32);
    u32 chunk = blockIdx.x, head = blockIdx.y, thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
    if (chunk >= batch[form == ALL_CHUNKS ? CHUNK_TOTAL : SEVERAL_CHUNKS]) return;
    const u32* words = batch + batch[AT_CHUNKS] + 4 * chunk;
    u32 piece = words[2];
    Place place = {words[0], words[1], piece_word(batch, piece, START), piece_word(batch, piece, SLOT_IN)};
    u32 padded = padded_key(h.key_width), tiles = padded / 16, channels = channels_of(h);

    bf16* image = (bf16*)dynamic_shared();
    float* decay = (float*)(image + (4 * tiles + 3) * TILE);
    bf16* values = (bf16*)(decay + padded);
    u32 bytes = image_bytes(padded, h.value_width);
    bf16* operands = (bf16*)(dynamic_shared() + bytes);   // [3][2][tiles], after the sums
    float* products = (float*)operands;                   // [3][16][padded], before them

    // A thread has a key channel.
    float query[CHUNK], key[CHUNK], gate[CHUNK];
    for (u32 t = 0; t < CHUNK; t++) query[t] = key[t] = gate[t] = 0.0f;
    if (thread < h.key_width) {
        u32 c = query_channel(h, head) + thread;
        read_channel(query, from, channels, place, c);
        read_channel(key, from, channels, place, c + h.key_heads * h.key_width);
        read_gates(gate, from, h, place, head, thread);
    }
    if (thread < CHUNK) {
        beta[thread] = thread < place.length ? read_beta(from, (u64)(place.first + thread) * h.heads + head) : 0.0f;
    }
    if (thread < padded) {
        #pragma unroll
        for (u32 t = 0; t < CHUNK; t++) {
            products[t * padded + thread] = query[t] * query[t];
            products[(CHUNK + t) * padded + thread] = key[t] * key[t];
            products[(2 * CHUNK + t) * padded + thread] = query[t] * key[t];
        }
    }
    // A value's channel is a column of its own.
    for (u32 e = thread; e < (h.value_width + 15) / 16 * 16; e += PREPARE_THREADS) {
        float value[CHUNK];
        for (u32 t = 0; t < CHUNK; t++) value[t] = 0.0f;
        if (e < h.value_width) read_channel(value, from, channels, place, value_channel(h, head) + e);
        #pragma unroll
        for (u32 t = 0; t < CHUNK; t++) values[element_at(t, e)] = narrow(value[t]);
    }
    // Sums of half a chunk decide on the anchor; a NaN is not small.
    float first = 0.0f, second = 0.0f;
    for (u32 t = 0; t < CHUNK / 2; t++) {
        first += gate[t];
        second += gate[t + CHUNK / 2];
    }
    int small = first > -MIDDLE_LIMIT && second > -MIDDLE_LIMIT;
    small = __all_sync(EVERY_LANE, small);
    if (lane == 0) safe[warp] = (u32)small;
    __syncthreads();
    for (u32 n = warp; n < 3 * CHUNK; n += PREPARE_THREADS / 32) {
        float sum = 0.0f;
        for (u32 d = lane; d < padded; d += 32) sum += products[n * padded + d];
        sum = warp_sum(sum);
        if (lane == 0) sums[n] = sum;
    }
    __syncthreads();
    float root = sqrtf((float)h.key_width);
    #pragma unroll
    for (u32 t = 0; t < CHUNK; t++) {
        query[t] /= sqrtf(sums[t] + L2_EPS) * root;
        key[t] /= sqrtf(sums[CHUNK + t] + L2_EPS);
    }

    if (thread < padded) {
        float sum = 0.0f;
        #pragma unroll
        for (u32 t = 0; t < CHUNK; t++) {
            sum += gate[t];
            float factor = expf(sum);
            image[element_at(t, thread)] = narrow(key[t] * factor);
            image[tiles * TILE + element_at(t, thread)] = narrow(query[t] * factor);
        }
        // Summed from the chunk's end backwards: a difference of sums from its start would lose what hard gates leave.
        sum = 0.0f;
        #pragma unroll
        for (int t = CHUNK - 1; t >= 0; t--) {
            bf16* at = image + 2 * tiles * TILE + element_at((u32)t, thread);
            split(key[t] * expf(sum), at[0], at[tiles * TILE]);
            sum += gate[t];
        }
        decay[thread] = expf(sum);
    }

    float found[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    if (safe[0] & safe[1] & safe[2] & safe[3]) {
        level<16>(found, operands, tiles, query, key, gate, padded);
    } else {
        level<8>(found, operands, tiles, query, key, gate, padded);
        level<4>(found, operands, tiles, query, key, gate, padded);
        level<2>(found, operands, tiles, query, key, gate, padded);
        level<1>(found, operands, tiles, query, key, gate, padded);
    }
    #pragma unroll
    for (u32 n = 0; n < 4; n++) {
        u32 i = lane / 4 + n / 2 * 8, j = warp % 2 * 8 + lane % 4 * 2 + n % 2;
        if (warp >= 2 && i == j) {
            found[n] = sums[2 * CHUNK + i] / (sqrtf(sums[i] + L2_EPS) * root) / sqrtf(sums[CHUNK + i] + L2_EPS);
        }
        squares[(warp / 2 * CHUNK + i) * (CHUNK + 1) + j] = warp < 2 ? beta[i] * found[n] : found[n];
    }
    __syncthreads();
    bf16* inverse = image + 4 * tiles * TILE;
    if (thread < CHUNK) {
        // Column `thread` of (I + A_kk)^-1, by forward substitution; what it multiplies has beta taken out.
        float column[CHUNK];
        #pragma unroll
        for (u32 i = 0; i < CHUNK; i++) {
            float sum = i == thread ? 1.0f : 0.0f;
            #pragma unroll
            for (u32 j = 0; j < i; j++) sum = fmaf(-squares[i * (CHUNK + 1) + j], column[j], sum);
            column[i] = sum;
            bf16* at = inverse + element_at(i, thread);
            split(sum * beta[thread], at[0], at[TILE]);
        }
    } else if (thread >= 32 && thread < 64) {
        for (u32 n = lane; n < TILE; n += 32) {
            u32 i = n / CHUNK, j = n % CHUNK;
            inverse[2 * TILE + element_at(i, j)] = narrow(squares[(CHUNK + i) * (CHUNK + 1) + j]);
        }
    }
    __syncthreads();
    uint4* to = (uint4*)(workspace + ((u64)chunk * h.heads + head) * bytes);
    const uint4* finished = (const uint4*)image;
    for (u32 i = thread; i < bytes / 16; i += PREPARE_THREADS) to[i] = finished[i];
}

// Images of chunks, from what the convolution and the gates left. Grid (chunks, heads), block 128; dynamic shared memory
// image_bytes + 192 P, with P the padded K. A grid may hold more chunks than the batch.
//   batch      the batch; its chunks are those of pieces that run by chunks (`form`)
//   qkv        [T, channels] bf16, after the convolution
//   gates      [T, heads K] f32: log decay           beta  [T, heads] f32
//   workspace  [chunks, heads, image_bytes], aligned to 16 bytes
// image_bytes = 512 (P/4 + 3 + ceil(V/16)) + 4 P; P is 32, 64 or 128, the first that K fits in.
extern "C" __global__ void __launch_bounds__(PREPARE_THREADS) kda_prepare(
    const u32* batch, const bf16* qkv, const float* gates, const float* beta, u8* workspace, u32 key_heads, u32 heads,
    u32 key_width, u32 value_width, u32 form) {
    prepare(Plain{qkv, gates, beta}, batch, workspace, Heads{key_heads, heads, key_width, value_width}, form);
}
ENTRY(kda_prepare)

// The same from what goes into the convolution and the gates. Grid, block and shared memory as above. Reads tails and
// leaves them: `kda_scan` writes them.
//   input      [T, channels] bf16, before the convolution
//   weight     [channels, taps] of the format; at most 4 taps
//   tails      [slots, channels, taps - 1] f32
//   decay      [T, heads K] bf16                     write    [T, heads] bf16
//   a_log      [heads] of its format                 dt_bias  [heads K] of its format
extern "C" __global__ void __launch_bounds__(PREPARE_THREADS) kda_prepare_fused(
    const u32* batch, const bf16* input, const void* weight, u32 format, float* tails, u32 taps, const bf16* decay,
    const bf16* write, const void* a_log, u32 a_log_format, const void* dt_bias, u32 dt_bias_format, u8* workspace,
    u32 key_heads, u32 heads, u32 key_width, u32 value_width, u32 form) {
    Fused from{Conv{input, weight, format, tails, taps}, Gates{decay, write, a_log, dt_bias, a_log_format, dt_bias_format}};
    prepare(from, batch, workspace, Heads{key_heads, heads, key_width, value_width}, form);
}
ENTRY(kda_prepare_fused)

// A state, transposed: sixteen columns v by K keys, as the sums of mma: of eight keys each.
template <int PADDED>
struct State {
    float at[PADDED / 8][4];
};

template <int PADDED>
static __device__ __forceinline__ void load_state(
    State<PADDED>& state, const float* states, const Heads& h, u32 slot, u32 head, u32 column) {
    u32 lane = threadIdx.x % 32;
    #pragma unroll
    for (u32 n = 0; n < PADDED / 8; n++) {
        #pragma unroll
        for (u32 i = 0; i < 4; i++) {
            u32 d = n * 8 + lane % 4 * 2 + i % 2, e = column + lane / 4 + i / 2 * 8;
            bool inside = slot != NONE && d < h.key_width && e < h.value_width;
            state.at[n][i] = inside ? states[state_at(h, slot, head) + (u64)d * h.value_width + e] : 0.0f;
        }
    }
}

template <int PADDED>
static __device__ __forceinline__ void store_state(
    const State<PADDED>& state, float* states, const Heads& h, u32 slot, u32 head, u32 column) {
    u32 lane = threadIdx.x % 32;
    #pragma unroll
    for (u32 n = 0; n < PADDED / 8; n++) {
        #pragma unroll
        for (u32 i = 0; i < 4; i++) {
            u32 d = n * 8 + lane % 4 * 2 + i % 2, e = column + lane / 4 + i / 2 * 8;
            if (d < h.key_width && e < h.value_width) {
                states[state_at(h, slot, head) + (u64)d * h.value_width + e] = state.at[n][i];
            }
        }
    }
}

// Sums [16, 16], two of eight columns each, as an operand of the next product: parts and rests.
static __device__ __forceinline__ void as_operand(const float (&sum)[2][4], u32 (&part)[4], u32 (&rest)[4]) {
    #pragma unroll
    for (u32 i = 0; i < 4; i++) split_pair(sum[i / 2][i % 2 * 2], sum[i / 2][i % 2 * 2 + 1], part[i], rest[i]);
}

// One chunk through sixteen columns of the state: U, O and the next state, all transposed. `image` is the common part,
// `values` the warp's tile of V, where O [16 tokens, 16 columns] is left in its place.
template <int PADDED>
static __device__ __forceinline__ void advance(State<PADDED>& state, const bf16* image, bf16* values) {
    constexpr u32 TILES = PADDED / 16;
    u32 lane = threadIdx.x % 32, down = lane_down(lane), across = lane_across(lane);
    const bf16* inverse = image + 4 * TILES * TILE;
    const float* decay = (const float*)(inverse + 3 * TILE);

    // (K exp(G)) S and (Q exp(G)) S.
    float answer[2][4] = {}, output[2][4] = {};
    #pragma unroll
    for (u32 tile = 0; tile < TILES; tile++) {
        const float (&left)[4] = state.at[2 * tile], (&right)[4] = state.at[2 * tile + 1];
        u32 a[4] = {
            narrow_pair(left[0], left[1]), narrow_pair(left[2], left[3]),
            narrow_pair(right[0], right[1]), narrow_pair(right[2], right[3])};
        u32 b[4];
        ldmatrix(b, image + tile * TILE + down);
        multiply_halves(answer, a, b);
        ldmatrix(b, image + (TILES + tile) * TILE + down);
        multiply_halves(output, a, b);
    }

    // U = (I + A_kk)^-1 beta (V - answer).
    u32 v[4];
    ldmatrix_transposed(v, values + down);
    float wrong[2][4];
    #pragma unroll
    for (u32 i = 0; i < 4; i++) {
        wrong[i / 2][i % 2 * 2] = low(v[i]) - answer[i / 2][i % 2 * 2];
        wrong[i / 2][i % 2 * 2 + 1] = high(v[i]) - answer[i / 2][i % 2 * 2 + 1];
    }
    u32 part[4], rest[4], b[4], b_rest[4];
    as_operand(wrong, part, rest);
    ldmatrix(b, inverse + down);
    ldmatrix(b_rest, inverse + TILE + down);
    float write[2][4] = {};
    multiply_halves(write, rest, b);
    multiply_halves(write, part, b_rest);
    multiply_halves(write, part, b);
    as_operand(write, part, rest);

    // O = (Q exp(G)) S + A_qk U, rows of tokens again in the place of V.
    ldmatrix(b, inverse + 2 * TILE + down);
    multiply_halves(output, part, b);
    __syncwarp();
    #pragma unroll
    for (u32 n = 0; n < 2; n++) {
        #pragma unroll
        for (u32 i = 0; i < 4; i++) {
            values[element_at(n * 8 + lane % 4 * 2 + i % 2, lane / 4 + i / 2 * 8)] = narrow(output[n][i]);
        }
    }
    __syncwarp();

    // S' = exp(G_16) S + Kr^T U.
    #pragma unroll
    for (u32 tile = 0; tile < TILES; tile++) {
        ldmatrix_transposed(b, image + (2 * TILES + tile) * TILE + across);
        ldmatrix_transposed(b_rest, image + (3 * TILES + tile) * TILE + across);
        #pragma unroll
        for (u32 n = 0; n < 2; n++) {
            float (&s)[4] = state.at[2 * tile + n];
            float2 factor = *(const float2*)(decay + tile * 16 + n * 8 + lane % 4 * 2);
            s[0] *= factor.x;
            s[1] *= factor.y;
            s[2] *= factor.x;
            s[3] *= factor.y;
            u32 b_n[2] = {b[2 * n], b[2 * n + 1]}, rest_n[2] = {b_rest[2 * n], b_rest[2 * n + 1]};
            mma_bf16(s, rest, b_n);
            mma_bf16(s, part, rest_n);
            mma_bf16(s, part, b_n);
        }
    }
}

template <int PADDED>
static __device__ __forceinline__ void scan(
    const u32* batch, const u8* workspace, float* states, bf16* output, const Heads& h, u32 form, const Conv& conv) {
    u32 piece = blockIdx.z, head = blockIdx.y, thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
    if (piece >= batch[PIECES] || !by_chunks(form, piece_word(batch, piece, LENGTH))) return;
    u32 bytes = image_bytes(PADDED, h.value_width), common = common_bytes(PADDED);
    u32 first_column = blockIdx.x * SCAN_WARPS * 16, column = first_column + warp * 16;
    u32 columns = (h.value_width + 15) / 16 * 16;
    // Whole tiles of V that this block has.
    u32 copied = common + min((u32)SCAN_WARPS, (columns - first_column) / 16) * TILE * 2;
    constexpr u32 stage_bytes = (4 * PADDED / 16 + 3 + SCAN_WARPS) * TILE * 2 + PADDED * 4;
    u8* stages = dynamic_shared();
    u32 chunk = piece_word(batch, piece, CHUNKS), count = piece_word(batch, piece, CHUNK_COUNT);
    const u8* source = workspace + ((u64)chunk * h.heads + head) * bytes;

    auto fetch = [&](u32 n) {
        if (n < count) {
            const u8* from = source + (u64)n * h.heads * bytes;
            u8* to = stages + n % STAGES * stage_bytes;
            for (u32 at = thread * 16; at < copied; at += SCAN_WARPS * 32 * 16) {
                // The block's columns of V follow the common part.
                u32 skip = at < common ? 0 : first_column / 16 * TILE * 2;
                copy_async(to + at, from + at + skip);
            }
        }
        copy_async_commit();
    };
    for (u32 n = 0; n + 1 < STAGES; n++) fetch(n);

    State<PADDED> state;
    load_state(state, states, h, piece_word(batch, piece, SLOT_IN), head, column);
    for (u32 n = 0; n < count; n++) {
        copy_async_wait<STAGES - 2>();
        // The stage that is filled next was read before this barrier.
        __syncthreads();
        fetch(n + STAGES - 1);
        if (column < columns) {
            u8* stage = stages + n % STAGES * stage_bytes;
            bf16* values = (bf16*)(stage + common) + warp * TILE;
            advance(state, (const bf16*)stage, values);
            const u32* words = batch + batch[AT_CHUNKS] + 4 * (chunk + n);
            // A lane has half a row: eight columns.
            u32 t = lane / 2, e = column + lane % 2 * 8;
            if (t < words[1]) {
                bf16* to = output + ((u64)(words[0] + t) * h.heads + head) * h.value_width + e;
                const bf16* eight = values + eight_at(t, lane % 2);
                if (h.value_width % 8 == 0) {
                    if (e < h.value_width) *(uint4*)to = *(const uint4*)eight;
                } else {
                    for (u32 i = 0; i < 8 && e + i < h.value_width; i++) to[i] = eight[i];
                }
            }
            if (words[3] != NONE) store_state(state, states, h, words[3], head, column);
        }
    }
    copy_async_wait<0>();
    store_state(state, states, h, piece_word(batch, piece, SLOT_OUT), head, column);

    if (conv.input == nullptr || conv.taps < 2) return;
    u32 channels = channels_of(h);
    for (u32 e = first_column + thread; e < min(first_column + SCAN_WARPS * 16, h.value_width); e += SCAN_WARPS * 32) {
        keep_tails(conv, channels, batch, piece, value_channel(h, head) + e);
    }
    if (blockIdx.x == 0 && head % (h.heads / h.key_heads) == 0) {
        for (u32 d = thread; d < h.key_width; d += SCAN_WARPS * 32) {
            keep_tails(conv, channels, batch, piece, query_channel(h, head) + d);
            keep_tails(conv, channels, batch, piece, query_channel(h, head) + h.key_heads * h.key_width + d);
        }
    }
}

// The chunks of each piece in their order. Grid (ceil(V / 32), heads, pieces), block 64; dynamic shared memory
// 3 (512 (P/4 + 5) + 4 P). K is at most P. A grid may hold more pieces than the batch; a piece that does not run by
// chunks is left alone, one of no tokens has its state copied.
//   batch      the batch
//   workspace  what `kda_prepare` left
//   states     [slots, heads, K, V] f32
//   output     [T, heads V] bf16, aligned to 16 bytes
//   input      [T, channels] bf16, before the convolution, where `kda_prepare_fused` ran: then the tails of the pieces'
//              slots are written as well; else null
//   tails      [slots, channels, taps - 1] f32, or null
#define KDA_SCAN(name, padded)                                                                                        \
    extern "C" __global__ void __launch_bounds__(SCAN_WARPS * 32, 1) name(                                            \
        const u32* batch, const u8* workspace, float* states, bf16* output, const bf16* input, float* tails,          \
        u32 taps, u32 key_heads, u32 heads, u32 key_width, u32 value_width, u32 form) {                               \
        Heads h{key_heads, heads, key_width, value_width};                                                            \
        scan<padded>(batch, workspace, states, output, h, form, Conv{input, nullptr, 0, tails, taps});                \
    }

KDA_SCAN(kda_scan_32, 32)
KDA_SCAN(kda_scan_64, 64)
KDA_SCAN(kda_scan_128, 128)
ENTRY(kda_scan_32)
ENTRY(kda_scan_64)
ENTRY(kda_scan_128)
