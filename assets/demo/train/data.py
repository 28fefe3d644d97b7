"""Chat conversations for training, and the held-out ones for evaluation; all text is our own.

    python data.py show [SEED]        a few conversations, as a person would read them
    python data.py eval OUT.jsonl [ROWS]   the held-out set: ROWS a task and length class
"""
import json, random, re, sys

from lists import Stack, copy, reverse
from phrases import joined
from recall import Corrections, MultiQuery, Recall
from talk import Talk, outside, small_talk
from tracking import World

# Each task with its share of the training conversations and the longest of its training lengths: statements, items or keys.
# Training goes to twice that, so that both classes of the evaluation are learnt.
TASKS = {
    "recall": (Recall, 18, 12), "corrections": (Corrections, 11, 8), "tracking": (World, 24, 12), "copy": (copy, 14, 8), "reverse": (reverse, 16, 8),
    "multi-query": (MultiQuery, 8, 8), "stack": (Stack, 12, 12), "talk": (Talk, 6, 1),
}
UNKNOWN = {Recall, Corrections, World}  # tasks that can be asked about what they were never told
ACKNOWLEDGE = "Noted."
HELD_OUT = 1 << 40  # evaluation seeds start here; training seeds stay below
FIXED = re.compile(r"I (?!don't know )|I don't know (why|when|who\.|what it)|Hello|You are|Thank|Try|Goodbye")  # answers without words of the user's
OPENINGS = re.compile(r"^(the|your|you said|backwards|found|nobody|forgotten|noted)\b")


def small_letters(turns):
    """Everything as typed without capitals; answers take over the spelling, and keep their own words as they are."""
    out = []
    for user, assistant in turns:
        text = assistant if FIXED.match(assistant) else assistant.lower()
        text = re.sub(r"^i don't", "I don't", OPENINGS.sub(lambda m: m[0].capitalize(), text))
        out.append((user.lower(), text))
    return out


def casual(rng, turns):
    """As people type: sometimes in small letters, sometimes without the last mark."""
    if rng.random() < 0.12:
        turns = small_letters(turns)
    share = rng.choice([0, 0, 0.1, 0.5, 0.9])
    return [(user[:-1] if rng.random() < share and user[-1] in ".?!" and len(user) > 1 else user, assistant) for user, assistant in turns]


def turns_of(rng, task, questions):
    """(user, assistant) turns: the statements in one or several turns, questions beside them or in turns of their own."""
    left, out = task.statements, []
    pieces = rng.choice([1, 1, 1, 2, 3]) if left > 1 else 1
    if 1 < left < 6 and rng.random() < 0.25:
        pieces = left  # each in a turn of its own
    join = "\n" if rng.random() < 0.04 else " "
    for piece in range(pieces):
        last = piece == pieces - 1
        count = left if last else min(left - 1, 1 if pieces > 3 else rng.randint(0, left - 1))
        said = joined(rng, [task.say() for _ in range(count)])
        left -= count
        asked = questions if last else rng.randint(0, questions // 2) if left < task.statements and pieces < 4 else 0
        questions -= asked
        if said and (not asked or rng.random() < 0.3):
            out.append((join.join(said), task.note or ACKNOWLEDGE))
            said = []
        given = set()
        for _ in range(asked):
            question, answer = task.ask()
            if answer not in given or rng.random() < 0.1:
                out.append((join.join([*said, question]), answer))
                said = []
            given.add(answer)
    return out


def chat(rng):
    """Small talk, a question outside the world, or one about something in it that nothing was told about."""
    kind = rng.random()
    return [small_talk(rng) if kind < 0.35 else outside(rng) if kind < 0.85 else make(rng, rng.choice(["recall", "tracking"]), 1, 1.0).ask()]


def make(rng, name, n, unknown=0.0):
    kind = TASKS[name][0]
    return kind(rng, n, unknown) if kind in UNKNOWN else kind(rng, n)


def size(rng, most, scale):
    """Up to the training lengths for half of the conversations, up to twice those for the others."""
    return rng.randint(1, max(1, round(most * scale * rng.choice([1, 2]))))


def conversation(rng, scale=1.0):
    """One training conversation: mostly one task with a few questions, sometimes with others around it."""
    names = list(TASKS)
    count = rng.choices([1, 2, 3], [80, 16, 4])[0]
    turns = []
    for name in dict.fromkeys(rng.choices(names, [TASKS[t][1] for t in names], k=count)):
        task = make(rng, name, size(rng, TASKS[name][2], scale), unknown=0.2 if count == 1 else 0.0)
        turns += turns_of(rng, task, 1 if name in ("copy", "reverse") else rng.choice([1, 2, 4, 6, 9]))
        if rng.random() < 0.1:
            turns += chat(rng)
    return casual(rng, turns)


def evaluation_case(task, length, index):
    """A conversation that ends in a question, with the answer; the task `unknown` asks about what was never told."""
    rng = random.Random(f"{HELD_OUT + index} {task} {length}")
    name = rng.choice(["recall", "tracking"]) if task == "unknown" else task
    most = TASKS[name][2]
    n = rng.randint(min(2, most), most) if length == "train" else rng.randint(most + 1, 2 * most)
    turns = []
    if task == "talk":
        turns = [t for _ in range(rng.randint(0, 1) if length == "train" else rng.randint(2, 3)) for t in chat(rng)]
    turns += turns_of(rng, make(rng, name, n, unknown=1.0 if task == "unknown" else 0.0), 1)
    turns = casual(rng, turns)
    messages = [{"role": role, "content": text} for turn in turns for role, text in zip(("user", "assistant"), turn)]
    return {"task": task, "length": length, "messages": messages[:-1], "answer": messages[-1]["content"]}


def evaluation_set(rows, start=0):
    return [evaluation_case(task, length, i) for task in [*TASKS, "unknown"] for length in ("train", "double")
            for i in range(start, start + rows)]


def main():
    if sys.argv[1] == "show":
        rng = random.Random(int(sys.argv[2]) if len(sys.argv) > 2 else 1)
        for _ in range(int(sys.argv[3]) if len(sys.argv) > 3 else 12):
            print("\n".join(f"> {user}\n  {assistant}" for user, assistant in conversation(rng)), "\n")
    else:
        with open(sys.argv[2], "w") as out:
            for row in evaluation_set(int(sys.argv[3]) if len(sys.argv) > 3 else 50):
                out.write(json.dumps(row, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
