"""Tools that a server would run: left out of the prompt, or refused, in every API."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
from tokenizers import Tokenizer

from arriero.router import templates
from arriero.router.gateway import GatewayConfig
from arriero.router.http.hosted_tools import HostedTools
from support.frontdoor import echo, make_card, serve

SCHEMA = {"type": "object", "properties": {"path": {"type": "string"}}}
TALK = [{"role": "user", "content": "Read the file."}]
HOSTED: list[dict[str, Any]] = [
    {"type": "web_search", "external_web_access": True},
    {"type": "mcp", "server_label": "files", "server_url": "https://example.org"},
    {"type": "namespace", "name": "n", "tools": []},
    {"type": "web_search_20250305", "name": "web_search", "max_uses": 5},
]
FUNCTION = {"name": "read_file", "parameters": SCHEMA}
APIS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "/v1/chat/completions": ({"messages": TALK}, {"type": "function", "function": FUNCTION}),
    "/v1/responses": ({"input": "Read the file."}, {"type": "function", **FUNCTION}),
    "/v1/messages": (
        {"messages": TALK, "max_tokens": 4},
        {"name": "read_file", "input_schema": SCHEMA},
    ),
    "/v1/messages/count_tokens": (
        {"messages": TALK},
        {"name": "read_file", "input_schema": SCHEMA},
    ),
}


@pytest.mark.parametrize("setting", ["ignore", "refuse"])
@pytest.mark.parametrize("path", APIS)
async def test_a_gateway_ignores_or_refuses_them(
    llama_tokenizer: Tokenizer, path: str, setting: HostedTools
) -> None:
    card = make_card(llama_tokenizer, templates.read("llama3.1"), max_model_len=4096)
    config = GatewayConfig(http_address="127.0.0.1:0", hosted_tools=setting)
    body, own = APIS[path]
    body = {"model": "tiny", "temperature": 0, **body}
    if "count" in path:
        del body["temperature"]
    async with (
        serve(card, echo, config=config) as stack,
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{stack.gateway.http_port}") as ask,
    ):
        plain = await ask.post(path, json=body | {"tools": [own]})
        assert plain.status_code == 200, plain.text
        for hosted in HOSTED:
            answer = await ask.post(path, json=body | {"tools": [hosted, own]})
            if setting == "refuse":
                assert answer.status_code == 400
                error = answer.json()["error"]
                assert "`tools[0].type`" in error["message"]
                assert error.get("code", "unsupported_parameter") == "unsupported_parameter"
                continue
            assert answer.status_code == 200, answer.text
            if stack.engine.submitted:
                first, *_, last = stack.engine.submitted
                assert first.prompt == last.prompt


async def test_errors_of_other_tools_name_their_fields(llama_tokenizer: Tokenizer) -> None:
    card = make_card(llama_tokenizer, templates.read("llama3.1"), max_model_len=4096)
    config = GatewayConfig(http_address="127.0.0.1:0")
    wrong: list[tuple[Any, str]] = [
        ({"type": "function"}, "tools[1].function"),
        ({"type": "function", "function": {"name": 7}}, "tools[1].function.name"),
        ({"type": 7}, "tools[1].type"),
        ({"function": {"name": "f", "odd": 1}}, "tools[1].function.odd"),
        ("web_search", "tools[1]"),
    ]
    async with (
        serve(card, echo, config=config) as stack,
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{stack.gateway.http_port}") as ask,
    ):
        for tool, field in wrong:
            body = {"messages": TALK, "tools": [HOSTED[0], tool]}
            answer = await ask.post("/v1/chat/completions", json=body)
            assert (answer.status_code, answer.json()["error"]["param"]) == (400, field)
