// The gated delta rule one token at a time: the definition, in f32. Twin of src/backend/cpu/kda_step.rs.
//
// A block has one head's state, K and V up to 128, in the registers of its 256 threads: a lane four columns, a warp every
// eighth row. It is read once and written once, whatever the number of tokens.
#include "shared/kernel.h"
#include "shared/kda.h"

#define STEP_THREADS 256
#define STEP_WARPS 8
// The widest key and value.
#define WIDEST 128
#define STEP_ROWS (WIDEST / STEP_WARPS)

// Where a token's numbers come from and its output goes: after the convolution and the gates, before the gated norm ..
struct PlainStep {
    // Whether pieces may have more than one token.
    static constexpr bool SEVERAL = true;
    const bf16* qkv;
    const float* gates;
    const float* beta;
};
// .. or before the former and after the latter.
struct FusedStep {
    static constexpr bool SEVERAL = false;
    Conv conv;
    Gates gates;
    const bf16* gate;  // [T, heads V], before the sigmoid
    const void* norm;  // [V] of the format
    u32 norm_format;
    float eps;
};

// Token `t` of a piece.
struct Token {
    u32 start, slot, t;
};

static __device__ __forceinline__ float channel_of(const PlainStep& from, u32 channels, const Token& at, u32 c) {
    return widen(from.qkv[(u64)(at.start + at.t) * channels + c]);
}
static __device__ __forceinline__ float channel_of(const FusedStep& from, u32 channels, const Token& at, u32 c) {
    float x[1];
    convolve(x, from.conv, channels, at.start, at.slot, c, at.t, 1);
    return x[0];
}

static __device__ __forceinline__ float gate_of(const PlainStep& from, const Heads& h, u32 row, u32 head, u32 d) {
    return from.gates[((u64)row * h.heads + head) * h.key_width + d];
}
static __device__ __forceinline__ float gate_of(const FusedStep& from, const Heads& h, u32 row, u32 head, u32 d) {
    float x = widen(from.gates.decay[((u64)row * h.heads + head) * h.key_width + d]);
    float bias = weight_at(from.gates.dt_bias, from.gates.dt_bias_format, head * h.key_width + d);
    return rate_of(from.gates, head) * softplus(x + bias);
}

static __device__ __forceinline__ float beta_of(const PlainStep& from, u64 at) { return from.beta[at]; }
static __device__ __forceinline__ float beta_of(const FusedStep& from, u64 at) {
    return sigmoid(widen(from.gates.write[at]));
}

// What column `e` of a head comes to; `scratch` as for `block_sum`. Every thread comes, those past the columns with 0.
static __device__ __forceinline__ float finish(const PlainStep&, const Heads&, u64, u32, float x, float*) { return x; }
static __device__ __forceinline__ float finish(
    const FusedStep& from, const Heads& h, u64 at, u32 e, float x, float* scratch) {
    float scale = 1.0f / sqrtf(block_sum(x * x, scratch) / (float)h.value_width + from.eps);
    if (e >= h.value_width) return 0.0f;
    return x * scale * weight_at(from.norm, from.norm_format, e) * sigmoid(widen(from.gate[at + e]));
}

// A lane's four columns from `e` on of row `d`, where that begins at `at`.
static __device__ __forceinline__ float4 load_four(const float* at, const Heads& h, u32 d, u32 e) {
    if (d >= h.key_width || e >= h.value_width) return make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    at += e;
    if (h.value_width % 4 == 0) return *(const float4*)at;
    float4 x = make_float4(at[0], 0.0f, 0.0f, 0.0f);
    if (e + 1 < h.value_width) x.y = at[1];
    if (e + 2 < h.value_width) x.z = at[2];
    if (e + 3 < h.value_width) x.w = at[3];
    return x;
}
static __device__ __forceinline__ void store_four(float* at, const Heads& h, u32 d, u32 e, float4 x) {
    if (d >= h.key_width || e >= h.value_width) return;
    at += e;
    if (h.value_width % 4 == 0) {
        *(float4*)at = x;
        return;
    }
    at[0] = x.x;
    if (e + 1 < h.value_width) at[1] = x.y;
    if (e + 2 < h.value_width) at[2] = x.z;
    if (e + 3 < h.value_width) at[3] = x.w;
}

