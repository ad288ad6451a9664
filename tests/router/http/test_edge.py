"""The edges of HTTP: pages in browsers, bodies of other encodings, old clients, long silences."""

from __future__ import annotations

import asyncio
import gzip
import json
import zlib
from collections.abc import AsyncGenerator, AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from tokenizers import Tokenizer

from arriero.router.gateway import GatewayConfig
from arriero.router.http import stream as stream_module
from arriero.router.http.request_body import Unreadable, as_json
from arriero.router.http.stream import start_stream
from arriero.router.tenants.keys import add_key
from arriero.shards.errors import Overloaded
from support.eventually import eventually_async
from support.frontdoor import LLAMA3, Stack, echo, make_card, serve

ASK: dict[str, Any] = {
    "messages": [{"role": "user", "content": "hi"}],
    "max_tokens": 3,
    "model": "tiny",
}
CHAT = "/v1/chat/completions"
PAGE = "http://localhost:5173"
PREFLIGHT = {
    "origin": PAGE,
    "access-control-request-method": "POST",
    "access-control-request-headers": "authorization,content-type,x-stainless-os",
}


def client(stack: Stack) -> httpx.AsyncClient:
    return httpx.AsyncClient(base_url=f"http://127.0.0.1:{stack.gateway.http_port}")


@pytest.fixture
async def echoing(llama_tokenizer: Tokenizer) -> AsyncIterator[Stack]:
    config = GatewayConfig(http_address="127.0.0.1:0", max_message_bytes=100_000, lost_s=0.5)
    async with serve(make_card(llama_tokenizer, LLAMA3), echo, config=config) as stack:
        yield stack


async def test_pages_may_not_call_by_default(echoing: Stack) -> None:
    async with client(echoing) as ask:
        preflight = await ask.options(CHAT, headers=PREFLIGHT)
        assert preflight.status_code == 204 and "POST" in preflight.headers["allow"]
        answer = await ask.post(CHAT, json=ASK, headers={"origin": PAGE})
        for one in (preflight, answer):
            assert not [name for name in one.headers if name.startswith("access-control")]
        # nor send what a browser sends without asking
        hidden = await ask.post(
            CHAT,
            content=json.dumps(ASK),
            headers={"origin": PAGE, "content-type": "text/plain"},
        )
        assert hidden.status_code == 415


@pytest.mark.parametrize("origins", [("*",), ("http://other", PAGE)])
async def test_pages_that_may_call(
    llama_tokenizer: Tokenizer, origins: tuple[str, ...], tmp_path: Path
) -> None:
    keys = tmp_path / "keys.yaml"
    key = add_key(keys, "tenant", "")
    config = GatewayConfig(http_address="127.0.0.1:0", cors=origins, keys=keys)
    async with (
        serve(make_card(llama_tokenizer, LLAMA3), echo, config=config) as stack,
        client(stack) as ask,
    ):
        allowed = "*" if "*" in origins else PAGE
        preflight = await ask.options(CHAT, headers=PREFLIGHT)  # browsers send no key with it
        assert preflight.status_code == 200
        assert preflight.headers["access-control-allow-origin"] == allowed
        for name in ("authorization", "content-type", "x-stainless-os"):
            assert name in preflight.headers["access-control-allow-headers"]
        assert "POST" in preflight.headers["access-control-allow-methods"]
        near = await ask.options(
            CHAT, headers=PREFLIGHT | {"access-control-request-private-network": "true"}
        )
        assert near.headers["access-control-allow-private-network"] == "true"
        page = {"origin": PAGE}
        with_key = page | {"authorization": f"Bearer {key}"}
        answers = [
            await ask.post(CHAT, json=ASK, headers=with_key),
            await ask.post(CHAT, json=ASK | {"stream": True}, headers=with_key),
            await ask.post(CHAT, json=ASK, headers=page),
            await ask.post(CHAT, json={"nonsense": 1}, headers=with_key),
            await ask.get("/v1/none", headers=with_key),
        ]
        assert [answer.status_code for answer in answers] == [200, 200, 401, 400, 404]
        for answer in answers:
            assert answer.headers["access-control-allow-origin"] == allowed
            assert "x-request-id" in answer.headers["access-control-expose-headers"]
            credentials = answer.headers.get("access-control-allow-credentials")
            assert credentials == (None if allowed == "*" else "true")
        stranger = await ask.post(CHAT, json=ASK, headers=with_key | {"origin": "http://evil"})
        assert stranger.headers.get("access-control-allow-origin") == (
            "*" if allowed == "*" else None
        )


BODY = json.dumps(ASK).encode()
CAFE = json.dumps(ASK | {"messages": [{"role": "user", "content": "Café"}]}, ensure_ascii=False)


