#!/usr/bin/env python3
"""Plant bugs in the CUDA kernels, one after the other, and see that the tests on cuda-emulated catch each.

    tests/conformance/kernel_mutations.py [SUBSTRING]
    tests/conformance/kernel_mutations.py --check

The kernels are compiled into a library once; a mutant takes one file, compiled anew, and the test that is built already, which
loads the library in place of its own kernels. The repository is left alone. Each row of MUTATIONS is a file of kernels/, a piece
of it that occurs once, what stands there instead, and which cases of the conformance list are to catch it, or, after "trace:",
which tests of the trace. A row whose text is not found or that does not compile is an error of this script, not a catch. `--check` compiles nothing: it
says which rows no longer match their text, and runs with every test.
"""
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile

from mutation_rows import unmatched

MUTATIONS = [
    # file, from, to, cases
    ("embed.cu", "batch[batch[AT_TOKENS] + t]", "batch[batch[AT_TOKENS]]", "embed"),
    ("rms_norm.cu", "/ (float)width + eps)", "/ (float)width) + eps", "rms_norm"),
    ("rms_norm.cu", "gather ? batch[batch[AT_OUTPUTS] + 2 * r] : r", "r", "rms_norm"),
    ("rms_norm.cu", "SHARED(float, scratch, 32);", "SHARED(float, scratch, 4);", "rms_norm"),
    ("shared/kernel.h", "    __syncthreads();\n    float all", "    float all", "rms_norm"),
    ("linear.cu", "if (first + r < rows) sums[r]", "if (first + r < rows && i + 1 < columns) sums[r]", "linear"),
    ("linear.cu", "if (r == NONE || k >= columns) return eight;", "if (r == NONE) return eight;", "linear"),
    ("linear.cu", "c + 1 < columns ? row[c + 1] : bf16{0}", "row[c + 1]", "linear"),
    ("linear.cu", "mma_bf16(sums[i][j], a[1], b[1]);", "mma_bf16(sums[i][j], a[1], b[0]);", "linear"),
    ("linear.cu", "return order != nullptr ? order[n] : n;", "return n;", "linear"),
    ("linear.cu", "u32 several = kind == TOKENS ? batch[SEVERAL_ROWS] : 0", "u32 several = 0", "linear"),
    ("linear.cu", "        __syncthreads();\n        u32 r = threadIdx.x / FEW_OUTPUTS", "        u32 r = threadIdx.x / FEW_OUTPUTS", "linear"),
    ("linear.cu", "                ((bf16*)output)[at] = narrow(sum);\n            }\n        }\n        __syncthreads();", "                ((bf16*)output)[at] = narrow(sum);\n            }\n        }", "linear"),
    ("linear.cu", "weight_of(i, k + FEW_WARPS * FEW_COLUMNS)", "weight_of(i, k)", "linear"),
    ("linear.cu", "for (u32 from = 0; from < FEW_WARPS; from++)", "for (u32 from = 0; from < FEW_WARPS - 1; from++)", "linear"),
    ("add.cu", "narrow(widen(target[i]) + widen(source[i]))", "narrow(widen(source[i]))", "add"),
    ("swiglu.cu", "narrow(silu(gate) * up)", "narrow(gate * silu(up))", "swiglu"),
    ("short_conv.cu", "taps - 1 + t - back", "taps - 2 + t - back", "short_conv"),
    ("short_conv.cu", "narrow(silu(sum))", "narrow(sum)", "short_conv"),
    ("short_conv.cu", "if (slot == NONE) return 0.0f;", "if (slot == NONE) slot = 0;", "short_conv"),
    ("short_conv.cu", "taps, after, kept - j, c)", "taps, length, kept - j, c)", "short_conv"),
    ("kda_gates.cu", "-expf(weight_at(a_log", "expf(weight_at(a_log", "kda_gates"),
    ("shared/kernel.h", "fmaxf(x, 0.0f) + log1pf(expf(-fabsf(x)))", "logf(1.0f + expf(x))", "kda_gates"),
    ("gated_norm.cu", "narrow(x * sigmoid(widen(gate[at + i])))", "narrow(x * silu(widen(gate[at + i])))", "gated_norm"),
    ("mla_append.cu", "position % block_tokens) * width", "(position + 1) % block_tokens) * width", "mla_append"),
    ("mla_append.cu", "i = latent + threadIdx.x", "i = latent + 1 + threadIdx.x", "mla_append"),
    ("kda_step.cu", "float decay = factor[i];", "float decay = 1.0f;", "kda_step"),
    ("kda_step.cu", "state[r] = add_scaled(state[r], key[i], write);\n                result = add_scaled(result, query[i], state[r]);",
     "result = add_scaled(result, query[i], state[r]);\n                state[r] = add_scaled(state[r], key[i], write);", "kda_step"),
    ("kda_step.cu", "checkpoint[0] == t + 1", "checkpoint[0] == t", "kda_step"),
    ("kda_step.cu", "*part = answer;\n        __syncthreads();", "*part = answer;", "kda_step"),
    ("mla_prefill.cu", "at <= own(m, r) && at < window_end", "at <= own(m, r) + 1 && at < window_end", "mla_prefill/BF16/1"),
    ("mla_prefill.cu", "keep[r] = exp2f(greatest[m][r] - best[r]);", "keep[r] = 1.0f;", "mla_prefill/BF16/1"),
    ("mla_decode.cu", "float kept = expf(greatest - best);", "float kept = 1.0f;", "mla_decode/a long context"),
    ("mla_decode.cu", "total = fmaf(marks[n * stride + 1], factor, total);", "total += marks[n * stride + 1];",
     "mla_decode/single tokens after"),
    ("shared/mla.h", "(float)(a.nope + a.rope)", "(float)a.nope", "mla_decode"),
    ("route.cu", "float score = scores[expert];", "float score = scores[expert] + weight_at(bias, format, expert);", "route"),
    ("route.cu", "if (second != 0) {", "if (false) {", "route"),
    ("route.cu", "scale / (sum + 1e-20f)", "1.0f / (sum + 1e-20f)", "route"),
    ("shared/best.h", "(u64)bits << 32 | (u32)~id", "(u64)bits << 32 | (u32)id", "select"),
    ("select.cu", "if (sums[4 * s + 2] != 1.0f) wrong = 1.0f;", "", "select"),
    ("select.cu", "most + logf(sum)", "logf(sum)", "select"),
    ("experts.cu", "sum += weights[place] * results[place * width + column];", "sum += results[place * width + column];", "experts"),
    ("experts.cu", "silu(sums[i][j][n]) * sums[i][j + 4][n]", "sums[i][j][n] * silu(sums[i][j + 4][n])", "experts/BF16"),
    ("experts.cu", "starts[e] + n * TILE_ROWS;", "starts[e];", "experts/many"),
    ("experts.cu", "+ batch[SEVERAL_ROWS] + i / top_k", "+ i / top_k", "experts/single tokens"),
    ("experts.cu", "(1u << own % 32) - 1", "EVERY_LANE", "experts/single tokens"),
    ("experts.cu", "if (p == count) found[p] = place;", "found[0] = place;", "experts/single tokens"),
    ("experts.cu", "if (p < count && n + i < width) results", "if (p < count) results", "experts/single tokens, odd"),
    ("experts.cu", "if (s < blockIdx.x) before += count;", "", "experts/many"),
    ("experts.cu", "if (expert < experts && rank == 0) *to += (u32)__popc(peers);", "", "experts/many"),
    ("experts.cu", "next[w * experts + e] = before;", "next[w * experts + e] = 0;", "experts/many"),
    ("experts.cu", "u32 expert = ids[single_place(batch, top_k, own)] - first;\n    if (expert >= experts || !sharers(batch, ids, top_k, own, places, mask)) return;\n    u32 n = (blockIdx.x * 8 + threadIdx.x / 32) * FEW_OUTPUTS;\n    if (n >= hidden_width) return;",
     "u32 expert = ids[single_place(batch, top_k, own)];\n    if (expert >= experts || !sharers(batch, ids, top_k, own, places, mask)) return;\n    u32 n = (blockIdx.x * 8 + threadIdx.x / 32) * FEW_OUTPUTS;\n    if (n >= hidden_width) return;",
     "experts/single tokens, the second"),
    ("shared/tile.h", "copy_async_wait<TILE_STAGES - 2>();", "copy_async_wait<TILE_STAGES - 1>();", "experts/BF16"),
    ("shared/tile.h", "        __syncthreads();\n        load(step", "        load(step", "experts/BF16"),
    ("shared/tile.h", "j / 2 * 64 + half * 32", "j / 2 * 64 + half * 16", "experts/BF16"),
    ("shared/tile.h", "half * 64 + j * 16", "half * 64 + j * 8", "experts/BF16"),
    ("shared/tile.h", "if (first + i * 16 >= rows) continue;", "if (first + i * 16 + 16 > rows) continue;", "experts/BF16"),
    ("shared/tile.h", "from != nullptr && k + c + j < width", "from != nullptr", "experts"),
    ("shared/kda.h", "(start + t + (u32)i) * channels", "(start + (u32)i) * channels", "kda_block/H=3"),
    ("shared/kda.h", "    if (slot == NONE) return 0.0f;", "    if (slot == NONE) return 1.0f;", "kda_block/H=3"),
    ("shared/kda.h", "head / (h.heads / h.key_heads) * h.key_width", "head % h.key_heads * h.key_width", "kda_chunk/init/H=2,4"),
    ("kda_step.cu", "value[d] = beta * (value[d] - sum);", "value[d] = value[d] - beta * sum;", "kda_step/init/T=17"),
    ("kda_step.cu", "sigmoid(widen(from.gate[at + e]))", "silu(widen(from.gate[at + e]))", "kda_block/H=3"),
    ("kda_step.cu", "piece, query_channel(h, head) + heads * key_width + d);", "piece, query_channel(h, head) + d);", "kda_block/H=3"),
    ("mla_prefill.cu", "                    total[m][r] *= keep[r];\n", "", "mla_prefill/BF16/1"),
    ("mla_prefill.cu", "sum[m][n][i] *= keep[i / 2];", "sum[m][n][i] *= keep[0];", "mla_prefill/BF16/1"),
    ("mla_prefill.cu", "if (__any_sync(EVERY_LANE, keep[0] != 1.0f || keep[1] != 1.0f)) {", "if (false) {", "mla_prefill/BF16/1"),
    ("mla_prefill.cu", "first_position + PART > position + token + 1 ||", "first_position + PART > position + token + QUERIES ||",
     "mla_prefill/a prompt"),
    ("mla_prefill.cu", "(gridDim.x - 1 - blockIdx.x) * WARPS * QUERIES", "(gridDim.x - 1 - blockIdx.x) * QUERIES", "mla_prefill/a prompt"),
    ("mla_prefill.cu", "RUN * KEY + part * PART * VALUE + across;", "RUN * KEY + across;", "mla_prefill/BF16/1"),
    ("mla_prefill.cu", "undo = __uint_as_float(exponent);", "undo = 1.0f;", "mla_prefill/BF16/1"),
    ("mla_prefill.cu", "    u32 exponent = __float_as_uint(greatest) & 0x7f800000u;", "    u32 exponent = 0;", "mla_prefill/large"),
    ("mla_prefill.cu", "query_scale, (int)(m * 16 + g + 8 * r))", "query_scale, (int)(m * 16 + g))", "mla_prefill/a prompt"),
    ("mla_prefill.cu", "fmaxf(fmaxf(greatest[0], greatest[1]), fmaxf(greatest[2], greatest[3]))", "greatest[threadIdx.x / 32]", "mla_prefill/BF16/1"),
    ("mla_prefill.cu", "own_queries + (m * (KEY / 16) + n) * TILE", "own_queries + n * TILE", "mla_prefill/BF16/1"),
    ("mla_prefill.cu", "widen(shared[at - a.nope])", "widen(shared[0])", "mla_prefill/BF16/1"),
    ("mla_prefill.cu", "copy_async_wait<0>();", "copy_async_wait<1>();", "mla_prefill/BF16/1"),
    ("shared/mla.h", "position % a.block_tokens) * (a.latent", "(position + 1) % a.block_tokens) * (a.latent", "mla_prefill/BF16/1"),
    ("mla_decode.cu", "piece_word(batch, piece, START) + 1;", "piece_word(batch, piece, START);", "mla_decode/BF16/1"),
    ("mla_decode.cu", "            total *= kept;\n", "", "mla_decode/a long context"),
    ("mla_decode.cu", "sum[m][n][i / 4][i % 4] *= i % 4 < 2 ? low_keep : high_keep;", "sum[m][n][i / 4][i % 4] *= low_keep;", "mla_decode/41 heads"),
    ("mla_decode.cu", "copy_async_wait<STAGES - 3>();", "copy_async_wait<STAGES - 2>();", "mla_decode/BF16/2"),
    ("mla_decode.cu", "first_tile = score_part * part_tiles;", "first_tile = score_part * (part_tiles - 1);", "mla_decode/BF16/2"),
    ("mla_decode.cu", "multiply_halves(score[j], rest[n], b[j]);", "", "mla_decode/BF16/2"),
    ("mla_decode.cu", "fetch.look(position + RUN);", "fetch.look(position);", "mla_decode/a long context"),
    ("mla_decode.cu", "position % a.block_tokens) * (a.latent", "(position + 1) % a.block_tokens) * (a.latent", "mla_decode/BF16/2"),
    ("mla_decode.cu", "at = key ? c - shared + a.latent : c, last", "at = c, last", "mla_decode/a long context"),
    ("mla_decode.cu", "if (!__any_sync(EVERY_LANE, low_keep != 1.0f || high_keep != 1.0f)) continue;", "continue;", "mla_decode/a long context"),
    ("mla_decode.cu", "stages + (turn - 1) % STAGES", "stages + turn % STAGES", "mla_decode/a long context"),
    ("mla_decode.cu", "        __syncthreads();\n        if (turn < runs) {", "        if (turn < runs) {", "mla_decode/a long context"),
    ("mla_decode.cu", "        __syncthreads();\n        fetch_run(turn + STAGES - 2);", "        fetch_run(turn + STAGES - 2);", "mla_decode/a long context"),
    ("mla_decode.cu", "if (own[1] > 1) span = spans[2 * (own[0] + 1) + 1];", "", "mla_decode/single tokens after"),
    ("mla_decode.cu", "factors[warp * MOST_SPANS + n] /= total;", ";", "mla_decode/single tokens after"),
    ("mla_decode.cu", "n = group; n < spans; n += MERGE_GROUPS", "n = group; n < spans; n += MERGE_GROUPS + 1", "mla_decode/single tokens after"),
    ("mla_decode.cu", "for (u32 n = group; n < nope; n += ABSORB_GROUPS) {", "for (u32 n = group; n + 1 < nope; n += ABSORB_GROUPS) {", "mla_decode/BF16/2"),
    ("mla_decode.cu", "soft_first + i < count ? x[i] * scale", "soft_first < count ? x[i] * scale", "mla_decode/BF16/1"),
    ("mla_decode.cu", "if (own_heads > 16) multiply_halves(sum[1]", "if (own_heads > 17) multiply_halves(sum[0]", "mla_decode/20"),
    ("shared/weight.h", "x[j] = column + j < columns ? weight_at(weight, format, i + j) : 0.0f;", "x[j] = weight_at(weight, format, i + j);", "route/odd"),
    ("shared/weight.h", "(u16)(j % 2 ? pair >> 16 : pair)", "(u16)pair", "route/f16"),
    ("shared/weight.h", "x[4] = b.x, x[5] = b.y", "x[4] = b.y, x[5] = b.x", "route/f32"),
    ("mla_decode.cu", "head * (nope + value) + nope + e) * latent;", "head * (nope + value) + e) * latent;", "mla_decode/BF16/1"),
    ("shared/fragment.h", "(half ^ (row / 4 % 2))", "(half ^ (row / 8 % 2 & half))", "mla_prefill/BF16/1"),
    ("shared/kda_image.h", "(unit ^ (tile % 2 * 16))", "unit", "kda_chunk/init/T=17"),
    ("kda_chunk.cu", "if (mine) found[n] = left[n] + right[n] + both[n];", "found[n] += (mine ? 1.0f : 0.0f) * (left[n] + right[n] + both[n]);", "kda_chunk/steep"),
    ("kda_chunk.cu", "middle ? make_float2(before[0], before[1]) : make_float2(1.0f, 1.0f)", "make_float2(1.0f, 1.0f)", "kda_chunk/bounded"),
    ("kda_chunk.cu", "middle ? make_float2(before[0], before[1]) : make_float2(1.0f, 1.0f)", "make_float2(before[0], before[1])", "kda_chunk/wild/T=63"),
    ("kda_chunk.cu", "(i ^ j) >= span &&", "(i ^ j) > span &&", "kda_chunk/masked"),
    ("kda_chunk.cu", "span > 0; span /= 2", "span > 1; span /= 2", "kda_chunk/masked"),
    ("kda_chunk.cu", "        __syncthreads();\n        if (mine) {", "        if (mine) {", "kda_chunk/masked"),
    ("kda_chunk.cu", "#define MIDDLE_LIMIT 60.0f", "#define MIDDLE_LIMIT 1e9f", "kda_chunk/masked"),
    ("kda_chunk.cu", "bool middle = safe[0] & safe[1] & safe[2] & safe[3];", "bool middle = true;", "kda_chunk/masked"),
    ("kda_chunk.cu", "row[i][j] = half ? near : far;", "row[i][j] = near;", "kda_chunk/bounded"),
    ("kda_chunk.cu", "i % span == 0 ? kept[i][j]", "i % span == 0 ? 1.0f", "kda_chunk/wild/T=63"),
    ("kda_chunk.cu", "(i + 1) % span == 0 ? 1.0f", "i == OWN - 1 ? 1.0f", "kda_chunk/wild/T=63"),
    ("kda_chunk.cu", "split_pair(row[0] * beta[j], row[1] * beta[j + 1], part, rest);", "split_pair(row[0], row[1], part, rest);", "kda_chunk/init/T=17"),
    ("kda_chunk.cu", "+ j + 1] = beta[i] * right;", "+ j + 1] = beta[j] * right;", "kda_chunk/init/T=17"),
    ("kda_chunk.cu", "backward[OWN - 1][j] = 1.0f;", "backward[OWN - 1][j] = kept[OWN - 1][j];", "kda_chunk/init/T=17"),
    ("kda_chunk.cu", "before[j] = half ? other : 1.0f;", "before[j] = 1.0f;", "kda_chunk/bounded"),
    ("kda_chunk.cu", "        total[j] += __shfl_xor_sync(EVERY_LANE, total[j], 16);\n", "", "kda_chunk/init/T=256"),
    ("kda_chunk.cu", "float2 pair = load_two(at, i < rows);", "float2 pair = load_two(at, true);", "kda_chunk/init/T=17"),
    ("kda_chunk.cu", "(sqrtf(sum[0] + L2_EPS) * sqrtf((float)h.key_width))", "sqrtf(sum[0] + L2_EPS)", "kda_chunk/init/T=17"),
    ("kda_chunk.cu", "return x[0] + __shfl_xor_sync(EVERY_LANE, x[0], 8);", "return x[0];", "kda_chunk/init/T=17"),
    ("kda_chunk.cu", "            if (i == j + 1) right = diagonal[i];\n", "", "kda_chunk/init/T=17"),
    ("kda_chunk.cu", "fmaf(-inverse[(8 + i) * STRIDE + 8 + j]", "fmaf(inverse[(8 + i) * STRIDE + 8 + j]", "kda_chunk/init/T=17"),
    ("kda_chunk.cu", "        inverse[i * STRIDE + 8 + c] = 0.0f;\n", "", "kda_chunk/init/T=17"),
    ("kda_chunk.cu", "(exponent - 14) << 23", "(exponent - 13) << 23", "kda_chunk/init/T=17"),
    ("kda_chunk.cu", "max(__float_as_uint(warp_max(most)) >> 23, 20u)", "141u", "kda_chunk/loud"),
    ("kda_chunk.cu", "softplus(widen(from.gates.decay[at]) + bias)", "softplus(widen(from.gates.decay[at]))", "kda_block/H=3"),
    ("kda_chunk.cu", "u32 before = place.first - place.start + t;", "u32 before = place.first - place.start;", "kda_block/H=3"),
    ("kda_scan.cu", "if (words[3] != NONE) store_state(", "if (false) store_state(", "kda_chunk/checkpoints"),
    ("kda_scan.cu", "        phase_wait(full + n % STAGES, n / STAGES % 2);\n", "", "kda_chunk/init/T=17"),
    ("kda_scan.cu", "phase_wait(full + n % STAGES, n / STAGES % 2);", "phase_wait(full + n % STAGES, 0);", "kda_chunk/init/T=130"),
    ("kda_scan.cu", "        if (n >= STAGES) phase_wait(empty + at, (n / STAGES - 1) % 2);\n", "", "kda_chunk/init/T=130"),
    ("kda_scan.cu", "(n / STAGES - 1) % 2", "n / STAGES % 2", "kda_chunk/init/T=130"),
    ("kda_scan.cu", "phase_expect(full + at, common + values);", "phase_expect(full + at, common);", "kda_chunk/init/T=17"),
    ("kda_scan.cu", "from + common + skip", "from + common", "kda_chunk/init/T=17"),
    ("kda_scan.cu", "s[1] *= factor.y;", "s[1] *= factor.x;", "kda_chunk/init/T=17"),
    ("kda_scan.cu", "            mma_bf16(state.at[2 * tile + n], u, rest_n);\n", "", "kda_chunk/re"),
    ("kda_scan.cu", "        multiply_halves(result, u, b);\n", "", "kda_chunk/init/T=17"),
    ("kda_scan.cu", "column == written * 16 + d ? 1.0f : 0.0f", "0.0f", "kda_chunk/long/frozen"),
    ("kda_scan.cu", "tile < written ? values : nullptr", "values", "kda_chunk/long/init"),
    ("kda_scan.cu", "load_columns(state, operators + operator_at<PADDED>(h, run.segment, head, column));", "load_state(state, states, h, NONE, head, column);", "kda_chunk/long/init"),
    ("kda_scan.cu", "        store_columns(state, at);\n", "", "kda_chunk/long/init"),
    ("kda_scan.cu", "pair[0], pair[PADDED], b[i]", "pair[0], pair[0], b[i]", "kda_chunk/long/frozen"),
    ("kda_scan.cu", "piece_word(batch, words[0], SLOT_IN)", "NONE", "kda_chunk/long/frozen"),
    ("kda_scan.cu", "const float* map = operators + operator_at<PADDED>(h, segment + n,", "const float* map = operators + operator_at<PADDED>(h, segment,", "kda_chunk/long/frozen"),
    ("kda_scan.cu", "piece, query_channel(h, head) + h.key_heads * h.key_width + d);", "piece, query_channel(h, head) + d);", "kda_block/H=3"),
    ("kda_step.cu", "        if (!From::SEVERAL) break;\n", "        break;\n", "kda_step/init/T=17"),
    ("kda_step.cu", "        to += STEP_WARPS * h.value_width;\n", "", "kda_step/init/T=17"),
    ("trace_attention.cu", "format, first + (u64)d * latent", "format, (u64)d * latent", "trace:operations::attention"),
    ("trace_attention.cu", "position < seen ? sum : -INFINITE", "sum", "trace:operations::attention"),
    ("trace_attention.cu", "spans[2 * i + 1] * expf(spans[2 * i] - greatest)", "spans[2 * i + 1]", "trace:operations::attention"),
    ("trace_attention.cu", "for (u32 i = threadIdx.x; i < count; i += blockDim.x) sum", "for (u32 i = threadIdx.x; i < 1; i += blockDim.x) sum", "trace:operations::attention"),
    ("trace_gate.cu", "(row * layers + layer) * heads", "row * heads", "trace:operations::the_numbers"),
    ("trace_kda.cu", "((u64)row * layers + layer) * heads + head", "(u64)row * heads + head", "trace:operations::the_numbers"),
    ("trace_kda.cu", "output[NUMBERS + d] = gate[d];", "output[NUMBERS + d] = decays[d];", "trace:operations::the_numbers"),
    ("trace_kda.cu", "keys[d] /= norm;\n    __syncthreads();", "keys[d] /= norm;", "trace:operations"),
    ("trace_route.cu", "output[top + i] = single ?", "output[top + i] = true ?", "trace:operations::only"),
    ("trace_state.cu", "SLOT_OUT", "SLOT_IN", "trace:operations::only"),
    ("trace_state.cu", "* heads + head)", "* heads)", "trace:operations::only"),
]


