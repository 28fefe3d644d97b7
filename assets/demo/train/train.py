"""Train the demo model; stops and goes on where it stood.

    python train.py RUN_DIR [--ends 14e6 40e6] [--decay 0.4]

RUN_DIR holds the tokenizer, the state to go on from (`state.pt`) and the log; `export.py` writes the checkpoint from it.
"""
import argparse, json, os, pathlib, random, time
from concurrent.futures import ThreadPoolExecutor

import torch
import torch.nn.functional as F

from data import conversation
from model import KimiLinear, config
from muon import Muon
from tokenizer import ChatTokenizer, write

SEED = 20261120
BATCH = 1024  # tokens a step
POOL = 50  # batches drawn at once and sorted by length, so that rows of a batch are about as long
WARMUP = 100  # steps
CONTEXT, CONTEXT_SHARE = 0.2, 0.3  # weight of the tokens that are not an answer's, and the share of them that is looked at
# Size of conversations: the first, its growth, the share of right tokens that earns it, and the tokens after which it is whole in any case.
START, GROW, MASTERED, WHOLE = 0.2, 0.05, 0.95, 6e6
MUON_LR, ADAM_LR, DECAY = 3e-3, 5e-3, 0.02
EMA_STEPS = 300
THREADS = len(os.sched_getaffinity(0))
PARTS = ThreadPoolExecutor(THREADS)
torch.set_num_threads(1)


def batches(tok, pool, scale):
    """The batches of one pool: (ids, answer mask), padded on the right."""
    rng = random.Random(f"{SEED} {pool}")
    rows, total = [], 0
    while total < POOL * BATCH:
        rows.append(tok.encode(conversation(rng, scale)))
        total += len(rows[-1][0])
    rows.sort(key=lambda row: len(row[0]))
    out, batch = [], []
    for row in rows:
        if batch and len(row[0]) * (len(batch) + 1) > BATCH:
            out.append(batch)
            batch = []
        batch.append(row)
    out.append(batch)
    rng.shuffle(out)
    for batch in out:
        width = max(len(ids) for ids, _ in batch)
        ids = torch.full((len(batch), width), tok.id["[PAD]"])
        said = torch.zeros(len(batch), width, dtype=torch.bool)
        for i, (row, mask) in enumerate(batch):
            ids[i, :len(row)], said[i, :len(row)] = torch.tensor(row), torch.tensor(mask)
        yield ids, said


def optimisers(model):
    matrices, others = [], []
    for name, p in model.named_parameters():
        hidden = p.dim() >= 2 and not name.endswith(("A_log", "conv1d.weight", "gate.weight", "b_proj.weight"))
        (matrices if hidden and "embed_tokens" not in name and "lm_head" not in name else others).append(p)
    return [Muon(matrices, MUON_LR, weight_decay=DECAY), torch.optim.AdamW(others, ADAM_LR, (0.9, 0.98), weight_decay=0.0, fused=True)]


def gradients(model, ids, said, pad):
    """The gradients of one batch, its rows in as many parts as there are threads: a thread with all of a small operation is faster than all
    threads with a part of it. Returns the mean loss and the share of right tokens among the answers'."""
    told = F.pad(said[:, 1:], (0, 1))  # where the next token is an answer's
    context = F.pad(~said[:, 1:] & (ids[:, 1:] != pad), (0, 1)) & (torch.rand(ids.shape) < CONTEXT_SHARE)
    weight = told / told.sum() + CONTEXT * context / context.sum()
    following = F.pad(ids[:, 1:], (0, 1))

    def part(rows):
        asked = (told | context)[rows]
        logits, wanted = model(ids[rows], asked), following[rows][asked]
        each = F.cross_entropy(logits, wanted, reduction="none")
        (each * weight[rows][asked]).sum().backward()
        answer = told[rows][asked]
        return each.detach()[answer].sum(), (logits.argmax(-1) == wanted)[answer].sum()
    sums = [sum(x) / told.sum() for x in zip(*PARTS.map(part, torch.arange(len(ids)).chunk(THREADS)))]
    return sums[0].item(), sums[1].item()


def rate(tokens, ends, decay):
    """In each cycle of tokens: warm up, stay, then fall in a straight line over the last part `decay`."""
    start, end = next(cycle for cycle in zip([0, *ends], ends) if tokens < cycle[1])
    return min(1.0, (tokens - start + BATCH) / (WARMUP * BATCH), (end - tokens) / (decay * (end - start)))


def main():
    a = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    a.add_argument("run", type=pathlib.Path)
    a.add_argument("--ends", type=float, nargs="+", default=[14e6, 40e6], help="tokens at which the learning rate has fallen to nothing")
    a.add_argument("--decay", type=float, default=0.4)
    a = a.parse_args()
    torch.manual_seed(SEED)
    if not (a.run / "tiktoken.model").exists():
        write(a.run)
    tok = ChatTokenizer(a.run)
    model = KimiLinear(config(tok.vocab))
    model.initialise(SEED)
    opts = optimisers(model)
    routers = [l.block_sparse_moe.gate for l in model.model.layers if hasattr(l, "block_sparse_moe")]
    ema = {n: p.detach().clone() for n, p in model.named_parameters()}
    step, tokens, pool, seconds, scale = 0, 0, 0, 0.0, START
    saved = a.run / "state.pt"
    if saved.exists():
        s = torch.load(saved)
        model.load_state_dict(s["model"])
        for opt, state in zip(opts, s["opts"]):
            opt.load_state_dict(state)
        ema, step, tokens, pool, seconds, scale = (s[n] for n in ("ema", "step", "tokens", "pool", "seconds", "scale"))
    print(sum(p.numel() for p in model.parameters()), "parameters", flush=True)
    log = (a.run / "log.jsonl").open("a")
    started = time.time() - seconds
    while tokens < a.ends[-1]:
        losses, hits = [], []
        for ids, said in batches(tok, pool, scale):
            if tokens >= a.ends[-1]:
                break
            factor = rate(tokens, a.ends, a.decay)
            loss, hit = gradients(model, ids, said, tok.id["[PAD]"])
            torch.nn.utils.clip_grad_norm_(opts[1].param_groups[0]["params"], 1.0)
            for opt, base in zip(opts, (MUON_LR, ADAM_LR)):
                opt.param_groups[0]["lr"] = base * factor
                opt.step()
            model.zero_grad()
            for router in routers:
                router.balance(1e-3 * factor)
            weight = min(1 - 1 / EMA_STEPS, step / (step + 10))
            with torch.no_grad():
                torch._foreach_lerp_(list(ema.values()), list(model.parameters()), 1 - weight)
            step += 1
            tokens += ids.numel()
            losses.append(loss)
            hits.append(hit)
        pool += 1
        right = sum(hits) / len(hits)
        if right > MASTERED:
            scale = scale + GROW
        scale = min(1.0, max(scale, START + (1 - START) * tokens / WHOLE))
        row = {"step": step, "tokens": tokens, "loss": round(sum(losses) / len(losses), 4), "right": round(right, 4),
               "scale": round(scale, 2), "seconds": round(time.time() - started)}
        print(json.dumps(row), file=log, flush=True)
        torch.save({"model": model.state_dict(), "opts": [o.state_dict() for o in opts], "ema": ema, "step": step, "tokens": tokens,
                    "pool": pool, "seconds": time.time() - started, "scale": scale}, saved.with_suffix(".new"))
        saved.with_suffix(".new").replace(saved)


if __name__ == "__main__":
    main()
