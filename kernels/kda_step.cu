// The gated delta rule one token at a time: the definition, in f32. Counterpart of src/backend/cpu/kda_step.rs.
//
// A block has one head's state, K and V up to 128, in the registers of its 256 threads: four columns per lane, every eighth
// row per warp. The state is read once and written once, for any number of tokens.
#include "shared/kernel.h"
#include "shared/kda.h"
#include "shared/params_kda.h"

#define STEP_THREADS 256
#define STEP_WARPS 8
// Maximum width of a key and a value.
#define WIDEST 128
#define STEP_ROWS (WIDEST / STEP_WARPS)

// A thread's part of a token: the lower half of a block has one key channel per thread, of query and key, the upper half one
// channel of the value, which is read twice. Threads past the widths read the last channel and ignore it.
struct Share {
    u32 d;
    bool key, value;
    u32 first, second;  // channels within a row
};
static __device__ __forceinline__ Share share_of(const Heads& h, u32 head) {
    u32 d = threadIdx.x % WIDEST;
    if (threadIdx.x >= WIDEST) {
        u32 c = value_channel(h, head) + min(d, h.value_width - 1);
        return Share{d, false, d < h.value_width, c, c};
    }
    u32 c = query_channel(h, head) + min(d, h.key_width - 1);
    return Share{d, d < h.key_width, false, c, c + h.key_heads * h.key_width};
}
// The two inputs, or the value twice; the decay; the write strength.
struct Numbers {
    float first, second, kept, beta;
};

// The source of a token's numbers and the destination of its output: after the convolution and the gates, before the gated
// norm.
struct PlainStep {
    // Whether segments may have more than one token.
    static constexpr bool SEVERAL = true;
    const bf16* qkv;
    const float* gates;
    const float* beta;
    struct Weights {};
    struct Inputs {
        bf16 first, second;
        float gate, beta;
    };
};
// The same before the convolution and the gates, and after the gated norm.
struct FusedStep {
    static constexpr bool SEVERAL = false;
    Conv conv;
    Gates gates;
    const bf16* gate;  // [T, heads V], before the sigmoid; null, like the decay, if both are computed
    const void* norm;  // [V] of the format
    u32 norm_format;
    float eps;
    // As they are stored: weights that depend on the head alone, and are loaded before the batch is read.
    struct Weights {
        u32 first[TAPS], second[TAPS], a_log[1], dt_bias[1], norm[1];
    };
    // Inputs of a token. For positions before a sequence's start, the slot's stale contents are loaded.
    struct Inputs {
        float first[LEAD], second[LEAD];
        bf16 last_first, last_second, decay, write, gate;
    };
};

// The same before the second projections of decay and output gate, which the block computes for its head. Their rows are copied
// to shared memory while the batch and the state are read.
#define MOST_RANK 128
// Elements from one row to the next there: threads that read consecutive rows, 16 bytes each, find no bank conflicts.
#define RANK_STRIDE (MOST_RANK + 8)
struct ProjectedStep : FusedStep {
    const bf16 *decay_rank, *gate_rank;  // [T, rank]
    const bf16 *decay_up, *gate_up;      // [heads K, rank] and [heads V, rank]
    u32 rank;                            // a multiple of eight

    __device__ __forceinline__ ProjectedStep(
        const FusedStep& fused, const bf16* decay_rank, const bf16* gate_rank, const bf16* decay_up, const bf16* gate_up,
        u32 rank)
        : FusedStep(fused), decay_rank(decay_rank), gate_rank(gate_rank), decay_up(decay_up), gate_up(gate_up), rank(rank) {}
};

static __device__ __forceinline__ u32 gate_channel(const Heads& h, u32 head, u32 d) {
    return head * h.key_width + min(d, h.key_width - 1);
}

static __device__ __forceinline__ void load_weights(PlainStep::Weights&, const PlainStep&, const Heads&, u32, const Share&) {}
static __device__ __forceinline__ void load_weights(
    FusedStep::Weights& x, const FusedStep& from, const Heads& h, u32 head, const Share& share) {
    load_stored(x.first, from.conv.weight, from.conv.format, (u64)share.first * TAPS);
    load_stored(x.second, from.conv.weight, from.conv.format, (u64)share.second * TAPS);
    load_stored(x.a_log, from.gates.a_log, from.gates.a_log_format, head);
    load_stored(x.dt_bias, from.gates.dt_bias, from.gates.dt_bias_format, gate_channel(h, head, share.d));
    load_stored(x.norm, from.norm, from.norm_format, min(share.d, h.value_width - 1));
}

