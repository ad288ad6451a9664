"""Structured output and forced calls: clients, gateway, link, engine, on a real checkpoint."""

from __future__ import annotations

import asyncio
import json
import os
import random
import re
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Literal

import jsonschema
import pytest
from openai import AsyncOpenAI, BadRequestError
from pydantic import BaseModel

from arriero.router.card import ModelCard
from arriero.router.gateway import Gateway, GatewayConfig, GroupAddress
from arriero.router.grammar import read_grammar
from arriero.router.link import LinkServer
from arriero.router.proto.arriero.v1 import inference_pb2 as pb
from arriero.shards.errors import InvalidRequest
from arriero.shards.group import GroupConfig
from support.groups import running

MODEL = os.environ.get("ARRIERO_TEST_MODEL", "")
needs_model = pytest.mark.skipif(not MODEL, reason="ARRIERO_TEST_MODEL names no checkpoint folder")
ASK: Any = [{"role": "user", "content": "Describe a llama in JSON."}]


@asynccontextmanager
async def serving() -> AsyncIterator[AsyncOpenAI]:
    with running(GroupConfig(model_path=MODEL, max_model_len=1024, dtype="float32")) as group:
        limits = group.engine.config
        card = ModelCard.from_folder(
            MODEL,
            model="small",
            group="g0",
            layout="tp1",
            digest="d",
            max_model_len=limits.max_model_len,
            vocab_size=limits.vocab_size,
            bos_token_id=1,
            eos_token_ids=limits.eos_token_ids,
        )
        template = "{% if tools %}{{ tools | tojson }}{% endif %}"  # the checkpoint's knows none
        object.__setattr__(card, "chat_template", template + (card.chat_template or ""))
        link = LinkServer(group.engine, card)
        group.take = link.on_outputs  # type: ignore[method-assign]
        gateway = Gateway(GatewayConfig(http_address="127.0.0.1:0"))
        await gateway.start()
        await gateway.set_groups([GroupAddress("g0", "small", await link.start())])
        async with asyncio.timeout(30):
            while not gateway.ready:
                await asyncio.sleep(0.01)
        url = f"http://127.0.0.1:{gateway.http_port}/v1"
        async with AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as client:
            yield client
        await gateway.stop(1)
        await link.stop(1)


class Llama(BaseModel):
    colour: Literal["brown", "white"]
    age: int
    wild: bool


def schema(draw: random.Random, depth: int) -> dict[str, Any]:
    """A schema whose documents are short, so that a small model gets to their end."""
    kinds = ["enum", "integer", "boolean", "pattern", "const", "string"]
    kind = draw.choice(kinds + ["object", "array", "oneOf", "ref"] * 2 if depth else kinds)
    if kind == "enum":
        return {"enum": draw.sample(["red", "blue", 3, None, True, "grün"], 3)}
    if kind == "integer":
        low = draw.randint(-50, 50)
        return {"type": "integer", "minimum": low, "maximum": low + draw.randint(1, 100)}
    if kind == "boolean":
        return {"type": "boolean"}
    if kind == "pattern":
        return {"type": "string", "pattern": draw.choice(["^[A-Z]{3}-[0-9]{2}$", "^(a|b)+c$"])} | {
            "maxLength": 8
        }
    if kind == "const":
        return {"const": draw.choice(["x", 7, {"k": [1]}])}
    if kind == "string":
        return {"type": "string", "minLength": 1, "maxLength": draw.randint(2, 12)}
    if kind == "array":
        item = schema(draw, depth - 1)
        return {"type": "array", "items": item, "minItems": 1, "maxItems": draw.randint(1, 3)}
    if kind == "oneOf":
        low = draw.randint(0, 9)
        return {
            "oneOf": [
                {"type": "integer", "minimum": low, "maximum": low + 5},
                {"type": "string", "maxLength": 5},
            ]
        }
    names = draw.sample(["name", "kind", "size", "tags", "at"], draw.randint(1, 3))
    fields = {name: schema(draw, depth - 1) for name in names}
    made: dict[str, Any] = {
        "type": "object",
        "properties": fields,
        "required": names,
        "additionalProperties": False,
    }
    if kind == "ref":
        made["$defs"] = {"leaf": {"enum": ["l", "r"]}}
        made["properties"] = fields | {"leaf": {"$ref": "#/$defs/leaf"}}
    return made