def sh(*command, **more):
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, **more)


def main():
    root = pathlib.Path(__file__).resolve().parents[2]
    if wrong := unmatched(root / "kernels", MUTATIONS):
        sys.exit("\n".join(wrong))
    if sys.argv[1:] == ["--check"]:
        print(f"{len(MUTATIONS)} rows match")
        return
    only = sys.argv[1] if len(sys.argv) > 1 else ""
    chosen = [row for row in MUTATIONS if only in row[0] + row[1]]
    if not chosen:
        sys.exit(f"no row has {only}")
    built = sh("cargo", "test", "--release", "--locked", "--workspace", "--test", "conformance", "--test", "trace", "--no-run",
               "--message-format=json", cwd=root)
    if built.returncode != 0:
        sys.exit(built.stderr)
    artifacts = [json.loads(line) for line in built.stdout.splitlines() if line.startswith("{")]
    binaries = {a["target"]["name"]: a["executable"] for a in artifacts if a.get("executable")}
    missed = []
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        kernels = folder / "kernels"
        shutil.copytree(root / "kernels", kernels)
        flags = ["-std=c++20", "-O2", "-fPIC", "-ffp-contract=off", "-fno-strict-aliasing", "-fcf-protection=none", "-U_FORTIFY_SOURCE",
                 "-fsanitize=alignment,bounds,integer-divide-by-zero", "-fsanitize-undefined-trap-on-error", "-w", f"-I{kernels}"]

        def objects(file, into):
            out = folder / into / (file.name + ".o")
            out.parent.mkdir(exist_ok=True)
            done = sh("c++", *flags, "-xc++", "-c", file, "-o", out)
            if done.returncode != 0:
                sys.exit(f"{file.name} does not compile:\n{done.stderr[-3000:]}")
            return out

        files = sorted(kernels.glob("*.cu"))
        sound = {file.name: objects(file, "sound") for file in [*files, kernels / "shared/host.cpp"]}

        def run(changed, cases):
            library = folder / "kernels.so"
            library.unlink(missing_ok=True)
            linked = sh("c++", "-shared", "-o", library, *{**sound, **changed}.values())
            if linked.returncode != 0:
                sys.exit(linked.stderr)
            environment = {**os.environ, "KIMI_EMULATED_KERNELS": str(library)}
            name, wanted = ("trace", cases[6:]) if cases.startswith("trace:") else ("conformance", f"cuda-emulated/{cases}")
            result = sh(binaries[name], wanted, "--test-threads", "2", env=environment)
            trials = [line[5:].rsplit(" ... ", 1) for line in result.stdout.splitlines() if line.startswith("test ") and " ... " in line]
            return [name.strip() for name, verdict in trials if verdict.strip() == "FAILED"], len(trials), result.returncode

        for cases in sorted({cases for *_, cases in chosen}):
            failed, count, _ = run({}, cases)
            if failed or not count:
                sys.exit(f"the sound kernels fail already, or nothing ran: {cases}, {failed}")
        for file, old, new, cases in chosen:
            source = kernels / file
            text = source.read_text()
            source.write_text(text.replace(old, new))
            # A header's bug is in every kernel that includes it; those that the cases run are enough.
            stems = {"select": ["select.cu"], "experts": ["experts.cu"], "rms_norm": ["rms_norm.cu"], "kda_gates": ["kda_gates.cu"],
                     "kda_chunk": ["kda_chunk.cu", "kda_scan.cu"],
                     "kda_block": ["kda_chunk.cu", "kda_scan.cu", "kda_step.cu"], "mla_prefill": ["mla_prefill.cu"],
                     "mla_decode": ["mla_decode.cu"], "route": ["route.cu"]}
            names = [file] if file.endswith(".cu") else stems[cases.split("/")[0]]
            changed = {name: objects(kernels / name, "mutant") for name in names}
            failed, count, code = run(changed, cases)
            source.write_text(text)
            # A mutant that brings the program down is caught too, but must have been run.
            caught = f"caught by {len(failed)} of {count}, {failed[0]}" if failed else "brought the run down" if code else "NOT CAUGHT"
            print(f"{caught:72} {file}: {new.splitlines()[0] if new else 'nothing'} for {old.splitlines()[0]}", flush=True)
            if not failed and not code:
                missed.append((file, old))
    if missed:
        sys.exit(f"{len(missed)} not caught: {missed}")


if __name__ == "__main__":
    main()
