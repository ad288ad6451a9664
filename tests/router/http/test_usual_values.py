"""Values that mean the usual thing to the servers and clients in use."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from tokenizers import Tokenizer

from arriero.router import templates
from arriero.router.gateway import GatewayConfig
from arriero.shards.errors import ContextTooLong
from support.frontdoor import Stack, echo, make_card, serve

CONFIG = GatewayConfig(http_address="127.0.0.1:0", models=("tiny",))
CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "hi"}], "seed": 1}
TOOL = {"type": "function", "function": {"name": "f"}}


@pytest.fixture
async def stack(llama_tokenizer: Tokenizer) -> AsyncIterator[Stack]:
    card = make_card(llama_tokenizer, templates.read("llama3.1"), max_model_len=2048)
    async with serve(card, echo, config=CONFIG) as running:
        yield running


@pytest.fixture
async def ask(stack: Stack) -> AsyncIterator[httpx.AsyncClient]:
    base = f"http://127.0.0.1:{stack.gateway.http_port}"
    async with httpx.AsyncClient(base_url=base, timeout=60) as client:
        yield client


SAME: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"top_k": -1}, {"top_k": 0}),
    ({"top_k": 2**40}, {"top_k": 2**31 - 1}),
    ({"top_p": 0}, {"top_k": 1}),
    ({"max_tokens": -1}, {}),
    ({"max_tokens": 8.0}, {"max_tokens": 8}),
    ({"max_tokens": 8, "max_completion_tokens": 8.0}, {"max_tokens": 8}),
    ({"max_completion_tokens": 8}, {"max_tokens": 8}),
    ({"n": 2.0, "min_tokens": 0.0, "priority": 0.0}, {"n": 2}),
    ({"seed": 1.0}, {"seed": 1}),
    ({"seed": 2**63 + 5}, {"seed": 5}),
    ({"seed": 2**70 + 5}, {"seed": 5}),
    ({"seed": -5}, {"seed": 2**63 - 5}),
    ({"temperature": 0}, {"temperature": 0.0}),
    ({"logprobs": False, "top_logprobs": 0}, {}),
    ({"logprobs": True, "top_logprobs": 2.0}, {"logprobs": True, "top_logprobs": 2}),
    ({"stop": ""}, {}),
    ({"stop": []}, {}),
    ({"stop": None}, {}),
    ({"stop_token_ids": [60.0]}, {"stop_token_ids": [60]}),
    ({"logit_bias": {}}, {}),
    ({"logit_bias": {"60": 1}}, {"logit_bias": {"60": 1.0}}),
    ({"tools": []}, {}),
    ({"tool_choice": "none"}, {}),
    ({"tool_choice": "auto"}, {}),
    ({"parallel_tool_calls": True}, {}),
    ({"response_format": {"type": "text"}}, {}),
    ({"stream_options": {"include_usage": True}}, {}),
    ({"stream": False}, {}),
    ({"tools": [TOOL], "tool_choice": {"type": "auto"}}, {"tools": [TOOL]}),
    ({"tools": [TOOL], "tool_choice": "any"}, {"tools": [TOOL], "tool_choice": "required"}),
    (
        {"tools": [TOOL], "tool_choice": {"type": "function", "name": "f"}},
        {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "f"}}},
    ),
    (
        {"response_format": {"type": "json_object", "schema": {"type": "object"}}},
        {
            "response_format": {
                "type": "json_schema",
                "json_schema": {"schema": {"type": "object"}},
            }
        },
    ),
]


@pytest.mark.parametrize(("given", "usual"), SAME)
async def test_the_engine_is_asked_the_same(
    stack: Stack, ask: httpx.AsyncClient, given: dict[str, Any], usual: dict[str, Any]
) -> None:
    for changes in (given, usual):
        answer = await ask.post("/v1/chat/completions", json={**CHAT, **changes})
        assert answer.status_code == 200, (changes, answer.text)
    first, second = stack.engine.submitted
    assert (first.params, first.prompt) == (second.params, second.prompt)


async def test_seed_minus_one_is_drawn(stack: Stack, ask: httpx.AsyncClient) -> None:
    for _ in range(2):
        answer = await ask.post("/v1/chat/completions", json={**CHAT, "seed": -1})
        assert answer.status_code == 200, answer.text
    seeds = [request.params.seed for request in stack.engine.submitted]
    assert seeds[0] != seeds[1] and all(seed is not None and seed >= 0 for seed in seeds)
    async for message in stack.client.generate("a", seed=-1, top_k=-1, top_p=0.0, max_tokens=-1):
        if message.HasField("start"):
            assert message.start.seed >= 0
    params = stack.engine.submitted[-1].params
    assert (params.top_k, params.top_p) == (1, 1.0)


async def test_many_stop_strings(stack: Stack, ask: httpx.AsyncClient) -> None:
    stops = ["", *(f"</{number}>" for number in range(63)), "brown"]
    body = {"prompt": "the quick brown fox", "stop": stops}
    answer = (await ask.post("/v1/completions", json=body)).json()
    assert answer["choices"][0]["text"].strip() == "the quick"


async def test_prompts_alone_are_looked_at(stack: Stack, ask: httpx.AsyncClient) -> None:
    """Evaluations ask what a text's own tokens were expected to be, and for nothing more."""
    body = {"prompt": "the quick", "echo": True, "max_tokens": 0, "logprobs": 1}
    answer = (await ask.post("/v1/completions", json=body)).json()
    (choice,) = answer["choices"]
    assert choice["text"] == "the quick" and choice["finish_reason"] == "length"
    assert len(choice["logprobs"]["tokens"]) == answer["usage"]["prompt_tokens"]
    assert answer["usage"]["completion_tokens"] == 0
    off = await ask.post("/v1/completions", json={"prompt": "a", "logprobs": False})
    assert off.json()["choices"][0]["logprobs"] is None