@needs_model
async def test_structured_output_is_what_it_was_asked_to_be() -> None:
    draw = random.Random(1)
    count = int(os.environ.get("ARRIERO_SCHEMAS", "24"))
    schemas = [
        {
            "type": "object",
            "properties": {"it": schema(draw, 2)},
            "required": ["it"],
            "additionalProperties": False,
        }
        for _ in range(count)
    ]
    # `$ref` is from the document's root
    for one in schemas:
        one["$defs"] = {"leaf": {"enum": ["l", "r"]}}
    async with serving() as client, asyncio.timeout(280):
        gate = asyncio.Semaphore(32)

        async def ask(number: int) -> None:
            async with gate:
                form: Any = {
                    "type": "json_schema",
                    "json_schema": {"name": "it", "schema": schemas[number], "strict": True},
                }
                answer = await client.chat.completions.create(
                    model="small", messages=ASK, response_format=form, max_tokens=300, seed=number
                )
            (choice,) = answer.choices
            assert choice.finish_reason == "stop", (schemas[number], choice)
            jsonschema.validate(json.loads(choice.message.content or ""), schemas[number])

        await asyncio.gather(*(ask(number) for number in range(count)))

        parsed = await client.chat.completions.parse(
            model="small", messages=ASK, response_format=Llama, n=2, max_tokens=60, seed=1
        )
        assert all(isinstance(choice.message.parsed, Llama) for choice in parsed.choices)

        async def other(form: dict[str, Any]) -> str:
            answer = await client.chat.completions.create(
                model="small",
                messages=ASK,
                max_tokens=60,
                seed=1,
                extra_body={"structured_outputs": form},
            )
            return answer.choices[0].message.content or ""

        assert re.fullmatch("[0-9]{3}-[a-f]{2}", await other({"regex": "[0-9]{3}-[a-f]{2}"}))
        assert await other({"choice": ["alpaca", "vicuña"]}) in ("alpaca", "vicuña")
        assert await other({"grammar": 'start: "a" ("b" | "c")'}) in ("ab", "ac")
        assert await other({"grammar": 'root ::= "x" ("y" | "z")'}) in ("xy", "xz")

        place = {"type": "object", "properties": {"city": {"enum": ["Cusco", "Puno"]}}}
        place["required"] = ["city"]
        tools: Any = [
            {"type": "function", "function": {"name": name, "parameters": place}}
            for name in ("weather", "route")
        ]
        named: Any = {"type": "function", "function": {"name": "route"}}
        for choice in ("required", named):
            called = await client.chat.completions.create(
                model="small",
                messages=ASK,
                tools=tools,
                tool_choice=choice,
                parallel_tool_calls=False,
                max_tokens=80,
                seed=3,
            )
            (given,) = called.choices
            assert given.finish_reason == "tool_calls" and not given.message.content
            (call,) = given.message.tool_calls or []
            assert call.type == "function"
            assert call.function.name in (["route"] if choice is named else ["weather", "route"])
            jsonschema.validate(json.loads(call.function.arguments), place)

        with pytest.raises(BadRequestError, match="ignore_eos"):
            await client.chat.completions.create(
                model="small",
                messages=ASK,
                response_format={"type": "json_object"},
                extra_body={"ignore_eos": True},
            )


def _nested(depth: int) -> str:
    return '{"properties": {"a": ' * depth + "{}" + "}}" * depth


@pytest.mark.parametrize(
    "form",
    [
        pb.Grammar(),
        pb.Grammar(json_schema="{"),
        pb.Grammar(json_schema=_nested(60)),
        pb.Grammar(json_schema=_nested(5000)),
        pb.Grammar(json_schema='{"enum": ["' + "x" * 70_000 + '"]}'),
        pb.Grammar(json_schema='{"$ref": "http://example.com/x"}'),
        pb.Grammar(json_schema='{"not": {"type": "string"}}'),
        pb.Grammar(json_schema='{"allOf": [{"type": "integer"}, {"type": "string"}]}'),
        pb.Grammar(regex="(?=a)b"),
        pb.Grammar(regex="(((a{1,900}){1,900}){1,900}){1,900}b"),
        pb.Grammar(regex="("),
        pb.Grammar(ebnf="start: nothing"),
        pb.Grammar(choice=pb.Choice()),
    ],
)
def test_what_cannot_be_enforced_is_refused_soon(form: pb.Grammar) -> None:
    started = time.monotonic()
    with pytest.raises(InvalidRequest):
        read_grammar(form)
    assert time.monotonic() - started < 5
