#!/usr/bin/env python3
"""Plant bugs in the CUDA kernels, one after the other; the tests on cuda-emulated must detect each.

    tests/conformance/kernel_mutations.py [SUBSTRING]
    tests/conformance/kernel_mutations.py --check

The kernels are compiled into a library once. A mutant compiles one file again and runs the test that is built already, which loads the
library instead of its own kernels. The repository is not changed. Each row of MUTATIONS is a file of kernels/, a part of it that occurs
once, its replacement, and the cases of the conformance list that must detect it, or, after "trace:", the tests of the trace. A row whose
text is not found or that does not compile is an error of this script, not a detected bug. `--check` compiles nothing: it prints the rows
that no longer match their text, and is part of every test run.
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
    ("embed.cu", "p.batch[p.batch[AT_TOKENS] + t]", "p.batch[p.batch[AT_TOKENS]]", "embed"),
    ("embed.cu", "drawn[2 * (token ^ FED)]", "drawn[token ^ FED]", "embed/fed"),
    ("embed.cu", ", p.vocabulary - 1);", ", p.vocabulary);", "embed/fed"),
    ("shared/norm.h", "/ (float)width + eps)", "/ (float)width) + eps", "rms_norm"),
    ("shared/norm.h", "/ (float)width + eps)", "/ (float)width) + eps", "add_norm"),
    ("shared/norm.h", "normalise(target, weight", "normalise(source, weight", "add_norm"),
    ("shared/norm.h", "narrow(widen(target[i]) + widen(source[i]))", "narrow(widen(target[i]))", "add_norm"),
    ("add_norm.cu", "p.source + at, p.target + at", "p.source, p.target + at", "add_norm"),
    ("experts_combine.cu", "column < p.width; column += 1024) {", "column < min(p.width, 1024u); column += 1024) {", "moe_block/the sum"),
    ("experts_combine.cu", "    __syncthreads();\n    u64 at", "    u64 at", "moe_block/the sum"),
    ("rms_norm.cu", "p.gather ? p.batch[p.batch[AT_OUTPUTS] + OUTPUT_WORDS * r + OUTPUT_ROW] : r", "r", "rms_norm"),
    ("rms_norm.cu", "SHARED(float, scratch, 32);", "SHARED(float, scratch, 4);", "rms_norm"),
    ("shared/kernel.h", "    __syncthreads();\n    float all", "    float all", "rms_norm"),
    ("linear.cu", "if (first + r < rows) sums[r]", "if (first + r < rows && i + 1 < p.columns) sums[r]", "linear"),
    ("linear.cu", "if (r == NONE || k >= columns) return make_uint4", "if (r == NONE) return make_uint4", "linear"),
    ("shared/eights.h", "k + c + 1 < columns ? at[c + 1] : bf16{0}", "at[c + 1]", "linear"),
    ("shared/eights.h", "k + c < columns ? at[c] : bf16{0}", "at[c]", "experts/single tokens, odd"),
    ("shared/eights.h", "(u16)(j % 2 ? word >> 16 : word)", "(u16)word", "route/F16"),
    ("shared/eights.h", "n == 1 ? four.y : n == 2 ? four.z", "n == 1 ? four.z : n == 2 ? four.y", "route/BF16"),
    ("shared/eights.h", "FORMAT == FORMAT_F32 ? j / 4 : 0", "0", "route/F32"),
    ("shared/eights.h", "words[n] = load_sixteen(from + 16 * n, there);", "words[n] = load_sixteen(from + 16 * n, true);", "route/BF16"),
    ("linear.cu", "mma_bf16(sums[i][j], a[1], b[1]);", "mma_bf16(sums[i][j], a[1], b[0]);", "linear"),
    ("linear.cu", "return order != nullptr ? order[n] : n;", "return n;", "linear"),
    ("linear.cu", "u32 several = kind == TOKENS ? batch[SEVERAL_ROWS] : 0", "u32 several = 0", "linear"),
    ("linear.cu", "        __syncthreads();\n        u32 r = threadIdx.x / FEW_OUTPUTS", "        u32 r = threadIdx.x / FEW_OUTPUTS", "linear"),
    ("linear.cu", "output_first + n, sum);\n        }\n        __syncthreads();", "output_first + n, sum);\n        }", "linear"),
    ("linear.cu", "weight_of(i, k + FEW_WARPS * FEW_COLUMNS)", "weight_of(i, k)", "linear"),
    ("linear.cu", "for (u32 from = 0; from < FEW_WARPS; from++)", "for (u32 from = 0; from < FEW_WARPS - 1; from++)", "linear"),
    ("linear.cu", "        block -= blocks;\n", "", "kda_block/H=3,3 K=32"),
    ("linear.cu", "if (n < next || block < blocks) continue;", "if (n < next || block <= blocks) continue;", "mla_block"),
    ("shared/blocks.h", "(packed[4] & 15) | packed[-4] >> 6 << 4", "(packed[4] & 15) | packed[0] >> 6 << 4", "linear/Q4_K"),
    ("shared/blocks.h", "codes.x | more.x << 4, codes.y | more.y << 4, 32,", "codes.x | more.x << 4, codes.y | more.y << 4, 31,", "experts/Q6_K"),
    ("shared/blocks.h", "nibbles_of_32(at + 8 + 16 * group, i % 32)", "nibbles_of_32(at + 8 + 16 * group, i % 16)", "embed/IQ4_XS"),
    ("shared/tile.h", "bool second = i >= TILE_OWN / 2;", "bool second = i > TILE_OWN / 2;", "experts/Q8_0"),
    ("linear.cu", "n < p.outputs ? min(p.outputs - n, TILE_ROWS / 2u) : 0}", "TILE_ROWS / 2u}", "linear/Q8_0"),
    ("add.cu", "narrow(widen(target[i]) + widen(source[i]))", "narrow(widen(source[i]))", "add"),
    ("swiglu.cu", "narrow(silu(gate) * up)", "narrow(gate * silu(up))", "swiglu"),
    ("short_conv.cu", "taps - 1 + t - back", "taps - 2 + t - back", "short_conv"),
    ("short_conv.cu", "narrow(silu(sum))", "narrow(sum)", "short_conv"),
    ("short_conv.cu", "if (slot == NONE) return 0.0f;", "if (slot == NONE) slot = 0;", "short_conv"),
    ("short_conv.cu", "slot, after, kept - j, c)", "slot, length, kept - j, c)", "short_conv"),
    ("kda_gates.cu", "-expf(weight_at(p.a_log", "expf(weight_at(p.a_log", "kda_gates"),
    ("shared/kernel.h", "return fmaf(s, even, fmaxf(x, 0.0f));", "return s * even;", "kda_gates"),
    ("shared/kernel.h", "exp_near(-fabsf(x)), s", "exp_near(x), s", "kda_gates"),
    ("shared/kernel.h", "    even = fmaf(even, square, 0.666663229f);\n", "", "kda_gates"),
    ("gated_norm.cu", "narrow(x * sigmoid(widen(p.gate[at + i])))", "narrow(x * silu(widen(p.gate[at + i])))", "gated_norm"),
    ("mla_append.cu", "position % p.block_tokens) * width", "(position + 1) % p.block_tokens) * width", "mla_append"),
    ("mla_append.cu", "i = p.latent + threadIdx.x", "i = p.latent + 1 + threadIdx.x", "mla_append"),
    ("kda_step.cu", "float decay = factor[i];", "float decay = 1.0f;", "kda_step"),
    ("kda_step.cu", "state[r] = add_scaled(state[r], key[i], write);\n            result = add_scaled(result, query[i], state[r]);",
     "result = add_scaled(result, query[i], state[r]);\n            state[r] = add_scaled(state[r], key[i], write);", "kda_step"),
    ("kda_step.cu", "checkpoint[CHECKPOINT_AFTER] == t + 1", "checkpoint[CHECKPOINT_AFTER] == t", "kda_step"),
    ("kda_step.cu", "*part = answer;\n        __syncthreads();", "*part = answer;", "kda_step"),
    ("mla_prefill.cu", "at <= own(m, r) && at < window_end", "at <= own(m, r) + 1 && at < window_end", "mla_prefill/BF16/1"),
    ("mla_prefill.cu", "keep[r] = exp2f(greatest[m][r] - best[r]);", "keep[r] = 1.0f;", "mla_prefill/BF16/1"),
    ("mla_decode.cu", "float kept = expf(greatest - best);", "float kept = 1.0f;", "mla_decode/a long context"),
    ("mla_decode.cu", "total = fmaf(sum[i], greatest[i], total);", "total += sum[i];",
     "mla_decode/single tokens after"),
    ("shared/mla.h", "(float)(a.nope + a.rope)", "(float)a.nope", "mla_decode"),
    ("route.cu", "float score = plain[expert];", "float score = ranked_score(best);", "route"),
    ("route.cu", "float score = sigmoid(logits[i])", "float score = logits[i]", "route"),
    ("route.cu", "first < experts; first += 256) {", "first < experts; first += 288) {", "route/300"),
    ("route.cu", "u32 first = all ? 0 : batch[SEVERAL_ROWS];", "u32 first = 0;", "route"),
    ("route.cu", "u32 first = all ? 0 : batch[SEVERAL_ROWS];", "u32 first = batch[SEVERAL_ROWS];", "route"),
    ("route.cu", "order = batch + batch[AT_ROWS] + first;", "order = batch + batch[AT_ROWS];", "route/each row alone"),
    ("route.cu", "if (lane == t) own = sum;", "if (lane <= t) own = sum;", "route/BF16/single"),
    ("route.cu", "dots<FORMAT, AHEAD_OF_ONE>(sums, weight, row, rows, 256 * AHEAD_OF_ONE, width);", "", "route/F32/one"),
    ("route.cu", "*last = before + 1 == gridDim.x;", "*last = before + 2 == gridDim.x;", "route/F32/one"),
    ("route.cu", "if (*last) *p.finished = 0;", "", "route/each row alone, single"),
    ("route.cu", "for (; from < width; from += 256 * AHEAD) {", "for (; from < width; from += 256 * AHEAD + 256) {", "route/F16/single"),
    ("route.cu", "x[a][t] = load_sixteen(rows[t] + c, c < width);", "x[a][t] = load_sixteen(rows[0] + c, c < width);", "route/BF16/single"),
    ("route.cu", "for (u32 k = threadIdx.x % 32; k < width; k += 32) {", "for (u32 k = threadIdx.x % 32; k + 1 < width; k += 32) {", "route/F16/single tokens of 33"),
    ("route.cu", "if (second != 0) sum +=", "if (false) sum +=", "route"),
    ("route.cu", "p.scale / (sum + 1e-20f)", "1.0f / (sum + 1e-20f)", "route"),
    ("shared/best.h", "(u64)bits << 32 | (u32)~id", "(u64)bits << 32 | (u32)id", "select"),
    ("shared/best.h", "== upper ? (u32)best : 0", "== upper ? (u32)best : (u32)best", "route/8 choose"),
    ("select.cu", "if (sums[4 * s + 2] != 1.0f) wrong = 1.0f;", "", "select"),
    ("select.cu", "most + logf(sum)", "logf(sum)", "select"),
    ("sample.cu", "return weight >= row.draw[DRAW_LEAST] ? weight : 0;", "return weight;", "sample/min_p"),
    ("sample.cu", "share_of(sum + extra,", "share_of(sum,", "sample/top_k, top_p"),
    ("sample.cu", "u32 key = found.reached ? found.key : most.key;", "u32 key = found.key;", "sample/top_k, top_p"),
    ("sample.cu", "before < cut.ties ? cut.ties - before : (u64)0", "(u64)cut.ties", "sample/top_p"),
    ("sample.cu", "|| row.bits(i) == REMOVED) continue;", ") continue;", "sample/allowed"),
    ("sample.cu", "u32 known = p.level == 0 ? 0 : ~0u << (shift + 8);", "u32 known = 0;", "sample/top_k 5"),
    ("sample.cu", "crossing[2] + scan(ties, scratch, &all) - ties;", "scan(ties, scratch, &all) - ties;", "sample/top_p/vocabulary 9000"),
    ("experts_combine.cu", "fmaf(shares[i], parts[i][j], sums[j])", "sums[j] + parts[i][j]", "experts"),
    ("experts_combine.cu", "here[i] = begin + i < top_k && ids[begin + i] - first < experts;", "here[i] = begin + i < top_k;", "experts/the"),
    ("experts_combine.cu", "begin < top_k; begin += COMBINED) {", "begin < min(top_k, (u32)COMBINED); begin += COMBINED) {", "experts/BF16/16 of [16,32]"),
    ("experts_combine.cu", "results + (u64)(begin + i) * width + column;", "results + (u64)i * width + column;", "experts/BF16/16 of [16,32]"),
    ("experts_combine.cu", "low(pairs[0]) + low(more.x), high(pairs[0])", "low(more.x), high(pairs[0])", "moe_block"),
    ("experts_combine.cu", "p.shared != nullptr ? p.shared + row * p.width : nullptr", "p.shared", "moe_block"),
    ("experts_combine.cu", "narrow(widen(sum) + widen(shared[column + j]))", "shared[column + j]", "moe_block"),
    ("experts.cu", "silu(sums[i][j][n]) * sums[i][j + 4][n]", "sums[i][j][n] * silu(sums[i][j + 4][n])", "experts/BF16"),
    ("experts.cu", "starts[e] + n * run;", "starts[e];", "experts/many assignments"),
    ("experts.cu", "+ batch[SEVERAL_ROWS] + i / top_k", "+ i / top_k", "experts/single tokens"),
    ("experts.cu", "single = batch[AT_ROWS] + batch[SEVERAL_ROWS], n", "single = batch[AT_ROWS], n", "experts/a token"),
    ("experts.cu", "if (assignment == NONE || output + n >= p.width) return;", "if (assignment == NONE) return;", "experts/single tokens, odd"),
    ("experts.cu", "min(output + threadIdx.x % 32 / 4 + i * 8, p.width - 1);\n        product.", "output + threadIdx.x % 32 / 4 + i * 8;\n        product.", "experts/single tokens, odd"),
    ("experts.cu", "if (rows < 2) {", "if (rows < 3) {", "experts"),
    ("experts.cu", "n < list[0] ? entry[2] : 0", "n + 1 < list[0] ? entry[2] : 0", "experts/single tokens"),
    ("experts.cu", "n < list[0] ? entry[2] : 0", "n <= list[0] ? entry[2] : 0", "experts/single tokens"),
    ("experts.cu", "list + 1 + 3 * (u64)most + entry[1], NONE}", "list + 1 + 3 * (u64)most, NONE}", "experts/single tokens"),
    ("experts.cu", "return {expert, expert < experts ? 1u : 0u, nullptr, assignment};", "return {expert, 1u, nullptr, assignment};", "experts/one token"),
    ("experts.cu", "up = p.shared + (u64)p.hidden_width * p.width;", "up = p.shared;", "moe_block"),
    ("experts.cu", "is_shared(shared_hidden) ? shared_hidden : p.hidden", "p.hidden", "moe_block"),
    ("experts.cu", "        n--;\n", "", "moe_block"),
    ("experts.cu", "is_shared(shared_hidden) ? assignment : assignment / p.top_k", "assignment / p.top_k", "moe_block"),
    ("experts.cu", "first < chosen.count; first += FEW_ASSIGNMENTS) {", "first < min(chosen.count, (u32)FEW_ASSIGNMENTS); first += FEW_ASSIGNMENTS) {", "experts/many single"),
    ("experts.cu", "chosen.assignment(min(first + g, chosen.count - 1))", "chosen.assignment(first)", "experts/single tokens"),
    ("experts.cu", "first + warp < chosen.count ? chosen.assignment(first + warp) : NONE", "first + warp + 1 < chosen.count ? chosen.assignment(first + warp) : NONE", "experts/single tokens"),
    ("experts.cu", "        if (first > 0) __syncthreads();\n", "", "experts/many single"),
    ("experts.cu", "        __syncthreads();\n        float sum = 0.0f;", "        float sum = 0.0f;", "experts/single tokens"),
    ("experts.cu", "from < FEW_WARPS; from++) sum += parts", "from < FEW_WARPS - 1; from++) sum += parts", "experts/single tokens, wide"),
    ("experts.cu", "from[i] += FEW_WARPS * FEW_COLUMNS;", "from[i] += FEW_COLUMNS;", "experts/single tokens, wide"),
    ("experts.cu", "mma_bf16(sums[i], a[1], b[1]);", "mma_bf16(sums[i], a[1], b[0]);", "experts/single tokens"),
    ("experts.cu", "narrow(silu(sum) * other)", "narrow(sum * silu(other))", "experts/single tokens"),
    ("experts.cu", "run, p.first_expert, p.experts, 0, assignments, assignments, assignment_of);", "run, p.first_expert, p.experts, 0, assignments - 1, assignments, assignment_of);", "experts/single tokens"),
    ("experts.cu", "starts[e] = counts != nullptr ? all : before;", "starts[e] = all;", "experts/single tokens"),
    ("experts.cu", "entry[2] = min(count - n * run, run);", "entry[2] = count - 1;", "experts/single tokens"),
    ("experts.cu", "entry[0] = e;", "entry[0] = e + first;", "experts/single tokens, the second"),
    ("experts.cu", "if (s < blockIdx.x) before += count;", "", "experts/many"),
    ("experts.cu", "if (expert < experts && rank == 0) *to += (u32)__popc(peers);", "", "experts/many"),
    ("experts.cu", "next[w * experts + e] = before;", "next[w * experts + e] = 0;", "experts/many"),
    ("shared/tile.h", "copy_async_wait<TILE_STAGES - 2>();", "copy_async_wait<TILE_STAGES - 1>();", "experts/BF16"),
    ("shared/tile.h", "        __syncthreads();\n        load(step", "        load(step", "experts/BF16"),
    ("shared/tile.h", "j / 2 * 64 + half * 32", "j / 2 * 64 + half * 16", "experts/BF16"),
    ("shared/tile.h", "half * 64 + j * 16", "half * 64 + j * 8", "experts/BF16"),
    ("shared/tile.h", "if (first + i * 16 >= rows) continue;", "if (first + i * 16 + 16 > rows) continue;", "experts/BF16"),
    ("shared/tile.h", "from != nullptr && k + c + j < width", "from != nullptr", "experts"),
    ("shared/kda.h", "(start + after + i - LEAD) * channels", "(start + after + i) * channels", "kda_block/H=3,3 K=32"),
    ("shared/kda.h", "slot_in == NONE ? 0.0f : conv_state_of(conv, channels, slot_in, c)[after + i];", "conv_state_of(conv, channels, slot_in == NONE ? 0 : slot_in, c)[after + i];", "kda_block/H=3,3 K=32"),
    ("shared/kda.h", "sum = fmaf(taps[j], input[j], sum);", "sum = fmaf(taps[j], input[TAPS - 1 - j], sum);", "kda_block/H=3,3 K=32"),
    ("shared/weight.h", "n < HALF || wide);\n        } else {", "n < HALF);\n        } else {", "kda_block/H=1,1 K=64"),
    ("shared/weight.h", "(first + j) % 2 * 16", "j % 2 * 16", "kda_block/H=2,2 K=18"),
    ("shared/weight.h", "(first + j) % 2 ? high(", "j % 2 ? high(", "kda_block/H=2,2 K=18"),
    ("shared/weight.h", "        return j % 2 ? high(words[j / 2]) : low(words[j / 2]);", "        return low(words[j / 2]);", "mla_decode/BF16/2"),
    ("shared/kda.h", "head / (h.heads / h.key_heads) * h.key_width", "head % h.key_heads * h.key_width", "kda_chunk/init/H=2,4"),
    ("kda_step.cu", "value[d] = beta * (value[d] - sum);", "value[d] = value[d] - beta * sum;", "kda_step/init/T=17"),
    ("kda_step.cu", "x.decay = narrow(sums[0] + sums[1]);", "x.decay = narrow(sums[0]);", "kda_block/H=3,3 K=32"),
    ("kda_step.cu", "    __syncthreads();\n    float sums[2]", "    float sums[2]", "kda_block/H=3,3 K=32"),
    ("kda_step.cu", "r < WIDEST ? from.decay_up : from.gate_up;", "from.decay_up;", "kda_block/H=3,3 K=32"),
    ("kda_step.cu", "gates[share.d] = x.decay;\n    __syncthreads();", "gates[share.d] = x.decay;", "kda_block/H=3,3 K=32"),
    ("kda_step.cu", "(u64)(head * width + min(d, width - 1))", "(u64)min(d, width - 1)", "kda_block/H=3,3 K=32"),
    ("kda_step.cu", "sigmoid(widen(inputs.gate))", "silu(widen(inputs.gate))", "kda_block/H=3,3 K=32"),
    ("kda_step.cu", "input[i] = past ? before[i] : 0.0f;", "input[i] = before[i];", "kda_block/H=3,3 K=32"),
    ("kda_step.cu", "        if (share.key) second[i] = right;\n", "", "kda_block/H=3,3 K=32"),
    ("kda_step.cu", "if (length > 0) {\n            left", "if (true) {\n            left", "kda_block/H=3,3 K=32"),
    ("kda_step.cu", "float q = share.key ? numbers.first : 0.0f", "float q = thread < WIDEST ? numbers.first : 0.0f", "kda_block/H=3,3 K=32"),
    ("kda_step.cu", "there && h.key_width > warp ?", "h.key_width > warp ?", "kda_block/H=3,3 K=32"),
    ("kda_step.cu", "keep_conv_state_of(x, from, h, checkpoint[CHECKPOINT_WORDS * n + CHECKPOINT_AFTER], slot != NONE,\n            checkpoint[CHECKPOINT_WORDS * n + CHECKPOINT_SLOT], share);", "", "kda_block/H=3,3 K=32"),
    ("kda_step.cu", "read, head, share);\n        keep_conv_states_of", "out, head, share);\n        keep_conv_states_of", "kda_block/H=3,3 K=32"),
    ("kda_step.cu", "state[r].y = r < rows && e + 1 < h.value_width ? at[1] : 0.0f;", "state[r].y = r < rows && e + 1 < h.value_width ? at[0] : 0.0f;", "kda_step/init/H=2,2 K=20"),
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
    ("mla_decode.cu", "segment_word(p.batch, segment, START) + 1;", "segment_word(p.batch, segment, START);", "mla_decode/BF16/1"),
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
    ("mla_decode.cu", "if (own[SPANNED_COUNT] > 1) span = spans[SPAN_WORDS * (own[SPANNED_FIRST] + 1) + SPAN_FIRST];", "", "mla_decode/single tokens after"),
    ("mla_decode.cu", "greatest[i] / total;", "greatest[i];", "mla_decode/single tokens after"),
    ("mla_decode.cu", "lane + i * 32 < spans.count ? expf(greatest[i] - most) : 0.0f;", "expf(greatest[i] - most);", "mla_decode/single tokens after"),
    ("mla_decode.cu", "u32 span = n + i * MERGE_GROUPS;", "u32 span = n + i * (MERGE_GROUPS + 1);", "mla_decode/single tokens after"),
    ("mla_decode.cu", "span < spans.count ? factors[r * MOST_SPANS + min(span, spans.count - 1)] : 0.0f;", "factors[r * MOST_SPANS + min(span, spans.count - 1)];", "mla_decode/single tokens after"),
    ("mla_decode.cu", "            spans = spans_of(r);\n", "", "mla_decode/single tokens after"),
    ("mla_decode.cu", "weigh_spans(factors + warp * MOST_SPANS, spans_of(warp)", "weigh_spans(factors + warp * MOST_SPANS, spans_of(0)", "mla_decode/single tokens after"),
    ("mla_decode.cu", "r < count && thread < nope ? x : 0.0f;", "x;", "mla_decode/single tokens after"),
    ("mla_decode.cu", "float factor = q[r * MOST_NOPE + n + i * ABSORB_GROUPS];", "float factor = q[r * MOST_NOPE + n];", "mla_decode/20"),
    ("mla_decode.cu", "        if (n != group) load(n);\n", "", "mla_decode/F32/3"),
    ("mla_decode.cu", "            if (e != warp) load(set, e);\n", "", "mla_decode/F32/3"),
    ("mla_decode.cu", "    if (SETS > 1) load(SETS - 1, warp);\n", "", "mla_decode/20"),
    ("mla_decode.cu", "expand<ROWS>(to, weights[set], context", "expand<1>(to, weights[set], context", "mla_decode/single tokens after"),
    ("mla_decode.cu", "soft_first + i < count ? x[i] * scale", "soft_first < count ? x[i] * scale", "mla_decode/BF16/1"),
    ("mla_decode.cu", "if (own_heads > 16) multiply_halves(sum[1]", "if (own_heads > 17) multiply_halves(sum[0]", "mla_decode/20"),
    ("shared/weight.h", "x[j] = column + j < columns ? weight_at(weight, format, i + j) : 0.0f;", "x[j] = weight_at(weight, format, i + j);", "mla_decode/BF16/1"),
    ("shared/weight.h", "(u16)(j % 2 ? pair >> 16 : pair)", "(u16)pair", "mla_decode/F16/latents"),
    ("shared/weight.h", "x[4] = b.x, x[5] = b.y", "x[4] = b.y, x[5] = b.x", "mla_decode/F32/latents"),
    ("mla_decode.cu", "head * (nope + value) + nope + min(e", "head * (nope + value) + min(e", "mla_decode/BF16/1"),
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
    ("shared/kda_input.h", "float2 pair = load_two(at, i < rows);", "float2 pair = load_two(at, true);", "kda_chunk/init/T=17"),
    ("kda_chunk.cu", "(sqrtf(sum[0] + L2_EPS) * sqrtf((float)h.key_width))", "sqrtf(sum[0] + L2_EPS)", "kda_chunk/init/T=17"),
    ("kda_chunk.cu", "return x[0] + __shfl_xor_sync(EVERY_LANE, x[0], 8);", "return x[0];", "kda_chunk/init/T=17"),
    ("kda_chunk.cu", "            if (i == j + 1) right = diagonal[i];\n", "", "kda_chunk/init/T=17"),
    ("kda_chunk.cu", "fmaf(-inverse[(8 + i) * STRIDE + 8 + j]", "fmaf(inverse[(8 + i) * STRIDE + 8 + j]", "kda_chunk/init/T=17"),
    ("kda_chunk.cu", "        inverse[i * STRIDE + 8 + c] = 0.0f;\n", "", "kda_chunk/init/T=17"),
    ("kda_chunk.cu", "(exponent - 14) << 23", "(exponent - 13) << 23", "kda_chunk/init/T=17"),
    ("kda_chunk.cu", "max(__float_as_uint(warp_max(most)) >> 23, 20u)", "141u", "kda_chunk/loud"),
    ("shared/kda_input.h", "softplus(low(read.pair[i]) + bias[0])", "softplus(low(read.pair[i]))", "kda_block/H=3,3 K=32"),
    ("shared/kda_input.h", "gate[i][1] = i < rows ? right : 0.0f;", "gate[i][1] = right;", "kda_block/H=3,3 K=32"),
    ("shared/kda_input.h", "taps[n] = d < width ? both[j * TAPS + n] : 0.0f;", "taps[n] = both[j * TAPS + n];", "kda_block/H=2,2 K=18"),
    ("shared/kda_input.h", "u32 before = place.first - place.start + t;", "u32 before = place.first - place.start;", "kda_block/H=3,3 K=32"),
    ("shared/kda_input.h", "if (before + i < LEAD) input[j][i]", "if (before + i <= LEAD) input[j][i]", "kda_block/H=3,3 K=32"),
    ("shared/kda_input.h", "place.slot == NONE ? 0.0f : conv_state[before + i];", "place.slot == NONE ? 0.0f : conv_state[i];", "kda_block/H=3,3 K=32"),
    ("shared/kda_input.h", "min(max(first + (int)i, 0), (int)last)", "(u32)(first + (int)i)", "kda_block/H=3,3 K=32"),
    ("shared/kda_input.h", "(int)(place.first + t) - LEAD, place.first", "(int)(place.first + t) - LEAD + 1, place.first", "kda_block/H=3,3 K=32"),
    ("shared/kda_input.h", "return min(d, width - PAIR);", "return d;", "kda_block/H=2,2 K=18"),
    ("kda_chunk.cu", "words[CHUNK_SEGMENT] * SEGMENT;", "words[CHUNK_SLOT] * SEGMENT;", "kda_block/H=3,3 K=32"),
    ("kda_scan.cu", "if (chunk.slot != NONE) store_state(", "if (false) store_state(", "kda_chunk/checkpoints"),
    ("kda_scan.cu", "next = chunk_of(chunks, min(n + 1, run.count - 1));", "next = chunk_of(chunks, min(n + 2, run.count - 1));", "kda_chunk/init/T=130"),
    ("kda_scan.cu", "next = chunk_of(chunks, min(n + 1, run.count - 1));", "chunk = next = chunk_of(chunks, min(n + 1, run.count - 1));", "kda_chunk/checkpoints"),
    ("kda_scan.cu", "return Chunk{words[CHUNK_ROW], words[CHUNK_LENGTH], words[CHUNK_SLOT]};", "return Chunk{words[CHUNK_ROW], words[CHUNK_LENGTH], words[CHUNK_SEGMENT]};", "kda_chunk/checkpoints"),
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
    ("kda_scan.cu", "load_columns(state, operators + operator_at<PADDED>(h, run.split, head, column));", "load_state(state, states, h, NONE, head, column);", "kda_chunk/long/init"),
    ("kda_scan.cu", "        store_columns(state, at);\n", "", "kda_chunk/long/init"),
    ("kda_scan.cu", "pair[0], pair[PADDED], b[i]", "pair[0], pair[0], b[i]", "kda_chunk/long/frozen"),
    ("kda_scan.cu", "segment_word(batch, words[CUT_SEGMENT], SLOT_IN)", "NONE", "kda_chunk/long/frozen"),
    ("kda_scan.cu", "const float* map = operators + operator_at<PADDED>(h, split + n,", "const float* map = operators + operator_at<PADDED>(h, split,", "kda_chunk/long/frozen"),
    ("kda_scan.cu", "segment, query_channel(h, head) + h.key_heads * h.key_width + d);", "segment, query_channel(h, head) + d);", "kda_block/H=3,3 K=32"),
    ("kda_step.cu", "        if (!From::SEVERAL) break;\n", "        break;\n", "kda_step/init/T=17"),
    ("kda_step.cu", "            to += STEP_WARPS * h.value_width;\n", "", "kda_step/init/T=17"),
    ("trace_attention.cu", "format, first + (u64)d * p.latent", "format, (u64)d * p.latent", "trace:operations::attention"),
    ("trace_attention.cu", "position < seen ? sum : -INFINITE", "sum", "trace:operations::attention"),
    ("trace_attention.cu", "spans[2 * i + 1] * expf(spans[2 * i] - greatest)", "spans[2 * i + 1]", "trace:operations::attention"),
    ("trace_attention.cu", "for (u32 i = threadIdx.x; i < count; i += blockDim.x) sum", "for (u32 i = threadIdx.x; i < 1; i += blockDim.x) sum", "trace:operations::attention"),
    ("trace_gate.cu", "(row * p.layers + p.layer) * p.heads", "row * p.heads", "trace:operations::the_numbers"),
    ("trace_kda.cu", "((u64)row * p.layers + p.layer) * p.heads + head", "(u64)row * p.heads + head", "trace:operations::the_numbers"),
    ("trace_kda.cu", "output[NUMBERS + d] = gate[d];", "output[NUMBERS + d] = decays[d];", "trace:operations::the_numbers"),
    ("trace_kda.cu", "keys[d] /= norm;\n    __syncthreads();", "keys[d] /= norm;", "trace:operations"),
    ("trace_route.cu", "output[p.top + i] = single ?", "output[p.top + i] = true ?", "trace:operations::only"),
    ("trace_state.cu", "SLOT_OUT", "SLOT_IN", "trace:operations::only"),
    ("trace_state.cu", "* p.heads + p.head)", "* p.heads)", "trace:operations::only"),
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
            stems = {"select": ["select.cu"], "embed": ["embed.cu"], "linear": ["linear.cu"], "experts": ["experts.cu"], "rms_norm": ["rms_norm.cu"], "add_norm": ["add_norm.cu"], "kda_gates": ["kda_gates.cu"],
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
