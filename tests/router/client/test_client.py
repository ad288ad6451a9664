"""The Python client: retries within a deadline, and none of what has begun."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence

import pytest
from tokenizers import Tokenizer

from arriero.router.client.client import AsyncClient, Client
from arriero.router.client.retry import Retry
from arriero.shards.errors import InvalidRequest, Overloaded, Unavailable
from support.frontdoor import LLAMA3, echo, make_card, serve


def test_waits_double_up_to_the_deadline() -> None:
    now = 0.0
    retry = Retry(10, 5.0, clock=lambda: now)
    waits = []
    while (wait_s := retry.wait_s(Unavailable("x"))) is not None:
        waits.append(wait_s)
        now += wait_s
    assert 4 <= len(waits) <= 6 and now < 5.0
    assert all(0.1 * 2**i <= wait_s <= 0.2 * 2**i for i, wait_s in enumerate(waits))


def test_what_is_not_tried_again() -> None:
    assert Retry(3, None).wait_s(InvalidRequest("n", "no")) is None
    assert Retry(0, None).wait_s(Unavailable("x")) is None
    assert Retry(3, 2.0).wait_s(Overloaded("full", 3.0)) is None
    waited = Retry(3, None).wait_s(Overloaded("full", 3.0))
    assert waited is not None and waited >= 3.0


async def test_both_clients_come_back(llama_tokenizer: Tokenizer) -> None:
    async with serve(make_card(llama_tokenizer, LLAMA3), echo) as stack:

        async def make_room() -> None:
            await asyncio.sleep(0.3)
            stack.engine.max_queued = 100

        def ask() -> str:
            with Client(stack.address, timeout_s=30, retries=5) as client:
                return "".join(o.text for r in client.generate("llama") for o in r.outputs)

        stack.engine.max_queued = 0
        making = asyncio.create_task(make_room())
        async with AsyncClient(stack.address, timeout_s=30, retries=5) as client:
            answers = [one async for one in client.generate("llama")]
            assert answers[-1].usage.completion_tokens
        await making
        stack.engine.max_queued = 0
        making = asyncio.create_task(make_room())
        assert "llama" in await asyncio.to_thread(ask)
        await making

        stack.engine.max_queued = 0
        begun = time.monotonic()
        async with AsyncClient(stack.address, timeout_s=1, retries=50) as client:
            with pytest.raises(Overloaded):
                [one async for one in client.generate("llama")]
        assert time.monotonic() - begun < 2


@pytest.mark.parametrize("address", [lambda: [], []], ids=["function", "list"])
async def test_a_client_that_knows_no_gateway_says_so(
    address: Sequence[str] | Callable[[], Sequence[str]],
) -> None:
    with pytest.raises(Unavailable, match="`address` names no gateway"):
        AsyncClient(address)
