"""A scripted model behind a real gateway: calls a tool, and answers once it has the result."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import Any

from tokenizers import Tokenizer

from arriero.router import templates
from arriero.router.gateway import GatewayConfig
from arriero.shards.engine.types import EngineRequest
from support.frontdoor import Stack, make_card, serve

QUESTION = "How is the weather in La Paz?"
CALL = '{"name": "get_weather", "parameters": {"city": "La Paz"}}'
RESULT = "sunny in La Paz"
ANSWER = "It is sunny."
REPORT = '{"city": "La Paz", "sunny": true}'


@asynccontextmanager
async def scripted(tokenizer: Tokenizer, *, first: str = CALL, then: str = ANSWER) -> Any:  # noqa: ANN401
    """A model that says `first`, and `then` once the tool's result is in the conversation."""
    spoken = [tokenizer.encode(text, add_special_tokens=False).ids for text in (first, then)]
    answered: dict[str, bool] = {}

    def policy(request: EngineRequest, index: int, position: int) -> int:
        if request.request_id not in answered:
            answered[request.request_id] = RESULT in tokenizer.decode(request.prompt)
        words = spoken[answered[request.request_id]]
        return words[position] if position < len(words) else 1

    card = make_card(tokenizer, templates.read("llama3.1"), max_model_len=8192)
    config = GatewayConfig(http_address="127.0.0.1:0", models=("tiny",))
    async with serve(card, policy, config=config) as stack:
        yield stack


def base_url(stack: Stack) -> str:
    return f"http://127.0.0.1:{stack.gateway.http_port}/v1"
