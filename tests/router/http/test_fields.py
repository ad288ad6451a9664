"""Both classes of fields that are not honoured: those without effect, and those refused by name."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import replace
from typing import Any

import httpx
import pytest
from tokenizers import Tokenizer

from arriero.router import templates
from arriero.router.gateway import GatewayConfig
from arriero.router.http import fields
from arriero.router.http.fields import Rule
from support.frontdoor import Stack, echo, make_card, serve

CONFIG = GatewayConfig(http_address="127.0.0.1:0", models=("tiny",))
ANY: list[Any] = ["x", 1, 2.5, True, ["x"], {"a": 1}]
"""A value of each kind that JSON has."""
TOOL: dict[str, Any] = {"type": "function", "function": {"name": "f"}}
PNG = "data:image/png;base64,AA=="

CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 3, "seed": 1}
COMPLETION: dict[str, Any] = {"prompt": "the quick", "max_tokens": 3, "seed": 1}
TALK: dict[str, Any] = {
    "messages": [
        {"role": "user", "content": [{"type": "text", "text": "hi"}]},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
            ],
        },
        {"role": "tool", "tool_call_id": "c", "content": "4"},
    ],
    "tools": [TOOL],
    "max_tokens": 3,
    "seed": 1,
}
FORM = {"type": "json_schema", "json_schema": {"schema": {"type": "object"}}}
PLACES: list[tuple[str, str, dict[str, Any], tuple[str | int, ...], Mapping[str, Rule]]] = [
    ("chat", "/v1/chat/completions", CHAT, (), fields.CHAT),
    ("completion", "/v1/completions", COMPLETION, (), fields.COMPLETION),
    ("tokenize", "/tokenize", {"prompt": "the quick"}, (), fields.TOKENIZE),
    (
        "stream options",
        "/v1/chat/completions",
        {**CHAT, "stream": True, "stream_options": {}},
        ("stream_options",),
        fields.STREAM_OPTIONS,
    ),
    ("message", "/v1/chat/completions", TALK, ("messages", 1), fields.MESSAGE),
    ("call", "/v1/chat/completions", TALK, ("messages", 1, "tool_calls", 0), fields.CALL),
    (
        "function of a call",
        "/v1/chat/completions",
        TALK,
        ("messages", 1, "tool_calls", 0, "function"),
        fields.CALL,
    ),
    ("part", "/v1/chat/completions", TALK, ("messages", 0, "content", 0), fields.PART),
    ("tool", "/v1/chat/completions", TALK, ("tools", 0), fields.TOOL),
    ("function", "/v1/chat/completions", TALK, ("tools", 0, "function"), fields.TOOL),
    (
        "schema",
        "/v1/chat/completions",
        {**CHAT, "response_format": FORM},
        ("response_format", "json_schema"),
        fields.SCHEMA,
    ),
    (
        "structured",
        "/v1/chat/completions",
        {**CHAT, "structured_outputs": {"regex": "a+"}},
        ("structured_outputs",),
        fields.STRUCTURED,
    ),
]


@pytest.fixture
async def stack(llama_tokenizer: Tokenizer) -> AsyncIterator[Stack]:
    card = make_card(llama_tokenizer, templates.read("llama3.1"), max_model_len=4096)
    async with serve(card, echo, config=CONFIG) as running:
        yield running


def changed(body: Any, path: tuple[str | int, ...], name: str, value: Any) -> Any:  # noqa: ANN401
    """`body` with a field put into the object at `path`."""
    if not path:
        return {**body, name: value}
    step, *rest = path
    inner = changed(body[step], tuple(rest), name, value)
    if isinstance(body, list):
        return [inner if at == step else item for at, item in enumerate(body)]
    return {**body, step: inner}


def name_of(path: tuple[str | int, ...], name: str) -> str:
    field = ""
    for step in (*path, name):
        field += f"[{step}]" if isinstance(step, int) else f".{step}" if field else step
    return field


def told(stack: Stack) -> Any:  # noqa: ANN401
    """All that the engine is asked, but for the request's name."""
    if not stack.engine.submitted:
        return None
    return replace(stack.engine.submitted[-1], request_id="", trace="")


@pytest.mark.parametrize(
    ("path", "body", "inside", "rules"), [place[1:] for place in PLACES], ids=[p[0] for p in PLACES]
)
async def test_fields_without_effect_are_taken_and_the_others_refused_by_name(
    stack: Stack,
    path: str,
    body: dict[str, Any],
    inside: tuple[str | int, ...],
    rules: Mapping[str, Rule],
) -> None:
    async with httpx.AsyncClient(
        base_url=f"http://127.0.0.1:{stack.gateway.http_port}", timeout=60
    ) as ask:
        bare = await ask.post(path, json=body)
        assert bare.status_code == 200, bare.text
        without = told(stack)
        for number, (name, rule) in enumerate(rules.items()):
            values = ANY[number % 3 :: 3] if rule.neutral is None else rule.neutral
            for value in (None, *values):
                answer = await ask.post(path, json=changed(body, inside, name, value))
                assert answer.status_code == 200, (name, value, answer.text)
                assert told(stack) == without, (name, value)
            if rule.neutral is None:
                continue
            for value in _others(rule):
                answer = await ask.post(path, json=changed(body, inside, name, value))
                assert answer.status_code == 400, (name, value, answer.text)
                error = answer.json()["error"]
                assert error["param"] == name_of(inside, name)
                assert error["code"] == "unsupported_parameter"
                assert f"`{error['param']}` is not supported: {rule.words}" in error["message"]


def _others(rule: Rule) -> Iterator[Any]:
    return (value for value in [*ANY, False, 0, "", [], {}, 0.5] if not rule.takes(value))


def test_no_field_is_in_two_classes() -> None:
    from arriero.router.http import messages
    from arriero.router.http import request_schemas as bodies

    for module in (bodies, messages):
        for body in vars(module).values():
            if isinstance(body, type) and issubclass(body, fields.Body):
                assert not set(body.others) & set(body.model_fields), body


async def test_the_schema_shows_the_class_of_each_field(stack: Stack) -> None:
    async with httpx.AsyncClient(
        base_url=f"http://127.0.0.1:{stack.gateway.http_port}", timeout=60
    ) as ask:
        schemas = (await ask.get("/openapi.json")).json()["components"]["schemas"]
    shown = schemas["ChatBody"]["properties"]
    assert shown["temperature"]["x-class"] == "honoured"
    assert shown["metadata"]["x-class"] == "no effect"
    assert shown["modalities"]["enum"] == [None, ["text"], []]
    assert shown["web_search_options"]["x-class"] == "refused"
    assert schemas["ChatMessage"]["properties"]["annotations"]["x-class"] == "no effect"
    assert all(field["description"] for field in shown.values())


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image_url", "image_url": {"url": PNG, "detail": "low"}},
        {"type": "image_url", "image_url": {"url": PNG, "detail": "auto"}},
        {"type": "image_url", "image_url": PNG},
        {"type": "input_image", "image_url": PNG, "detail": "high"},
    ],
)
async def test_how_closely_an_image_is_looked_at_is_a_hint(
    stack: Stack, part: dict[str, Any]
) -> None:
    body = {"messages": [{"role": "user", "content": [part]}]}
    async with httpx.AsyncClient(
        base_url=f"http://127.0.0.1:{stack.gateway.http_port}", timeout=60
    ) as ask:
        answer = await ask.post("/v1/chat/completions", json=body)
    assert answer.status_code == 400  # the model reads no images
    message = answer.json()["error"]["message"]
    assert "detail" not in message and "image" in message
