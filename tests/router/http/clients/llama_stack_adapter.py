"""Llama Stack's adapter `remote::vllm`: models, chat plain and streamed, a tool, a JSON schema.

Usage: llama_stack_adapter.py BASE_URL tools|form; prints what came as JSON.
"""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

from llama_stack.apis.inference import (
    CompletionMessage,
    JsonSchemaResponseFormat,
    ToolDefinition,
    ToolResponseMessage,
    UserMessage,
)
from llama_stack.apis.models import Model
from llama_stack.models.llama.datatypes import StopReason, ToolParamDefinition
from llama_stack.providers.remote.inference.vllm.config import VLLMInferenceAdapterConfig
from llama_stack.providers.remote.inference.vllm.vllm import VLLMInferenceAdapter

QUESTION = UserMessage(content="How is the weather in La Paz?")
MODEL = Model(identifier="tiny", provider_resource_id="tiny", provider_id="vllm")
TOOL = ToolDefinition(
    tool_name="get_weather",
    description="The weather in a city.",
    parameters={"city": ToolParamDefinition(param_type="string", description="The city.")},
)
SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "sunny": {"type": "boolean"}},
    "required": ["city", "sunny"],
}


class OneModel:
    """The store that Llama Stack gives its adapters."""

    async def get_model(self, model_id: str) -> Model:
        assert model_id == MODEL.identifier
        return MODEL


async def streamed(adapter: VLLMInferenceAdapter, **given: Any) -> dict[str, Any]:  # noqa: ANN401
    """Text and calls of a streamed chat."""
    text, calls = "", []
    async for part in await adapter.chat_completion(MODEL.identifier, stream=True, **given):
        delta = part.event.delta
        if delta.type == "text":
            text += delta.text
        elif delta.parse_status.value == "succeeded":
            calls.append([delta.tool_call.tool_name, delta.tool_call.arguments])
    return {"text": text, "calls": calls}


async def use_a_tool(adapter: VLLMInferenceAdapter) -> dict[str, Any]:
    """A tool called and answered, each time whole and streamed."""
    first = {"messages": [QUESTION], "tools": [TOOL]}
    asked = await adapter.chat_completion(MODEL.identifier, **first)
    (call,) = asked.completion_message.tool_calls
    talk = [
        QUESTION,
        CompletionMessage(content="", stop_reason=StopReason.end_of_message, tool_calls=[call]),
        ToolResponseMessage(call_id=call.call_id, content="sunny in La Paz"),
    ]
    answered = await adapter.chat_completion(MODEL.identifier, messages=talk, tools=[TOOL])
    return {
        "call": [call.tool_name, call.arguments],
        "streamed_call": await streamed(adapter, **first),
        "answer": answered.completion_message.content,
        "streamed": await streamed(adapter, messages=talk),
    }


async def fill_a_form(adapter: VLLMInferenceAdapter) -> dict[str, Any]:
    """An answer in the form of a JSON schema, and Llama Stack's own chat completion."""
    form = JsonSchemaResponseFormat(json_schema=SCHEMA)
    formed = await adapter.chat_completion(
        MODEL.identifier, messages=[QUESTION], response_format=form
    )
    chat = [{"role": "user", "content": QUESTION.content}]
    passed = await adapter.openai_chat_completion(MODEL.identifier, messages=chat)
    return {
        "form": json.loads(formed.completion_message.content),
        "passed_on": json.loads(passed.choices[0].message.content),
    }


async def main() -> None:
    url, mode = sys.argv[1:]
    adapter = VLLMInferenceAdapter(
        VLLMInferenceAdapterConfig(url=url, max_tokens=64, api_token="none")
    )
    adapter.model_store = OneModel()
    await adapter.initialize()
    registered = await adapter.register_model(MODEL)  # fails unless `/v1/models` lists the model
    health = await adapter.health()
    work = use_a_tool if mode == "tools" else fill_a_form
    came = await work(adapter)
    print(json.dumps({"model": registered.identifier, "health": health["status"], **came}))


asyncio.run(main())
