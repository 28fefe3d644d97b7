"""Compare `model.py` with a reference checkpoint: logits of its recorded prompts.

    python check.py REFERENCE_DIR     a folder with config.json, *.safetensors and expected.safetensors
"""
import json, pathlib, sys

import torch
from safetensors.torch import load_file

from model import KimiLinear, load_published


@torch.no_grad()
def main():
    folder = pathlib.Path(sys.argv[1])
    model = KimiLinear(json.loads((folder / "config.json").read_text()))
    tensors = {}
    for file in sorted(folder.glob("model*.safetensors")):
        tensors |= load_file(file)
    load_published(model, tensors)
    expected = load_file(folder / "expected.safetensors")
    for name in sorted(n for n in expected if n.endswith(".tokens")):
        wanted = expected[name.replace("tokens", "logits")]
        error = ((model(expected[name].long()[None])[0] - wanted).norm() / wanted.norm()).item()
        print(f"{name.split('.')[1]:>4} tokens: {error:.1e}")
        if error > 1e-5:
            sys.exit("the logits differ")


if __name__ == "__main__":
    main()