// Loads those of row `row` of the batch; no other segment writes `slot`.
static __device__ __forceinline__ void load_inputs(
    PlainStep::Inputs& x, const PlainStep& from, const Heads& h, u32 row, u32, u32 head, const Share& share) {
    const bf16* at = from.qkv + (u64)row * channels_of(h);
    x.first = at[share.first];
    x.second = at[share.second];
    x.gate = from.gates[(u64)row * h.heads * h.key_width + gate_channel(h, head, share.d)];
    x.beta = from.beta[(u64)row * h.heads + head];
}
static __device__ __forceinline__ void load_inputs(
    FusedStep::Inputs& x, const FusedStep& from, const Heads& h, u32 row, u32 slot, u32 head, const Share& share) {
    u32 channels = channels_of(h);
    const bf16* at = from.conv.input + (u64)row * channels;
    x.last_first = at[share.first];
    x.last_second = at[share.second];
    const float *first = conv_state_of(from.conv, channels, slot, share.first), *second = conv_state_of(from.conv, channels, slot, share.second);
    #pragma unroll
    for (u32 i = 0; i < LEAD; i++) {
        x.first[i] = first[i];
        x.second[i] = second[i];
    }
    x.write = from.gates.write[(u64)row * h.heads + head];
    x.decay = x.gate = bf16{0};
    if (from.gate == nullptr) return;
    x.decay = from.gates.decay[(u64)row * h.heads * h.key_width + gate_channel(h, head, share.d)];
    x.gate = from.gate[((u64)row * h.heads + head) * h.value_width + min(share.d, h.value_width - 1)];
}

// Begins to copy a head's rows of both second projections: the decay's, then from row WIDEST on the gate's; zeros past them.
static __device__ __forceinline__ void begin_projections(const PlainStep&, const Heads&, u32) {}
static __device__ __forceinline__ void begin_projections(const FusedStep&, const Heads&, u32) {}
static __device__ __forceinline__ void begin_projections(const ProjectedStep& from, const Heads& h, u32 head) {
    bf16* rows = (bf16*)dynamic_shared();
    u32 pieces = from.rank / 8;
    for (u32 i = threadIdx.x; i < 2 * WIDEST * pieces; i += STEP_THREADS) {
        u32 r = i / pieces, k = i % pieces * 8, d = r % WIDEST, width = r < WIDEST ? h.key_width : h.value_width;
        const bf16* weight = r < WIDEST ? from.decay_up : from.gate_up;
        copy_async(rows + r * RANK_STRIDE + k, weight + (u64)(head * width + min(d, width - 1)) * from.rank + k, d < width);
    }
    copy_async_commit();
}
// Waits for the copies of a block that does not use them.
static __device__ __forceinline__ void end_projections(const FusedStep&) {}
static __device__ __forceinline__ void end_projections(const PlainStep&) {}
static __device__ __forceinline__ void end_projections(const ProjectedStep&) { copy_async_wait<0>(); }

// Decay and output gate of row `row`, rounded as if they had been stored. A thread of the lower half has a channel of the decay,
// one of the upper half a channel of the gate, which a thread of the lower half then takes.
static __device__ __forceinline__ void project(PlainStep::Inputs&, const PlainStep&, u32, const Share&) {}
static __device__ __forceinline__ void project(FusedStep::Inputs&, const FusedStep&, u32, const Share&) {}
static __device__ __forceinline__ void project(FusedStep::Inputs& x, const ProjectedStep& from, u32 row, const Share& share) {
    SHARED(bf16, gates, WIDEST);
    const bf16* weight = (const bf16*)dynamic_shared() + threadIdx.x * RANK_STRIDE;
    const bf16* input = (threadIdx.x < WIDEST ? from.decay_rank : from.gate_rank) + (u64)row * from.rank;
    copy_async_wait<0>();
    __syncthreads();
    float sums[2] = {0.0f, 0.0f};
#pragma unroll 2
    for (u32 k = 0; k < from.rank; k += 8) {
        uint4 w = *(const uint4*)(weight + k), i = *(const uint4*)(input + k);
        u32 ws[4] = {w.x, w.y, w.z, w.w}, is[4] = {i.x, i.y, i.z, i.w};
#pragma unroll
        for (u32 j = 0; j < 4; j++) {
            sums[0] = fmaf(low(ws[j]), low(is[j]), sums[0]);
            sums[1] = fmaf(high(ws[j]), high(is[j]), sums[1]);
        }
    }
    x.decay = narrow(sums[0] + sums[1]);
    if (threadIdx.x >= WIDEST) gates[share.d] = x.decay;
    __syncthreads();
    x.gate = gates[share.d];
}

