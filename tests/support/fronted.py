"""A real engine behind a real gateway, and clients of both kinds."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

import openai

from arriero.router.client.client import AsyncClient
from arriero.router.gateway import Gateway, GatewayConfig, GroupAddress
from arriero.router.http.lora_adapters import ChangeAdapter
from arriero.router.link.server import LinkServer
from arriero.router.text.model_card import ModelCard
from arriero.shards.config.group import GroupConfig
from arriero.shards.engine.types import EngineConfig
from support.eventually import eventually_async
from support.groups import Group, running


@dataclass
class Front:
    """What a test talks to."""

    group: Group
    client: AsyncClient
    ask: openai.AsyncOpenAI
    url: str
    link: LinkServer


@asynccontextmanager
async def fronted(
    config: GroupConfig,
    make_card: Callable[[EngineConfig], ModelCard],
    *,
    change_adapter: ChangeAdapter | None = None,
    console: bool = False,
) -> AsyncIterator[Front]:
    with running(config) as group:
        card = make_card(group.engine.config)
        link = LinkServer(group.engine, card)
        group.take = link.on_outputs  # type: ignore[method-assign]
        settings = GatewayConfig(http_address="127.0.0.1:0", console=console)
        gateway = Gateway(settings, change_adapter=change_adapter)
        port = await gateway.start()
        await gateway.set_groups([GroupAddress(card.group, card.model, await link.start())])
        url = f"http://127.0.0.1:{gateway.http_port}"
        try:
            async with (
                AsyncClient(f"127.0.0.1:{port}", timeout_s=240) as client,
                openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as ask,
            ):
                await eventually_async(lambda: gateway.ready, 30)
                yield Front(group, client, ask, url, link)
        finally:
            await gateway.stop(0.5)
            await link.stop(0.5)
