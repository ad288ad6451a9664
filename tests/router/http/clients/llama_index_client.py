"""llama-index's OpenAILike: text, chat, streams, and a tool called and answered.

Usage: llama_index_client.py BASE_URL; prints what came as JSON.
"""

from __future__ import annotations

import json
import sys

from llama_index.core.llms import ChatMessage
from llama_index.core.tools import FunctionTool
from llama_index.llms.openai_like import OpenAILike

QUESTION = "How is the weather in La Paz?"


def get_weather(city: str) -> str:
    """The weather in a city."""
    return f"sunny in {city}"


def main() -> None:
    model = OpenAILike(
        model="tiny",
        api_base=sys.argv[1],
        api_key="none",
        is_chat_model=True,
        is_function_calling_model=True,
        context_window=8192,
        max_retries=0,
    )
    tool = FunctionTool.from_defaults(get_weather)
    talk = [ChatMessage(role="user", content=QUESTION)]
    asked = model.chat_with_tools([tool], chat_history=talk)
    (call,) = model.get_tool_calls_from_response(asked)
    result = ChatMessage(
        role="tool", content=get_weather(**call.tool_kwargs), tool_call_id=call.tool_id
    )
    talk += [asked.message, result]
    answered = model.chat(talk)
    streamed = "".join(part.delta or "" for part in model.stream_chat(talk))
    print(
        json.dumps(
            {
                "call": [call.tool_name, call.tool_kwargs],
                "answer": answered.message.content,
                "streamed": streamed,
            }
        )
    )


main()
