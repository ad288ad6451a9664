"""Five times as much as a gateway's groups can do, and a tenant that floods another.

A policy paces the steps, so capacity is known: `PLACES` sequences, a token each a step. Here for
some seconds, judged by tokens a step, since a test machine's clock is shared;
`ARRIERO_OVERLOAD_S=60` runs it at length, and judges tokens a second too.
"""

from __future__ import annotations

import asyncio
import math
import os
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from tokenizers import Tokenizer

from arriero.router.client.client import AsyncClient
from arriero.router.gateway import GatewayConfig
from arriero.router.tenants.keys import add_key
from arriero.router.tenants.tenant import QueueLimits
from arriero.shards.errors import Overloaded
from support.eventually import eventually_async
from support.frontdoor import LLAMA3, Stack, endless, make_card, serve

LONG = "ARRIERO_OVERLOAD_S" in os.environ
DURATION_S = float(os.environ.get("ARRIERO_OVERLOAD_S", "5"))
PLACES, OUTPUT, STEP_S, MAX_WAIT_S = 8, 20, 0.02, 1.0


@dataclass
class Tally:
    """What became of one tenant's requests."""

    first_s: list[float] = field(default_factory=list)
    tokens: int = 0
    refused: int = 0
    others: list[BaseException] = field(default_factory=list)


async def ask(client: AsyncClient, tally: Tally, output: int = OUTPUT) -> None:
    begun = time.monotonic()
    first = True
    try:
        async for message in client.generate([60] * 16, max_tokens=output, ignore_eos=True):
            if first:
                tally.first_s.append(time.monotonic() - begun)
                first = False
            tally.tokens += sum(len(output.token_ids) for output in message.outputs)
    except Overloaded as error:
        tally.refused += 1
        assert error.retry_after_s >= 1
        assert first, "refused after it had begun"
    except Exception as error:
        tally.others.append(error)


async def offer(
    client: AsyncClient, tally: Tally, per_s: float, until_s: float, output: int = OUTPUT
) -> None:
    """Requests at a steady rate, whatever becomes of them."""
    tasks: set[asyncio.Task[None]] = set()
    begun, number = time.monotonic(), 0
    try:
        while time.monotonic() < until_s:
            task = asyncio.create_task(ask(client, tally, output))
            tasks.add(task)
            task.add_done_callback(tasks.discard)
            number += 1
            await asyncio.sleep(max(0.0, begun + number / per_s - time.monotonic()))
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()


async def best_rates(stack: Stack, client: AsyncClient) -> tuple[float, float]:
    """Tokens a second, and a step, of a closed loop that keeps every place taken."""
    tally = Tally()
    until = time.monotonic() + min(3.0, DURATION_S / 2)

    async def loop() -> None:
        while time.monotonic() < until:
            await ask(client, tally)

    begun, steps = time.monotonic(), stack.engine.steps
    await asyncio.gather(*(loop() for _ in range(PLACES + 2)))  # one or two wait in the group
    assert not tally.refused
    return (
        tally.tokens / (time.monotonic() - begun),
        tally.tokens / (stack.engine.steps - steps),
    )


