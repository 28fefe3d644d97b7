"""Reads the results of a visit: its commands and how they ended, the cases and their verdicts."""

import os
import re
import signal
from collections import defaultdict
from dataclasses import dataclass

# A line of `kimi-linear conformance`: names have single spaces, two end them.
LINE = re.compile(r"^(ok|skip|FAIL)\s+(.*?)  (.*)$")
GOOD = ("ok", "skip")
# Maximum number of cases that are run alone: per operation, and in all.
ALONE = (5, 40)
# Maximum number of failed cases that the second call examines: per operation, and in all.
LOOKED_INTO = (1, 6)


def read(path, most=None):
    """A file's text or its end; empty if it does not exist."""
    try:
        with open(path, errors="replace") as file:
            text = file.read()
    except OSError:
        return ""
    return text if most is None else text[-most:]


def last_line(path):
    lines = read(path, 2000).strip().splitlines()
    return lines[-1] if lines else ""


def fields(path, count):
    rows = (line.split("\t") for line in read(path).splitlines())
    return [row for row in rows if len(row) == count]


@dataclass
class Step:
    """A command of the visit."""

    call: str
    name: str
    code: str
    seconds: int
    start: int
    limit: int
    file: str

    @property
    def end(self):
        return ending(self.code, self.seconds, self.limit)


def ending(code, seconds, limit):
    """How a process ended, in a word or two, from the exit code that `timeout` gave."""
    if not code.isdigit():
        return {"late": "no time left", "none": "not run"}.get(code, code)
    number = int(code)
    if number == 0:
        return "ok"
    # `timeout` returns 137 if it had to kill, but so does a process that something else killed.
    if number == 124 or (number == 137 and seconds >= limit):
        return f"HANG: not done within {limit} s"
    if number > 128:
        try:
            name = signal.Signals(number - 128).name
        except ValueError:
            name = f"signal {number - 128}"
        return f"DIED: {name}"
    return f"exit {number}"


@dataclass
class Verdict:
    """How a case came out: ok, skip, FAIL, DIED (its process ended without an answer), HANG, or never (not reached)."""

    word: str
    detail: str


@dataclass
class Process:
    """A process that ran the cases whose names contain `filter`."""

    code: str
    seconds: int
    limit: int
    file: str
    filter: str

    @property
    def end(self):
        return ending(self.code, self.seconds, self.limit)

    def cases(self):
        return {match[2]: Verdict(match[1], match[3]) for match in map(LINE.match, read(self.file).splitlines()) if match}

    def verdict(self, name):
        """The verdict on a case that ran alone, else how the process ended."""
        return self.cases().get(name) or ended_without(self.end, self.file + ".err")


def ended_without(end, errors):
    """The verdict on a case that a process with this end did not report."""
    word, detail = ("HANG", end) if end.startswith("HANG") else ("DIED", end)
    said = last_line(errors)
    detail = detail.removeprefix(f"{word}: ")
    return Verdict(word, f"{detail}: {said}" if said else detail)


class Visit:
    """The state that the calls left in `work`, of what was packed in `pack`."""

    def __init__(self, work, pack):
        self.work, self.pack = work, pack
        self.names = read(f"{pack}/names.txt").splitlines()
        self.settings = dict(fields(f"{work}/settings", 2))
        self.steps = [
            Step(call, name, code, int(seconds), int(start), int(limit), file)
            for call, name, code, seconds, start, limit, file in fields(f"{work}/steps", 7)
        ]

    def path(self, *parts):
        return os.path.join(self.work, *parts)

    def step(self, name):
        """The last command of this name."""
        return next((step for step in reversed(self.steps) if step.name == name), None)

    def processes(self, group):
        return [
            Process(code, int(seconds), int(limit), file, filter)
            for code, seconds, limit, file, filter in fields(self.path(f"{group}.list"), 5)
        ]

    def verdicts(self):
        """Of every case, from its operation's process, and where that does not tell, from its own."""
        of_operations = {}
        for process in self.processes("operations"):
            # A filter may match names of other operations too, which have processes of their own.
            own = {name: verdict for name, verdict in process.cases().items() if name.startswith(process.filter)}
            of_operations.update(own)
        alone = {process.filter: process for process in self.processes("alone")}
        verdicts = {}
        for name in self.names:
            verdict = of_operations.get(name, Verdict("never", "not reached"))
            if verdict.word not in GOOD and name in alone:
                own = alone[name].verdict(name)
                note = "[alone]"
                if own.word in GOOD:
                    note = "[alone; its operation's process failed it]" if verdict.word == "FAIL" else "[alone; not reached before]"
                    # Broken by another case: that is a fault too.
                    own = Verdict("FAIL" if verdict.word == "FAIL" else own.word, own.detail)
                verdict = Verdict(own.word, f"{own.detail} {note}")
            verdicts[name] = verdict
        return verdicts

    def bad(self, per_operation, all_together, passed_over=GOOD):
        """The cases that failed, at most this number per operation and in all; skipped verdicts do not count."""
        count, chosen = defaultdict(int), []
        for name, verdict in self.verdicts().items():
            operation = name.split("/")[0]
            if verdict.word not in passed_over and count[operation] < per_operation and len(chosen) < all_together:
                count[operation] += 1
                chosen.append(name)
        return chosen
