"""Bodies that nobody should send: each gets an answer in the API's shape, none a fault of ours."""

from __future__ import annotations

import json
import random
from typing import Any

import httpx
import pytest
from tokenizers import Tokenizer

from arriero.router import templates
from arriero.router.gateway import GatewayConfig
from support.frontdoor import echo, make_card, serve

VALUES: list[Any] = [
    *(None, True, False, 0, 1, -1, 2**31, 2**63, 2**64, 10**400, 0.5, -1.5, 1e308),
    *(float("nan"), float("inf"), "", "x", "\x00", "\ud800", "🦙" * 50, "<|eot_id|>", "{}"),
    *([], [[]], [None], [0], [-1], [2**40], ["a", 1], {}, {"a": 1}, {"type": "text"}),
    *([{}], [{"role": "user"}], [{"role": "user", "content": "x"}], [{"type": "function"}]),
]
BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {
        "model": "tiny",
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "hello"}]},
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [
                    {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
                ],
            },
            {"role": "tool", "tool_call_id": "c", "content": "4"},
        ],
        "tools": [{"type": "function", "function": {"name": "f", "parameters": {"a": {}}}}],
        "tool_choice": "auto",
        "temperature": 0.5,
        "logit_bias": {"5": 1},
        "stop": ["zz"],
        "n": 2,
        "seed": 1,
        "max_completion_tokens": 4,
        "logprobs": True,
        "top_logprobs": 2,
        "stream": True,
        "stream_options": {"include_usage": True},
    },
    "/v1/completions": {
        "prompt": ["a", "b"],
        "echo": True,
        "logprobs": 1,
        "max_tokens": 3,
        "allowed_token_ids": [50, 51],
        "stop_token_ids": [60],
        "top_k": 4,
        "ignore_eos": True,
        "min_tokens": 1,
        "priority": 2,
    },
    "/tokenize": {"messages": [{"role": "user", "content": "x"}], "add_generation_prompt": True},
    "/detokenize": {"tokens": [50, 51], "skip_special_tokens": True},
}


def mutate(value: Any, rng: random.Random) -> Any:  # noqa: ANN401
    """`value` with one thing in it replaced, taken out or added."""
    if isinstance(value, dict) and value and rng.random() < 0.8:
        changed = dict(value)
        key = rng.choice(list(changed))
        match rng.randrange(6):
            case 0:
                del changed[key]
            case 1:
                changed[rng.choice(["x", "", "é", "n"])] = rng.choice(VALUES)
            case _:
                changed[key] = mutate(changed[key], rng)
        return changed
    if isinstance(value, list) and value and rng.random() < 0.7:
        at = rng.randrange(len(value))
        return [*value[:at], mutate(value[at], rng), *value[at + 1 :]]
    return rng.choice(VALUES)


@pytest.mark.parametrize("path", BODIES)
async def test_mutated_bodies_never_are_our_fault(llama_tokenizer: Tokenizer, path: str) -> None:
    rng = random.Random(path)
    card = make_card(llama_tokenizer, templates.read("llama3.1"), max_model_len=2048)
    config = GatewayConfig(http_address="127.0.0.1:0", lost_s=0.5)
    async with serve(card, echo, config=config) as stack:
        base = f"http://127.0.0.1:{stack.gateway.http_port}"
        async with httpx.AsyncClient(base_url=base, timeout=20) as ask:
            statuses = set()
            for _ in range(60):
                body = BODIES[path]
                for _ in range(rng.choice((0, 1, 1, 2, 3))):
                    body = mutate(body, rng)
                raw = json.dumps(body).encode()
                if rng.random() < 0.05:
                    raw = raw[: rng.randrange(len(raw))]
                headers = {"content-type": "application/json"}
                answer = await ask.post(path, content=raw, headers=headers)
                statuses.add(answer.status_code)
                assert answer.status_code in (200, 400, 404), (raw, answer.text)
                if answer.status_code != 200:
                    error = answer.json()["error"]
                    assert error["message"] and "Traceback" not in error["message"]
                elif answer.headers["content-type"].startswith("text/event-stream"):
                    assert answer.text.endswith("data: [DONE]\n\n"), (raw, answer.text)
            assert statuses >= {200, 400}
        assert not stack.engine.running


@pytest.mark.parametrize("depth", [50, 100, 400, 900, 5_000, 200_000])
async def test_deep_json_is_refused(llama_tokenizer: Tokenizer, depth: int) -> None:
    card = make_card(llama_tokenizer, templates.read("llama3.1"), max_model_len=16384)
    async with serve(card, echo, config=GatewayConfig(http_address="127.0.0.1:0")) as stack:
        base = f"http://127.0.0.1:{stack.gateway.http_port}"
        async with httpx.AsyncClient(base_url=base, timeout=20) as ask:
            schema = '{"a":' * depth + "1" + "}" * depth
            head = '{"max_tokens":1,"messages":[{"role":"user","content":"x"}],"tools":['
            tool = f'{{"type":"function","function":{{"name":"f","parameters":{schema}}}}}'
            raw = f"{head}{tool}]}}"
            headers = {"content-type": "application/json"}
            answer = await ask.post("/v1/chat/completions", content=raw, headers=headers)
            assert answer.status_code == (200 if depth <= 50 else 400), answer.text
            if depth > 50:
                assert answer.json()["error"]["type"] == "invalid_request_error"