static __device__ __forceinline__ Numbers numbers_of(
    const PlainStep::Inputs& x, const PlainStep::Weights&, const PlainStep&, const Heads&, u32, u32, const Share&) {
    return Numbers{widen(x.first), widen(x.second), expf(x.gate), x.beta};
}
static __device__ __forceinline__ float convolve(
    const u32 (&words)[TAPS], u32 format, const float (&before)[LEAD], bf16 last, bool past) {
    float taps[TAPS], input[TAPS];
    widen_stored(taps, words, format, 0);
    #pragma unroll
    for (u32 i = 0; i < LEAD; i++) input[i] = past ? before[i] : 0.0f;
    input[LEAD] = widen(last);
    return convolved(taps, input);
}
static __device__ __forceinline__ Numbers numbers_of(
    const FusedStep::Inputs& x, const FusedStep::Weights& weights, const FusedStep& from, const Heads& h, u32 slot, u32 head,
    const Share& share) {
    float bias[1];
    widen_stored(bias, weights.dt_bias, from.gates.dt_bias_format, gate_channel(h, head, share.d));
    float gate = rate_of(from.gates, weights.a_log, head) * softplus(widen(x.decay) + bias[0]);
    return Numbers{convolve(weights.first, from.conv.format, x.first, x.last_first, slot != NONE),
                   convolve(weights.second, from.conv.format, x.second, x.last_second, slot != NONE), expf(gate),
                   sigmoid(widen(x.write))};
}

// Writes the convolution states of a segment of at most one token to a slot.
static __device__ __forceinline__ void keep_conv_state_of(
    const FusedStep::Inputs& x, const FusedStep& from, const Heads& h, u32 length, bool past, u32 slot, const Share& share) {
    u32 channels = channels_of(h);
    float *first = conv_state_of(from.conv, channels, slot, share.first), *second = conv_state_of(from.conv, channels, slot, share.second);
    #pragma unroll
    for (u32 i = 0; i < LEAD; i++) {
        float left = past ? x.first[i] : 0.0f, right = past ? x.second[i] : 0.0f;
        if (length > 0) {
            left = i + 1 == LEAD ? widen(x.last_first) : past ? x.first[(i + 1) % LEAD] : 0.0f;
            right = i + 1 == LEAD ? widen(x.last_second) : past ? x.second[(i + 1) % LEAD] : 0.0f;
        }
        if (share.key || share.value) first[i] = left;
        if (share.key) second[i] = right;
    }
}
// At the segment's checkpoints, and at its end.
static __device__ __forceinline__ void keep_conv_states_of(
    const PlainStep::Inputs&, const PlainStep&, const Heads&, u32, u32, u32, const u32*, u32, const Share&) {}
static __device__ __forceinline__ void keep_conv_states_of(
    const FusedStep::Inputs& x, const FusedStep& from, const Heads& h, u32 length, u32 slot, u32 out, const u32* checkpoint,
    u32 checkpoints, const Share& share) {
    for (u32 n = 0; n < checkpoints; n++) {
        keep_conv_state_of(x, from, h, checkpoint[CHECKPOINT_WORDS * n + CHECKPOINT_AFTER], slot != NONE,
            checkpoint[CHECKPOINT_WORDS * n + CHECKPOINT_SLOT], share);
    }
    keep_conv_state_of(x, from, h, length, slot != NONE, out, share);
}

// The output of column `e` of a head; `scratch` as for `block_sum`. Every thread must call it, those past the columns with 0.
static __device__ __forceinline__ float finish(
    const PlainStep::Inputs&, const PlainStep::Weights&, const PlainStep&, const Heads&, u32, float x, float*) {
    return x;
}
static __device__ __forceinline__ float finish(
    const FusedStep::Inputs& inputs, const FusedStep::Weights& weights, const FusedStep& from, const Heads& h, u32 e, float x,
    float* scratch) {
    float scale = 1.0f / sqrtf(block_sum(x * x, scratch) / (float)h.value_width + from.eps), norm[1];
    widen_stored(norm, weights.norm, from.norm_format, min(e, h.value_width - 1));
    return x * scale * norm[0] * sigmoid(widen(inputs.gate));
}