async def test_a_salt_keeps_caches_apart(stack: Stack, ask: httpx.AsyncClient) -> None:
    for salt in (None, "mine", "yours", "mine"):
        await ask.post("/v1/chat/completions", json={**CHAT, "cache_salt": salt})
    none, mine, yours, again = [request.cache_salt for request in stack.engine.submitted]
    assert mine == again and len({none, mine, yours}) == 3


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"messages": [{"role": "user", "content": "hello " * 3000}]}, "messages"),
        ({"max_tokens": 10_000_000}, "max_tokens"),
        ({"max_completion_tokens": 2**40}, "max_tokens"),
        ({"max_tokens": 2040.0, "stream": True}, "max_tokens"),
    ],
)
async def test_too_long_for_the_context_has_a_code(
    ask: httpx.AsyncClient, changes: dict[str, Any], param: str
) -> None:
    answer = await ask.post("/v1/chat/completions", json={**CHAT, **changes})
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert (error["code"], error["param"]) == ("context_length_exceeded", param)
    assert "This model's maximum context length is 2048 tokens" in error["message"]
    assert "reduce the length of the messages" in error["message"]


async def test_too_long_for_the_context_over_grpc(stack: Stack) -> None:
    with pytest.raises(ContextTooLong) as caught:
        async for _ in stack.client.generate([60] * 4000):
            pass
    assert caught.value.field == "prompt" and caught.value.code == "context_length_exceeded"


CODES: list[tuple[str, dict[str, Any], str | None, str]] = [
    ("/v1/chat/completions", {}, "messages", "missing_required_parameter"),
    ("/v1/chat/completions", {**CHAT, "n": "2"}, "n", "invalid_type"),
    ("/v1/chat/completions", {**CHAT, "n": 2.5}, "n", "invalid_type"),
    ("/v1/chat/completions", {**CHAT, "n": 200}, "n", "invalid_value"),
    ("/v1/chat/completions", {**CHAT, "nn": 2}, "nn", "unsupported_parameter"),
    ("/v1/chat/completions", {**CHAT, "tool_choice": "x"}, "tool_choice", "invalid_value"),
    ("/v1/chat/completions", {**CHAT, "model": "x"}, "model", "model_not_found"),
    ("/v1/completions", {"prompt": "a", "best_of": 3}, "best_of", "unsupported_parameter"),
    ("/v1/completions", {"prompt": ["a"] * 200}, "prompt", "invalid_value"),
    ("/tokenize", {}, "prompt", "missing_required_parameter"),
    ("/v1/none", {}, None, "unknown_url"),
]


@pytest.mark.parametrize(("path", "body", "param", "code"), CODES)
async def test_errors_name_field_and_code(
    ask: httpx.AsyncClient, path: str, body: dict[str, Any], param: str | None, code: str
) -> None:
    error = (await ask.post(path, json=body)).json()["error"]
    assert (error["param"], error["code"]) == (param, code), error
