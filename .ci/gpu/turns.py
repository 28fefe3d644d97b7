#!/usr/bin/env python3
"""Our recurrence and fla's Triton kernels alternating, on the same inputs, each compared with the recurrence in float64.

    turns.py PROGRAM OUT.md [--backend cuda] [--case N] [--dry-run]

PROGRAM is `kimi-linear`: its `bench interleaved` makes the inputs, computes the reference, runs on request, and returns the errors of
its own answers and of those in a file. Rounds alternate, so that changes of the device over time affect both alike; a table gives the
medians. Both sides run as CUDA graphs if they can be captured; the table notes if fla's could not.

A dry run takes no timings: tiny shapes, and instead of fla's kernels its reference in PyTorch, if that can be imported.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile

ROUNDS = 9
# Seconds per side of a round.
TURN = 0.03

# Name, tokens of all sequences (none for a decode), sequences, gates.
CASES = [
    ("prefill, T=8192, 1 sequence, fresh gates", 8192, 1, "fresh"),
    ("prefill, T=8192, 1 sequence, slow gates", 8192, 1, "slow"),
    ("prefill, T=8192, 8 sequences, fresh gates", 8192, 8, "fresh"),
    ("prefill, T=8192, 8 sequences, slow gates", 8192, 8, "slow"),
    ("decode, 1 sequence", None, 1, "fresh"),
    ("decode, 64 sequences", None, 64, "fresh"),
]
DRY_CASES = [
    ("prefill, T=96, 1 sequence, fresh gates", 96, 1, "fresh"),
    ("prefill, T=96, 3 sequences, slow gates", 96, 3, "slow"),
    ("decode, 3 sequences", None, 3, "fresh"),
]


class Ours:
    """The program: a line of input, and a line of JSON as the answer."""

    def __init__(self, program, backend, case, inputs, shape):
        _, tokens, sequences, gates = case
        command = [program, "bench", "interleaved", "--backend", backend, "--inputs", inputs]
        command += ["--sequences", str(sequences), "--gates", gates]
        command += ["--heads", str(shape[0]), "--width", str(shape[1])]
        command += ["--decode"] if tokens is None else ["--tokens", str(tokens)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.about = self.answer()

    def answer(self):
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"error: {' '.join(self.process.args)} ended with {self.process.wait()}")
        return json.loads(line)

    def ask(self, line):
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        return self.answer()

    def run(self, count):
        return self.ask(f"run {count}")["seconds"]

    def errors(self, file=None):
        return self.ask("errors" if file is None else f"errors {file}")

    def close(self):
        self.process.stdin.write("quit\n")
        self.process.stdin.close()
        self.process.wait()


class Fla:
    """fla's kernels on the inputs of a file; on the CPU its reference."""

    def __init__(self, inputs, case, dry):
        import torch
        from safetensors.torch import load_file

        self.torch = torch
        _, tokens, sequences, _ = case
        self.device = "cpu" if dry else "cuda"
        stored = {name: tensor.to(self.device) for name, tensor in load_file(inputs).items()}
        # Sequences have equal lengths: a batch, without a list of their starts.
        each = 1 if tokens is None else tokens // sequences
        rows = sequences * each
        batch = {
            name: stored[name][:rows].reshape(sequences, each, *stored[name].shape[1:])
            for name in ["q", "k", "v", "g", "beta"]
        }
        initial = stored.get("initial")
        self.graph = None
        if dry:
            from fla.ops.kda.naive import naive_recurrent_kda

            def normal(x):
                x = x.double()
                return x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt()

            self.name = "naive_recurrent_kda (PyTorch, on the CPU)"
            self.call = lambda: naive_recurrent_kda(
                normal(batch["q"]), normal(batch["k"]), batch["v"], batch["g"], batch["beta"],
                initial_state=initial, output_final_state=True,
            )
        else:
            from fla.ops.kda import chunk_kda, fused_recurrent_kda

            kernel = fused_recurrent_kda if tokens is None else chunk_kda
            self.name = kernel.__name__
            self.call = lambda: kernel(
                **batch, initial_state=initial, output_final_state=True, use_qk_l2norm_in_kernel=True
            )
        with torch.no_grad():
            self.output, self.state = self.call()
            if not dry:
                self.capture()

    def capture(self):
        """Warms up, then captures a graph of one call; if that fails, calls are queued one by one."""
        torch = self.torch
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                self.call()
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        try:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self.output, self.state = self.call()
            self.graph = graph
        except Exception as error:  # any error of the capture
            print(f"{self.name}: no graph: {error}", file=sys.stderr)
            torch.cuda.synchronize()

    def run(self, count):
        torch = self.torch
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        with torch.no_grad():
            start.record()
            for _ in range(count):
                if self.graph is not None:
                    self.graph.replay()
                else:
                    self.output, self.state = self.call()
            end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1000 / count

    def save(self, file):
        from safetensors.torch import save_file

        full = self.torch.float32
        # The last run's answers, as [T, H, V] and [N, H, K, V].
        output = self.output.reshape(-1, *self.output.shape[2:])
        tensors = {"o": output.to(full), "state": self.state.to(full)}
        save_file({name: tensor.contiguous().cpu() for name, tensor in tensors.items()}, file)