// Reads a thread's rows: all loads are issued before the first is used. Zeros if there is no state.
static __device__ __forceinline__ void load_rows(float4 (&state)[STEP_ROWS], const float* from, const Heads& h, bool there) {
    u32 warp = threadIdx.x / 32, e = threadIdx.x % 32 * 4;
    from += warp * h.value_width + e;
    u32 pitch = STEP_WARPS * h.value_width, rows = there && h.key_width > warp ? (h.key_width - warp + STEP_WARPS - 1) / STEP_WARPS : 0;
    if (h.value_width % 4 == 0) {
        #pragma unroll
        for (u32 r = 0; r < STEP_ROWS; r++) state[r] = load_four(from + r * pitch, r < rows && e < h.value_width);
        return;
    }
    #pragma unroll
    for (u32 r = 0; r < STEP_ROWS; r++) {
        const float* at = from + r * pitch;
        state[r].x = r < rows && e < h.value_width ? at[0] : 0.0f;
        state[r].y = r < rows && e + 1 < h.value_width ? at[1] : 0.0f;
        state[r].z = r < rows && e + 2 < h.value_width ? at[2] : 0.0f;
        state[r].w = r < rows && e + 3 < h.value_width ? at[3] : 0.0f;
    }
}

// Writes a thread's rows; the address is advanced, so that no list of addresses is kept in registers.
static __device__ __forceinline__ void store_rows(const float4 (&state)[STEP_ROWS], float* to, const Heads& h) {
    u32 warp = threadIdx.x / 32, e = threadIdx.x % 32 * 4;
    to += warp * h.value_width + e;
    if (h.value_width % 4 == 0) {
        #pragma unroll
        for (u32 r = 0; r < STEP_ROWS; r++) {
            if (r * STEP_WARPS + warp < h.key_width && e < h.value_width) *(float4*)to = state[r];
            to += STEP_WARPS * h.value_width;
        }
        return;
    }
    #pragma unroll
    for (u32 r = 0; r < STEP_ROWS; r++) {
        bool inside = r * STEP_WARPS + warp < h.key_width;
        if (inside && e < h.value_width) to[0] = state[r].x;
        if (inside && e + 1 < h.value_width) to[1] = state[r].y;
        if (inside && e + 2 < h.value_width) to[2] = state[r].z;
        if (inside && e + 3 < h.value_width) to[3] = state[r].w;
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
    u32 head = blockIdx.x, segment = blockIdx.y, thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
    Share share = share_of(h, head);
    typename From::Weights weights;
    load_weights(weights, from, h, head, share);
    begin_projections(from, h, head);
    // Two dependent loads until the state's address is known: the header, the segment.
    Words header = words_at(batch, HEADER);
    u32 segments = header[SEGMENTS];
    Words words = words_at(batch + header[AT_SEGMENTS] + min(segment, max(segments, 1u) - 1) * SEGMENT, SEGMENT);
    u32 start = words[START], length = words[LENGTH], slot = words[SLOT_IN], out = words[SLOT_OUT];
    u32 checkpoints = words[CHECKPOINT_COUNT];
    const u32* checkpoint = batch + words[CHECKPOINTS];
    if (segment >= segments || by_chunks(form, length)) {
        end_projections(from);
        return;
    }

    // The state is loaded first; the token's inputs are loaded meanwhile.
    float4 state[STEP_ROWS];
    u32 read = slot == NONE ? out : slot;
    load_rows(state, states + state_at(h, read, head), h, slot != NONE);
    typename From::Inputs inputs;
    if (!From::SEVERAL) {
        load_inputs(inputs, from, h, length > 0 ? start : 0, read, head, share);
        keep_conv_states_of(inputs, from, h, length, slot, out, checkpoint, checkpoints, share);
        project(inputs, from, length > 0 ? start : 0, share);
    }
    float root = sqrtf((float)h.key_width);
    for (u32 t = 0; t < length; t++) {
        u32 row = start + t, d = share.d;
        if (From::SEVERAL) load_inputs(inputs, from, h, row, read, head, share);
        Numbers numbers = numbers_of(inputs, weights, from, h, slot, head, share);
        float q = share.key ? numbers.first : 0.0f, k = share.key ? numbers.second : 0.0f, beta = numbers.beta;
        if (share.value) value[d] = numbers.first;
        float q_square = warp_sum(q * q), k_square = warp_sum(k * k);
        if (lane == 0 && warp < 4) {
            squares[warp] = q_square;
            squares[4 + warp] = k_square;
        }
        __syncthreads();
        if (thread < WIDEST) {
            query[d] = q / (sqrtf(squares[0] + squares[1] + squares[2] + squares[3] + L2_EPS) * root);
            key[d] = k / sqrtf(squares[4] + squares[5] + squares[6] + squares[7] + L2_EPS);
            factor[d] = share.key ? numbers.kept : 0.0f;
        }
        __syncthreads();

        // The state decays, then is multiplied with the key: its prediction of the value. Rows past the key's width are zero,
        // and so are their products.
        float4 answer = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        #pragma unroll
        for (u32 r = 0; r < STEP_ROWS; r++) {
            u32 i = r * STEP_WARPS + warp;
            float decay = factor[i];
            state[r] = make_float4(decay * state[r].x, decay * state[r].y, decay * state[r].z, decay * state[r].w);
            answer = add_scaled(answer, key[i], state[r]);
        }
        float4* part = (float4*)parts + warp * (WIDEST / 4) + lane;
        *part = answer;
        __syncthreads();
        // The prediction's error, times beta, is written.
        if (share.value) {
            float sum = 0.0f;
            for (u32 w = 0; w < STEP_WARPS; w++) sum += parts[w * WIDEST + d];
            value[d] = beta * (value[d] - sum);
        }
        __syncthreads();
        float4 write = *((const float4*)value + lane), result = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        #pragma unroll
        for (u32 r = 0; r < STEP_ROWS; r++) {
            u32 i = r * STEP_WARPS + warp;
            state[r] = add_scaled(state[r], key[i], write);
            result = add_scaled(result, query[i], state[r]);
        }
        *part = result;
        __syncthreads();
        float sum = 0.0f;
        if (thread < h.value_width) {
            for (u32 w = 0; w < STEP_WARPS; w++) sum += parts[w * WIDEST + thread];
        }
        u64 to = ((u64)row * h.heads + head) * h.value_width;
        sum = finish(inputs, weights, from, h, thread, sum, scratch);
        if (thread < h.value_width) output[to + thread] = narrow(sum);

        if (checkpoints > 0 && checkpoint[CHECKPOINT_AFTER] == t + 1) {
            store_rows(state, states + state_at(h, checkpoint[CHECKPOINT_SLOT], head), h);
            checkpoint += CHECKPOINT_WORDS;
            checkpoints--;
        }
        if (!From::SEVERAL) break;
    }
    store_rows(state, states + state_at(h, out, head), h);
}

// Grid (heads, segments), block 256. K and V are at most 128. Grids may be larger than the number of segments; segments that
// run by chunks (`form`) are skipped, and for a segment of no tokens the state is copied.
extern "C" __global__ void __launch_bounds__(STEP_THREADS, 2) kda_step(const KdaStepParams p) {
    grid_dependency_synchronize();
    Heads h{p.key_heads, p.heads, p.key_width, p.value_width};
    step(PlainStep{p.qkv, p.gates, p.beta}, p.batch, p.states, p.output, h, p.form);
}
ENTRY(kda_step)

// A decode in one kernel, for segments of a single token: convolution and its convolution states, gates, recurrence, gated
// norm. Grid and block as above. There must be as many heads of keys as of values: a thread reads a channel of a convolution
// state and writes it.
extern "C" __global__ void __launch_bounds__(STEP_THREADS, 2) kda_decode(const KdaDecodeParams p) {
    grid_dependency_synchronize();
    Heads h{p.heads, p.heads, p.key_width, p.value_width};
    Conv conv{p.input, p.weight, p.format, p.conv_states};
    Gates gates{p.decay, p.write, p.a_log, p.dt_bias, p.a_log_format, p.dt_bias_format};
    FusedStep from{conv, gates, p.gate, p.norm, p.norm_format, p.eps};
    step(from, p.batch, p.states, p.output, h, BY_LENGTH);
}
ENTRY(kda_decode)

// The same with the second projections of decay and output gate: one kernel between a layer's two products. Dynamic shared
// memory: 2 WIDEST rows of RANK_STRIDE bf16.
extern "C" __global__ void __launch_bounds__(STEP_THREADS, 2) kda_decode_projected(const KdaDecodeParams p) {
    grid_dependency_synchronize();
    Heads h{p.heads, p.heads, p.key_width, p.value_width};
    Conv conv{p.input, p.weight, p.format, p.conv_states};
    Gates gates{nullptr, p.write, p.a_log, p.dt_bias, p.a_log_format, p.dt_bias_format};
    FusedStep fused{conv, gates, nullptr, p.norm, p.norm_format, p.eps};
    ProjectedStep from(fused, p.decay_rank, p.gate_rank, p.decay_up, p.gate_up, p.rank);
    step(from, p.batch, p.states, p.output, h, BY_LENGTH);
}
ENTRY(kda_decode_projected)