@pytest.mark.parametrize(
    ("content", "headers"),
    [
        (gzip.compress(BODY, mtime=0), {"content-encoding": "gzip"}),
        (gzip.compress(BODY, mtime=0), {"content-encoding": "X-GZIP"}),
        (
            gzip.compress(BODY[:9], mtime=0) + gzip.compress(BODY[9:], mtime=0),
            {"content-encoding": "gzip"},
        ),
        (zlib.compress(BODY), {"content-encoding": "deflate"}),
        (zlib.compress(BODY)[2:-4], {"content-encoding": "deflate"}),
        (BODY, {"content-encoding": "identity"}),
        (BODY, {"content-type": ""}),
        (BODY, {"content-type": "text/plain;charset=UTF-8"}),
        (BODY, {"content-type": "application/x-www-form-urlencoded"}),
        (BODY, {"content-type": "application/json; charset=utf-8"}),
        (b"\xef\xbb\xbf" + BODY, {"content-type": "application/json"}),
        (CAFE.encode("latin-1"), {"content-type": "application/json; charset=latin-1"}),
        (CAFE.encode("cp1252"), {"content-type": 'application/json; charset="windows-1252"'}),
        (CAFE.encode("utf-16"), {"content-type": "application/json; charset=utf-16"}),
    ],
)
async def test_bodies_that_are_read(
    echoing: Stack, content: bytes, headers: dict[str, str]
) -> None:
    async with client(echoing) as ask:
        answer = await ask.post(CHAT, content=content, headers=headers)
        assert answer.status_code == 200, answer.text


@pytest.mark.parametrize(
    ("content", "headers", "status", "words"),
    [
        (CAFE.encode("latin-1"), {}, 400, "utf-8"),
        (CAFE.encode("utf-16"), {}, 400, "utf-8"),
        (CAFE.encode("latin-1"), {"content-type": "application/json; charset=utf-8"}, 400, "utf-8"),
        (b"\xff", {"content-type": "application/json; charset=utf-16"}, 400, "utf-16"),
        (BODY, {"content-type": "application/json; charset=zip"}, 415, "charset 'zip'"),
        (BODY, {"content-encoding": "gzip"}, 400, "content-encoding"),
        (gzip.compress(BODY, mtime=0)[:-12], {"content-encoding": "gzip"}, 400, "ends early"),
        (BODY, {"content-encoding": "br"}, 415, "content-encoding"),
        (BODY, {"content-encoding": "gzip, gzip"}, 415, "content-encoding"),
        (gzip.compress(b" " * 10**8, mtime=0), {"content-encoding": "gzip"}, 413, "100000 bytes"),
        (b" " * 100_001, {}, 413, "100000 bytes"),
        (b"--x", {"content-type": "multipart/form-data; boundary=x"}, 415, "content-type"),
        (b"{", {}, 400, "not JSON"),
        (b"a=1", {"content-type": "application/x-www-form-urlencoded"}, 400, "not JSON"),
    ],
)
async def test_bodies_that_are_refused_in_words(
    echoing: Stack, content: bytes, headers: dict[str, str], status: int, words: str
) -> None:
    async with client(echoing) as ask:
        answer = await ask.post(CHAT, content=content, headers=headers)
        assert answer.status_code == status, answer.text
        error = answer.json()["error"]
        assert words.lower() in error["message"].lower()
        assert set(error) == {"message", "type", "param", "code"}


async def test_a_compressed_body_is_bounded_as_it_grows() -> None:
    for name in ("utf_7", "unicode_escape", "idna", "punycode"):
        with pytest.raises(Unreadable, match="charset"):
            headers = {b"content-type": f"application/json; charset={name}".encode()}
            await as_json(b"{}", headers, 10)


async def test_paths_and_methods(echoing: Stack) -> None:
    async with client(echoing) as ask:
        for path in ("/v1/chat/completions/", "/v1//chat/completions", "/v1//chat/completions//"):
            answer = await ask.post(path, json=ASK)
            assert answer.status_code == 200, path
        for path in ("/v1/models/", "/v1/models/tiny/", "/health/", "/metrics/"):
            assert (await ask.get(path)).status_code == 200, path
        assert (await ask.post("/v1/v1/chat/completions", json=ASK)).status_code == 404
        for path in ("/v1/models", "/health"):
            head, got = await ask.head(path), await ask.get(path)
            assert head.status_code == 200 and not head.content
            assert head.headers["content-type"] == got.headers["content-type"]
        options = await ask.options("/v1/models")
        assert options.status_code == 204 and "GET" in options.headers["allow"]


async def spoken(stack: Stack, head: str, body: bytes = b"") -> bytes:
    """All that a connection answers until the server closes it."""
    assert stack.gateway.http_port is not None
    reader, writer = await asyncio.open_connection("127.0.0.1", stack.gateway.http_port)
    length = f"Content-Length: {len(body)}\r\n" if body else ""
    writer.write(f"{head}{length}\r\n".encode() + body)
    try:
        async with asyncio.timeout(10):
            return await reader.read()
    finally:
        writer.close()


