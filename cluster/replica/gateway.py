"""A gateway on Ray Serve: the router's gRPC and HTTP servers in the event loop of a replica.

The gateway follows the registry, and learns of new and lost groups within milliseconds. Requests
bypass Serve's proxies, except under Serve's own commands (`serve run`): then Serve's HTTP proxy
calls the same HTTP application.

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

from arriero.cluster.hosts import ray_private
from arriero.cluster.hosts.log_level import set_log_level
from arriero.cluster.hosts.nodes import node_address, reachable
from arriero.cluster.registry import registry
from arriero.cluster.registry.history import Failure
from arriero.cluster.registry.snapshot import GatewayEntry
from arriero.cluster.replica.adapter_changes import change_adapter, develop
from arriero.cluster.replica.console_reads import read_cluster
from arriero.cluster.replica.prompt_guard_service import RemotePromptGuard
from arriero.cluster.replica.response_archive import RemoteArchive
from arriero.cluster.spec.gateway import GatewaySpec, TlsSpec, TracingSpec
from arriero.cluster.spec.live_settings import LiveSettings
from arriero.router.gateway import Gateway, GroupAddress
from arriero.router.guards.injections import PROMPT_GUARD
from arriero.shards.errors import CheckpointError, SpecError

RETRY_S = 0.5
DEMAND_S = 0.5
SPEND_S = 1.0
CHECK_S, CHECK_TIMEOUT_S = 2.0, 5.0
"""Seconds between two checks of Prompt Guard, and seconds until a check without answer counts."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GatewaySettings:
    """Settings of a gateway, from the spec.

    Attributes:
        spec: section of the gateways.
        models: names of the models.
        link_tls: TLS files of the links to leaders; None for links without TLS.
        tracing: export of spans; None for none.
        wake_s: see `GatewayConfig`.
        log_level, log_format: level and form of the gateway's logs.
    """

    spec: GatewaySpec
    models: tuple[str, ...]
    link_tls: TlsSpec | None = None
    tracing: TracingSpec | None = None
    wake_s: Mapping[str, float] = field(default_factory=dict)
    log_level: str = "warning"
    log_format: str = "text"


