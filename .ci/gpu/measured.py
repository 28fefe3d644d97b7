"""The numbers of a visit as lines of its summary: headlines, kernels, profiles, checkers."""

import csv
import glob
import io
import json
import os
import re
from collections import defaultdict

from results import LINE, ended_without, read

HEADLINES = (
    "decode-4k", "decode-4k-early-off", "decode-4k-again", "batch64-4k", "decode-128k", "prefill-8k", "prefill-128k",
    "prefill-128k-again", "wgpu-decode-4k",
)
# Maximum number of kernels of a profile that are shown, the slowest first.
SHOWN = 10
# Checkers whose findings can be trusted: this compute-sanitizer (2025.3) only partly tracks bulk copies and their barriers.
TRUSTED = ("memcheck", "synccheck")


def in_units(value):
    """Seconds with a unit."""
    if value is None:
        return "-"
    for factor, unit in ((1e6, "us"), (1e3, "ms")):
        if value * factor < 999.5:
            return f"{value * factor:.3g} {unit}"
    return f"{value:.3g} s"


def times(value, other):
    return f" (x {value / other:.2f})" if value and other else ""


def headlines(visit):
    """The measured time with prediction and floor, whether all layers ran, and the slowest operations."""
    predicted = json.loads(read(os.path.join(os.path.dirname(__file__), "predicted.json")))
    lines = []
    for name in HEADLINES:
        step = visit.step(f"bench {name}")
        if step is None:
            continue
        try:
            told = json.loads(read(step.file))
            row = told["rows"][0]
        except (ValueError, KeyError, IndexError):
            lines.append(f"{name}: none: {ended_without(step.end, step.file + '.err').detail}")
            continue
        seconds, floor = row["seconds"], row["floor_seconds"]
        expected = predicted["seconds"].get(name.removesuffix("-again")) if visit.settings.get("shape") == "48b" else None
        parts = [in_units(seconds) if told["timings"] else "ran, no time taken (dry run)"]
        if expected:
            parts.append(f"predicted for {predicted['device']} {in_units(expected)}{times(seconds, expected)}")
        parts.append(f"floor {in_units(floor)}{times(seconds, floor)}")
        if row["how"] == "whole":
            parts.append("all layers")
        else:
            parts.append("BY LAYER: one of each kind times their number, no whole step")
        ran, segments = row["segments"]
        if ran < segments:
            parts.append(f"{ran} of {segments} segments")
        dearest = sorted(row["operations"], key=lambda operation: -operation[1])[:6]
        parts.extend([", ".join(f"{operation} {in_units(ms / 1e3)}" for operation, ms in dearest)] if dearest else [])
        lines.append(f"{name}: " + " | ".join(parts))
    if lines and not any(" | all layers" in line for line in lines):
        lines.append("No headline ran with all layers: this GPU's memory does not hold the bf16 weights, or the bench failed.")
    return lines


def tables(visit):
    """The rows of the kernels' tables, shortened to name, floor, time, ratio and error."""
    lines = []
    for path in sorted(glob.glob(visit.path("bench", "*.md"))):
        rows = [line for line in read(path).splitlines() if line.startswith("|") and "---" not in line]
        for line in rows:
            cells = [cell.strip() for cell in line.strip("|").split("|")]
            # Bytes and operations of the kernels' tables are in kernels.md.
            lines.append(" | ".join(cells[:1] + cells[3:] if cells[1:3] == ["bytes", "operations"] or len(cells) == 7 else cells))
    for step in visit.steps:
        if step.end != "ok" and (step.name.startswith("kernels: ") or step.name == "turns with fla"):
            lines.append(f"{step.name}: {ended_without(step.end, step.file + '.err').detail}")
    return lines


def profile(path):
    """Launches, median microseconds and bytes per second by kernel, from Nsight Compute's CSV in base units."""
    rows = [line for line in read(path).splitlines() if line.startswith('"')]
    measured = defaultdict(lambda: defaultdict(list))
    for row in csv.DictReader(io.StringIO("\n".join(rows))):
        metric, unit = row.get("Metric Name") or "", row.get("Metric Unit") or ""
        try:
            value = float((row.get("Metric Value") or "").replace(",", ""))
        except ValueError:
            continue
        if ("time_duration" in metric and unit in ("ns", "nsecond")) or ("bytes" in metric and unit == "byte"):
            measured[row["Kernel Name"].split("(")[0]][metric].append(value)
    kernels = []
    for name, metrics in measured.items():
        durations = next((values for metric, values in metrics.items() if "time" in metric), [])
        moved = next((values for metric, values in metrics.items() if "bytes" in metric), [])
        # The kernels that generate random weights are not part of a model.
        if durations and not name.startswith("fill"):
            kernels.append((sum(durations), name, len(durations), middle(durations), middle(moved) if moved else None))
    return sorted(kernels, reverse=True)


def middle(values):
    return sorted(values)[len(values) // 2]


def profiles(visit):
    lines = []
    for path in sorted(glob.glob(visit.path("ncu", "*.csv"))):
        name = os.path.basename(path).removesuffix(".csv")
        kernels = profile(path)
        if not kernels:
            step = visit.step(f"ncu {name}")
            lines.append(f"{name}: no kernel was profiled: {step.end if step else 'not run'}; see ncu.txt")
            continue
        lines.append(f"{name}: launches, median us, GB/s (caches emptied before each launch)")
        for _, kernel, launches, duration, moved in kernels[:SHOWN]:
            rate = f"{moved / duration:>7.0f}" if moved else "      -"
            lines.append(f"{kernel[:44]:<44} {launches:>4} {duration / 1e3:>9.2f} {rate}")
    return lines


def finding(path):
    """The summary of a checker, and whether it found anything; without a summary neither is known."""
    text = read(path)
    said = [line.strip("= ") for line in text.splitlines() if "SUMMARY" in line or "not supported" in line]
    if not said:
        return "no summary", None
    counts = [int(count) for line in said for count in re.findall(r"(\d+) (?:errors?|hazards? displayed)", line)]
    return "; ".join(said), any(counts) if counts else None


def checkers(visit):
    """Each run of a checker, and whether a trusted one found something."""
    lines, faults = [], 0
    for step in visit.steps:
        tool = step.name.split(": ")[0]
        if not step.file.startswith(visit.path("sanitizer")) or step.end == "no time left":
            continue
        said, found = finding(step.file)
        if found is None or step.end.startswith(("DIED", "HANG")):
            said = f"{said}: {ended_without(step.end, step.file + '.err').detail}"
        elif found and tool in TRUSTED:
            faults += 1
            said += " FOUND"
        elif found:
            said += " doubtful where a kernel copies in bulk"
        lines.append(f"{step.name}: {said}")
    return lines, faults


def attempts(visit):
    """The results of each failed case that the second call ran in other ways."""
    ways = ("graphs-off", "early-off", "blocking", "PTX")
    of_cases = defaultdict(list)
    for step in visit.steps:
        way, _, case = step.name.partition(": ")
        if way in ways and case:
            own = [match for match in map(LINE.match, read(step.file).splitlines()) if match and match[2] == case]
            word = own[0][1] if own else step.end if step.end == "no time left" else ended_without(step.end, step.file + ".err").word
            of_cases[case].append(f"{way} {word}")
    return [f"{case}: {', '.join(told)}" for case, told in of_cases.items()]
