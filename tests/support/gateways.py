"""Several gateways over the same groups, each group a policy in the engine's place."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import httpx

from arriero.router.gateway import Gateway, GatewayConfig, GroupAddress
from arriero.router.link.server import LinkServer
from arriero.router.text.model_card import ModelCard
from support.eventually import eventually_async
from support.frontdoor import FakeEngine, Policy


@dataclass
class Gateways:
    """What a test talks to."""

    gateways: list[Gateway]
    ports: list[int]
    engines: list[FakeEngine]
    stopped: set[int] = field(default_factory=set)

    def http(self, number: int, **options: object) -> httpx.AsyncClient:
        """A client of one gateway's HTTP."""
        port = self.gateways[number].http_port
        return httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=60, **options)  # type: ignore[arg-type]

    async def warm(self, number: int, key: str = "") -> None:
        """Let a gateway answer its first request, which imports and builds much.

        On a busy machine this takes so long that the gateway gives up its links and links again.
        """
        headers = {"authorization": f"Bearer {key}"} if key else {}
        async with asyncio.timeout(30), self.http(number, headers=headers) as ask:
            while not (await ask.post("/tokenize", json={"prompt": "a"})).is_success:
                await asyncio.sleep(0.1)

    async def kill(self, number: int) -> None:
        """End a gateway at once."""
        self.stopped.add(number)
        await self.gateways[number].stop(0)


@asynccontextmanager
async def serve_by(
    cards: Sequence[ModelCard],
    policy: Policy,
    *configs: GatewayConfig,
    step_s: float = 0.0,
    make: Callable[[int, GatewayConfig], Gateway] = lambda number, config: Gateway(config),
) -> AsyncIterator[Gateways]:
    """A gateway for each of `configs`, all linked to a group for each of `cards`."""
    engines = [FakeEngine(policy, eos=card.eos_token_ids[0], step_s=step_s) for card in cards]
    links = [LinkServer(engine, card) for engine, card in zip(engines, cards, strict=True)]
    addresses = []
    for engine, link, card in zip(engines, links, cards, strict=True):
        engine.on_outputs = link.on_outputs
        addresses.append(GroupAddress(card.group, card.model, await link.start()))
    gateways = [make(number, config) for number, config in enumerate(configs)]
    ports = [await gateway.start() for gateway in gateways]
    served = Gateways(gateways, ports, engines)
    try:
        for gateway in gateways:
            await gateway.set_groups(addresses)
        for gateway in gateways:
            await eventually_async(lambda g=gateway: len(g.linked()) == len(cards), 20)  # type: ignore[misc]
        yield served
    finally:
        for number, gateway in enumerate(gateways):
            if number not in served.stopped:
                await gateway.stop(0.2)
        for link in links:
            await link.stop(0.2)
        for engine in engines:
            engine.close()
