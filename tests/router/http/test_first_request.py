"""The first request finds all built: the event loop that serves it also hears the groups."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Mapping

import fastapi
import pytest
from tokenizers import Tokenizer

from arriero.router.gateway import GatewayConfig
from support.frontdoor import CHATML, echo, make_card, serve


async def exchange(port: int, path: str, body: Mapping[str, object] | None = None) -> bytes:
    """The whole answer, read without a client's library, which would import modules of its own."""
    content = b"" if body is None else json.dumps(body).encode()
    head = (
        f"{'GET' if body is None else 'POST'} {path} HTTP/1.1\r\nhost: localhost\r\n"
        f"content-length: {len(content)}\r\nconnection: close\r\n\r\n"
    )
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(head.encode() + content)
    answer = await reader.read()
    writer.close()
    await writer.wait_closed()
    return answer


async def test_the_first_request_builds_nothing(
    llama_tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = GatewayConfig(http_address="127.0.0.1:0", lost_s=0.5)
    async with serve(make_card(llama_tokenizer, CHATML), echo, config=config) as stack:
        port = stack.gateway.http_port
        assert port is not None

        def built_late(*args: object, **fields: object) -> None:
            raise AssertionError("built at a request")

        monkeypatch.setattr(fastapi.FastAPI, "build_middleware_stack", built_late)
        monkeypatch.setattr(fastapi.applications, "get_openapi", built_late)
        before = set(sys.modules)
        say = [{"role": "user", "content": "fox"}]
        answers = {
            "/v1/chat/completions": {"model": "tiny", "messages": say, "max_tokens": 4},
            "/v1/responses": {"model": "tiny", "input": "fox", "max_output_tokens": 4},
            "/v1/messages": {"model": "tiny", "messages": say, "max_tokens": 4},
            "/openapi.json": None,
        }
        for path, body in answers.items():
            answer = await exchange(port, path, body)
            assert answer.startswith(b"HTTP/1.1 200"), (path, answer[:300])
        ours = ("arriero", "fastapi", "starlette", "pydantic", "anyio", "uvicorn")
        imported = set(sys.modules) - before
        assert not [name for name in imported if name.split(".")[0] in ours]
