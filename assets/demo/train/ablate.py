"""KDA against one scalar gate a head (Gated DeltaNet) and against MLA alone, on the synthetic tasks of the Kimi Linear report.

    python ablate.py OUT.json [--steps 1200] [--only kda,scalar,mla]
    python ablate.py OUT.json --plot PICTURE.svg

Each mixer makes a model of two layers, trained the same way on each task from the same data at lengths up to TRAINED (short ones
first), then scored at lengths up to four times that. OUT.json holds, for each mixer, task and length, the share of right tokens
among those asked for; `table` and `--plot` show it.
"""
import argparse, json, pathlib, time

import torch
import torch.nn.functional as F

from model import KDA, KimiLinear, config
from muon import Muon

TRAINED, LENGTHS = 128, [32, 64, 96, 128, 160, 192, 256, 384, 512]
SYMBOLS, PAD, MARK, PUSH, POP, STACKS = 64, 0, 1, 2, 3, 4  # tokens: the marks, then stack names, then symbols
FIRST = 4 + STACKS
VOCAB = FIRST + SYMBOLS
BATCH, LR = 16, 3e-3


def palindrome(gen, length):
    """Random symbols, a mark, the same backwards."""
    half = torch.randint(SYMBOLS, (length // 2 - 1,), generator=gen) + FIRST
    ids = torch.cat([half, torch.tensor([MARK]), half.flip(0)])
    return ids, torch.arange(len(ids)) > len(half)


def multi_query(gen, length):
    """Pairs of a key and a value, a mark, then keys in another order, each with its value."""
    pairs = min(length // 4, SYMBOLS // 2)
    keys = torch.randperm(SYMBOLS // 2, generator=gen)[:pairs] + FIRST
    values = torch.randint(SYMBOLS // 2, (pairs,), generator=gen) + FIRST + SYMBOLS // 2
    order = torch.randint(pairs, ((length - 2 * pairs) // 2,), generator=gen)
    asked = torch.stack([keys[order], values[order]], 1).flatten()
    ids = torch.cat([torch.stack([keys, values], 1).flatten(), torch.tensor([MARK]), asked])
    said = torch.zeros(len(ids), dtype=torch.bool)
    said[2 * pairs + 2::2] = True
    return ids, said


def stack(gen, length):
    """Pushes and pops on several stacks; a pop is followed by what comes off."""
    stacks, ids, said = [[] for _ in range(STACKS)], [], []
    while len(ids) < length - 2:
        s = int(torch.randint(STACKS, (1,), generator=gen))
        pop = bool(stacks[s]) and float(torch.rand(1, generator=gen)) < 0.5
        symbol = stacks[s].pop() if pop else int(torch.randint(SYMBOLS, (1,), generator=gen)) + FIRST
        if not pop:
            stacks[s].append(symbol)
        ids += [POP if pop else PUSH, 4 + s, symbol]
        said += [False, False, pop]
    return torch.tensor(ids), torch.tensor(said)


NAMES = {"kda": "KDA", "scalar": "one gate a head", "mla": "MLA alone"}
TASKS = {"palindrome": palindrome, "multi-query recall": multi_query, "stack": stack}


class ScalarGate(KDA):
    """The same layer with one decay for all channels of a head."""

    def decay(self, x):
        return super().decay(x).mean(-1, keepdim=True).expand(-1, -1, -1, self.dim)


def build(mixer):
    c = config(VOCAB)
    layers = [1, 2]
    c |= {"num_hidden_layers": 2, "first_k_dense_replace": 2, "num_attention_heads": 2, "qk_nope_head_dim": 64, "v_head_dim": 64,
          "linear_attn_config": {"kda_layers": [] if mixer == "mla" else layers, "full_attn_layers": layers if mixer == "mla" else [],
                                 "head_dim": 64, "num_heads": 2, "short_conv_kernel_size": 4}}
    torch.manual_seed(1)
    model = KimiLinear(c)
    model.initialise(1, copying=False)
    if mixer == "scalar":
        for layer in model.model.layers:
            layer.self_attn.__class__ = ScalarGate
    return model


def batch(task, gen, length):
    rows = [TASKS[task](gen, length) for _ in range(BATCH)]
    width = max(len(ids) for ids, _ in rows)
    pad = lambda x: F.pad(x, (0, width - len(x)))
    return torch.stack([pad(ids) for ids, _ in rows]), torch.stack([pad(said) for _, said in rows])


def run(mixer, task, steps):
    model = build(mixer)
    matrices = [p for n, p in model.named_parameters() if p.dim() == 2 and "proj" in n and "b_proj" not in n.split(".")]
    chosen = {id(p) for p in matrices}
    opts = [Muon(matrices, LR), torch.optim.AdamW([p for p in model.parameters() if id(p) not in chosen], LR, weight_decay=0.0)]
    gen = torch.Generator().manual_seed(2)
    for step in range(steps):
        longest = 32 + (TRAINED - 32) * min(1.0, 3 * step / steps)  # the whole length after a third of the steps
        length = int(torch.randint(4, int(longest) // 4 + 1, (1,), generator=gen)) * 4
        ids, said = batch(task, gen, length)
        target = said[:, 1:]
        loss = F.cross_entropy(model(ids, F.pad(target, (0, 1))), ids[:, 1:][target])
        loss.backward()
        for opt in opts:
            opt.param_groups[0]["lr"] = LR * min(1, (step + 1) / 100, 4 * (steps - step) / steps)
            opt.step()
        model.zero_grad()
    held_out, out = torch.Generator().manual_seed(3), {}
    with torch.no_grad():
        for length in LENGTHS:
            right = total = 0
            for _ in range(8):
                ids, said = batch(task, held_out, length)
                target = said[:, 1:]
                best = model(ids, F.pad(target, (0, 1))).argmax(-1)
                right += int((best == ids[:, 1:][target]).sum())
                total += best.numel()
            out[length] = right / total
    return out


def table(results):
    """Markdown: a row a task and mixer, a column a length."""
    rows = [["task", "mixer", *LENGTHS], ["---"] * (2 + len(LENGTHS))]
    rows += [[task, NAMES[m], *(f"{100 * results[m][task][str(n)]:.1f}" for n in LENGTHS)] for task in TASKS for m in results]
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in rows)


def plot(results, path):
    import matplotlib
    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "ablation"  # the same picture from the same numbers
    from matplotlib import pyplot
    figure, axes = pyplot.subplots(1, len(TASKS), figsize=(11, 3.4), sharey=True, layout="constrained")
    for axis, task in zip(axes, TASKS):
        for (mixer, by_task), colour, mark in zip(results.items(), ("#0072b2", "#d55e00", "#555555"), "os^"):
            axis.plot(LENGTHS, [100 * by_task[task][str(n)] for n in LENGTHS], color=colour, marker=mark, ms=4, label=NAMES[mixer])
        axis.axvline(TRAINED, color="#aaaaaa", lw=1, ls="--")
        axis.set(title=task, xlabel="tokens", xscale="log", xticks=[32, 64, 128, 256, 512], xticklabels=[32, 64, 128, 256, 512])
        axis.minorticks_off()
        axis.grid(alpha=0.25)
    axes[0].set(ylabel="right tokens, %", ylim=(-2, 102))
    axes[0].legend(frameon=False)
    axes[1].text(TRAINED, 10, " trained up to here", color="#777777", fontsize=8)
    figure.savefig(path, metadata={"Date": None})


def main():
    a = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    a.add_argument("out", type=pathlib.Path)
    a.add_argument("--steps", type=int, default=1200)
    a.add_argument("--only", default="kda,scalar,mla")
    a.add_argument("--plot", type=pathlib.Path, help="draw what OUT.json holds, and train nothing")
    a = a.parse_args()
    results = json.loads(a.out.read_text()) if a.out.exists() else {}
    if a.plot:
        plot(results, a.plot)
        return
    for mixer in a.only.split(","):
        for task in TASKS:
            if task in results.get(mixer, {}):
                continue  # an interrupted run goes on with what is missing
            start = time.time()
            scores = run(mixer, task, a.steps)
            results.setdefault(mixer, {})[task] = {str(n): share for n, share in scores.items()}
            a.out.write_text(json.dumps(results, indent=1) + "\n")
            print(mixer, task, f"{time.time() - start:.0f} s", scores, flush=True)
    print(table(results))


if __name__ == "__main__":
    main()
