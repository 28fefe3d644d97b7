"""What programs do with the `openai` package, against the server that OPENAI_BASE_URL names.

The model's words do not matter here: they may be those of random weights.
"""

import json
from typing import Literal

import openai
from openai import OpenAI
from pydantic import BaseModel

client = OpenAI(max_retries=0)
MODEL = client.models.list().data[0].id
HELLO = [{"role": "user", "content": "Hello"}]


def chat():
    answer = client.chat.completions.create(model=MODEL, messages=HELLO, temperature=0, max_tokens=8, n=2)
    assert len(answer.choices) == 2 and answer.choices[0].message.role == "assistant"
    assert answer.choices[0].message.content == answer.choices[1].message.content
    assert answer.choices[0].finish_reason in ("stop", "length")
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert answer._request_id
    again = client.chat.completions.create(
        model=MODEL, messages=HELLO + [answer.choices[0].message, {"role": "user", "content": "And?"}], max_tokens=2
    )
    assert again.usage.prompt_tokens_details.cached_tokens > 0
    return answer.choices[0].message.content


def stream(expected):
    chunks = list(
        client.chat.completions.create(
            model=MODEL,
            messages=HELLO,
            temperature=0,
            max_completion_tokens=8,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    assert chunks[-1].usage.completion_tokens <= 8 and not chunks[-1].choices
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == expected, (text, expected)
    assert chunks[-2].choices[0].finish_reason in ("stop", "length")


WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "enum": ["Paris", "Rome"]}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}


def tools():
    asked = dict(
        model=MODEL, messages=HELLO, tools=[WEATHER], tool_choice="required", parallel_tool_calls=False, temperature=0, max_tokens=300
    )
    choice = client.chat.completions.create(**asked).choices[0]
    assert choice.finish_reason == "tool_calls", choice
    (call,) = choice.message.tool_calls
    assert call.function.name == "get_weather" and call.id.startswith("functions.get_weather:")
    city = json.loads(call.function.arguments)["city"]
    with client.chat.completions.stream(**asked) as events:
        final = events.get_final_completion().choices[0].message
    assert final.tool_calls[0].id == call.id
    assert final.tool_calls[0].function.arguments == call.function.arguments
    answered = client.chat.completions.create(
        model=MODEL,
        messages=HELLO + [choice.message, {"role": "tool", "tool_call_id": call.id, "content": f"Sunny in {city}"}],
        tools=[WEATHER],
        tool_choice="none",
        max_tokens=8,
    )
    assert answered.choices[0].message.tool_calls is None


class Box(BaseModel):
    colour: str
    holds: int


def schema():
    shape = {
        "type": "object",
        "properties": {"colour": {"enum": ["red", "blue"]}, "holds": {"type": "integer", "minimum": 0, "maximum": 99}},
        "required": ["colour", "holds"],
        "additionalProperties": False,
    }
    answer = client.chat.completions.create(
        model=MODEL,
        messages=HELLO,
        temperature=0,
        max_tokens=200,
        response_format={"type": "json_schema", "json_schema": {"name": "box", "strict": True, "schema": shape}},
    )
    box = Box.model_validate_json(answer.choices[0].message.content)
    assert box.colour in ("red", "blue") and 0 <= box.holds <= 99


def logprobs():
    answer = client.chat.completions.create(
        model=MODEL, messages=HELLO, temperature=0, max_tokens=4, logprobs=True, top_logprobs=3
    )
    for token in answer.choices[0].logprobs.content:
        assert len(token.top_logprobs) == 3 and token.logprob <= 0
        assert token.top_logprobs[0].logprob == max(top.logprob for top in token.top_logprobs)
        assert token.top_logprobs[0].token == token.token, "greedy takes the likeliest"


def completions():
    answer = client.completions.create(model=MODEL, prompt="The red box", max_tokens=4, temperature=0, echo=True, logprobs=2)
    assert answer.choices[0].text.startswith("The red box")
    assert answer.choices[0].logprobs.token_logprobs[0] is None
    pieces = client.completions.create(model=MODEL, prompt="The red box", max_tokens=4, temperature=0, stream=True)
    text = "".join(chunk.choices[0].text for chunk in pieces)
    assert "The red box" + text == answer.choices[0].text


def responses():
    asked = dict(model=MODEL, input="Hello", temperature=0, max_output_tokens=8)
    first = client.responses.create(**asked)
    assert first.status in ("completed", "incomplete") and first._request_id
    with client.responses.stream(**asked) as events:
        text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert text == first.output_text
    second = client.responses.create(model=MODEL, previous_response_id=first.id, input="And?", max_output_tokens=2)
    assert second.usage.input_tokens > first.usage.input_tokens
    stateless = client.responses.create(
        model=MODEL,
        input=[{"role": "user", "content": "Hello"}, *first.output, {"role": "user", "content": "And?"}],
        max_output_tokens=2,
        store=False,
    )
    assert stateless.usage.input_tokens == second.usage.input_tokens
    assert client.responses.retrieve(first.id).output_text == first.output_text
    client.responses.delete(first.id)
    functions(asked)
    box = client.responses.parse(model=MODEL, input="Hello", temperature=0, max_output_tokens=200, text_format=Choice).output_parsed
    assert box.colour in ("red", "blue")


class Choice(BaseModel):
    colour: Literal["red", "blue"]


def functions(asked):
    function = {"type": "function", "strict": True, **WEATHER["function"]}
    asked = {**asked, "max_output_tokens": 300, "tools": [function], "tool_choice": "required", "parallel_tool_calls": False}
    answer = client.responses.create(**asked)
    (call,) = answer.output
    assert call.type == "function_call" and json.loads(call.arguments)["city"] in ("Paris", "Rome")
    with client.responses.stream(**asked) as events:
        for event in events:
            pass
        final = events.get_final_response()
    assert final.output[0].arguments == call.arguments and final.output[0].call_id == call.call_id
    output = {"type": "function_call_output", "call_id": call.call_id, "output": "Sunny"}
    answered = client.responses.create(
        model=MODEL, previous_response_id=answer.id, input=[output], tools=[function], tool_choice="none", max_output_tokens=8
    )
    assert all(item.type == "message" for item in answered.output)


def errors():
    for wrong, kind in [
        (lambda: client.embeddings.create(model=MODEL, input="text"), openai.BadRequestError),
        (lambda: client.chat.completions.create(model="nobody", messages=HELLO), openai.NotFoundError),
        (lambda: client.chat.completions.create(model=MODEL, messages=HELLO, temperature=3), openai.BadRequestError),
        (lambda: client.responses.create(model=MODEL, input="Hi", previous_response_id="resp_0"), openai.BadRequestError),
        (lambda: client.responses.retrieve("resp_0"), openai.NotFoundError),
        (lambda: client.with_options(api_key="wrong").models.list(), openai.AuthenticationError),
    ]:
        try:
            wrong()
        except kind as error:
            assert error.body["message"], error
        else:
            raise AssertionError(f"{kind} was expected")


said = chat()
print("chat ok")
stream(said)
print("stream ok")
for part in (tools, schema, logprobs, completions, responses, errors):
    part()
    print(f"{part.__name__} ok")
