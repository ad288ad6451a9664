"""Real engines of several models in this process, behind one real gateway."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from arriero.router.gateway import Gateway, GatewayConfig, GroupAddress
from arriero.router.link.server import LinkServer
from arriero.router.text.model_card import ModelCard
from arriero.shards.config.group import GroupConfig
from arriero.shards.engine.types import EngineConfig
from arriero.shards.kv.blocks import model_root
from support.eventually import eventually_async
from support.groups import Group, running


@dataclass(frozen=True, kw_only=True)
class ServedModel:
    """A model of the gateway.

    Attributes:
        name: id of the model.
        folder: its checkpoint.
        group: fields of the group's config.
        card: changed fields of the card, such as the chat template.
    """

    name: str
    folder: Path
    group: Mapping[str, Any] = field(default_factory=dict)
    card: Mapping[str, Any] = field(default_factory=dict)

    @property
    def config(self) -> GroupConfig:
        """Config of the group."""
        fields: dict[str, Any] = {"num_blocks": 1024, "threads": 1} | dict(self.group)
        return GroupConfig(model_path=str(self.folder), **fields)

    def make_card(self, limits: EngineConfig) -> ModelCard:
        """The card that the group shows to the gateway."""
        fields: dict[str, Any] = {
            "model": self.name,
            "group": f"{self.name}-0",
            "layout": "tp1",
            "digest": self.name,
            "max_model_len": limits.max_model_len,
            "vocab_size": limits.vocab_size,
            "bos_token_id": 1,
            "eos_token_ids": limits.eos_token_ids,
            "max_sequences": limits.max_sequences,
            "cache_root": model_root(limits.cache_salt),
            "block_size": limits.block_size,
        }
        return ModelCard.from_folder(str(self.folder), **fields | dict(self.card))


@dataclass
class FrontedGroups:
    """Gateway and groups.

    Attributes:
        gateway: the gateway.
        address: HOST:PORT of its gRPC.
        groups: the group of each model.
    """

    gateway: Gateway
    address: str
    groups: list[Group]

    @property
    def url(self) -> str:
        """Base URL for clients of OpenAI's API."""
        return f"http://127.0.0.1:{self.gateway.http_port}/v1"


@asynccontextmanager
async def fronted_groups(
    models: Sequence[ServedModel], config: GatewayConfig
) -> AsyncIterator[FrontedGroups]:
    """Serve the models until the block ends."""
    with ExitStack() as engines:
        groups = [engines.enter_context(running(model.config)) for model in models]
        async with AsyncExitStack() as links:
            addresses = []
            for model, group in zip(models, groups, strict=True):
                card = model.make_card(group.engine.config)
                link = LinkServer(group.engine, card)
                group.take = link.on_outputs  # type: ignore[method-assign]
                addresses.append(GroupAddress(card.group, card.model, await link.start()))
                links.push_async_callback(link.stop, 0.5)
            gateway = Gateway(config)
            port = await gateway.start()
            links.push_async_callback(gateway.stop, 0.5)
            await gateway.set_groups(addresses)
            await eventually_async(lambda: len(gateway.linked()) == len(models), 60)
            yield FrontedGroups(gateway, f"127.0.0.1:{port}", groups)