// Writes a thread's rows; their place moves on, so that no list of addresses is kept in registers.
static __device__ __forceinline__ void store_rows(const float4 (&state)[STEP_ROWS], float* to, const Heads& h) {
    u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    to += warp * h.value_width;
    #pragma unroll
    for (u32 r = 0; r < STEP_ROWS; r++) {
        store_four(to, h, r * STEP_WARPS + warp, 4 * lane, state[r]);
        to += STEP_WARPS * h.value_width;
    }
}

static __device__ __forceinline__ float4 add_scaled(float4 sum, float factor, float4 x) {
    return make_float4(
        fmaf(factor, x.x, sum.x), fmaf(factor, x.y, sum.y), fmaf(factor, x.z, sum.z), fmaf(factor, x.w, sum.w));
}

template <class From>
static __device__ __forceinline__ void step(
    const From& from, const u32* batch, float* states, bf16* output, const Heads& h, u32 form) {
    SHARED(float, query, WIDEST);
    SHARED(float, key, WIDEST);
    SHARED(float, factor, WIDEST);
    SHARED(float, value, WIDEST);
    SHARED(float, parts, STEP_WARPS * WIDEST);
    SHARED(float, squares, 8);
    SHARED(float, scratch, 32);
    u32 head = blockIdx.x, piece = blockIdx.y, thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
    if (piece >= batch[PIECES]) return;
    u32 length = piece_word(batch, piece, LENGTH);
    if (by_chunks(form, length)) return;
    u32 start = piece_word(batch, piece, START), slot = piece_word(batch, piece, SLOT_IN), channels = channels_of(h);
    const u32* checkpoint = batch + piece_word(batch, piece, CHECKPOINTS);
    u32 checkpoints = piece_word(batch, piece, CHECKPOINT_COUNT);

    float4 state[STEP_ROWS];
    #pragma unroll
    for (u32 r = 0; r < STEP_ROWS; r++) {
        state[r] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        u32 d = r * STEP_WARPS + warp;
        if (slot != NONE) state[r] = load_four(states + state_at(h, slot, head) + d * h.value_width, h, d, 4 * lane);
    }
    float root = sqrtf((float)h.key_width);
    for (u32 t = 0; t < length; t++) {
        u32 row = start + t;
        Token at = {start, slot, t};
        // The lower half of the block has the key's channels, the upper one the value's.
        u32 d = thread % WIDEST;
        bool has_key = thread < WIDEST && d < h.key_width, has_value = thread >= WIDEST && d < h.value_width;
        float q = 0.0f, k = 0.0f, kept = 0.0f;
        if (has_key) {
            u32 c = query_channel(h, head) + d;
            q = channel_of(from, channels, at, c);
            k = channel_of(from, channels, at, c + h.key_heads * h.key_width);
            kept = expf(gate_of(from, h, row, head, d));
        } else if (has_value) {
            value[d] = channel_of(from, channels, at, value_channel(h, head) + d);
        }
        float beta = beta_of(from, (u64)row * h.heads + head);
        float q_square = warp_sum(q * q), k_square = warp_sum(k * k);
        if (lane == 0 && warp < 4) {
            squares[warp] = q_square;
            squares[4 + warp] = k_square;
        }
        __syncthreads();
        if (thread < WIDEST) {
            query[d] = q / (sqrtf(squares[0] + squares[1] + squares[2] + squares[3] + L2_EPS) * root);
            key[d] = k / sqrtf(squares[4] + squares[5] + squares[6] + squares[7] + L2_EPS);
            factor[d] = kept;
        }
        __syncthreads();

        // The memory decays, then answers for this key.
        float4 answer = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        #pragma unroll
        for (u32 r = 0; r < STEP_ROWS; r++) {
            u32 i = r * STEP_WARPS + warp;
            if (i < h.key_width) {
                float decay = factor[i];
                state[r] = make_float4(
                    decay * state[r].x, decay * state[r].y, decay * state[r].z, decay * state[r].w);
                answer = add_scaled(answer, key[i], state[r]);
            }
        }
        float4* part = (float4*)parts + warp * (WIDEST / 4) + lane;
        *part = answer;
        __syncthreads();
        // What it answered wrongly is what gets written.
        if (has_value) {
            float sum = 0.0f;
            for (u32 w = 0; w < STEP_WARPS; w++) sum += parts[w * WIDEST + d];
            value[d] = beta * (value[d] - sum);
        }
        __syncthreads();
        float4 write = *((const float4*)value + lane), result = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        #pragma unroll
        for (u32 r = 0; r < STEP_ROWS; r++) {
            u32 i = r * STEP_WARPS + warp;
            if (i < h.key_width) {
                state[r] = add_scaled(state[r], key[i], write);
                result = add_scaled(result, query[i], state[r]);
            }
        }
        *part = result;
        __syncthreads();
        float sum = 0.0f;
        if (thread < h.value_width) {
            for (u32 w = 0; w < STEP_WARPS; w++) sum += parts[w * WIDEST + thread];
        }
        u64 to = ((u64)row * h.heads + head) * h.value_width;
        sum = finish(from, h, to, thread, sum, scratch);
        if (thread < h.value_width) output[to + thread] = narrow(sum);

        if (checkpoints > 0 && checkpoint[0] == t + 1) {
            store_rows(state, states + state_at(h, checkpoint[1], head), h);
            checkpoint += 2;
            checkpoints--;
        }
        if (!From::SEVERAL) break;
    }
    store_rows(state, states + state_at(h, piece_word(batch, piece, SLOT_OUT), head), h);
}

