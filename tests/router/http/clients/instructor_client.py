"""instructor: a parsed object from a forced call, from a JSON schema, and streamed in parts.

Usage: instructor_client.py BASE_URL whole|parts MODE…; prints what came as JSON.
"""

from __future__ import annotations

import json
import sys

import instructor
import openai
from pydantic import BaseModel

QUESTION = [{"role": "user", "content": "How is the weather in La Paz?"}]


class Report(BaseModel):
    """The weather in a city."""

    city: str
    sunny: bool


def main() -> None:
    given = openai.OpenAI(base_url=sys.argv[1], api_key="none", max_retries=0)
    told = {}
    for name in sys.argv[3:]:
        client = instructor.from_openai(given, mode=instructor.Mode[name])
        if sys.argv[2] == "whole":
            report = client.chat.completions.create(
                model="tiny", messages=QUESTION, response_model=Report, max_retries=0
            )
        else:
            parts = client.chat.completions.create_partial(
                model="tiny", messages=QUESTION, response_model=Report, max_retries=0
            )
            *_, report = parts
        told[name] = report.model_dump()
    print(json.dumps(told))


main()
