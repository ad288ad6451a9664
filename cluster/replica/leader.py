"""A replica group on Ray Serve: the leader's replica, which owns the slices.

After any loss the leader records the first cause, and ends its own process and the slices'
processes; Serve notices the end and replaces the whole group.

Knows the life of a group; knows nothing of the parts that serve (`serving_group`), of requests
(router) or of steps (shards).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time

import ray

from arriero.cluster.hosts import nodes, ray_private
from arriero.cluster.hosts.log_level import set_log_level
from arriero.cluster.registry import registry
from arriero.cluster.replica import standby
from arriero.cluster.replica.group_settings import GroupSettings
from arriero.cluster.replica.group_slices import GroupSlices
from arriero.cluster.replica.registration import Registration
from arriero.cluster.replica.serving_group import ServingGroup
from arriero.cluster.spec.live_settings import LiveSettings
from arriero.shards.errors import GroupFailed
from arriero.shards.protocol.failure import Evidence, Kind

RECORD_TIMEOUT_S = 3.0
"""Longest wait for the registry to record a failure."""


class Leader:
    """The Serve replica that leads a group; ready after a token has passed through every slice."""

    async def __init__(self, settings: GroupSettings) -> None:  # type: ignore[misc]  # Serve awaits it
        set_log_level(settings.log_level, settings.log_format)
        ray_private.bind_replica_server(nodes.node_address())
        self._settings = settings
        self._loop = asyncio.get_running_loop()
        self._registration = Registration(registry.connect(), settings)
        self._slices = GroupSlices(settings)
        self._group = ServingGroup(settings, self._slices, self._registration, self._on_lost)
        self._background: list[asyncio.Task[None]] = []
        self._standby: asyncio.Task[None] | None = None
        self._live_version = 0
        self._failure: str | None = None
        self._serving = False
        self._closing = False
        try:
            async with asyncio.timeout(settings.start_timeout_s):
                await self._registration.begin()
                self._registration.report("placing slices")
                await self._slices.place()
                self._registration.report_processes(self._slices.locations)
                if not await self._registration.is_promoted():
                    self._standby = asyncio.create_task(self._stand_by())
                    return
                await self._start()
        except BaseException as error:
            if self._closing:  # errors after a stop are no failure
                raise GroupFailed("the group was stopped during its start") from None
            text = self._start_error(error)
            first_cause = await self._group.first_cause()
            await self._registration.fail(type(error).__name__, text, first_cause)
            await self._close()
            # Serve shows the text of this error, and would show each chained error too
            raise GroupFailed(text) from None
        self._serving = True

    async def check_health(self) -> None:
        """Serve calls this method each period; after an error Serve replaces the replica.

        Raises:
            GroupFailed: the group is lost; the text is the first cause.
        """
        if self._failure is not None:
            raise GroupFailed(self._failure)

    async def __del__(self) -> None:
        """Serve calls this method once, at the stop of the replica: drains the group."""
        await self._close()
        with contextlib.suppress(ray.exceptions.RayError):
            await self._registration.end()

    def _start_error(self, error: BaseException) -> str:
        if isinstance(error, TimeoutError):
            return (
                f"no first token within `start_timeout_s`={self._settings.start_timeout_s:g};"
                " raise `health.start_timeout_s` if the model loads slowly"
            )
        return str(error) or f"{type(error).__name__} in the group's start"

    async def _stand_by(self) -> None:
        """Wait as a spare group, without device memory, until the promotion; then start."""
        settings = self._settings
        try:
            self._registration.report("standing by")
            await standby.until_promoted(
                self._registration.registry,
                settings.seat,
                self._slices.actors,
                settings.config.model_path,
                settings.limits.silence_s,
            )
            async with asyncio.timeout(settings.start_timeout_s):
                await self._start()
        except Exception as error:  # after any error the group is useless
            self._failure = self._start_error(error)
            await self._end(self._failure, type(error).__name__)
        self._serving = True

    async def _start(self) -> None:
        """Start the parts of the group, register, and watch the group from now on."""
        started_s = time.monotonic()
        address, digest = await self._group.start()
        slices = self._slices.locations
        if not await self._registration.register(
            address=address,
            digest=digest,
            link_token=self._group.link_token,
            slices=slices,
            stats=self._group.stats(),
            start_s=time.monotonic() - started_s,
        ):
            raise GroupFailed(
                f"{self._registration.group_id} was fenced or replaced during the start"
            )
        addresses = {location.node_id: location.address for location in slices}
        addresses[ray.get_runtime_context().get_node_id()] = nodes.node_address()
        self._background = [
            asyncio.create_task(self._keep_renewing()),
            asyncio.create_task(self._group.draw_when_idle()),
            *(asyncio.create_task(self._watch_node(*node)) for node in addresses.items()),
        ]

    async def _watch_node(self, node_id: str, address: str) -> None:
        """Wait for the loss of a node of this group."""
        await nodes.until_gone(node_id)
        summary = f"node {address} is gone: its raylet does not answer"
        self._group.report_loss(Evidence(kind=Kind.CRASH, summary=summary, node=address))

    def _on_lost(self, cause: str) -> None:
        """The group is lost; called from any thread, perhaps more than once."""
        self._loop.call_soon_threadsafe(self._lost, cause)

    def _lost(self, cause: str) -> None:
        if self._failure is not None or self._closing:
            return
        self._failure = cause
        self._group.give_up(cause)
        if self._serving:
            self._ending = asyncio.create_task(self._end(cause))

    async def _end(self, cause: str, kind: str = GroupFailed.__name__) -> None:
        """Record the first cause, and end all processes, so that no half-dead group answers."""
        try:
            record = await self._group.first_cause()
            if record is not None:
                cause = record.cause.summary
            await asyncio.wait_for(self._registration.fail(kind, cause, record), RECORD_TIMEOUT_S)
        finally:
            with contextlib.suppress(Exception):  # after any error this process must end
                await self._slices.kill()
            os._exit(1)

    async def _keep_renewing(self) -> None:
        while self._failure is None:
            await asyncio.sleep(self._settings.period_s)
            # the registry may restart meanwhile: a lease lasts several periods
            with contextlib.suppress(ray.exceptions.RayError):
                version = await self._renew()
                if version is None:
                    self._on_lost("the group was silent, and was fenced or replaced")
                elif version != self._live_version:
                    self._apply_live(await self._registration.live())

    async def _renew(self) -> int | None:
        """Renew the registry entry; see `Registration.renew`."""
        return await self._registration.renew(self._group.stats(), draining=self._closing)

    def _apply_live(self, live: LiveSettings | None) -> None:
        """Apply settings that `reload` changed while the group runs."""
        if live is None:
            return
        self._live_version = live.version
        self._group.apply_live(live)
        set_log_level(live.log_level, live.log_format)
        self._slices.set_log_level(live.log_level, live.log_format)

    async def _close(self) -> None:
        """Drain, stop engine and slices, and end the slices' processes."""
        self._closing = True
        self._group.expect_end()
        if self._standby is not None:
            self._standby.cancel()
        if self._registration.entry is not None:
            with contextlib.suppress(ray.exceptions.RayError):
                await self._renew()  # from now on gateways send no requests
        await self._group.drain(self._settings.drain_s if self._failure is None else 0.0)
        for task in self._background:
            task.cancel()
        await self._group.close()