def seconds(value):
    if value is None:
        return "-"
    value *= 1e6
    for unit in ["us", "ms"]:
        if value < 999.5:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} s"


def count_for(once):
    return max(1, min(200, int(TURN / max(once, 1e-7))))


def error_of(errors):
    return max(errors["output"], errors["state"])


def measure(arguments, case, folder):
    inputs = os.path.join(folder, "inputs.safetensors")
    shape = (2, 32) if arguments.dry_run else (32, 128)
    ours = Ours(arguments.program, arguments.backend, case, inputs, shape)
    row = {"case": case[0], **ours.about, "our_seconds": None, "fla_seconds": None, "fla_error": None, "fla": None}
    try:
        fla = Fla(inputs, case, arguments.dry_run)
        row["fla"] = fla.name
    except Exception as error:  # ours is measured nevertheless, and the table gives the reason
        fla = None
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        row["why"] = f"fla did not run: {first}"
    if not arguments.dry_run:
        counts = [count_for(ours.run(3)), count_for(fla.run(3)) if fla else 0]
        times = ([], [])
        for _ in range(ROUNDS):
            times[0].append(ours.run(counts[0]))
            if fla:
                times[1].append(fla.run(counts[1]))
        row["our_seconds"] = statistics.median(times[0])
        row["our_range"] = [min(times[0]), max(times[0])]
        if fla:
            row["fla_seconds"] = statistics.median(times[1])
            row["fla_range"] = [min(times[1]), max(times[1])]
            row["fla_graph"] = fla.graph is not None
    else:
        ours.run(1)
    row["our_error"] = error_of(ours.errors())
    if fla:
        answers = os.path.join(folder, "answers.safetensors")
        fla.save(answers)
        row["fla_error"] = error_of(ours.errors(answers))
    ours.close()
    return row


def table(rows, dry):
    lines = []
    device = rows[0]["device"]
    shape = "2 heads of 32 x 32" if dry else "32 heads of 128 x 128"
    lines.append(f"{device['backend']}: {device['name']}; {shape}, unbounded gates.")
    if dry:
        lines.append("No timings were taken: a dry run with tiny shapes.")
    else:
        lines.append(f"Medians of {ROUNDS} alternating rounds; errors against the recurrence in float64, over 4 heads.")
    lines += ["", "| recurrence | floor | ours | x floor | error | fla | x floor | error | fla / ours |"]
    lines.append("|---|---:|---:|---:|---:|---:|---:|---:|---:|")
    for row in rows:
        floor, own, other = row["floor_seconds"], row["our_seconds"], row["fla_seconds"]
        ratio = lambda a, b: f"{a / b:.2f}" if a and b else "-"
        error = "-" if row["fla_error"] is None else f"{row['fla_error']:.1e}"
        name = seconds(other) if other else ("not run" if row["fla"] is None else "-")
        cells = [row["case"], seconds(floor), seconds(own), ratio(own, floor), f"{row['our_error']:.1e}"]
        cells += [name, ratio(other, floor), error, ratio(other, own)]
        lines.append(f"| {' | '.join(cells)} |")
    notes = {row["why"] for row in rows if "why" in row}
    notes |= {f"fla's side is {row['fla']}." for row in rows if row["fla"] and dry}
    notes |= {
        f"{row['fla']} could not be captured as a graph: its calls were queued from Python."
        for row in rows
        if row.get("fla_graph") is False
    }
    return "\n".join(lines + [line for note in sorted(notes) for line in ("", note)]) + "\n"


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("program")
    parser.add_argument("out")
    parser.add_argument("--backend", default="cuda")
    parser.add_argument("--case", type=int, help="only this one of the cases, counted from 0")
    parser.add_argument("--dry-run", action="store_true")
    arguments = parser.parse_args()
    cases = DRY_CASES if arguments.dry_run else CASES
    if arguments.case is not None:
        if not 0 <= arguments.case < len(cases):
            raise SystemExit(f"error: --case {arguments.case}: there are {len(cases)}, counted from 0")
        cases = [cases[arguments.case]]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for case in cases:
            rows.append(measure(arguments, case, folder))
            print(json.dumps(rows[-1]), flush=True)
    with open(arguments.out, "w") as out:
        out.write(table(rows, arguments.dry_run))
    worst = max(row["our_error"] for row in rows)
    # The conformance list's bound on the recurrence in bf16; errors of f32 backends are far below.
    if not worst <= 5e-3:
        raise SystemExit(f"error: our answers are off by {worst:.1e}, and 5e-3 is the bound")


if __name__ == "__main__":
    main()
