"""guidellm: a benchmark of each of its routes, all of whose requests are answered, with the answers of plain requests."""

import json
import os
import pathlib
import subprocess
import sys
import tempfile

import plain

GUIDELLM = pathlib.Path(sys.executable).with_name("guidellm")
TOKENS = 8
folder = pathlib.Path(tempfile.mkdtemp())
prompts = [f"The red box holds {number}. What does the red box hold?" for number in range(12)]
data = folder / "prompts.jsonl"
data.write_text("".join(json.dumps({"prompt": prompt, "output_tokens_count": TOKENS}) + "\n" for prompt in prompts))

for route, rate in (("chat_completions", ["concurrent", "--rate", "3"]), ("text_completions", ["throughput"])):
    out = folder / f"{route}.json"
    environment = os.environ | {
        "GUIDELLM__OPENAI__API_KEY": plain.KEY,
        "GUIDELLM__PREFERRED_ROUTE": route,
        "HF_HOME": str(folder / "hub"),
    }
    flags = ["--target", plain.SERVER, "--model", plain.MODEL, "--data", data, "--output-path", out]
    greedy = ["--backend-args", json.dumps({"extra_body": {"temperature": 0}})]
    limits = ["--max-requests", str(len(prompts)), "--disable-progress", "--rate-type", *rate]
    ran = subprocess.run([GUIDELLM, "benchmark", "run", *flags, *greedy, *limits], env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    (benchmark,) = json.loads(out.read_text())["benchmarks"]
    requests = benchmark["requests"]
    assert not requests["errored"] and not requests["incomplete"], requests
    answers = {request["prompt"]: request for request in requests["successful"]}
    assert sorted(answers) == sorted(prompts)
    for prompt, answer in answers.items():
        ask = plain.chat if route == "chat_completions" else plain.completion
        plain.same(answer["output"], ask(prompt, max_tokens=TOKENS, ignore_eos=True))
        assert answer["output_tokens"] == TOKENS, answer
