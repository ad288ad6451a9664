"""Earlier answers that clients send back, in the spellings of their libraries."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from tokenizers import Tokenizer

from arriero.router import templates
from arriero.router.gateway import GatewayConfig
from support.frontdoor import Stack, echo, make_card, serve

CONFIG = GatewayConfig(http_address="127.0.0.1:0", models=("tiny",))
USER = {"role": "user", "content": "hi"}
TOOL = {"type": "function", "function": {"name": "get_weather"}}
ITERATING = (
    "{% for m in messages %}{% for c in m.tool_calls or [] %}"
    "{% for name, value in c.function.arguments.items() %}{{ name }}={{ value }};{% endfor %}"
    "{% endfor %}{{ m.content }}\n{% endfor %}{{ tools or '' }}"
)
"""A template that goes through the arguments of calls by name."""


@pytest.fixture
async def stack(llama_tokenizer: Tokenizer) -> AsyncIterator[Stack]:
    card = make_card(llama_tokenizer, templates.read("llama3.1"), max_model_len=4096)
    async with serve(card, echo, config=CONFIG) as running:
        yield running


async def shown(stack: Stack, tokenizer: Tokenizer, *messages: dict[str, Any]) -> str:
    """The prompt that a conversation becomes."""
    base = f"http://127.0.0.1:{stack.gateway.http_port}"
    body = {"messages": [USER, *messages], "tools": [TOOL], "max_tokens": 2}
    async with httpx.AsyncClient(base_url=base, timeout=60) as ask:
        answer = await ask.post("/v1/chat/completions", json=body)
    assert answer.status_code == 200, answer.text
    prompt: str = tokenizer.decode(stack.engine.submitted[-1].prompt, skip_special_tokens=False)
    return prompt


def calling(arguments: Any, **more: Any) -> dict[str, Any]:  # noqa: ANN401
    function = {"name": "get_weather", "arguments": arguments}
    call = {"id": "c1", "type": "function", "function": function, **more}
    return {"role": "assistant", "content": None, "tool_calls": [call]}


RESULT = {"role": "tool", "tool_call_id": "c1", "content": "sunny"}


@pytest.mark.parametrize("arguments", ["", " \n", "null", "{}", {}, None])
async def test_no_arguments(
    stack: Stack, llama_tokenizer: Tokenizer, arguments: str | dict[str, Any] | None
) -> None:
    prompt = await shown(stack, llama_tokenizer, calling(arguments), RESULT)
    assert '{"name": "get_weather", "parameters": {}}' in prompt


async def test_arguments_left_out_or_given_as_they_are(
    stack: Stack, llama_tokenizer: Tokenizer
) -> None:
    message = calling({"city": "Lima"})
    assert '"parameters": {"city": "Lima"}' in await shown(stack, llama_tokenizer, message, RESULT)
    del message["tool_calls"][0]["function"]["arguments"]
    assert '"parameters": {}' in await shown(stack, llama_tokenizer, message, RESULT)


@pytest.mark.parametrize("garbage", ['{"city": "Li', "Lima", "[1]", "7", '"Lima"'])
async def test_arguments_that_are_no_object_are_shown_as_they_are(
    stack: Stack, llama_tokenizer: Tokenizer, garbage: str
) -> None:
    prompt = await shown(stack, llama_tokenizer, calling(garbage), RESULT)
    assert garbage.replace('"', '\\"') in prompt


async def test_a_template_that_goes_through_arguments_is_shown_one(
    llama_tokenizer: Tokenizer,
) -> None:
    async with serve(make_card(llama_tokenizer, ITERATING), echo, config=CONFIG) as stack:
        prompt = await shown(stack, llama_tokenizer, calling('{"city": "Li'), RESULT)
        assert 'arguments={"city": "Li;' in prompt


@pytest.mark.parametrize(
    "message",
    [
        {"role": "assistant", "content": None, "refusal": "I cannot."},
        {"role": "assistant", "refusal": "I cannot.", "tool_calls": [], "function_call": None},
        {"role": "assistant", "content": [{"type": "refusal", "refusal": "I cannot."}]},
        {"role": "assistant", "content": [{"type": "output_text", "text": "I cannot."}]},
        {"role": "assistant", "content": ["I cannot."]},
        {"role": "assistant", "content": [{"text": "I cannot."}]},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "hm", "signature": "x"},
                {"type": "text", "text": "I cannot.", "cache_control": {"type": "ephemeral"}},
            ],
        },
        {"role": "assistant", "content": "I cannot.", "audio": None, "tool_calls": None},
    ],
)
async def test_what_an_assistant_said_is_shown(
    stack: Stack, llama_tokenizer: Tokenizer, message: dict[str, Any]
) -> None:
    prompt = await shown(stack, llama_tokenizer, message, USER)
    plain = await shown(stack, llama_tokenizer, {"role": "assistant", "content": "I cannot."}, USER)
    assert prompt == plain and "I cannot." in prompt


async def test_calls_and_results_in_other_spellings(
    stack: Stack, llama_tokenizer: Tokenizer
) -> None:
    usual = await shown(stack, llama_tokenizer, calling('{"city": "Lima"}'), RESULT)
    older = {
        "role": "assistant",
        "content": None,
        "function_call": {"name": "get_weather", "arguments": '{"city": "Lima"}'},
    }
    same = [
        (calling('{"city": "Lima"}', index=0), RESULT),
        (calling('{"city": "Lima"}', id=None), {"role": "tool", "content": "sunny"}),
        (calling('{"city": "Lima"}'), {**RESULT, "tool_call_id": "another", "name": "f"}),
        (calling('{"city": "Lima"}'), {**RESULT, "content": [{"type": "text", "text": "sunny"}]}),
        (older, {"role": "function", "name": "get_weather", "content": "sunny"}),
    ]
    for messages in same:
        assert await shown(stack, llama_tokenizer, *messages) == usual, messages


async def test_variables_of_models_that_reason_are_hints(stack: Stack) -> None:
    base = f"http://127.0.0.1:{stack.gateway.http_port}"
    async with httpx.AsyncClient(base_url=base, timeout=60) as ask:
        for name, status in (("enable_thinking", 200), ("thinking", 200), ("fancy", 400)):
            body = {"messages": [USER], "max_tokens": 1, "chat_template_kwargs": {name: False}}
            answer = await ask.post("/v1/chat/completions", json=body)
            assert answer.status_code == status, answer.text
