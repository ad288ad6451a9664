"""A gateway on Ray Serve: the router's own gRPC server in a replica's event loop.

Follows the registry: a group that registers or is lost is known to the gateway within
milliseconds. No request passes through Serve's own proxies.

Knows the life of a gateway; knows nothing of requests.
"""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from dataclasses import dataclass
from typing import Any

import ray

from arriero.cluster import registry
from arriero.cluster.slices import node_address
from arriero.cluster.spec import GatewaySpec
from arriero.router.gateway import Gateway, GatewayConfig, GroupAddress

RETRY_S = 0.5


@dataclass(frozen=True, kw_only=True, slots=True)
class GatewaySettings:
    """What a gateway needs to know: its part of the spec."""

    spec: GatewaySpec


class GatewayReplica:
    """The Serve replica around one `Gateway`.

    `leaders` are the handles that tie the groups' deployments into the application; requests do
    not go through them.
    """

    async def __init__(self, settings: GatewaySettings, *leaders: Any) -> None:  # type: ignore[misc]  # noqa: ANN401
        self._id = uuid.uuid4().hex[:8]
        self._spec = settings.spec
        self._registry = registry.connect()
        self._gateway = Gateway(GatewayConfig(address=f"{self._spec.host}:{self._spec.port}"))
        try:
            port = await self._gateway.start()
        except OSError as error:
            failure = registry.Failure(who="gateway", kind="SpecError", cause=str(error))
            await self._registry.fail.remote(failure)
            raise
        wildcard = self._spec.host in ("0.0.0.0", "[::]")
        self._address = f"{node_address() if wildcard else self._spec.host}:{port}"
        self._following = asyncio.create_task(self._follow())

    async def check_health(self) -> None:
        """Called by Serve each period; raising has the replica replaced."""
        if self._following.done():
            self._following.result()

    async def __del__(self) -> None:
        """Called by Serve once, when the replica is told to stop."""
        self._following.cancel()
        with contextlib.suppress(ray.exceptions.RayError):
            await self._registry.gateway.remote(self._id, None)
        await self._gateway.stop(self._spec.drain_s)

    async def _follow(self) -> None:
        version = -1
        while True:
            try:
                await self._registry.gateway.remote(self._id, self._address)
                board = await self._registry.changed.remote(version)
            except ray.exceptions.RayError:
                await asyncio.sleep(RETRY_S)  # it is being restarted; the groups known serve on
                continue
            version = board.version
            await self._gateway.set_groups(
                [
                    GroupAddress(group_id=one.group_id, model=one.model, address=one.address)
                    for one in board.groups
                ]
            )
