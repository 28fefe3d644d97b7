"""Requests to the server without a client's package, for what a client's answer is compared with.

The server is the one of OPENAI_BASE_URL, with the key of OPENAI_API_KEY; it serves the demo model as `model`.
"""

import json
import os
import urllib.request

BASE = os.environ["OPENAI_BASE_URL"]
SERVER = BASE.removesuffix("/v1")
KEY = os.environ["OPENAI_API_KEY"]
MODEL = "model"
BOXES = "The red box holds 7. The blue box holds 2. Now the red box holds 3. What does the red box hold?"

_opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def post(path, **body):
    """The answer to a JSON body at a path of the server."""
    headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
    request = urllib.request.Request(f"{SERVER}{path}", json.dumps({"model": MODEL, **body}).encode(), headers)
    with _opener.open(request) as answer:
        return json.load(answer)


def chat(messages, **more):
    """The greedy answer to a chat, or to one message of the user."""
    if isinstance(messages, str):
        messages = [{"role": "user", "content": messages}]
    answer = post("/v1/chat/completions", messages=messages, temperature=0, **more)
    return answer["choices"][0]["message"]["content"]


def completion(prompt, **more):
    """The greedy continuation of a text."""
    return post("/v1/completions", prompt=prompt, temperature=0, **more)["choices"][0]["text"]


def same(found, expected):
    assert found == expected, f"found {found!r}, expected {expected!r}"
    assert found, "an empty answer"
