"""llm, the command: prompts, streams, a conversation, a schema."""

import json
import os
import pathlib
import subprocess
import sys
import tempfile

import plain

LLM = pathlib.Path(sys.executable).with_name("llm")
folder = pathlib.Path(tempfile.mkdtemp())
MODELS = [
    {"model_id": "boxes", "model_name": plain.MODEL, "api_base": plain.BASE, "api_key_name": "ours", "supports_schema": True},
    {"model_id": "text", "model_name": plain.MODEL, "api_base": plain.BASE, "api_key_name": "ours", "completion": True},
]
# JSON is YAML.
(folder / "extra-openai-models.yaml").write_text(json.dumps(MODELS))
(folder / "keys.json").write_text(json.dumps({"ours": plain.KEY}))
GREEDY = ["-o", "temperature", "0", "-o", "max_tokens", "60"]


def llm(*arguments):
    environment = os.environ | {"LLM_USER_PATH": str(folder)}
    ran = subprocess.run([LLM, *arguments], env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout.rstrip("\n")


assert "boxes" in llm("models")
first = plain.chat(plain.BOXES, max_tokens=60)
plain.same(llm("-m", "boxes", *GREEDY, "--no-stream", plain.BOXES), first)
plain.same(llm("-m", "boxes", *GREEDY, plain.BOXES), first)
told = [
    {"role": "user", "content": plain.BOXES},
    {"role": "assistant", "content": first},
    {"role": "user", "content": "And the blue box?"},
]
plain.same(llm("-c", *GREEDY, "And the blue box?"), plain.chat(told, max_tokens=60))
system = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": plain.BOXES}]
plain.same(llm("-m", "boxes", *GREEDY, "-s", "Be brief.", plain.BOXES), plain.chat(system, max_tokens=60))
plain.same(llm("-m", "text", *GREEDY, "The red box"), plain.completion("The red box", max_tokens=60).rstrip("\n"))
shape = {"type": "object", "properties": {"colour": {"enum": ["red", "blue"]}}, "required": ["colour"]}
box = json.loads(llm("-m", "boxes", *GREEDY, "--schema", json.dumps(shape), plain.BOXES))
assert box["colour"] in ("red", "blue")
