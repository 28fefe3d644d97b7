"""Chat conversations for training, and the held-out ones for evaluation; all text is our own.

    python data.py show [SEED]        a few conversations, as a person would read them
    python data.py eval OUT.jsonl [ROWS]   the held-out set: ROWS a task and length class
"""
import json, random, re, sys

from lists import Stack, copy, reverse
from recall import MultiQuery, Recall
from talk import Talk, outside, small_talk
from tracking import World

# Each task with its share of the training conversations and the largest training size: statements, items or keys.
TASKS = {
    "recall": (Recall, 18, 12), "tracking": (World, 28, 12), "copy": (copy, 18, 8), "reverse": (reverse, 20, 8),
    "multi-query": (MultiQuery, 8, 8), "stack": (Stack, 12, 12), "talk": (Talk, 3, 1),
}
UNKNOWN = {Recall, World}  # tasks that can be asked about what they were never told
ACKNOWLEDGE = "Noted."
HELD_OUT = 1 << 40  # evaluation seeds start here; training seeds stay below


def casual(rng, text):
    """As people type: sometimes in lower case, sometimes without the last mark."""
    if rng.random() < 0.1 and not re.search(r"\b(?!I [a-z])[A-Z]\b", text):
        text = text.lower()
    if rng.random() < 0.1 and text[-1] in ".?!":
        text = text[:-1]
    return text


def turns_of(rng, task, questions):
    """(user, assistant) turns: the statements in one or several turns, questions beside them or in turns of their own."""
    left, out = task.statements, []
    pieces = rng.choice([1, 1, 1, 2, 3]) if left > 1 else 1
    join = "\n" if rng.random() < 0.04 else " "
    for piece in range(pieces):
        last = piece == pieces - 1
        count = left if last else rng.randint(0, left - 1)
        said = [task.say() for _ in range(count)]
        left -= count
        asked = questions if last else rng.randint(0, questions // 2) if left < task.statements else 0
        questions -= asked
        if said and (not asked or rng.random() < 0.4):
            out.append((join.join(said), ACKNOWLEDGE))
            said = []
        given = set()
        for _ in range(asked):
            question, answer = task.ask()
            if answer not in given or rng.random() < 0.1:
                out.append((join.join([*said, question]), answer))
                said = []
            given.add(answer)
    return [(casual(rng, user), assistant) for user, assistant in out]


def chat(rng):
    return [(casual(rng, q), a) for q, a in [rng.choice([outside, small_talk])(rng)]]


def make(rng, name, n, unknown=0.0):
    kind = TASKS[name][0]
    return kind(rng, n, unknown) if kind in UNKNOWN else kind(rng, n)


def conversation(rng, scale=1.0):
    """One training conversation: mostly one task with a few questions, sometimes with others around it."""
    names = list(TASKS)
    count = rng.choices([1, 2, 3], [75, 20, 5])[0]
    turns = []
    for name in dict.fromkeys(rng.choices(names, [TASKS[t][1] for t in names], k=count)):
        n = rng.randint(1, max(1, round(TASKS[name][2] * scale)))
        task = make(rng, name, n, unknown=0.3 if count == 1 else 0.0)
        turns += turns_of(rng, task, 1 if name in ("copy", "reverse") else rng.choice([1, 2, 3, 5, 8]))
        if rng.random() < 0.1:
            turns += chat(rng)
    return turns


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
    messages = [{"role": role, "content": text} for turn in turns for role, text in zip(("user", "assistant"), turn)]
    return {"task": task, "length": length, "messages": messages[:-1], "answer": messages[-1]["content"]}


def evaluation_set(rows, start=0):
    return [evaluation_case(task, length, i) for task in [*TASKS, "unknown"] for length in ("train", "double")
            for i in range(start, start + rows)]


def main():
    if sys.argv[1] == "show":
        rng = random.Random(int(sys.argv[2]) if len(sys.argv) > 2 else 1)
        for _ in range(12):
            print("\n".join(f"> {user}\n  {assistant}" for user, assistant in conversation(rng)), "\n")
    else:
        with open(sys.argv[2], "w") as out:
            for row in evaluation_set(int(sys.argv[3]) if len(sys.argv) > 3 else 60):
                out.write(json.dumps(row, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
