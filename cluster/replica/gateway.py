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
from dataclasses import dataclass, field, replace
from typing import Any

import ray
from fastapi import FastAPI

from arriero.cluster.hosts.log_level import set_log_level
from arriero.cluster.hosts.nodes import reachable
from arriero.cluster.registry import registry
from arriero.cluster.registry.history import Failure
from arriero.cluster.registry.snapshot import GatewayEntry
from arriero.cluster.spec.gateway import GatewaySpec, TlsSpec, TracingSpec
from arriero.cluster.spec.live_settings import LiveSettings
from arriero.router.gateway import Gateway, GroupAddress
from arriero.shards.errors import CheckpointError, SpecError

RETRY_S = 0.5
DEMAND_S = 0.5


@dataclass(frozen=True, kw_only=True, slots=True)
class GatewaySettings:
    """What a gateway needs to know: its parts of the spec, and of the models.

    Attributes:
        spec, link_tls, tracing: parts of the spec.
        models: their names.
        wake_s: see `GatewayConfig`.
        log_level: see the spec.
    """

    spec: GatewaySpec
    models: tuple[str, ...]
    link_tls: TlsSpec | None = None
    tracing: TracingSpec | None = None
    wake_s: Mapping[str, float] = field(default_factory=dict)
    log_level: str = "warning"


class GatewayReplica:
    """The Serve replica around one `Gateway`.

    `leaders` are the handles that tie the groups' deployments into the application; requests do
    not go through them.
    """

    async def __init__(self, settings: GatewaySettings, *leaders: Any) -> None:  # type: ignore[misc]  # noqa: ANN401
        set_log_level(settings.log_level)
        self._live_version = 0
        self._id = uuid.uuid4().hex[:8]
        self._spec = settings.spec
        self._registry = registry.connect()
        self._entry: GatewayEntry | None = None
        self._slots: dict[str, str] = {}  # by group
        self._told_faults: set[str] = set()
        self._leaving = False
        http = self._spec.http
        try:
            config = self._spec.config(
                settings.models, settings.link_tls, settings.tracing, settings.wake_s
            )
            self._gateway = Gateway(config, self._on_lost, on_change=self._on_change)
            port = await self._gateway.start()
        except (OSError, SpecError) as error:
            failure = Failure(who="gateway", kind="SpecError", cause=str(error))
            await self._registry.fail.remote(failure)
            raise
        http_port = self._gateway.http_port
        self._entry = GatewayEntry(
            id=self._id,
            address=reachable(self._spec.host, port),
            http="" if http is None or not http_port else reachable(http.host, http_port),
            pid=os.getpid(),
            node_id=ray.get_runtime_context().get_node_id(),
        )
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
        self._leaving = True
        self._following.cancel()
        self._telling.cancel()
        with contextlib.suppress(ray.exceptions.RayError):
            await self._registry.gateway_gone.remote(self._id)
        await self._gateway.stop(self._spec.drain_s)

    async def _follow(self) -> None:
        version = -1
        while True:
            try:
                await self._registry.gateway.remote(self._entry)
                snapshot = await self._registry.changed.remote(version)
            except ray.exceptions.RayError:
                await asyncio.sleep(RETRY_S)  # it is being restarted; the groups known serve on
                continue
            version = snapshot.version
            self._take(snapshot.live)
            self._slots = {one.group_id: one.seat for one in snapshot.groups}
            await self._gateway.set_groups(
                [
                    GroupAddress(one.group_id, one.model, one.address, one.link_token)
                    for one in snapshot.groups
                ],
                fenced=snapshot.fenced,
            )

    def _take(self, live: LiveSettings | None) -> None:
        """Take settings that were changed while this gateway runs."""
        if live is None or live.version == self._live_version:
            return
        self._live_version = live.version
        set_log_level(live.log_level)
        self._gateway.reload(
            tenants=live.tenants, limits=live.queue, lost_s=live.lost_s, wake_s=live.wake_s
        )

    async def _tell_demand(self) -> None:
        """Tell what waits here, for as long as anything does, and groups that cannot be used."""
        told = False
        while True:
            await asyncio.sleep(DEMAND_S)
            self._tell_faults()
            waiting = self._gateway.demand()
            if waiting or told:
                self._registry.demand.remote(self._id, waiting)
            told = bool(waiting)

    def _tell_faults(self) -> None:
        """Tell once of each group that serves but that no request can reach through here."""
        for group_id, cause in self._gateway.faults().items():
            if group_id in self._told_faults:
                continue
            self._told_faults.add(group_id)
            failure = Failure(
                who=f"{group_id} at gateway {self._id}",
                kind=CheckpointError.__name__,
                cause=cause,
                seat=self._slots.get(group_id, ""),
            )
            self._registry.fail.remote(failure)

    def _on_change(self) -> None:
        linked = self._gateway.linked()
        if self._entry is None or self._leaving:
            return
        if linked != self._entry.linked:
            self._entry = replace(self._entry, linked=linked)
            self._registry.gateway.remote(self._entry)

    def _on_lost(self, group_id: str, cause: str) -> None:
        # no answer is waited for: if the registry is away just now, leases do its work
        self._registry.suspect.remote(group_id, cause)
