#!/usr/bin/env python3
"""A visit's summary on stdout, its most important lines last, and its files, eight at most.

    summary.py files WORK PACK OUT    write OUT, print the summary; exit with 1 if something was wrong
    summary.py todo WORK PACK         the cases to run alone, one per line
    summary.py failed WORK PACK       the cases that the second call examines
"""

import glob
import json
import os
import sys
import tarfile
import textwrap
from collections import Counter, defaultdict

import measured
from results import ALONE, GOOD, LINE, LOOKED_INTO, Visit, last_line, read

# Maximum characters of the summary on stdout; its beginning is cut, and summary.md has all of it.
PRINTED = 11_000
WIDTH = 190
# Maximum number of failed cases that are shown: per operation, and in all.
SHOWN = (4, 24)
# Maximum difference of a model's negative log-likelihood from the CPU's: bf16 against f32.
LIKELIHOOD = 0.01
# Commands that are judged by their exit codes; others are judged in their sections.
OWED = ("smoke: ", "bench ", "kernels: ", "wgpu", "turns ", "devices")
# The fraction of the CPU's right answers that a device must give: near-ties may differ in bf16.
ANSWERS = 0.9


class Summary:
    """Lines by section, and the faults that were found."""

    def __init__(self, visit):
        self.visit = visit
        self.lines = []
        self.wrong = []
        self.verdicts = visit.verdicts()

    def section(self, title, make):
        """A section that cannot be read contains the error; the others are not affected."""
        try:
            lines = make()
        except Exception as error:
            self.wrong.append(f"section {title}")
            lines = [f"cannot be read: {type(error).__name__}: {error}"]
        if lines:
            self.lines += ["", f"# {title}", *(line[:WIDTH] for line in lines)]

    def clock(self):
        """Commands that failed, one per line; for the others only their times."""
        lines = []
        for call in ("first", "second"):
            steps = [step for step in self.visit.steps if step.call == call]
            fine = ", ".join(f"{step.name} {step.seconds}" for step in steps if step.end == "ok")
            if steps:
                lines.append(f"{call} call, {steps[-1].start + steps[-1].seconds} s; ended with 0, in seconds:")
            lines += wrapped(fine)
            lines += [f"{step.start:>4} s, {step.name}: {step.end}, {step.seconds} s" for step in steps if step.end != "ok"]
        for step in self.visit.steps:
            if step.end == "stopped" or (step.name.startswith(OWED) and step.end not in ("ok", "no time left")):
                self.wrong.append(f"{step.name}: {step.end}")
        return lines

    def machine(self):
        lines = read(self.visit.path("facts")).splitlines()[:9] + read(self.visit.path("devices")).splitlines()[:6]
        for step in self.visit.steps:
            if step.name.startswith("smoke: ") and step.end != "ok" or step.name == "torch":
                lines.append(f"{step.name}: {step.end}: {last_line(step.file if step.end == 'ok' else step.file + '.err')}")
        return lines

    def warnings(self):
        """The program's warnings: code refused, a graph not captured."""
        paths = glob.glob(self.visit.path("**", "*.err"), recursive=True)
        said = Counter(line.strip() for path in paths for line in read(path).splitlines() if line.lstrip().startswith("WARN"))
        return [f"{count} times: {line}" for line, count in said.most_common(6)]

    def checkers(self):
        lines, faults = measured.checkers(self.visit)
        if faults:
            self.wrong.append(f"{faults} findings of a checker")
        return lines

    def models(self):
        backend = self.visit.settings.get("backend", "cuda")
        lines = []
        for name, compare in (("score-tiny-a", likelihoods), ("score-tiny-128", likelihoods), ("generate", texts), ("eval", answers)):
            paths = [self.visit.path("models", f"{name}.{on}") for on in ("cpu", backend)]
            step_names = [f"{name.replace('score-', 'score ')} on {on}" for on in ("cpu", backend)]
            steps = [step for step in map(self.visit.step, step_names) if step]
            bad = [step for step in steps if step.end != "ok"]
            if not steps:
                continue
            if bad:
                told, held = f"{bad[-1].name}: {bad[-1].end}: {last_line(bad[-1].file + '.err')}", False
            else:
                told, held = compare(*map(read, paths))
            if not held:
                self.wrong.append(f"model: {name}")
            lines.append(f"{name}, cpu | {backend}: {told}{'' if held else ' WRONG'}")
        return lines

    def wgpu(self):
        lines = [step.name for step in self.visit.steps if step.name.startswith("wgpu: ")]
        bad = 0
        for process in sorted(self.visit.processes("wgpu"), key=lambda process: process.filter):
            count = Counter(verdict.word for name, verdict in process.cases().items() if name.startswith(process.filter))
            bad += count["FAIL"] + (process.end not in ("ok", "exit 1"))
            lines.append(f"{process.filter:<16}{counted(count)}  {process.end}, {process.seconds} s")
        if bad:
            self.wrong.append(f"{bad} of wgpu")
        return lines

    def conformance(self):
        table = defaultdict(Counter)
        for name, verdict in self.verdicts.items():
            table[name.split("/")[0]][verdict.word] += 1
        processes = {process.filter.strip("/"): process for process in self.visit.processes("operations")}
        whole, never, rows = [], [], []
        for operation, count in sorted(table.items()):
            process = processes.get(operation)
            if process and process.end == "ok" and set(count) <= set(GOOD):
                whole.append(f"{operation} {count.total()}")
            elif set(count) == {"never"}:
                never.append(f"{operation} {count.total()}")
            else:
                rows.append(f"{operation:<16}{counted(count):<28}{process.end if process else 'no process of it ended'}")
        lines = wrapped(f"operations of which every case held: {', '.join(whole) or 'none'}")
        lines += wrapped(f"of which none was reached: {', '.join(never)}") if never else []
        lines += rows
        again = self.visit.step("bits repeated")
        if again:
            said = Counter(match[1] for match in map(LINE.match, read(again.file).splitlines()) if match)
            lines.append(f"bits repeated: {counted(said)}, {again.end}")
            self.wrong += [] if again.end in ("ok", "no time left") else ["bits repeated"]
        # The first of each operation, so that an operation in which everything fails does not hide the rest.
        for name in self.visit.bad(*SHOWN, passed_over=(*GOOD, "never")):
            lines.append(f"{self.verdicts[name].word} {name}: {self.verdicts[name].detail}")
        return lines

    def verdict(self):
        count = Counter(verdict.word for verdict in self.verdicts.values())
        bad = sum(number for word, number in count.items() if word not in GOOD)
        lines = []
        if not any(step.name.startswith("smoke: ") and step.end == "ok" for step in self.visit.steps):
            lines.append("NOTHING RAN: neither with cubins nor with PTX nor by NVRTC")
            self.wrong.append("nothing ran")
        lines.append(f"wrong besides cases: {'; '.join(self.wrong) or 'nothing'}")
        note = read(f"{self.visit.pack}/note").strip()
        lines.append(f"VERDICT: {bad} of {len(self.verdicts)} cases bad ({counted(count)}){'; ' if note else ''}{note}")
        return lines, bool(bad or self.wrong or not self.verdicts)

    def text(self):
        """Returns the whole summary, and whether something was wrong."""
        visit = self.visit
        self.section("Profiles", lambda: measured.profiles(visit))
        self.section("Kernels", lambda: measured.tables(visit))
        self.section("Clock", self.clock)
        self.section("wgpu", self.wgpu)
        self.section("Checkers", self.checkers)
        self.section("Failed cases in other ways", lambda: measured.attempts(visit))
        self.section("Machine", self.machine)
        self.section("Warnings of the program", self.warnings)
        self.section("Models", self.models)
        self.section("Headlines", lambda: measured.headlines(visit))
        self.section("Conformance", self.conformance)
        verdict, wrong = self.verdict()
        self.lines += ["", *(line[: 2 * WIDTH] for line in verdict)]
        return "\n".join(self.lines).strip() + "\n", wrong


