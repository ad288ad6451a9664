"""Bodies in the shape that coding agents send: answered, and never a 500 with a field changed."""

from __future__ import annotations

import copy
import json
from collections.abc import AsyncIterator, Iterator
from typing import Any

import httpx
import pytest
from tokenizers import Tokenizer

from arriero.router import templates
from arriero.router.gateway import GatewayConfig
from support.frontdoor import echo, make_card, serve

SCHEMA = {
    "type": "object",
    "properties": {"path": {"type": "string"}},
    "required": ["path"],
    "additionalProperties": False,
}
MESSAGES: dict[str, Any] = {
    "model": "tiny",
    "max_tokens": 32000,
    "stream": True,
    "system": [
        {"type": "text", "text": "You read files."},
        {"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}},
    ],
    "messages": [
        {"role": "user", "content": [{"type": "text", "text": "Read the file a.txt."}]},
        {"role": "system", "content": "The user is in a hurry."},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "hm", "signature": "x"},
                {
                    "type": "tool_use",
                    "id": "toolu_1",
                    "name": "Read",
                    "input": {"path": "a.txt"},
                    "caller": {"type": "direct"},
                },
            ],
        },
        {
            "role": "user",
            "content": [
                {
                    "tool_use_id": "toolu_1",
                    "type": "tool_result",
                    "content": [{"type": "text", "text": "1 RESULT"}],
                    "is_error": False,
                    "cache_control": {"type": "ephemeral", "ttl": "1h"},
                }
            ],
        },
    ],
    "tools": [
        {"name": "Read", "description": "Reads.", "input_schema": SCHEMA},
        {"name": "Later", "description": "x", "input_schema": SCHEMA, "defer_loading": True},
        {"type": "web_search_20250305", "name": "web_search", "max_uses": 5},
    ],
    "metadata": {"user_id": "u"},
    "thinking": {"type": "adaptive", "display": "omitted"},
    "context_management": {"edits": [{"type": "clear_thinking", "keep": "all"}]},
    "output_config": {"effort": "high"},
}
RESPONSES: dict[str, Any] = {
    "model": "tiny",
    "stream": True,
    "store": False,
    "instructions": None,
    "input": [
        {
            "type": "message",
            "id": "msg_1",
            "role": "developer",
            "content": [{"type": "input_text", "text": "You run commands."}],
        },
        {"role": "user", "content": [{"type": "input_text", "text": "Read the file a.txt."}]},
        {"type": "reasoning", "id": "rs_1", "summary": [], "encrypted_content": None},
        {
            "type": "function_call",
            "id": "fc_1",
            "call_id": "call_1",
            "name": "run_command",
            "arguments": '{"path":"a.txt"}',
            "status": "completed",
        },
        {"type": "function_call_output", "id": "fco_1", "call_id": "call_1", "output": "RESULT"},
    ],
    "tools": [
        {
            "type": "function",
            "name": "run_command",
            "description": "Runs.",
            "parameters": SCHEMA,
            "strict": False,
        },
        {"type": "namespace", "name": "helpers", "description": "x", "tools": [{"type": "x"}]},
        {"type": "web_search", "external_web_access": True},
    ],
    "tool_choice": "auto",
    "parallel_tool_calls": True,
    "reasoning": {"summary": "auto"},
    "include": ["reasoning.encrypted_content"],
    "prompt_cache_key": "3f0c2d1e",
    "client_metadata": {"session_id": "3f0c2d1e", "turn_id": "1"},
}


@pytest.fixture
async def http(llama_tokenizer: Tokenizer) -> AsyncIterator[httpx.AsyncClient]:
    card = make_card(llama_tokenizer, templates.read("llama3.1"), max_model_len=8192)
    config = GatewayConfig(http_address="127.0.0.1:0", models=("tiny",))
    async with (
        serve(card, echo, config=config) as stack,
        httpx.AsyncClient(
            base_url=f"http://127.0.0.1:{stack.gateway.http_port}", timeout=60
        ) as client,
    ):
        yield client


def paths(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:  # noqa: ANN401
    if path:
        yield path
    if isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from paths(inner, (*path, key))


def changed(body: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The body with each field left out, null, doubled, and of another type."""
    for *outer, last in paths(body):
        for change in ("remove", "null", "double", "number", "deep"):
            whole = copy.deepcopy(body)
            place: Any = whole
            for key in outer:
                place = place[key]
            if change == "remove":
                del place[last]
            elif change == "null":
                place[last] = None
            elif change == "double" and isinstance(place, list):
                place.insert(last, copy.deepcopy(place[last]))
            elif change == "number":
                place[last] = 7
            elif change == "deep":
                place[last] = {"type": [{}]}
            yield whole


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/messages?beta=true", MESSAGES),
        (
            "/v1/messages/count_tokens",
            {k: v for k, v in MESSAGES.items() if k not in ("max_tokens", "stream")},
        ),
        ("/v1/responses", RESPONSES),
    ],
)
async def test_no_change_is_an_internal_error(
    http: httpx.AsyncClient, path: str, body: dict[str, Any]
) -> None:
    headers = {"anthropic-version": "2023-06-01", "anthropic-beta": "one-2025-01-01"}
    assert (await http.post(path, json=body, headers=headers)).status_code == 200
    for whole in changed({**body, "stream": False} if "stream" in body else body):
        whole.setdefault("max_tokens", 4) if path.startswith("/v1/messages?") else None
        if whole.get("max_tokens", 0) == 32000:
            whole["max_tokens"] = 4
        if path == "/v1/responses":
            whole.setdefault("max_output_tokens", 4)
        answer = await http.post(path, json=whole)
        assert answer.status_code in (200, 400, 404), (whole, answer.text)
        if answer.status_code != 200:
            error = answer.json()["error"]
            assert error["message"], json.dumps(whole)
