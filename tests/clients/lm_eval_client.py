"""lm-eval with tasks that are files: exact answers through chats, and choices by the log-probabilities of completions. Its scores are
those that plain requests give.
"""

import json
import os
import pathlib
import subprocess
import sys
import tempfile

import plain

LM_EVAL = pathlib.Path(sys.executable).with_name("lm_eval")
TOKENS = 32
folder = pathlib.Path(tempfile.mkdtemp())
environment = os.environ | {"HF_HOME": str(folder / "hub")}
names = [("red", 7), ("blue", 2), ("green", 31), ("grey", 45), ("brown", 76), ("white", 9)]
questions = [
    {
        "question": f"The {colour} box holds {number}. Now the {colour} box holds {number + 1}. What does the {colour} box hold?",
        "answer": f"The {colour} box holds {number + 1}.",
        "start": f"The {colour} box holds {number}. The {colour} box holds",
        "ends": [f" {number}.", f" {number + 1}.", f" {number + 2}."],
    }
    for colour, number in names
]
data = folder / "questions.jsonl"
data.write_text("".join(json.dumps(question) + "\n" for question in questions))
SHARED = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}}, "test_split": "test", "metadata": {"version": 1}}
TASKS = {
    "boxes_chat": {
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["\n\n"], "max_gen_toks": TOKENS, "do_sample": False, "temperature": 0},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    },
    "boxes_choice": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{start}}",
        "doc_to_choice": "{{ends}}",
        "doc_to_target": 0,
        "target_delimiter": "",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    },
}
for name, task in TASKS.items():
    # JSON is YAML.
    (folder / f"{name}.yaml").write_text(json.dumps({"task": name, **SHARED, **task}))


def lm_eval(task, model, path, *more):
    """The result of a task, and its samples."""
    out = folder / task
    arguments = f"model={plain.MODEL},base_url={plain.BASE}{path},num_concurrent=2,max_retries=1,max_length=2048"
    flags = ["--model", model, "--model_args", arguments + "".join(more), "--tasks", task, "--include_path", folder]
    chat = ["--apply_chat_template"] if "chat" in model else []
    ran = subprocess.run(
        [LM_EVAL, "run", *flags, *chat, "--output_path", out, "--log_samples"], env=environment, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stdout[-4000:] + ran.stderr[-4000:]
    (result,) = out.rglob("results_*.json")
    (samples,) = out.rglob("samples_*.jsonl")
    samples = [json.loads(line) for line in samples.read_text().splitlines()]
    return json.loads(result.read_text())["results"][task], sorted(samples, key=lambda sample: sample["doc_id"])


result, samples = lm_eval("boxes_chat", "local-chat-completions", "/chat/completions")
expected = [plain.chat(question["question"], max_tokens=TOKENS) for question in questions]
for sample, answer in zip(samples, expected, strict=True):
    plain.same(sample["resps"][0][0], answer)
right = sum(answer == question["answer"] for answer, question in zip(expected, questions))
assert right > 0, expected
assert result["exact_match,none"] == right / len(questions), result

# The server's own tokenizer, over HTTP.
result, samples = lm_eval("boxes_choice", "local-completions", "/completions", ",tokenizer_backend=remote", f",auth_token={plain.KEY}")


def log_probability(start, end):
    """Of the tokens of `end` after those of `start`."""
    count = len(plain.post("/tokenize", prompt=start)["tokens"])
    echo = plain.post("/v1/completions", prompt=start + end, max_tokens=0, echo=True, logprobs=1, temperature=0)
    return sum(echo["choices"][0]["logprobs"]["token_logprobs"][count:])


right = 0
for sample, question in zip(samples, questions, strict=True):
    expected = [log_probability(question["start"], end) for end in question["ends"]]
    found = [float(response[0][0]) for response in sample["resps"]]
    assert all(abs(one - other) < 1e-3 for one, other in zip(found, expected, strict=True)), (found, expected)
    right += expected.index(max(expected)) == 0
assert result["acc,none"] == right / len(questions), result
