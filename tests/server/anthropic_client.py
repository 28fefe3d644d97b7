"""What programs do with the `anthropic` package, against the server that ANTHROPIC_BASE_URL names.

The model's words do not matter here: they may be those of random weights.
"""

import os

import anthropic
from anthropic import Anthropic

client = Anthropic(max_retries=0)
MODEL = os.environ["MODEL"]
# The package has no parameter for it.
GREEDY = {"temperature": 0}
HELLO = [{"role": "user", "content": "Hello"}]


def messages():
    answer = client.messages.create(model=MODEL, max_tokens=8, messages=HELLO, extra_body=GREEDY)
    assert answer.role == "assistant" and answer.stop_reason in ("end_turn", "max_tokens")
    assert answer._request_id
    counted = client.messages.count_tokens(model=MODEL, messages=HELLO)
    assert counted.input_tokens == answer.usage.input_tokens + answer.usage.cache_read_input_tokens
    again = client.messages.create(
        model=MODEL,
        max_tokens=2,
        system="Be brief.",
        messages=HELLO + [answer.to_param(), {"role": "user", "content": "And?"}],
    )
    assert again.usage.output_tokens <= 2


def stream():
    asked = dict(model=MODEL, max_tokens=8, messages=HELLO, extra_body=GREEDY)
    whole = client.messages.create(**asked)
    with client.messages.stream(**asked) as events:
        text = "".join(events.text_stream)
        final = events.get_final_message()
    assert text == whole.content[0].text == final.content[0].text
    assert final.stop_reason == whole.stop_reason
    assert final.usage.output_tokens == whole.usage.output_tokens


WEATHER = {
    "name": "get_weather",
    "description": "The weather of a city",
    "input_schema": {
        "type": "object",
        "properties": {"city": {"type": "string", "enum": ["Paris", "Rome"]}},
        "required": ["city"],
        "additionalProperties": False,
    },
}


def tools():
    asked = dict(
        model=MODEL, max_tokens=300, messages=HELLO, tools=[WEATHER], extra_body=GREEDY, tool_choice={"type": "tool", "name": "get_weather"}
    )
    answer = client.messages.create(**asked)
    assert answer.stop_reason == "tool_use", answer
    (call,) = answer.content
    assert call.type == "tool_use" and call.input["city"] in ("Paris", "Rome")
    with client.messages.stream(**asked) as events:
        final = events.get_final_message()
    assert final.content[0].input == call.input and final.content[0].id == call.id
    result = {"type": "tool_result", "tool_use_id": call.id, "content": "Sunny", "is_error": False}
    answered = client.messages.create(
        model=MODEL,
        max_tokens=8,
        messages=HELLO + [answer.to_param(), {"role": "user", "content": [result]}],
        tools=[WEATHER],
        tool_choice={"type": "none"},
    )
    assert all(block.type == "text" for block in answered.content)


def errors():
    image = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": ""}}
    for wrong, kind in [
        (lambda: client.messages.create(model="nobody", max_tokens=1, messages=HELLO), anthropic.NotFoundError),
        (lambda: client.messages.create(model=MODEL, max_tokens=1, messages=[]), anthropic.BadRequestError),
        (
            lambda: client.messages.create(model=MODEL, max_tokens=1, messages=[{"role": "user", "content": [image]}]),
            anthropic.BadRequestError,
        ),
        (
            lambda: client.with_options(api_key="wrong").messages.count_tokens(model=MODEL, messages=HELLO),
            anthropic.AuthenticationError,
        ),
    ]:
        try:
            wrong()
        except kind as error:
            assert error.body["error"]["message"], error
        else:
            raise AssertionError(f"{kind} was expected")


for part in (messages, stream, tools, errors):
    part()
    print(f"{part.__name__} ok")