async def test_old_and_careful_clients(echoing: Stack) -> None:
    streamed = json.dumps(ASK | {"stream": True}).encode()
    old = await spoken(echoing, f"POST {CHAT} HTTP/1.0\r\n", streamed)
    head, _, body = old.partition(b"\r\n\r\n")
    assert b" 200 " in head and b"chunked" not in head.lower()
    assert body.startswith(b"data: {") and body.endswith(b"data: [DONE]\n\n")
    whole = await spoken(echoing, f"POST {CHAT} HTTP/1.0\r\n", BODY)
    head, _, body = whole.partition(b"\r\n\r\n")
    assert b"chunked" not in head.lower() and json.loads(body)["choices"]
    for refused in (
        await spoken(echoing, "GET /v1/none HTTP/1.0\r\n"),
        await spoken(echoing, f"POST {CHAT} HTTP/1.0\r\nContent-Encoding: br\r\n", BODY),
    ):
        head, _, body = refused.partition(b"\r\n\r\n")
        assert b"chunked" not in head.lower() and json.loads(body)["error"]
    careful = await spoken(
        echoing,
        f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nExpect: 100-continue\r\n",
        BODY,
    )
    assert careful.startswith(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\n")


@pytest.mark.parametrize("path", [CHAT, "/v1/completions"])
async def test_a_silent_stream_says_that_it_lives(
    llama_tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    monkeypatch.setattr(stream_module, "FIRST_COMMENT_S", 0.1)
    monkeypatch.setattr(stream_module, "COMMENT_S", 0.2)
    config = GatewayConfig(http_address="127.0.0.1:0")
    card = make_card(llama_tokenizer, LLAMA3)
    async with (
        serve(card, echo, config=config, step_s=0.01) as stack,
        client(stack) as ask,
    ):
        stack.engine.max_running = 0  # as while a long prompt is computed
        body = ASK | {"stream": True}
        if path != CHAT:
            body = {"prompt": ["a", "b"], "stream": True, "max_tokens": 3}
        lines: list[str] = []
        async with ask.stream("POST", path, json=body, timeout=20) as answer:
            assert answer.status_code == 200
            async for line in answer.aiter_lines():
                lines.append(line)
                if len([one for one in lines if one.startswith(":")]) == 3:
                    stack.engine.max_running = None
        comments = [at for at, line in enumerate(lines) if line.startswith(":")]
        events = [at for at, line in enumerate(lines) if line.startswith("data:")]
        assert len(comments) >= 3 and comments[2] < events[0]
        assert lines[events[-1]] == "data: [DONE]"
        # one that leaves meanwhile is cancelled
        stack.engine.max_running = 0
        async with ask.stream("POST", path, json=body, timeout=20) as answer:
            await anext(answer.aiter_lines())
        await eventually_async(lambda: stack.engine.cancelled, 10)
        # clients of the API do not see comments
        loop = asyncio.get_running_loop()
        loop.call_later(0.5, setattr, stack.engine, "max_running", None)
        url = f"http://127.0.0.1:{stack.gateway.http_port}/v1"
        async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as api:
            stream = await api.chat.completions.create(
                model="tiny",
                messages=[{"role": "user", "content": "x"}],
                stream=True,
            )
            assert [chunk async for chunk in stream][-1].choices[0].finish_reason == "stop"


async def test_a_stream_begins_once_it_is_no_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream_module, "FIRST_COMMENT_S", 0.05)
    closed = 0

    async def items(gate: asyncio.Event, error: Exception | None = None) -> AsyncGenerator[int]:
        nonlocal closed
        try:
            await gate.wait()
            if error is not None:
                raise error
            yield 1
        finally:
            closed += 1

    # not before its turn has come
    gate, accepted = asyncio.Event(), asyncio.Event()
    stream = items(gate)
    beginning = asyncio.create_task(start_stream(stream, accepted))
    await asyncio.sleep(0.2)
    assert not beginning.done()
    accepted.set()
    first = await beginning
    assert not first.done()
    gate.set()
    assert await first == 1
    await stream.aclose()
    # an error before is raised, and the stream closed
    gate, accepted = asyncio.Event(), asyncio.Event()
    beginning = asyncio.create_task(start_stream(items(gate, Overloaded("full", 1.0)), accepted))
    await asyncio.sleep(0)
    gate.set()
    with pytest.raises(Overloaded):
        await beginning
    # who gives up meanwhile closes it
    beginning = asyncio.create_task(start_stream(items(asyncio.Event()), asyncio.Event()))
    await asyncio.sleep(0.01)
    beginning.cancel()
    with pytest.raises(asyncio.CancelledError):
        await beginning
    assert closed == 3
