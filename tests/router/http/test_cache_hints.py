"""Hints of sessions and breakpoints on their way from every API to the engine."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from tokenizers import Tokenizer

from arriero.router import templates
from arriero.router.calls.cache_hint import session_name
from arriero.router.gateway import GatewayConfig
from arriero.shards.kv.blocks import model_root
from arriero.shards.kv.retention import CacheHint, Retain
from support.frontdoor import Stack, echo, make_card, serve

KEY = "session-1"
SESSION = session_name(KEY)
MINUTES = {"type": "ephemeral"}
HOUR = {"type": "ephemeral", "ttl": "1h"}
CHAT, COMPLETION = "/v1/chat/completions", "/v1/completions"
RESPONSES, MESSAGES = "/v1/responses", "/v1/messages"
WORDS = "the quick brown fox jumps over the lazy dog. " * 4


@pytest.fixture
async def stack(llama_tokenizer: Tokenizer) -> AsyncIterator[Stack]:
    card = make_card(
        llama_tokenizer,
        templates.read("llama3.1"),
        max_model_len=4096,
        cache_root=model_root(b"x"),
        block_size=16,
    )
    config = GatewayConfig(http_address="127.0.0.1:0", models=("tiny",))
    async with serve(card, echo, config=config) as running:
        yield running


def client(stack: Stack) -> httpx.AsyncClient:
    return httpx.AsyncClient(base_url=f"http://127.0.0.1:{stack.gateway.http_port}")


def body_of(path: str, **fields: Any) -> dict[str, Any]:  # noqa: ANN401
    bodies: dict[str, dict[str, Any]] = {
        CHAT: {"messages": [{"role": "user", "content": WORDS}], "max_tokens": 2},
        COMPLETION: {"prompt": WORDS, "max_tokens": 2},
        RESPONSES: {"input": WORDS, "max_output_tokens": 2},
        MESSAGES: {"messages": [{"role": "user", "content": WORDS}], "max_tokens": 2},
    }
    return {"model": "tiny", **bodies[path], **fields}


def whole(seconds: float, session: str = "") -> CacheHint:
    return CacheHint(session=session, retain=(Retain(seconds=seconds),))


HINTS: list[tuple[str, dict[str, Any], CacheHint | None]] = [
    *((path, {"prompt_cache_key": KEY}, whole(600, SESSION)) for path in (CHAT, COMPLETION)),
    (RESPONSES, {"prompt_cache_key": KEY}, whole(600, SESSION)),
    (MESSAGES, {"prompt_cache_key": KEY}, whole(600, SESSION)),
    (CHAT, {"prompt_cache_key": KEY, "prompt_cache_retention": "24h"}, whole(86400, SESSION)),
    (CHAT, {"prompt_cache_key": KEY, "prompt_cache_retention": "in_memory"}, whole(600, SESSION)),
    (RESPONSES, {"prompt_cache_options": {"ttl": "30m"}}, whole(1800)),
    (CHAT, {"prompt_cache_retention": "0s"}, None),
    (CHAT, {"cache_control": HOUR}, whole(3600)),
    (MESSAGES, {"cache_control": MINUTES}, whole(300)),
    (CHAT, {}, None),
    (MESSAGES, {}, None),
]


@pytest.mark.parametrize(("path", "fields", "hint"), HINTS)
async def test_a_hint_reaches_the_engine(
    stack: Stack, path: str, fields: dict[str, Any], hint: CacheHint | None
) -> None:
    async with client(stack) as ask:
        answer = await ask.post(path, json=body_of(path, **fields))
    assert answer.status_code == 200, answer.text
    assert stack.engine.submitted[-1].hint == hint


@pytest.mark.parametrize("path", [CHAT, COMPLETION, RESPONSES, MESSAGES])
async def test_a_header_names_the_session(stack: Stack, path: str) -> None:
    async with client(stack) as ask:
        headers = {"x-prompt-cache-key": KEY}
        answer = await ask.post(path, json=body_of(path), headers=headers)
    assert answer.status_code == 200, answer.text
    assert stack.engine.submitted[-1].hint == whole(600, SESSION)


@pytest.mark.parametrize("path", [CHAT, MESSAGES])
async def test_breakpoints_count_tokens_of_the_prompt(stack: Stack, path: str) -> None:
    """A long-lived system prompt, and the last message for five minutes."""
    system: dict[str, Any] = {"type": "text", "text": WORDS, "cache_control": HOUR}
    question = [{"type": "text", "text": WORDS, "cache_control": MINUTES}]
    earlier = [
        {"role": "user", "content": question},
        {"role": "assistant", "content": [{"type": "text", "text": "ok"}]},
    ]
    last = {"role": "user", "content": question}
    body = body_of(path, messages=[*earlier, last], system=[system])
    if path == CHAT:
        del body["system"]
        body["messages"] = [{"role": "system", "content": [system]}, *body["messages"]]
    async with client(stack) as ask:
        answer = await ask.post(path, json=body)
        assert answer.status_code == 200, answer.text
    request = stack.engine.submitted[-1]
    assert request.hint is not None and not request.hint.session
    minutes, hour = request.hint.retain
    assert minutes == Retain(seconds=300) and hour.seconds == 3600
    assert 0 < hour.num_tokens < len(request.prompt)
    text = stack_text(stack, request.prompt[: hour.num_tokens])
    assert text.endswith("lazy dog.<|eot_id|>") or text.endswith("<|eot_id|><|start_header_id|>"), (
        text[-80:]
    )


def stack_text(stack: Stack, tokens: tuple[int, ...]) -> str:
    text, _ = stack.gateway._groups.find("tiny")
    return text.tokenizer.decode(tokens, skip_special=False)


async def test_usage_tells_what_was_written(stack: Stack) -> None:
    async with client(stack) as ask:
        chat = (await ask.post(CHAT, json=body_of(CHAT))).json()["usage"]
        response = (await ask.post(RESPONSES, json=body_of(RESPONSES))).json()["usage"]
        plain = (await ask.post(MESSAGES, json=body_of(MESSAGES))).json()["usage"]
        marked = body_of(MESSAGES, cache_control=MINUTES)
        cached = (await ask.post(MESSAGES, json=marked)).json()["usage"]
        streamed = await ask.post(MESSAGES, json=marked | {"stream": True})
    read = chat["prompt_tokens_details"]["cached_tokens"]
    written = chat["prompt_tokens"] // 16 * 16 - read
    assert read and written
    details = {"cached_tokens": read, "cache_write_tokens": written}
    assert response["input_tokens_details"] == details
    assert plain["cache_creation_input_tokens"] == 0
    assert plain["input_tokens"] == chat["prompt_tokens"] - read
    assert cached["cache_creation_input_tokens"] == written
    assert cached["cache_read_input_tokens"] == read
    assert cached["input_tokens"] == chat["prompt_tokens"] - read - written
    assert streamed.text.count(f'"cache_creation_input_tokens":{written}') == 2


async def test_a_session_ends(stack: Stack) -> None:
    async with client(stack) as ask:
        for key in (KEY, "with/slash", "unknown", "ñ 🦙"):
            answer = await ask.delete(f"/v1/prompt_caches/{key}")
            assert answer.status_code == 200, answer.text
            assert answer.json() == {"id": key, "object": "prompt_cache", "deleted": True}
        too_long = await ask.delete(f"/v1/prompt_caches/{'x' * 1025}")
        assert too_long.status_code == 400
        assert too_long.json()["error"]["param"] == "prompt_cache_key"
        await ask.post(CHAT, json=body_of(CHAT))
    sessions = [("anyone", session_name(key)) for key in (KEY, "with/slash", "unknown", "ñ 🦙")]
    assert stack.engine.released == sessions


WRONG: list[tuple[str, dict[str, Any], str]] = [
    (CHAT, {"prompt_cache_key": "x" * 1025}, "prompt_cache_key"),
    (CHAT, {"prompt_cache_key": 7}, "prompt_cache_key"),
    (RESPONSES, {"prompt_cache_key": ["a"]}, "prompt_cache_key"),
    (CHAT, {"prompt_cache_retention": "25h"}, "prompt_cache_retention"),
    (CHAT, {"prompt_cache_retention": "soon"}, "prompt_cache_retention"),
    (RESPONSES, {"prompt_cache_options": {"ttl": "-1m"}}, "prompt_cache_options.ttl"),
    (MESSAGES, {"cache_control": {"type": "ephemeral", "ttl": "2d"}}, "cache_control.ttl"),
    (CHAT, {"cache_control": "yes"}, "cache_control"),
]


@pytest.mark.parametrize(("path", "fields", "field"), WRONG)
async def test_a_wrong_hint_is_refused_by_name(
    stack: Stack, path: str, fields: dict[str, Any], field: str
) -> None:
    async with client(stack) as ask:
        answer = await ask.post(path, json=body_of(path, **fields))
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error.get("param", field) == field and field.split(".")[0] in error["message"]


async def test_many_breakpoints_are_bounded(stack: Stack) -> None:
    talk = [
        {
            "role": ("user", "assistant")[number % 2],
            "content": "hi",
            "cache_control": {"ttl": f"{999 - number}s"},
        }
        for number in range(301)
    ]
    async with client(stack) as ask:
        answer = await ask.post(CHAT, json=body_of(CHAT, messages=talk))
    assert answer.status_code == 200, answer.text
    hint = stack.engine.submitted[-1].hint
    assert hint is not None and len(hint.retain) == 4
    assert [retain.seconds for retain in hint.retain] == [699, 700, 701, 702]
