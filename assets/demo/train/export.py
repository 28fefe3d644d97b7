"""Write the averaged weights of a run as a checkpoint in the published format.

    python export.py RUN_DIR OUT_DIR
"""
import json, pathlib, shutil, sys

import torch
from safetensors.torch import save_file

from model import KimiLinear, config, published
from tokenizer import ChatTokenizer


def main():
    run, out = map(pathlib.Path, sys.argv[1:3])
    out.mkdir(parents=True, exist_ok=True)
    c = config(ChatTokenizer(run).vocab)
    saved = torch.load(run / "state.pt")
    model = KimiLinear(c)
    model.load_state_dict({**saved["model"], **saved["ema"]})
    tensors = {}
    for name, t in published(model).items():
        keep = name.endswith(("A_log", "dt_bias"))
        tensors[name] = (t.float() if keep else t.bfloat16()).contiguous()
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    (out / "config.json").write_text(json.dumps(c, indent=2) + "\n")
    (out / "generation_config.json").write_text(json.dumps(
        {"bos_token_id": c["bos_token_id"], "eos_token_id": c["eos_token_id"], "pad_token_id": c["pad_token_id"],
         "do_sample": False}, indent=2) + "\n")
    for name in ("tiktoken.model", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(run / name, out / name)
    size = sum(f.stat().st_size for f in out.iterdir() if f.is_file())
    print(f"step {saved['step']}, {saved['tokens'] / 1e6:.2f} M tokens, {sum(t.numel() for t in tensors.values())} parameters, "
          f"{size / 2**20:.2f} MiB")


if __name__ == "__main__":
    main()
