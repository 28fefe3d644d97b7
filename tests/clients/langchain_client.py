"""langchain-openai: chats, streams, structured output, and an agent of langchain that calls a tool."""

from typing import Literal

from langchain.agents import create_agent
from langchain.agents.middleware import wrap_model_call
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from pydantic import BaseModel

import plain


class Box(BaseModel):
    """A box."""

    colour: Literal["red", "blue"]


ran = []


@tool
def get_weather(city: Literal["Paris", "Rome"]) -> str:
    """The weather of a city."""
    ran.append(city)
    return f"Sunny in {city}"


@wrap_model_call
def one_call(request, handler):
    """The model must call a tool first, and must not after that: the demo model does not decide it well."""
    answered = any(message.type == "tool" for message in request.messages)
    settings = {"parallel_tool_calls": False}
    return handler(request.override(tool_choice="none" if answered else "required", model_settings=settings))


for responses in (False, True):
    model = ChatOpenAI(model=plain.MODEL, temperature=0, max_tokens=300, max_retries=0, use_responses_api=responses)
    expected = plain.chat(plain.BOXES, max_tokens=300)
    answer = model.invoke(plain.BOXES)
    plain.same(answer.text, expected)
    assert answer.usage_metadata["output_tokens"] > 0
    pieces = [piece.text for piece in model.stream(plain.BOXES)]
    assert len(pieces) > 2, pieces
    plain.same("".join(pieces), expected)
    for method in ("json_schema", "function_calling"):
        box = model.with_structured_output(Box, method=method).invoke(plain.BOXES)
        assert isinstance(box, Box), box

    ran.clear()
    agent = create_agent(model, [get_weather], system_prompt="You tell the weather.", middleware=[one_call])
    messages = agent.invoke({"messages": [{"role": "user", "content": "Hello"}]})["messages"]
    assert [message.type for message in messages] == ["human", "ai", "tool", "ai"], messages
    (call,) = messages[1].tool_calls
    assert call["name"] == "get_weather" and ran == [call["args"]["city"]]
    assert messages[2].content == f"Sunny in {ran[0]}" and messages[2].tool_call_id == call["id"]
    assert messages[3].text and not messages[3].tool_calls
