"""litellm: chats, streams, texts, tools, a schema and responses, through its provider `openai` and its provider for vLLM."""

import json

import litellm

import plain

litellm.telemetry = False
litellm.suppress_debug_info = True
ASKED = dict(api_base=plain.BASE, api_key=plain.KEY, temperature=0, max_retries=0)
MESSAGES = [{"role": "user", "content": plain.BOXES}]
TOOL = {
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
SHAPE = {
    "type": "object",
    "properties": {"colour": {"enum": ["red", "blue"]}},
    "required": ["colour"],
    "additionalProperties": False,
}

for provider in ("openai", "hosted_vllm"):
    asked = dict(ASKED, model=f"{provider}/{plain.MODEL}")
    expected = plain.chat(plain.BOXES, max_tokens=16)
    answer = litellm.completion(**asked, messages=MESSAGES, max_tokens=16)
    plain.same(answer.choices[0].message.content, expected)
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    pieces = list(litellm.completion(**asked, messages=MESSAGES, max_tokens=16, stream=True))
    plain.same("".join(piece.choices[0].delta.content or "" for piece in pieces), expected)
    # The history as litellm keeps it, with its own fields.
    history = [*MESSAGES, answer.choices[0].message, {"role": "user", "content": "And the blue box?"}]
    told = [*MESSAGES, {"role": "assistant", "content": expected}, {"role": "user", "content": "And the blue box?"}]
    plain.same(litellm.completion(**asked, messages=history, max_tokens=16).choices[0].message.content, plain.chat(told, max_tokens=16))

    forced = dict(asked, messages=MESSAGES, tools=[TOOL], tool_choice="required", max_tokens=300)
    choice = litellm.completion(**forced, parallel_tool_calls=False).choices[0]
    assert choice.finish_reason == "tool_calls", choice
    (call,) = choice.message.tool_calls
    assert call.function.name == "get_weather" and json.loads(call.function.arguments)["city"] in ("Paris", "Rome")
    result = {"role": "tool", "tool_call_id": call.id, "content": "Sunny"}
    told = litellm.completion(**asked, messages=[*MESSAGES, choice.message, result], tools=[TOOL], tool_choice="none", max_tokens=8)
    assert not told.choices[0].message.tool_calls and told.choices[0].message.content

    shaped = {"type": "json_schema", "json_schema": {"name": "box", "strict": True, "schema": SHAPE}}
    box = litellm.completion(**asked, messages=MESSAGES, max_tokens=100, response_format=shaped)
    assert json.loads(box.choices[0].message.content)["colour"] in ("red", "blue")

text = litellm.text_completion(**ASKED, model=f"text-completion-openai/{plain.MODEL}", prompt="The red box", max_tokens=8)
plain.same(text.choices[0].text, plain.completion("The red box", max_tokens=8))
response = litellm.responses(
    input=plain.BOXES, model=f"openai/{plain.MODEL}", api_base=plain.BASE, api_key=plain.KEY, temperature=0, max_output_tokens=16
)
plain.same(response.output[0].content[0].text, plain.chat(plain.BOXES, max_tokens=16))
try:
    litellm.completion(**dict(ASKED, temperature=3), model=f"openai/{plain.MODEL}", messages=MESSAGES)
except litellm.BadRequestError as error:
    assert "temperature" in str(error)
else:
    raise AssertionError("a temperature of 3 is answered")