def wrapped(text):
    return textwrap.wrap(text, WIDTH, break_long_words=False, break_on_hyphens=False)


def counted(count):
    return " ".join(f"{word} {number}" for word, number in sorted(count.items(), key=lambda item: (item[0] not in GOOD, item[0])))


def likelihoods(cpu, device):
    """Compares likelihoods of the same tokens with random weights."""
    numbers = [json.loads(text)["negative_log_likelihood"] for text in (cpu, device)]
    apart = abs(numbers[1] - numbers[0]) / abs(numbers[0])
    return f"{numbers[0]:.6g} | {numbers[1]:.6g}, {apart:.1e} apart, {LIKELIHOOD} allowed", apart <= LIKELIHOOD


def texts(cpu, device):
    """A greedy text may differ after a near-tie, so it need not be the same, but it must not be empty."""
    same = len(os.path.commonprefix([cpu, device]))
    told = "same text" if cpu == device else f"the same for {same} of {len(cpu)} characters, then {device[same : same + 40]!r}"
    return told, bool(device.strip())


def answers(cpu, device):
    right = [sum(row["right"] for row in json.loads(text)["classes"]) for text in (cpu, device)]
    total = sum(row["total"] for row in json.loads(device)["classes"])
    return f"{right[0]} | {right[1]} of {total} answers exact", right[1] >= ANSWERS * right[0]


def together(paths, most):
    """Files that are not empty, concatenated."""
    return "".join(f"== {os.path.basename(path)}\n{text}\n" for path in sorted(paths) if (text := read(path, most)).strip())


def write(visit, verdicts, text, out):
    """Eight files of at most a few megabytes."""
    at = lambda pattern: glob.glob(visit.path(*pattern.split("/")), recursive=True)
    files = {
        "summary.md": text,
        "conformance.txt": "".join(f"{verdict.word}\t{name}\t{verdict.detail}\n" for name, verdict in verdicts.items()),
        "errors.txt": together(at("**/*.err"), 4_000),
        "bench.jsonl": "".join(read(path) for path in sorted(at("bench/*.json"))),
        "kernels.md": together(at("bench/*.md"), 200_000),
        "ncu.txt": together(at("ncu/*"), 4_000_000),
        "sanitizer.txt": together(at("sanitizer/*"), 400_000),
    }
    os.makedirs(out, exist_ok=True)
    for name, body in files.items():
        with open(os.path.join(out, name), "w") as file:
            file.write(body[-15_000_000:])
    with tarfile.open(os.path.join(out, "rest.tar.gz"), "w:gz") as tar:
        for name in os.listdir(visit.work):
            path = visit.path(name)
            if os.path.isfile(path) or name in ("operations", "alone", "models", "tries", "wgpu"):
                tar.add(path, name)


def main():
    match sys.argv[1:]:
        case ["todo", work, pack]:
            sys.stdout.writelines(f"{name}\n" for name in Visit(work, pack).bad(*ALONE))
        case ["failed", work, pack]:
            sys.stdout.writelines(f"{name}\n" for name in Visit(work, pack).bad(*LOOKED_INTO))
        case ["files", work, pack, out]:
            summary = Summary(Visit(work, pack))
            text, wrong = summary.text()
            write(summary.visit, summary.verdicts, text, out)
            cut = "(its beginning is in summary.md)\n"
            print(text if len(text) <= PRINTED else cut + text[-(PRINTED - len(cut)) :], end="")
            sys.exit(int(wrong))
        case _:
            sys.exit(__doc__)


if __name__ == "__main__":
    main()
