#!/usr/bin/env python3
"""Plant bugs in the sources of the CPU backend and the shaders, one after the other; the conformance list must detect each.

    tests/conformance/mutations.py [SUBSTRING] [--filter cpu/]
    tests/conformance/mutations.py --check

Works on a copy of the sources; the repository is not changed. Each row of MUTATIONS is a file, a part of it that occurs once, and its
replacement. A row for a shader (.wgsl) requires `--filter wgpu/`. Set CARGO_TARGET_DIR to a folder with built dependencies, or they
are built first. A mutant that does not compile, or whose text is not found, is an error of this script, not a detected bug. `--check`
compiles nothing: it prints the rows that no longer match their text, and is part of every test run.
`mutants.rs` plants bugs around a backend in every test run; this script needs a build per mutant and is run by hand.
"""
import argparse
import pathlib
import shutil
import subprocess
import sys
import tempfile

from mutation_rows import unmatched

CPU = "src/backend/cpu/"
MUTATIONS = [
    # file, from, to
    (CPU + "embed.rs", "drawn[2 * fed.draw]", "drawn[fed.draw]"),
    (CPU + "kda_gates.rs", "let rate = -a_log[head].exp();", "let rate = a_log[head].exp();"),
    (CPU + "kda_gates.rs", "a_log[head]", "a_log[heads - 1 - head]"),
    (CPU + "math.rs", "ln(sum) * (power / rounded)", "ln(sum)"),
    (CPU + "math.rs", "if x > 20.0", "if x > 8.0"),
    (CPU + "math.rs", "1.0 / (dot(x, x) / x.len() as f32 + eps).sqrt()", "1.0 / ((dot(x, x) / x.len() as f32).sqrt() + eps)"),
    (CPU + "kda_step.rs", "let decay = exp(gates[d]);", "let decay = exp(gates[d]).max(0.0067);"),
    (CPU + "kda_step.rs", "*value = normal(*value * decay);\n                *write += key[d] * *value;", "*write += key[d] * *value;\n                *value = normal(*value * decay);"),
    (CPU + "kda_step.rs", "add_scaled(row, key[d], &write);\n            add_scaled(output, query[d], row);", "add_scaled(output, query[d], row);\n            add_scaled(row, key[d], &write);"),
    (CPU + "kda_chunk.rs", "add_scaled(row, -a_kk[i][j], before)", "add_scaled(row, a_kk[i][j], before)"),
    (CPU + "kda_chunk.rs", ".take(i + 1)", ".take(i)"),
    (CPU + "kda_chunk.rs", "for half in [8, 4, 2, 1]", "for half in [8, 4, 2]"),
    (CPU + "kda_chunk.rs", "let factor = exp(decay[d]);\n        row.iter_mut()", "let factor = 1.0_f32;\n        row.iter_mut()"),
    (CPU + "kda_chunk.rs", "decayed[j * k + d] = normal(tokens.key[j * k + d] * exp(decay[d]));\n                    decay[d] += tokens.gates[j * k + d];",
     "decay[d] += tokens.gates[j * k + d];\n                    decayed[j * k + d] = normal(tokens.key[j * k + d] * exp(decay[d]));"),
    (CPU + "kda_chunk.rs", "decayed[i * k + d] = normal(tokens.key[i * k + d] * exp(decay[d]));\n            decay[d] += tokens.gates[i * k + d];",
     "decay[d] += tokens.gates[i * k + d];\n            decayed[i * k + d] = normal(tokens.key[i * k + d] * exp(decay[d]));"),
    (CPU + "kda_chunk.rs", "a_kk[i][j] = tokens.beta[i]", "a_kk[i][j] = tokens.beta[j]"),
    (CPU + "kda_recurrence.rs", "dot(row, row) + KEY_EPS", "dot(row, row) + 10.0 * KEY_EPS"),
    (CPU + "kda_recurrence.rs", "head / (value_heads / key_heads))", "head % key_heads)"),
    (CPU + "kda_recurrence.rs", "(k as f32).sqrt()", "(v as f32).sqrt()"),
    (CPU + "mod.rs", "let state = record.key_value();", "let state = std::borrow::Cow::Borrowed(&record.state[..]);"),
    (CPU + "short_conv.rs", "inputs.add_tap(t, kept - j, first, &taps[first..], output);", "inputs.add_tap(t, j, first, &taps[first..], output);"),
    (CPU + "short_conv.rs", "inputs.at(after, kept - i, c)", "inputs.at(after, 1 + i, c)"),
    (CPU + "short_conv.rs", "let first = part * CHANNELS;", "let first = 0 * part;"),
    (CPU + "short_conv.rs", "|value| *value = silu(*value)", "|value| *value *= 1.0"),
    (CPU + "gated_norm.rs", "weight[i] * sigmoid(gate[i])", "weight[i] * gate[i] * sigmoid(gate[i])"),
    (CPU + "mla_append.rs", "rope.copy_from_slice", "rope[1..].copy_from_slice(&input[weight.len()..input.len() - 1]); let _ = |rope: &mut [f32]| rope.copy_from_slice"),
    (CPU + "mla_decode.rs", "let positions = segment.position + t + 1;", "let positions = (segment.position + t).max(1);"),
    (CPU + "mla.rs", "(self.key() as f32).sqrt()", "(self.nope as f32).sqrt()"),
    (CPU + "mla_prefill.rs", "let seen = run.min(segment.position + t + 1 - first);", "let seen = run.min(segment.position + t + 2 - first);"),
    (CPU + "mla.rs", "*sum *= keep;", ""),
    (CPU + "mla.rs", "output.iter_mut().for_each(|value| *value *= keep);", ""),
    (CPU + "route.rs", "(expert, scores[expert as usize])", "(expert, biased[expert as usize])"),
    (CPU + "route.rs", "take(2)", "take(1)"),
    (CPU + "route.rs", "op.scale / sum", "1.0 / sum"),
    (CPU + "route.rs", "order.sort_by(|a, b|", "order.reverse();\n    order.sort_by(|a, b|"),
    (CPU + "experts.rs", ".checked_sub(stacks.first)", ".checked_sub(0)"),
    (CPU + "experts.rs", "*output += weights[assignment] * value", "*output += value"),
    (CPU + "swiglu.rs", "*output = silu(*gate) * up", "*output = *gate * silu(*up)"),
    (CPU + "select.rs", ".then(a.0.cmp(&b.0))", ".then(b.0.cmp(&a.0))"),
    (CPU + "select.rs", ".all(|logit| logit.is_finite())", ".all(|logit| !logit.is_nan())"),
    (CPU + "sample.rs", "found >= self.numbers.least", "true"),
    (CPU + "sample.rs", "left.div_ceil(weight(key).max(1))", "left / weight(key).max(1)"),
    (CPU + "sample.rs", "kept.extend(std::iter::repeat_n(last, ties as usize));", ""),
    ("src/backend/weight.rs", "&self.bytes[at + self.columns.start..at + self.columns.end]", "&self.bytes[at..at + self.columns.len()]"),
    (CPU + "memory.rs", "part.rows.start < rows.end", "part.rows.end < rows.end"),
    (CPU + "rms_norm.rs", "&input[row * d..(row + 1) * d], weight, eps", "&input[row / 2 * d..(row / 2 + 1) * d], weight, eps"),
    ("shaders/shared/blocks.wgsl", "scale = (low & 15u) | ((byte_at(base, packed + group - 4u)", "scale = (low & 15u) | ((byte_at(base, packed + group)"),
    ("shaders/shared/blocks.wgsl", "stored_word(base, at + 3u) << (32u - shift)", "stored_word(base, at) << (32u - shift)"),
    ("shaders/shared/blocks.wgsl", "} else if (rest >= 0x0400u) {", "} else {"),
    ("src/backend/wgpu/weights.rs", "Format::Block(_) => row.next_multiple_of(VECTOR)", "Format::Block(_) => row / VECTOR * VECTOR"),
    ("shaders/embed.wgsl", "drawn[2u * (token ^ FED)]", "drawn[token ^ FED]"),
    ("shaders/add_norm.wgsl", "let x = destination[row + i] + source[row + i];", "let x = source[row + i];"),
    ("shaders/experts_combine.wgsl", "        sum += shared_result[i];\n", ""),
    ("shaders/kda_gates.wgsl", "gates[i] = -exp(a_log[head])", "gates[i] = exp(a_log[head])"),
    ("shaders/kda_chunk.wgsl", "u = fma(-a[t * C + before]", "u = fma(a[t * C + before]"),
    ("shaders/kda_chunk.wgsl", "let decay = prepared[base + 3u * C * k + d];", "let decay = 1.0;"),
    ("shaders/kda_chunk.wgsl", "state[i] = states[state_at(slot, head) + i / COLUMNS * v + column];", "state[i] = states[state_at(slot, head) + column * v + i / COLUMNS];"),
    ("shaders/shared/kda_step.wgsl", "decayed = decays[d] * states[state_at(slot, head) + d * v + column];\n                }\n                let value",
     "decayed = states[state_at(slot, head) + d * v + column];\n                }\n                let value"),
    ("shaders/kda_step_gated.wgsl", "dt_bias[head * params.key_width + d]", "dt_bias[d]"),
    ("shaders/shared/kda.wgsl", "const L2_EPS: f32 = 1e-6", "const L2_EPS: f32 = 1e-5"),
    ("shaders/mla_append.wgsl", "+ params.eps)", "+ 1e-5)"),
    ("shaders/short_conv.wgsl", "params.taps - 1u + t - back", "params.taps - 2u + t - back"),
    ("shaders/route.wgsl", "bitcast<u32>(scores[chosen]);", "bitcast<u32>(scores[chosen] + bitcast<f32>(bias[chosen]));"),
    ("shaders/sample.wgsl", "(a >> 16u) * (b >> 16u) + (first >> 16u) + (second >> 16u)", "(a >> 16u) * (b >> 16u) + (first >> 16u)"),
    ("shaders/sample.wgsl", "let key = select(most.key, found.key, found.reached);", "let key = found.key;"),
    ("shaders/sample.wgsl", "cut.ties - min(cut.ties, before)", "cut.ties"),
    ("shaders/sample.wgsl", "&& changed_out[to + i] != REMOVED", ""),
    ("src/backend/check/batch.rs", "**token as usize >= vocabulary", "**token as usize > vocabulary + 1"),
    ("src/backend/check/batch.rs", "if segment.blocks.len() < needed", "if segment.blocks.len() + 1 < needed"),
    ("src/backend/check/batch.rs", "if written.contains(&slot) && segment.slot_out != slot", "if written.contains(&slot) && segment.slot_out == slot"),
]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("only", nargs="?", default="", help="part of a row's file or text")
    parser.add_argument("--filter", default="cpu/", help="trials that are run")
    parser.add_argument("--check", action="store_true", help="only say which rows do not match their text")
    options = parser.parse_args()
    root = pathlib.Path(__file__).resolve().parents[2]
    if wrong := unmatched(root, MUTATIONS):
        sys.exit("\n".join(wrong))
    if options.check:
        print(f"{len(MUTATIONS)} rows match")
        return
    chosen = [row for row in MUTATIONS if options.only in row[0] + row[1]]
    if not chosen:
        sys.exit(f"no row has {options.only}")
    missed = []
    with tempfile.TemporaryDirectory() as folder:
        copy = pathlib.Path(folder) / "copy"
        shutil.copytree(root, copy, ignore=shutil.ignore_patterns("target", ".git"))
        # Built once per mutant, so with less optimisation and incrementally; dependencies are unchanged.
        profile = "profile.release.package.kimi-linear."
        faster = ["--config", profile + "opt-level=1", "--config", profile + "debug=false", "--config", "profile.release.incremental=true"]
        # Only the backend of the selected trials.
        features = ["--no-default-features"] + (["--features", "wgpu"] if options.filter.startswith("wgpu") else [])
        build = ["cargo", "test", "--release", "--locked", *faster, *features, "--test", "conformance"]
        cargo = lambda *more: subprocess.run([*build, *more], cwd=copy, capture_output=True, text=True)
        for file, old, new in chosen:
            source = copy / file
            text = source.read_text()
            source.write_text(text.replace(old, new))
            compiled = cargo("--no-run")
            if compiled.returncode != 0:
                sys.exit(f"{file}: {new}\ndoes not compile:\n{compiled.stderr[-3000:]}")
            result = cargo("--", options.filter)
            trials = [line[5:].rsplit(" ... ", 1) for line in result.stdout.splitlines() if line.startswith("test ") and " ... " in line]
            failed = [name.strip() for name, verdict in trials if verdict.strip() == "FAILED"]
            source.write_text(text)
            caught = f"caught by {len(failed)}, {failed[0]} .." if failed else "NOT CAUGHT"
            print(f"{caught:60} {file}: {new.splitlines()[0] if new else 'nothing'} for {old.splitlines()[0]}", flush=True)
            if not failed:
                missed.append((file, old))
    if missed:
        sys.exit(f"{len(missed)} not caught")


if __name__ == "__main__":
    main()