async def test_five_times_capacity(llama_tokenizer: Tokenizer) -> None:
    config = GatewayConfig(limits=QueueLimits(max_queued=64, max_wait_s=MAX_WAIT_S))
    card = make_card(llama_tokenizer, LLAMA3, max_sequences=PLACES)
    async with serve(card, endless, step_s=STEP_S, config=config) as stack:
        stack.engine.max_running = PLACES
        client = stack.client
        best, best_a_step = await best_rates(stack, client)
        memory = psutil.Process()
        tally = Tally()
        half = DURATION_S / 2
        begun, steps = time.monotonic(), stack.engine.steps
        await offer(client, tally, 5 * best / OUTPUT, begun + half)
        middle = memory.memory_info().rss
        await offer(client, tally, 5 * best / OUTPUT, time.monotonic() + half)
        goodput = tally.tokens / (time.monotonic() - begun)
        a_step = tally.tokens / (stack.engine.steps - steps)
        grown = memory.memory_info().rss - middle
        first = statistics.quantiles(tally.first_s, n=100)
        print(
            f"best {best:.0f} tokens/s, goodput {goodput:.0f} ({goodput / best:.0%}), "
            f"{a_step:.2f} tokens a step of {best_a_step:.2f}, "
            f"{len(tally.first_s)} accepted, {tally.refused} refused, time to first token p50 "
            f"{first[49]:.2f} s, p99 {first[98]:.2f} s, memory {grown / 2**20:+.1f} MiB"
        )
        assert not tally.others, tally.others[:3]
        assert tally.refused > len(tally.first_s)
        assert a_step >= 0.9 * best_a_step
        assert goodput >= 0.9 * best or not LONG
        assert first[98] <= 2 * MAX_WAIT_S
        assert grown < 16 * 2**20
        assert not stack.engine.running
        assert stack.gateway.inference.admission.waiting() == {("tiny", "anyone"): 0}


async def test_a_flood_leaves_the_other_its_share(
    llama_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    path = tmp_path / "keys.yaml"
    keys = {name: add_key(path, name) for name in ("flood", "quiet")}
    limits = QueueLimits(max_queued=64, max_wait_s=60)
    config = GatewayConfig(keys=path, limits=limits)
    card = make_card(llama_tokenizer, LLAMA3, max_sequences=PLACES)
    step_s = 3 * STEP_S  # so that twenty times as much is still few requests
    output = OUTPUT // 2  # what is under way as the count begins and ends is an error of the share
    async with serve(card, endless, step_s=step_s, config=config) as stack:
        stack.engine.max_running = PLACES
        clients = {name: AsyncClient(stack.address, api_key=keys[name]) for name in keys}
        tallies = {name: Tally() for name in keys}
        # The quiet one always has two sets of places outstanding, so that it always waits, and is
        # served half of what the groups can do; the flood sends twenty times as much.
        half = PLACES / step_s / output / 2

        async def insist() -> None:
            while True:
                await ask(clients["quiet"], tallies["quiet"], output)

        flood = offer(clients["flood"], tallies["flood"], 20 * half, math.inf, output)
        load = [asyncio.create_task(flood)]
        load += [asyncio.create_task(insist()) for _ in range(2 * PLACES)]
        waiting = stack.gateway.inference.admission.waiting
        least: dict[str, int] = {}

        async def given(tokens: int) -> dict[str, int]:
            """Tokens so far, once both together have so many."""
            least.update(dict.fromkeys(keys, 1000))
            while sum(tally.tokens for tally in tallies.values()) < tokens:
                await asyncio.sleep(0.02)
                for name in keys:
                    least[name] = min(least[name], waiting()["tiny", name])
            return {name: tally.tokens for name, tally in tallies.items()}

        await eventually_async(
            lambda: min(waiting().get(("tiny", name), 0) for name in keys) >= PLACES // 2, 60
        )
        turn = PLACES * output  # tokens of one set of places; the first ones go to whoever is first
        before = await given(sum(tally.tokens for tally in tallies.values()) + turn)
        after = await given(sum(before.values()) + int(3 * max(DURATION_S, 5) * turn))
        for task in load:
            task.cancel()
        await asyncio.gather(*load, return_exceptions=True)
        gained = {name: after[name] - before[name] for name in keys}
        share = gained["quiet"] / sum(gained.values())
        refused = {name: tally.refused for name, tally in tallies.items()}
        print(
            f"tokens {gained}: the quiet tenant's share {share:.1%}; refused {refused}, "
            f"fewest that waited {least}"
        )
        for name, tally in tallies.items():
            assert not tally.others, (name, tally.others[:3])
        assert refused["flood"] > 0
        assert min(least.values()) > 0, f"not both backlogged: {least}"
        assert share >= 0.45
        for client in clients.values():
            await client.close()