// Grid (heads, pieces), block 256. K and V are at most 128. Grids may hold more pieces than the batch; pieces that run by
// chunks (`form`) are left alone, one of no tokens has its state copied.
//   batch   the batch
//   qkv     [T, channels] bf16, after the convolution
//   gates   [T, heads K] f32: log decay           beta  [T, heads] f32
//   states  [slots, heads, K, V] f32, aligned to 16 bytes
//   output  [T, heads V] bf16
extern "C" __global__ void __launch_bounds__(STEP_THREADS, 2) kda_step(
    const u32* batch, const bf16* qkv, const float* gates, const float* beta, float* states, bf16* output,
    u32 key_heads, u32 heads, u32 key_width, u32 value_width, u32 form) {
    step(PlainStep{qkv, gates, beta}, batch, states, output, Heads{key_heads, heads, key_width, value_width}, form);
}
ENTRY(kda_step)

// A decode in one kernel, of pieces of a single token: convolution and its tails, gates, recurrence, gated norm. Grid and
// block as above. As many heads of keys as of values: a block reads a tail and writes it.
//   input    [T, channels] bf16, before the convolution
//   weight   [channels, taps] of the format; at most 4 taps
//   tails    [slots, channels, taps - 1] f32
//   decay    [T, heads K] bf16                     write    [T, heads] bf16
//   a_log    [heads] of its format                 dt_bias  [heads K] of its format
//   gate     [T, heads V] bf16, before the sigmoid
//   norm     [V] of its format
//   states   [slots, heads, K, V] f32, aligned to 16 bytes
//   output   [T, heads V] bf16, gated and normalised
extern "C" __global__ void __launch_bounds__(STEP_THREADS, 2) kda_decode(
    const u32* batch, const bf16* input, const void* weight, u32 format, float* tails, u32 taps, const bf16* decay,
    const bf16* write, const void* a_log, u32 a_log_format, const void* dt_bias, u32 dt_bias_format, const bf16* gate,
    const void* norm, u32 norm_format, float eps, float* states, bf16* output, u32 heads, u32 key_width,
    u32 value_width) {
    Heads h{heads, heads, key_width, value_width};
    FusedStep from{Conv{input, weight, format, tails, taps},
                   Gates{decay, write, a_log, dt_bias, a_log_format, dt_bias_format}, gate, norm, norm_format, eps};
    step(from, batch, states, output, h, BY_LENGTH);
    u32 head = blockIdx.x, piece = blockIdx.y, d = threadIdx.x % WIDEST, channels = channels_of(h);
    if (taps < 2 || piece >= batch[PIECES] || by_chunks(BY_LENGTH, piece_word(batch, piece, LENGTH))) return;
    // The thread that read a channel of the tail writes it.
    if (threadIdx.x >= WIDEST) {
        if (d < value_width) keep_tails(from.conv, channels, batch, piece, value_channel(h, head) + d);
    } else if (d < key_width) {
        keep_tails(from.conv, channels, batch, piece, query_channel(h, head) + d);
        keep_tails(from.conv, channels, batch, piece, query_channel(h, head) + heads * key_width + d);
    }
}
ENTRY(kda_decode)
