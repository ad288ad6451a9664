"""A gateway on Ray Serve: the router's own gRPC and HTTP servers in a replica's event loop.

Follows the registry: a group that registers or is lost is known to the gateway within
milliseconds. No request passes through Serve's own proxies, unless the application is run with
Serve's own commands (`serve run`): then Serve's HTTP proxy reaches the same HTTP application.

Knows the life of a gateway; knows nothing of requests.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import ray
from fastapi import FastAPI

from arriero.cluster import registry
from arriero.cluster.history import Failure
from arriero.cluster.slices import node_address
from arriero.cluster.spec import GatewaySpec, TlsSpec, TracingSpec
from arriero.router.gateway import Gateway, GroupAddress
from arriero.shards.errors import SpecError

RETRY_S = 0.5
DEMAND_S = 0.5


@dataclass(frozen=True, kw_only=True, slots=True)
class GatewaySettings:
    """What a gateway needs to know: its parts of the spec, and of the models.

    Attributes:
        spec, link_tls, tracing: parts of the spec.
        models: their names.
        wake_s: see `GatewayConfig`.
    """

    spec: GatewaySpec
    models: tuple[str, ...]
    link_tls: TlsSpec | None = None
    tracing: TracingSpec | None = None
    wake_s: Mapping[str, float] = field(default_factory=dict)


class GatewayReplica:
    """The Serve replica around one `Gateway`.

    `leaders` are the handles that tie the groups' deployments into the application; requests do
    not go through them.
    """

    async def __init__(self, settings: GatewaySettings, *leaders: Any) -> None:  # type: ignore[misc]  # noqa: ANN401
        self._id = uuid.uuid4().hex[:8]
        self._spec = settings.spec
        self._registry = registry.connect()
        http = self._spec.http
        try:
            config = self._spec.config(
                settings.models, settings.link_tls, settings.tracing, settings.wake_s
            )
            self._gateway = Gateway(config, self._on_lost)
            port = await self._gateway.start()
        except (OSError, SpecError) as error:
            failure = Failure(who="gateway", kind="SpecError", cause=str(error))
            await self._registry.fail.remote(failure)
            raise
        self._address = _reachable(self._spec.host, port)
        http_port = self._gateway.http_port
        self._http = None if http is None or not http_port else _reachable(http.host, http_port)
        self._following = asyncio.create_task(self._follow())
        self._telling = asyncio.create_task(self._tell_demand())

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Called by Serve once: what its own HTTP proxy, if there is one, passes requests to."""
        return self._gateway.app()

    async def check_health(self) -> None:
        """Called by Serve each period; raising has the replica replaced."""
        if self._following.done():
            self._following.result()

    async def __del__(self) -> None:
        """Called by Serve once, when the replica is told to stop."""
        self._following.cancel()
        self._telling.cancel()
        with contextlib.suppress(ray.exceptions.RayError):
            await self._registry.gateway.remote(self._id, None)
        await self._gateway.stop(self._spec.drain_s)

    async def _follow(self) -> None:
        version = -1
        while True:
            try:
                await self._registry.gateway.remote(
                    self._id, self._address, self._http, os.getpid()
                )
                board = await self._registry.changed.remote(version)
            except ray.exceptions.RayError:
                await asyncio.sleep(RETRY_S)  # it is being restarted; the groups known serve on
                continue
            version = board.version
            await self._gateway.set_groups(
                [
                    GroupAddress(one.group_id, one.model, one.address, one.link_token)
                    for one in board.groups
                ],
                fenced=board.fenced,
            )

    async def _tell_demand(self) -> None:
        """Tell what waits here, for as long as anything does."""
        told = False
        while True:
            await asyncio.sleep(DEMAND_S)
            waiting = self._gateway.demand()
            if waiting or told:
                self._registry.demand.remote(self._id, waiting)
            told = bool(waiting)

    def _on_lost(self, group_id: str, cause: str) -> None:
        # no answer is waited for: if the registry is away just now, leases do its work
        self._registry.suspect.remote(group_id, cause)


def _reachable(host: str, port: int) -> str:
    """The address that clients use; a listener on every interface is reached at its node's."""
    return f"{node_address() if host in ('0.0.0.0', '[::]') else host}:{port}"