class GatewayReplica:
    """The Serve replica around one `Gateway`.

    `leaders` are Serve handles that add the groups' deployments to the application; requests do
    not use the handles. `prompt_guard` is the handle of Prompt Guard, for a spec with one.
    """

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self,
        settings: GatewaySettings,
        *leaders: Any,  # noqa: ANN401
        prompt_guard: Any = None,  # noqa: ANN401
    ) -> None:
        set_log_level(settings.log_level, settings.log_format)
        ray_private.bind_replica_server(node_address())
        self._live_version = 0
        self._id = uuid.uuid4().hex[:8]
        self._spec = settings.spec
        self._registry = registry.connect()
        self._entry: GatewayEntry | None = None
        self._seats: dict[str, str] = {}  # by group id
        self._reported_groups: set[str] = set()
        self._stopping = False
        http = self._spec.http
        self._prompt_guard = None if prompt_guard is None else RemotePromptGuard(prompt_guard)
        try:
            config = self._spec.config(
                settings.models, settings.link_tls, settings.tracing, settings.wake_s
            )
            self._gateway = Gateway(
                config,
                self._on_lost,
                on_change=self._on_change,
                archive=RemoteArchive() if http is not None else None,
                change_adapter=change_adapter,
                develop=develop,
                read_cluster=read_cluster,
                score_texts=self._prompt_guard,
            )
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
        self._reporting = asyncio.create_task(self._report_demand())
        self._spending = asyncio.create_task(self._report_spending())
        self._checking = asyncio.create_task(self._check_prompt_guard())

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Serve calls this method once: the application for Serve's own HTTP proxy."""
        return self._gateway.app()

    async def check_health(self) -> None:
        """Serve calls this method each period; after an error Serve replaces the replica."""
        if self._following.done():
            self._following.result()

    async def __del__(self) -> None:
        """Serve calls this method once, at the stop of the replica."""
        self._stopping = True
        self._following.cancel()
        self._reporting.cancel()
        self._spending.cancel()
        self._checking.cancel()
        with contextlib.suppress(ray.exceptions.RayError):
            await self._registry.gateway_gone.remote(self._id)
        await self._gateway.stop(self._spec.drain_s)
        with contextlib.suppress(ray.exceptions.RayError):
            await self._spend()

    async def _follow(self) -> None:
        """Register, and link the groups of the registry, after every change."""
        version = -1
        while True:
            try:
                await self._registry.gateway.remote(self._entry)
                snapshot = await self._registry.changed.remote(version)
            except ray.exceptions.RayError:
                await asyncio.sleep(RETRY_S)  # the registry restarts; linked groups continue
                continue
            version = snapshot.version
            self._apply_live(snapshot.live)
            self._gateway.set_model_groups(snapshot.model_groups())
            self._seats = {group.group_id: group.seat for group in snapshot.groups}
            await self._gateway.set_groups(
                [
                    GroupAddress(group.group_id, group.model, group.address, group.link_token)
                    for group in snapshot.groups
                ],
                fenced=snapshot.fenced,
            )

    def _apply_live(self, live: LiveSettings | None) -> None:
        """Apply settings that `reload` changed while the gateway runs."""
        if live is None or live.version == self._live_version:
            return
        self._live_version = live.version
        set_log_level(live.log_level, live.log_format)
        self._gateway.reload(
            tenants=live.tenants,
            limits=live.queue,
            lost_s=live.lost_s,
            wake_s=live.wake_s,
            models=live.models,
        )

    async def _report_demand(self) -> None:
        """Report waiting requests and unusable groups to the registry, at regular times."""
        reported = False
        while True:
            await asyncio.sleep(DEMAND_S)
            self._report_faults()
            waiting = self._gateway.demand()
            if waiting or reported:  # the last report says that no request waits any more
                self._registry.demand.remote(self._id, waiting)
            reported = bool(waiting)

    async def _report_spending(self) -> None:
        """Share with all gateways what the tenants' budgets of the day have lost, and read it."""
        while True:
            if self._gateway.has_day_budgets:
                with contextlib.suppress(ray.exceptions.RayError):  # the registry restarts
                    await self._spend()
            await asyncio.sleep(SPEND_S)

    async def _check_prompt_guard(self) -> None:
        """Check at regular times whether Prompt Guard answers, for the metrics."""
        while self._prompt_guard is not None:
            up = await self._prompt_guard.is_up(CHECK_TIMEOUT_S)
            self._gateway.inference.metrics.guards.set_up(PROMPT_GUARD, up=up)
            await asyncio.sleep(CHECK_S)

    async def _spend(self) -> None:
        budgets = self._gateway.budgets
        day, spent = budgets.take()
        try:
            budgets.merge(day, await self._registry.spend.remote(day, spent))
        except ray.exceptions.RayError:
            budgets.give_back(day, spent)
            raise

    def _report_faults(self) -> None:
        """Report, once each, the serving groups that this gateway cannot use."""
        for group_id, cause in self._gateway.faults().items():
            if group_id in self._reported_groups:
                continue
            self._reported_groups.add(group_id)
            failure = Failure(
                who=f"{group_id} at gateway {self._id}",
                kind=CheckpointError.__name__,
                cause=cause,
                seat=self._seats.get(group_id, ""),
            )
            self._registry.fail.remote(failure)

    def _on_change(self) -> None:
        linked = self._gateway.linked()
        if self._entry is None or self._stopping:
            return
        if linked != self._entry.linked:
            self._entry = replace(self._entry, linked=linked)
            self._registry.gateway.remote(self._entry)

    def _on_lost(self, group_id: str, cause: str) -> None:
        # no wait for the answer: if the registry is unreachable, expired leases fence the group
        self._registry.suspect.remote(group_id, cause)
