"""Exact-match accuracy per task and length class on the held-out conversations.

    python evaluate.py CHECKPOINT_DIR [--rows 100] [--errors 3]

CHECKPOINT_DIR is an exported checkpoint: the weights are those that ship, BF16 widened to F32, run by the recurrence. A greedy
answer equals the expected one, end of turn included, exactly when every token of the expected one is the most likely after
those before it; so one pass over prompt and answer decides.
"""
import argparse, json, pathlib

import torch
from safetensors.torch import load_file

from data import evaluation_set
from model import KimiLinear, load_published
from tokenizer import ChatTokenizer

BATCH = 64


def load(folder):
    folder = pathlib.Path(folder)
    model = KimiLinear(json.loads((folder / "config.json").read_text())).eval()
    load_published(model, load_file(folder / "model.safetensors"))
    return model, ChatTokenizer(folder)


@torch.no_grad()
def judge(model, tok, rows):
    """For each row, the first wrong place: what was said up to there, or None."""
    out = [None] * len(rows)
    pairs = [(tok.prompt(row["messages"]), tok.enc.encode_ordinary(row["answer"]) + [tok.end]) for row in rows]
    order = sorted(range(len(rows)), key=lambda i: sum(map(len, pairs[i])))
    for start in range(0, len(order), BATCH):
        part = order[start:start + BATCH]
        width = max(sum(map(len, pairs[i])) for i in part)
        ids = torch.full((len(part), width), tok.id["[PAD]"])
        asked = torch.zeros(len(part), width, dtype=torch.bool)
        for row, mask, i in zip(ids, asked, part):
            prompt, answer = pairs[i]
            row[:len(prompt) + len(answer)] = torch.tensor(prompt + answer)
            mask[len(prompt) - 1:len(prompt) + len(answer) - 1] = True
        best = model(ids, asked).argmax(-1).split([len(pairs[i][1]) for i in part])
        for i, said in zip(part, best):
            wrong = (said != torch.tensor(pairs[i][1])).nonzero()
            if len(wrong):
                out[i] = tok.decode(said[:int(wrong[0]) + 1].tolist()) + " .."
    return out


def score(rows, wrong):
    """(task, length) -> share of exact answers."""
    table = {}
    for row, w in zip(rows, wrong):
        table.setdefault((row["task"], row["length"]), []).append(w is None)
    return {key: sum(v) / len(v) for key, v in table.items()}


def main():
    a = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    a.add_argument("checkpoint")
    a.add_argument("--rows", type=int, default=100)
    a.add_argument("--errors", type=int, default=0, help="show so many wrong answers per task and length")
    a = a.parse_args()
    model, tok = load(a.checkpoint)
    rows = evaluation_set(a.rows)
    wrong = judge(model, tok, rows)
    table = score(rows, wrong)
    print(f"{'task':12} {'train':>7} {'double':>7}")
    for task in dict.fromkeys(row["task"] for row in rows):
        print(f"{task:12} {table[task, 'train']:7.1%} {table[task, 'double']:7.1%}")
    for key in table:
        failed = [(row, w) for row, w in zip(rows, wrong) if (row["task"], row["length"]) == key and w is not None]
        for row, w in failed[:a.errors]:
            print(f"\n{key}", *(f"\n  {m['role']}: {m['content']}" for m in row["messages"]))
            print(f"  expected: {row['answer']}\n  said:     {w}")


if __name__ == "__main__":
    main()
