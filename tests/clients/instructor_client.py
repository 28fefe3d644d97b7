"""instructor: models of pydantic by each of its modes, lists, and a stream of partial models."""

from typing import Literal

import instructor
from openai import OpenAI
from pydantic import BaseModel, Field

import plain


class Box(BaseModel):
    colour: Literal["red", "blue"]
    holds: int = Field(ge=0, le=99)


ASKED = dict(model=plain.MODEL, messages=[{"role": "user", "content": plain.BOXES}], temperature=0, max_tokens=400, max_retries=0)

for mode in (instructor.Mode.TOOLS, instructor.Mode.TOOLS_STRICT, instructor.Mode.JSON_SCHEMA):
    client = instructor.from_openai(OpenAI(max_retries=0), mode=mode)
    box, raw = client.chat.completions.create_with_completion(response_model=Box, **ASKED)
    assert isinstance(box, Box) and box.colour in ("red", "blue") and 0 <= box.holds <= 99
    message = raw.choices[0].message
    text = message.tool_calls[0].function.arguments if message.tool_calls else message.content
    assert Box.model_validate_json(text).model_dump() == box.model_dump()
    *_, last = client.chat.completions.create_partial(response_model=Box, **ASKED)
    assert (last.colour, last.holds) == (box.colour, box.holds)
