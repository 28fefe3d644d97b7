"""pydantic-ai: agents over both of OpenAI's protocols, with text, streams, tools, and output by a tool and by a schema."""

import asyncio
from typing import Literal

from pydantic import BaseModel
from pydantic_ai import Agent, NativeOutput
from pydantic_ai.messages import ToolCallPart, ToolReturnPart
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel

import plain

SETTINGS = {"temperature": 0, "max_tokens": 300, "parallel_tool_calls": False}


class Box(BaseModel):
    colour: Literal["red", "blue"]


async def stream(agent):
    async with agent.run_stream(plain.BOXES) as result:
        return "".join([piece async for piece in result.stream_text(delta=True)])


for model in (OpenAIChatModel(plain.MODEL), OpenAIResponsesModel(plain.MODEL)):
    expected = plain.chat(plain.BOXES, max_tokens=300)
    agent = Agent(model, model_settings={"temperature": 0, "max_tokens": 300})
    first = agent.run_sync(plain.BOXES)
    plain.same(first.output, expected)
    plain.same(asyncio.run(stream(agent)), expected)
    told = [
        {"role": "user", "content": plain.BOXES},
        {"role": "assistant", "content": expected},
        {"role": "user", "content": "And the blue box?"},
    ]
    second = agent.run_sync("And the blue box?", message_history=first.all_messages())
    plain.same(second.output, plain.chat(told, max_tokens=300))

    # The output is the argument of a tool that the model must call, and one that follows a schema.
    for output in (Box, NativeOutput(Box)):
        box = Agent(model, output_type=output, model_settings=SETTINGS).run_sync(plain.BOXES).output
        assert isinstance(box, Box), box

    ran = []

    async def only_before_the_first_call(context, tool):
        return None if ran else tool

    agent = Agent(model, output_type=Box, model_settings=SETTINGS)

    @agent.tool_plain(prepare=only_before_the_first_call)
    def get_weather(city: Literal["Paris", "Rome"]) -> str:
        """The weather of a city."""
        ran.append(city)
        return f"Sunny in {city}"

    result = agent.run_sync(plain.BOXES)
    assert isinstance(result.output, Box)
    parts = [part for message in result.all_messages() for part in message.parts]
    calls = [part for part in parts if isinstance(part, ToolCallPart) and part.tool_name == "get_weather"]
    returns = [part.content for part in parts if isinstance(part, ToolReturnPart) and part.tool_name == "get_weather"]
    assert [call.args_as_dict()["city"] for call in calls] == ran, (calls, ran)
    assert returns == [f"Sunny in {city}" for city in ran]
