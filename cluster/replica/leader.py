"""A replica group on Ray Serve: the leader's replica, which owns the slices.

After any loss the leader records the first cause, and ends its own process and the slices'
processes; Serve notices the end and replaces the whole group.

Knows the life of a group; knows nothing of requests (router) or of steps (shards).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

import ray

from arriero.cluster.hosts import nodes
from arriero.cluster.hosts.log_level import set_log_level
from arriero.cluster.hosts.nodes import node_address
from arriero.cluster.registry import registry
from arriero.cluster.registry.history import Failure
from arriero.cluster.registry.snapshot import GroupEntry
from arriero.cluster.replica import standby
from arriero.cluster.replica.group_settings import GroupSettings
from arriero.cluster.replica.group_slices import GroupSlices
from arriero.cluster.spec.live_settings import LiveSettings
from arriero.shards.errors import ArrieroError, GroupFailed
from arriero.shards.protocol.failure import KEEP_LINES, Evidence, FirstCause, Kind

if TYPE_CHECKING:
    from arriero.cluster.replica.canary import Canary
    from arriero.router.link.server import LinkServer
    from arriero.router.observability.tracing import Tracing
    from arriero.router.text.model_card import ModelCard
    from arriero.shards.checkpoint.formats.scheme import QuantScheme
    from arriero.shards.config.group import GroupConfig
    from arriero.shards.engine.engine import Engine
    from arriero.shards.engine.types import EngineConfig, SequenceOutput
    from arriero.shards.layout.parts import AnyModel
    from arriero.shards.leader.remote_executor import Loading, RemoteExecutor

LEASE_PERIODS = 5
LOG_TIMEOUT_S = 1.0
"""Longest wait for the last log lines of a lost slice; the loss is recorded only after."""
RECORD_TIMEOUT_S = 3.0
"""Longest wait for the registry to record a failure."""


class Leader:
    """The Serve replica that leads a group; ready after a token has passed through every slice."""

    async def __init__(self, settings: GroupSettings) -> None:  # type: ignore[misc]  # Serve awaits it
        set_log_level(settings.log_level)
        self._settings = settings
        self._live_version = 0
        self._registry = registry.connect()
        self._loop = asyncio.get_running_loop()
        self._epoch = 0
        self._group_id = settings.seat
        self._failure: str | None = None
        self._slices = GroupSlices(settings)
        self._background: list[asyncio.Task[None]] = []
        self._executor: RemoteExecutor | None = None
        self._engine: Engine | None = None
        self._link: LinkServer | None = None
        self._tracing: Tracing | None = None
        self._link_token = secrets.token_hex(32)  # a new token for each leader
        self._canary: Canary | None = None
        self._entry: GroupEntry | None = None
        self._standby: asyncio.Task[None] | None = None
        self._percent_loaded = -1
        self._serving = False
        self._closing = False
        try:
            async with asyncio.timeout(settings.start_timeout_s):
                self._epoch = await self._registry.next_epoch.remote(settings.seat)
                self._group_id = f"{settings.seat}.{self._epoch}"
                self._report("placing slices")
                await self._slices.place()
                if not await self._registry.wait_for_promotion.remote(settings.seat, 0.0):
                    self._standby = asyncio.create_task(self._stand_by())
                    return
                await self._start()
        except BaseException as error:
            if self._closing:  # errors after a stop are no failure
                raise GroupFailed("the group was stopped during its start") from None
            text = self._start_error(error)
            await self._record_failure(type(error).__name__, text, await self._first_cause())
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
            await self._registry.unregister.remote(self._group_id)

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
            self._report("standing by")
            await standby.until_promoted(
                self._registry,
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
        """Load the model on all slices, generate a token, open the link, and register."""
        started_s = time.monotonic()
        # late imports: meanwhile the slices import torch
        import arriero.router.text.model_card  # noqa: F401
        from arriero.shards.checkpoint.formats.describe import describe
        from arriero.shards.checkpoint.remote import local_folder
        from arriero.shards.engine.config import engine_config

        path = self._settings.config.model_path
        folder = await asyncio.to_thread(local_folder, path, weights=False)
        model, scheme = describe(folder)
        config = await self._load(model, scheme, started_s)
        digest = await self._slices.actors[0].digest.remote(path)
        limits = engine_config(config, model, digest)
        card = self._card(folder, config, model, limits, digest)
        address = await self._open(limits, card)
        self._entry = self._registry_entry(address, card.compat_key)
        if await self._renew() is None:
            raise GroupFailed(f"{self._group_id} was fenced or replaced during the start")
        addresses = {location.node_id: location.address for location in self._slices.locations}
        addresses[self._entry.node_id] = self._entry.node
        self._background = [
            asyncio.create_task(self._keep_renewing()),
            asyncio.create_task(self._draw_when_idle()),
            *(asyncio.create_task(self._watch_node(*node)) for node in addresses.items()),
        ]

    async def _load(
        self, model: AnyModel, scheme: QuantScheme | None, started_s: float
    ) -> GroupConfig:
        """Start the executor and the slices' runs, and wait until every slice has loaded.

        Args:
            model: config of the model.
            scheme: quantization of the checkpoint; None for plain weights.
            started_s: start of the group, on the monotonic clock.

        Returns:
            The resolved config.
        """
        from arriero.cluster.planner.kv_room import needs_room, with_kv_blocks
        from arriero.shards.layout.resolve import resolve
        from arriero.shards.leader.remote_executor import RemoteExecutor

        config = self._slices.with_threads(self._settings.config)
        if needs_room(config):
            self._report("reading the free memory of the GPUs")
            config = with_kv_blocks(config, model, scheme, await self._slices.free_bytes())
        config = resolve(config, model)
        executor = self._executor = RemoteExecutor(
            config,
            self._slices.link_host(),
            limits=self._settings.limits,
            on_lost=self._on_lost,
        )
        self._slices.run(executor)
        left_s = self._settings.start_timeout_s - (time.monotonic() - started_s)
        await asyncio.to_thread(executor.wait_ready, left_s, self._on_loaded)
        return config

    def _card(
        self,
        folder: Path,
        config: GroupConfig,
        model: AnyModel,
        limits: EngineConfig,
        digest: str,
    ) -> ModelCard:
        """The description of the group for gateways."""
        from arriero.router.text.model_card import ModelCard
        from arriero.shards.kv.blocks import model_root
        from arriero.shards.kv.host_id import host_name
        from arriero.shards.model_config.llama4 import Llama4Config

        vision = model.vision if isinstance(model, Llama4Config) else None
        return ModelCard.from_folder(
            folder,
            model=self._settings.model,
            group=self._group_id,
            layout=self._settings.layout,
            digest=digest,
            max_model_len=limits.max_model_len,
            vocab_size=limits.vocab_size,
            bos_token_id=model.bos_token_id,
            eos_token_ids=limits.eos_token_ids,
            max_sequences=limits.max_sequences,
            numerics=self._settings.numerics,
            epoch=self._epoch,
            cache_root=model_root(limits.cache_salt) if limits.prefix_cache else b"",
            block_size=limits.block_size,
            memory=host_name() if config.tiers.host_bytes else "",
            image_tile=0 if vision is None else vision.image_size,
            image_features=0 if vision is None else vision.features_per_tile,
        )

    def _registry_entry(self, address: str, digest: str) -> GroupEntry:
        locations = self._slices.locations
        return GroupEntry(
            group_id=self._group_id,
            model=self._settings.model,
            address=address,
            seat=self._settings.seat,
            epoch=self._epoch,
            revision=self._settings.revision,
            digest=digest,
            layout=self._settings.layout,
            node=node_address(),
            node_id=ray.get_runtime_context().get_node_id(),
            pid=os.getpid(),
            slice_pids=tuple(location.pid for location in locations),
            link_token=self._link_token,
            slice_nodes=tuple(location.address for location in locations),
            slice_node_ids=tuple(location.node_id for location in locations),
        )

    async def _open(self, limits: EngineConfig, card: ModelCard) -> str:
        """Start the engine, generate a token, open the link; returns the address of the link."""
        from arriero.cluster.replica.canary import Canary
        from arriero.cluster.replica.kv_admin import KvAdminHandler
        from arriero.router.directory.journal import Journal
        from arriero.router.link.leader_rpc import PeerGroups
        from arriero.router.link.server import LinkServer
        from arriero.router.observability.tracing import Tracing
        from arriero.shards.engine.engine import Engine

        assert self._executor is not None

        def on_outputs(outputs: Sequence[SequenceOutput]) -> None:
            canary.take(outputs)
            if self._link is not None:
                self._link.on_outputs(outputs)

        def on_failure(error: Exception) -> None:
            self._on_lost(str(error))

        journal = Journal((limits.num_blocks + limits.tiers.num_blocks) * limits.num_dp_ranks)
        engine = self._engine = Engine(
            limits, self._executor, on_outputs, on_failure=on_failure, on_event=journal.note
        )
        canary = self._canary = Canary(engine)
        engine.start()
        self._report("first token")
        await canary.draw()
        tls, tracing = self._settings.link_tls, self._settings.tracing
        self._tracing = Tracing.from_config(
            "arriero-leader", None if tracing is None else tracing.config()
        )
        self._link = LinkServer(
            engine,
            card,
            f"{node_address()}:0",
            token=self._link_token,
            tls=None if tls is None else tls.files().link_server("link_tls"),
            tracing=self._tracing,
            kv=KvAdminHandler(engine, canary, card).answer,
            journal=journal,
            peers=PeerGroups(None if tls is None else tls.files().link_client("link_tls")),
        )
        return str(await self._link.start())

    async def _watch_node(self, node_id: str, address: str) -> None:
        """Wait for the loss of a node of this group."""
        await nodes.until_gone(node_id)
        assert self._executor is not None, "the executor exists before nodes are watched"
        summary = f"node {address} is gone: its raylet does not answer"
        self._executor.report(Evidence(kind=Kind.CRASH, summary=summary, node=address))

    def _on_lost(self, cause: str) -> None:
        """The group is lost; called from any thread, perhaps more than once."""
        self._loop.call_soon_threadsafe(self._lost, cause)

    def _lost(self, cause: str) -> None:
        if self._failure is not None or self._closing:
            return
        self._failure = cause
        if self._canary is not None:
            self._canary.give_up(GroupFailed(cause))
        if self._serving:
            self._ending = asyncio.create_task(self._end(cause))

    async def _end(self, cause: str, kind: str = GroupFailed.__name__) -> None:
        """Record the first cause, and end all processes, so that no half-dead group answers."""
        try:
            record = await self._first_cause()
            if record is not None:
                cause = record.cause.summary
            await asyncio.wait_for(self._record_failure(kind, cause, record), RECORD_TIMEOUT_S)
        finally:
            with contextlib.suppress(Exception):  # after any error this process must end
                await self._slices.kill()
            os._exit(1)

    async def _first_cause(self) -> FirstCause | None:
        """The first cause, with the last log lines of the slice that failed first."""
        if self._executor is None:
            return None
        record = await asyncio.to_thread(self._executor.first_cause)
        if record is None or record.cause.rank is None:  # no failure of a slice
            return record
        lines = await self._slices.log_tail(record.cause.rank, KEEP_LINES, LOG_TIMEOUT_S)
        log = tuple(dict.fromkeys((*record.cause.log, *lines)))[-KEEP_LINES:]
        return replace(record, cause=replace(record.cause, log=log))

    async def _record_failure(
        self, kind: str, cause: str, record: FirstCause | None = None
    ) -> None:
        failure = Failure(
            who=self._group_id,
            kind=kind,
            cause=cause,
            seat=self._settings.seat,
            record=None if record is None else record.to_wire(),
        )
        await self._registry.fail.remote(failure)

    async def _keep_renewing(self) -> None:
        while self._failure is None:
            await asyncio.sleep(self._settings.period_s)
            # the registry may restart meanwhile: a lease lasts several periods
            with contextlib.suppress(ray.exceptions.RayError):
                version = await self._renew()
                if version is None:
                    self._on_lost("the group was silent, and was fenced or replaced")
                elif version != self._live_version:
                    self._apply_live(await self._registry.live.remote())

    def _apply_live(self, live: LiveSettings | None) -> None:
        """Apply settings that `reload` changed while the group runs."""
        if live is None:
            return
        self._live_version = live.version
        self._settings = replace(self._settings, limits=live.health, canary_s=live.canary_s)
        if self._executor is not None:
            self._executor.set_limits(live.health)
        set_log_level(live.log_level)
        self._slices.set_log_level(live.log_level)

    async def _renew(self) -> int | None:
        """Renew the registry entry.

        Returns:
            The version of the live settings; None when the registry has fenced the group.
        """
        assert self._engine is not None and self._entry is not None
        phase = "draining" if self._closing else "serving"
        entry = replace(self._entry, stats=asdict(self._engine.stats()), phase=phase)
        lease_s = LEASE_PERIODS * self._settings.period_s
        version: int | None = await self._registry.register.remote(entry, lease_s)
        return version

    async def _draw_when_idle(self) -> None:
        """Generate a test token after each `canary_s` seconds without a step."""
        assert self._engine is not None and self._canary is not None
        while self._failure is None and not self._closing:
            steps = self._engine.stats().steps
            await asyncio.sleep(self._settings.canary_s)
            if self._engine.stats().steps == steps and not self._closing:
                limit_s = self._settings.limits.step_s
                try:
                    async with asyncio.timeout(limit_s):
                        await self._canary.draw()
                except (ArrieroError, TimeoutError) as error:
                    cause = str(error) or f"no answer in {limit_s:g} s"
                    self._on_lost(f"the canary token did not come: {cause}")

    def _report(self, text: str) -> None:
        """Report the progress of the start to the registry."""
        self._registry.report.remote(self._group_id, text)

    def _on_loaded(self, loading: Loading) -> None:
        percent = int(loading.share * 100)
        if percent != self._percent_loaded:
            self._percent_loaded = percent
            self._report(str(loading))

    async def _close(self) -> None:
        """Drain, stop engine and slices, and end the slices' processes."""
        self._closing = True
        self._slices.expect_end()
        if self._standby is not None:
            self._standby.cancel()
        drain_s = self._settings.drain_s if self._failure is None else 0.0
        if self._link is not None:
            with contextlib.suppress(ray.exceptions.RayError):
                await self._renew()  # from now on gateways send no requests
            await self._link.stop(drain_s)
        for task in self._background:
            task.cancel()
        if self._engine is not None:
            await asyncio.to_thread(self._engine.stop)
        if self._executor is not None:
            await asyncio.to_thread(self._executor.close)
        await self._slices.close()
        if self._tracing is not None:
            await asyncio.to_thread(self._tracing.close)
