"""A replica group on Ray Serve: the leader's replica, which owns its slices.

The replica's placement group holds one bundle for the leader, and then one for each S slices that
must be on one node; rank r is in bundle r // S + 1. Which node a bundle is on may change from start
to start, so ranks come from bundles alone. After any loss the leader tells the first cause and ends
its own process and its slices'; Serve sees that and replaces the whole group.

Knows the life of a group; knows nothing of requests (router) or of steps (shards).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import ray
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from arriero.cluster.hosts import nodes
from arriero.cluster.hosts.log_level import set_log_level
from arriero.cluster.hosts.nodes import node_address
from arriero.cluster.registry import registry
from arriero.cluster.registry.history import Failure
from arriero.cluster.registry.snapshot import GroupEntry
from arriero.cluster.replica import standby
from arriero.cluster.replica.slice_actor import SliceActor, SliceLocation
from arriero.cluster.spec.live_settings import LiveSettings
from arriero.shards.config.group import GroupConfig
from arriero.shards.errors import ArrieroError, CollectiveFailed, GroupFailed
from arriero.shards.leader.health import HealthLimits
from arriero.shards.protocol.failure import KEEP_LINES, Evidence, FirstCause, Kind

if TYPE_CHECKING:
    from arriero.cluster.replica.canary import Canary
    from arriero.cluster.spec.gateway import TlsSpec, TracingSpec
    from arriero.router.link.server import LinkServer
    from arriero.router.observability.tracing import Tracing
    from arriero.router.text.model_card import ModelCard
    from arriero.shards.engine.engine import Engine
    from arriero.shards.engine.types import EngineConfig, SequenceOutput
    from arriero.shards.leader.remote_executor import Loading, RemoteExecutor

LEASE_PERIODS = 5
STOP_LIMIT_S = 3.0
LOG_S = 1.0
"""How long a lost slice's last lines are waited for: nobody is told of the loss before."""
END_S = 3.0
"""How long the registry is waited for to take a failure in."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupSettings:
    """What a leader needs to know.

    Attributes:
        model: its name.
        seat: its place in the deployment; each life of it has an epoch of its own.
        revision: of the model's settings.
        config: of the group, device decided.
        cpus_per_slice: Ray's logical CPUs of each slice.
        slices_per_bundle: slices that are on one node together.
        period_s: between two renewals of the group's entry in the registry.
        start_timeout_s: limit of the whole start.
        drain_s: how long running streams may go on at the end.
        link_tls: of the link with gateways; None for one in the clear.
        tracing: where spans go; None makes none.
        canary_s: between two tokens drawn while idle.
        limits: how long a slice may be silent, and the group stuck.
        log_level: see the spec.
    """

    model: str
    seat: str
    revision: int
    config: GroupConfig
    cpus_per_slice: float
    slices_per_bundle: int
    period_s: float
    start_timeout_s: float
    drain_s: float
    canary_s: float
    limits: HealthLimits
    log_level: str = "warning"
    link_tls: TlsSpec | None = None
    tracing: TracingSpec | None = None

    @property
    def layout(self) -> str:
        """The mesh in words."""
        config = self.config
        lanes = f" dp{config.dp}" if config.dp > 1 else ""
        return f"tp{config.tp}{lanes} pp{config.pp}"

    @property
    def numerics(self) -> str:
        """What the weights are held and computed in, and what tokens see."""
        config = self.config
        return " ".join(filter(None, (config.dtype, config.quantization, config.window_words)))


class Leader:
    """The Serve replica that leads one group; ready once a token came through every slice."""

    async def __init__(self, settings: GroupSettings) -> None:  # type: ignore[misc]  # Serve awaits it
        set_log_level(settings.log_level)
        self._settings = settings
        self._live_version = 0
        self._registry = registry.connect()
        self._loop = asyncio.get_running_loop()
        self._epoch = 0
        self._group_id = settings.seat
        self._failure: str | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._keepers: list[asyncio.Task[None]] = []
        self._slices: list[Any] = []
        self._where: list[SliceLocation] = []
        self._executor: RemoteExecutor | None = None
        self._engine: Engine | None = None
        self._link: LinkServer | None = None
        self._tracing: Tracing | None = None
        self._link_token = secrets.token_hex(32)  # one for each life of a leader
        self._canary: Canary | None = None
        self._entry: GroupEntry | None = None
        self._standing: asyncio.Task[None] | None = None
        self._loaded = -1
        self._serving = False
        self._closing = False
        try:
            async with asyncio.timeout(settings.start_timeout_s):
                self._epoch = await self._registry.next_epoch.remote(settings.seat)
                self._group_id = f"{settings.seat}.{self._epoch}"
                self._say("placing slices")
                self._where = await self._place()
                if not await self._registry.wait_for_promotion.remote(settings.seat, 0.0):
                    self._standing = asyncio.create_task(self._stand_by())
                    return
                await self._start()
        except BaseException as error:
            if self._closing:  # what follows from that is no failure
                raise GroupFailed("told to stop while it started") from None
            text = self._why_not_started(error)
            await self._tell_failure(type(error).__name__, text, await self._first_cause())
            await self._close()
            # Serve tells this text, so it must be the cause itself; chains it would unroll
            raise GroupFailed(text) from None
        self._serving = True

    async def check_health(self) -> None:
        """Called by Serve each period; raising has the replica replaced.

        Raises:
            GroupFailed: the group is lost; the text is the first cause.
        """
        if self._failure is not None:
            raise GroupFailed(self._failure)

    async def __del__(self) -> None:
        """Called by Serve once, when the replica is told to stop: drains."""
        await self._close()
        with contextlib.suppress(ray.exceptions.RayError):
            await self._registry.unregister.remote(self._group_id)

    def _why_not_started(self, error: BaseException) -> str:
        if isinstance(error, TimeoutError):
            return f"no token within start_timeout_s={self._settings.start_timeout_s:g}"
        return str(error) or f"{type(error).__name__} in the group's start"

    async def _stand_by(self) -> None:
        """Be a spare: go as far as takes no memory of the devices, and on when it is our turn."""
        settings = self._settings
        try:
            self._say("standing by")
            await standby.until_turn(
                self._registry,
                settings.seat,
                self._slices,
                settings.config.model_path,
                settings.limits.silence_s,
            )
            async with asyncio.timeout(settings.start_timeout_s):
                await self._start()
        except Exception as error:  # whatever it is, this group is of no use
            self._failure = self._why_not_started(error)
            await self._end(self._failure, type(error).__name__)
        self._serving = True

    async def _start(self) -> None:
        begun_s = time.monotonic()
        where = self._where
        # imported only now: the slices import torch meanwhile
        from arriero.cluster.planner.kv_room import needs_room, sized
        from arriero.router.text.model_card import ModelCard
        from arriero.shards.checkpoint.formats.describe import describe
        from arriero.shards.checkpoint.remote import local_folder
        from arriero.shards.engine.config import engine_config
        from arriero.shards.kv.blocks import model_root
        from arriero.shards.kv.host_id import host_name
        from arriero.shards.layout.resolve import resolve
        from arriero.shards.leader.remote_executor import RemoteExecutor
        from arriero.shards.model_config.llama4 import Llama4Config

        where_it_is = self._settings.config.model_path
        folder = await asyncio.to_thread(local_folder, where_it_is, weights=False)
        model, scheme = describe(folder)
        config = _with_threads(self._settings.config, where)
        if needs_room(config):
            self._say("asking the GPUs for their memory")
            free = await asyncio.gather(*[one.free_bytes.remote() for one in self._slices])
            config = sized(config, model, scheme, free)
        config = resolve(config, model)
        host = self._link_host(where)
        executor = self._executor = RemoteExecutor(
            config, host, limits=self._settings.limits, on_lost=self._on_lost
        )
        for rank, (actor, at) in enumerate(zip(self._slices, where, strict=True)):
            run = actor.run.remote(rank, executor.endpoint, at.address)
            self._tasks.append(asyncio.create_task(self._watch(rank, at, run)))
        left_s = self._settings.start_timeout_s - (time.monotonic() - begun_s)
        await asyncio.to_thread(executor.wait_ready, left_s, self._on_loaded)
        digest = await self._slices[0].digest.remote(where_it_is)
        limits = engine_config(config, model, digest)
        vision = model.vision if isinstance(model, Llama4Config) else None
        card = ModelCard.from_folder(
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
        address = await self._lead(limits, card)
        self._entry = GroupEntry(
            group_id=self._group_id,
            model=self._settings.model,
            address=address,
            seat=self._settings.seat,
            epoch=self._epoch,
            revision=self._settings.revision,
            digest=card.compat_key,
            layout=self._settings.layout,
            node=node_address(),
            node_id=ray.get_runtime_context().get_node_id(),
            pid=os.getpid(),
            slice_pids=tuple(one.pid for one in where),
            link_token=self._link_token,
            slice_nodes=tuple(one.address for one in where),
            slice_node_ids=tuple(one.node_id for one in where),
        )
        if await self._renew() is None:
            raise GroupFailed(f"{self._group_id} was replaced while it started")
        places = {entry.node_id: entry.address for entry in where}
        places[self._entry.node_id] = self._entry.node
        self._keepers = [
            asyncio.create_task(self._keep_renewing()),
            asyncio.create_task(self._keep_drawing()),
            *(asyncio.create_task(self._watch_node(*place)) for place in places.items()),
        ]

    async def _place(self) -> list[SliceLocation]:
        """Start the slices in all bundles but the leader's; says where they are, by rank."""
        config = self._settings.config
        bundles = ray.util.get_current_placement_group()
        assert bundles is not None, "a leader runs in a placement group"
        actor = ray.remote(SliceActor)
        for rank in range(config.world_size):
            options = actor.options(
                num_cpus=self._settings.cpus_per_slice,
                num_gpus=1 if config.device == "cuda" else 0,
                max_restarts=0,
                enable_task_events=False,
                max_concurrency=2,  # a run, and what is asked meanwhile
                scheduling_strategy=PlacementGroupSchedulingStrategy(
                    placement_group=bundles,
                    placement_group_bundle_index=rank // self._settings.slices_per_bundle + 1,
                ),
            )
            self._slices.append(options.remote(self._settings.log_level))
        return list(await asyncio.gather(*[one.location.remote() for one in self._slices]))

    def _link_host(self, where: Sequence[SliceLocation]) -> str | None:
        """None while every slice is on the leader's node, else the address to bind to."""
        here = ray.get_runtime_context().get_node_id()
        if all(one.node_id == here for one in where):
            return None
        return node_address()

    async def _lead(self, limits: EngineConfig, card: ModelCard) -> str:
        """Start the engine, draw a token, open the link; returns the link's address."""
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
        self._say("first token")
        await canary.draw()
        tls, traced = self._settings.link_tls, self._settings.tracing
        tracing = None if traced is None else traced.config()
        self._tracing = Tracing.from_config("arriero-leader", tracing)
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

    async def _watch(self, rank: int, at: SliceLocation, run: Any) -> None:  # noqa: ANN401
        """Wait for the end of a slice's run, which is a failure unless we are closing."""
        which = f"slice {rank} (pid {at.pid} on {at.address})"
        kind = Kind.CRASH
        try:
            await run
            what = f"{which} stopped"
        except ray.exceptions.RayTaskError as error:  # it has told so itself, and more
            kind = Kind.ABORTED if isinstance(error.cause, CollectiveFailed) else Kind.ERROR
            what = f"{which} failed: {error.cause}"
        except ray.exceptions.RayError:
            what = f"{which} died"
        if self._closing:
            return
        if kind is Kind.CRASH and await asyncio.to_thread(nodes.is_gone, at.node_id):
            what = f"node {at.address} is gone (its raylet does not answer), and with it {which}"
        assert self._executor is not None, "slices run for an executor"
        self._executor.report(
            Evidence(kind=kind, summary=what, rank=rank, node=at.address, pid=at.pid)
        )

    async def _watch_node(self, node_id: str, address: str) -> None:
        """Wait for the end of a node that this group is on."""
        await nodes.until_gone(node_id)
        assert self._executor is not None, "it is there before the nodes are watched"
        what = f"node {address} is gone: its raylet does not answer"
        self._executor.report(Evidence(kind=Kind.CRASH, summary=what, node=address))

    def _on_lost(self, cause: str) -> None:
        """The group is lost; called from any thread, and perhaps more than once."""
        self._loop.call_soon_threadsafe(self._begin_end, cause)

    def _begin_end(self, cause: str) -> None:
        if self._failure is not None or self._closing:
            return
        self._failure = cause
        if self._canary is not None:
            self._canary.give_up(GroupFailed(cause))
        if self._serving:
            self._ending = asyncio.create_task(self._end(cause))

    async def _end(self, cause: str, kind: str = GroupFailed.__name__) -> None:
        """Tell the first cause, and end this process and the slices': no zombie answers."""
        try:
            record = await self._first_cause()
            if record is not None:
                cause = record.cause.summary
            await asyncio.wait_for(self._tell_failure(kind, cause, record), END_S)
        finally:
            places = [(one.node_id, one.pid) for one in self._where]
            with contextlib.suppress(Exception):  # whatever it is, this process must end
                await nodes.kill_all(places)
            os._exit(1)

    async def _first_cause(self) -> FirstCause | None:
        """The record, with the last lines that the process itself wrote."""
        if self._executor is None:
            return None
        record = await asyncio.to_thread(self._executor.first_cause)
        if record is None or record.cause.rank is None:  # not a slice's
            return record
        at = self._where[record.cause.rank]
        written = await nodes.log_tail(at.node_id, at.pid, KEEP_LINES, LOG_S)
        log = tuple(dict.fromkeys((*record.cause.log, *written)))[-KEEP_LINES:]
        return replace(record, cause=replace(record.cause, log=log))

    async def _tell_failure(self, kind: str, cause: str, record: FirstCause | None = None) -> None:
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
            # a registry that is being restarted comes back; leases outlast a few periods
            with contextlib.suppress(ray.exceptions.RayError):
                version = await self._renew()
                if version is None:
                    self._on_lost("it was replaced while it was silent")
                elif version != self._live_version:
                    self._take(await self._registry.live.remote())

    def _take(self, live: LiveSettings | None) -> None:
        """Take settings that were changed while this group runs."""
        if live is None:
            return
        self._live_version = live.version
        self._settings = replace(self._settings, limits=live.health, canary_s=live.canary_s)
        if self._executor is not None:
            self._executor.set_limits(live.health)
        set_log_level(live.log_level)
        for actor in self._slices:
            actor.set_log_level.remote(live.log_level)

    async def _renew(self) -> int | None:
        """Renew the entry; gives the live settings' version, None when it has been replaced."""
        assert self._engine is not None and self._entry is not None
        phase = "draining" if self._closing else "serving"
        entry = replace(self._entry, stats=asdict(self._engine.stats()), phase=phase)
        lease_s = LEASE_PERIODS * self._settings.period_s
        version: int | None = await self._registry.register.remote(entry, lease_s)
        return version

    async def _keep_drawing(self) -> None:
        """Draw a token whenever nothing else went through the slices for a while."""
        assert self._engine is not None and self._canary is not None
        while self._failure is None and not self._closing:
            steps = self._engine.stats().steps
            await asyncio.sleep(self._settings.canary_s)
            if self._engine.stats().steps == steps and not self._closing:
                try:
                    async with asyncio.timeout(self._settings.limits.step_s):
                        await self._canary.draw()
                except (ArrieroError, TimeoutError) as error:
                    self._on_lost(f"the canary token did not come: {error or 'too late'}")

    def _say(self, text: str) -> None:
        self._registry.report.remote(self._group_id, text)

    def _on_loaded(self, loading: Loading) -> None:
        percent = int(loading.share * 100)
        if percent != self._loaded:
            self._loaded = percent
            self._say(str(loading))

    async def _close(self) -> None:
        """Drain, stop engine and slices, and let their processes go."""
        self._closing = True
        if self._standing is not None:
            self._standing.cancel()
        drain_s = self._settings.drain_s if self._failure is None else 0.0
        if self._link is not None:
            with contextlib.suppress(ray.exceptions.RayError):
                await self._renew()  # gateways send no more from here on
            await self._link.stop(drain_s)
        for keeper in self._keepers:
            keeper.cancel()
        if self._engine is not None:
            await asyncio.to_thread(self._engine.stop)
        if self._executor is not None:
            await asyncio.to_thread(self._executor.close)
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=STOP_LIMIT_S)
        for task in self._tasks:
            task.cancel()
        for actor in self._slices:
            ray.kill(actor)
        self._slices = []
        if self._tracing is not None:
            await asyncio.to_thread(self._tracing.close)


def _with_threads(config: GroupConfig, where: Sequence[SliceLocation]) -> GroupConfig:
    """Divide each node's cores among the slices that are on it."""
    if config.threads is not None:
        return config
    slices_on = Counter(one.node_id for one in where)
    return replace(
        config, threads=min(max(1, one.cores // slices_on[one.node_id]) for one in where)
    )
