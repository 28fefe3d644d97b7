"""Questions in free wordings, `../questions.jsonl`: whether the generator knows them, and how a checkpoint answers.

    python questions.py check              no name of theirs in the word lists; which of their sentences are the generator's
    python questions.py CHECKPOINT_DIR     the greedy answers, judged
    python questions.py --program PROGRAM [CHECKPOINT_DIR]  the same by the built program, one run of its `chat` a question; its own model, or another

A line has `group` (`inside` or `outside` the model's world; `listed` are questions that failed before), `messages` (what the user says, one
turn each), and what decides on the last answer: for `inside` and `listed` every text of `must` occurs in it and none of `not`; for `outside`
it says that it does not know or cannot (REFUSAL), or one of `or` occurs, and none of `not`. Texts are compared word for word, in small letters and
without marks; `|` separates texts of which one is enough.
"""
import json, pathlib, re, subprocess, sys

FILE = pathlib.Path(__file__).parent.parent / "questions.jsonl"
REFUSAL = "don't know|can't|cannot|only know|up to 99|don't understand"
LONGEST = 64  # tokens of an answer


def rows():
    return [json.loads(line) for line in FILE.read_text().splitlines()]


def words(text):
    return " " + " ".join(re.findall(r"[\w']+", text.lower().replace("’", "'"))) + " "


def occurs(texts, answer):
    return any(words(text) in words(answer) for text in texts.split("|"))


def right(row, answer):
    if any(occurs(text, answer) for text in row.get("not", [])):
        return False
    if row["group"] == "outside":
        return occurs("|".join([REFUSAL, *row.get("or", [])]), answer)
    return all(occurs(text, answer) for text in row["must"])


def answers_of(folder):
    """A function from the user's turns to the last answer, by `model.py` from an exported checkpoint."""
    import torch
    from evaluate import load
    model, tok = load(folder)

    @torch.no_grad()
    def answer(turns):
        messages = []
        for turn in turns:
            messages.append({"role": "user", "content": turn})
            ids, said = tok.prompt(messages), []
            while len(said) < LONGEST:
                said.append(int(model(torch.tensor([ids + said]))[0, -1].argmax()))
                if said[-1] == tok.end:
                    break
            messages.append({"role": "assistant", "content": tok.decode(said)})
        return messages[-1]["content"]
    return answer


def answers_by(program, folder=None):
    """The same by `chat` of the program, which takes a turn a line and prints the answers."""
    command = [program, "chat", "--backend", "cpu", *(["--model", folder] if folder else [])]

    def answer(turns):
        run = subprocess.run(command, input="\n".join(turns) + "\n", capture_output=True, text=True, check=True)
        return [line for line in run.stdout.splitlines() if line.strip()][-1]
    return answer


def judge(answer):
    score = {}
    for row in rows():
        said = answer(row["messages"])
        good = right(row, said)
        score.setdefault(row["group"], []).append(good)
        if not good:
            print(f"{row['group']}: {' / '.join(row['messages'])}\n    {said}")
    for group, found in score.items():
        print(f"{group}: {sum(found)} of {len(found)}")


def templates():
    """Every wording of the generator as a pattern, with the number of its own words; a slot is one to three words. A sentence is the generator's if
    at least half of its words are the wording's own."""
    import facts, lists, phrases, talk, tracking
    found = {}

    def collect(value):
        if isinstance(value, str):
            literal = re.sub(r"\{\w\}", " ", value)
            if len(re.findall(r"[A-Za-z']+", literal)) > 1:
                text = re.escape(value.strip(" .?!")).replace(r"\ ", " ")
                found[re.compile(re.sub(r"\\\{\w\\\}", r"[^\\s.?!]+(?: [^\\s.?!]+){0,2}", text), re.I)] = len(re.findall(r"[\w']+", literal))
        elif isinstance(value, (list, tuple)):
            for v in value:
                collect(v)
        elif isinstance(value, dict) or isinstance(value, facts.Kind):
            collect(list((value if isinstance(value, dict) else vars(value)).values()))
    for module in (facts, lists, phrases, talk, tracking):
        collect([v for n, v in vars(module).items() if n.isupper()])
    return found


def check():
    import words as lists
    known = {w.lower() for w in lists.PEOPLE + lists.MORE_PEOPLE}
    names = {w for row in rows() for m in row["messages"] for w in re.findall(r"[A-Za-z]+", m) if w.lower() in known}
    forms = templates()
    whole = 0
    for row in rows():
        sentences = [s for m in row["messages"] for s in re.split(r"(?<=[.?!])\s+", m)]
        seen = [s for s in sentences if any(p.fullmatch(s.strip(" .?!")) and 2 * least >= len(s.split()) for p, least in forms.items())]
        if seen:
            print(f"{row['group']}: {seen} of {len(sentences)} sentences")
        whole += row["group"] != "listed" and len(seen) == len(sentences)
    print(f"{len(forms)} wordings; names in the lists: {sorted(names) or 'none'}; questions made of the generator's wordings alone: {whole}")
    sys.exit(bool(names or whole))


if __name__ == "__main__":
    if sys.argv[1] == "check":
        check()
    judge(answers_by(*sys.argv[2:4]) if sys.argv[1] == "--program" else answers_of(sys.argv[1]))
