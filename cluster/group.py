"""A replica group on Ray Serve: the leader's replica, which owns its slices.

The replica's placement group holds one bundle for the leader and one for each slice, and rank r
is the slice in bundle r + 1: which node a bundle is on may change from start to start, so ranks
come from bundles alone. Any loss fails the health check; Serve then replaces the whole group.

Knows the life of a group; knows nothing of requests (router) or of steps (shards).
"""

from __future__ import annotations

import asyncio
import contextlib
import time
import uuid
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from arriero.cluster import registry
from arriero.cluster.slices import SliceActor, Whereabouts, node_address
from arriero.shards.errors import GroupFailed
from arriero.shards.group import GroupConfig

if TYPE_CHECKING:
    from arriero.router.card import ModelCard
    from arriero.router.link import LinkServer
    from arriero.shards.engine.engine import Engine
    from arriero.shards.engine.types import EngineConfig, SequenceOutput
    from arriero.shards.executor import Loading, RemoteExecutor

LEASE_PERIODS = 5
STOP_LIMIT_S = 3.0


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupSettings:
    """What a leader needs to know.

    Attributes:
        model: its name.
        config: of the group, device decided.
        cpus_per_slice: Ray's logical CPUs of each slice.
        period_s: between two renewals of the group's entry in the registry.
        start_timeout_s: limit of the whole start.
        drain_s: how long running streams may go on at the end.
    """

    model: str
    config: GroupConfig
    cpus_per_slice: float
    period_s: float
    start_timeout_s: float
    drain_s: float

    @property
    def layout(self) -> str:
        """The mesh in words."""
        config = self.config
        lanes = f" dp{config.dp}" if config.dp > 1 else ""
        return f"tp{config.tp}{lanes} pp{config.pp}"


class Leader:
    """The Serve replica that leads one group; ready once a token came through every slice."""

    async def __init__(self, settings: GroupSettings) -> None:  # type: ignore[misc]  # Serve awaits it
        self._settings = settings
        self._group_id = f"{settings.model}-{uuid.uuid4().hex[:8]}"
        self._registry = registry.connect()
        self._failure: str | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._slices: list[Any] = []
        self._executor: RemoteExecutor | None = None
        self._engine: Engine | None = None
        self._link: LinkServer | None = None
        self._first: asyncio.Future[SequenceOutput] = asyncio.get_running_loop().create_future()
        self._loaded = -1
        self._closing = False
        try:
            async with asyncio.timeout(settings.start_timeout_s):
                await self._start()
        except BaseException as error:
            text = str(error) or f"{type(error).__name__} in the group's start"
            if isinstance(error, TimeoutError):
                text = f"no token within start_timeout_s={settings.start_timeout_s:g}"
            await self._tell_failure(type(error).__name__, text)
            await self._close()
            # Serve tells this text, so it must be the cause itself; chains it would unroll
            raise GroupFailed(text) from None

    async def check_health(self) -> None:
        """Called by Serve each period; raising has the replica replaced.

        Raises:
            GroupFailed: a slice is lost or the engine failed; the text is the first cause.
        """
        cause = self._failure
        if cause is None and self._engine is not None and self._engine.failure is not None:
            cause = str(self._engine.failure)
        if cause is not None:
            raise GroupFailed(cause)

    async def __del__(self) -> None:
        """Called by Serve once, when the replica is told to stop."""
        self._closing = True
        await self._registry.unregister.remote(self._group_id)
        await self._close()

    async def _start(self) -> None:
        self._say("placing slices")
        begun_s = time.monotonic()
        where = await self._place()
        # imported only now: the slices import torch meanwhile
        from arriero.router.card import ModelCard
        from arriero.shards.checkpoint.formats.describe import describe
        from arriero.shards.executor import RemoteExecutor
        from arriero.shards.resolve import engine_config, resolve

        folder = Path(self._settings.config.model_path)
        model, _ = describe(folder)
        config = resolve(_with_threads(self._settings.config, where), model)
        host = self._link_host(where)
        executor = self._executor = RemoteExecutor(config, host)
        executor.on_watch(lambda: self._failure, lambda: None)
        for rank, (actor, at) in enumerate(zip(self._slices, where, strict=True)):
            run = actor.run.remote(rank, executor.ticket, at.address)
            self._tasks.append(asyncio.create_task(self._watch(rank, at, run)))
        left_s = self._settings.start_timeout_s - (time.monotonic() - begun_s)
        await asyncio.to_thread(executor.wait_ready, left_s, self._on_loaded)
        digest = await self._slices[0].digest.remote(folder)
        limits = engine_config(config, model, digest)
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
        )
        address = await self._lead(limits, card)
        entry = registry.GroupEntry(
            group_id=self._group_id,
            model=self._settings.model,
            address=address,
            layout=self._settings.layout,
            slice_pids=tuple(one.pid for one in where),
        )
        await self._renew(entry)
        self._tasks.append(asyncio.create_task(self._keep_renewing(entry)))

    async def _place(self) -> list[Whereabouts]:
        """Start a slice in each bundle but the leader's; says where they are, by rank."""
        config = self._settings.config
        bundles = ray.util.get_current_placement_group()
        assert bundles is not None, "a leader runs in a placement group"
        actor = ray.remote(SliceActor)
        for rank in range(config.world_size):
            options = actor.options(
                num_cpus=self._settings.cpus_per_slice,
                num_gpus=1 if config.device == "cuda" else 0,
                max_restarts=0,
                max_concurrency=2,  # a run, and what is asked meanwhile
                scheduling_strategy=PlacementGroupSchedulingStrategy(
                    placement_group=bundles, placement_group_bundle_index=rank + 1
                ),
            )
            self._slices.append(options.remote())
        return list(await asyncio.gather(*[one.whereabouts.remote() for one in self._slices]))

    def _link_host(self, where: Sequence[Whereabouts]) -> str | None:
        """None while every slice is on the leader's node, else the address to bind to."""
        here = ray.get_runtime_context().get_node_id()
        if all(one.node_id == here for one in where):
            return None
        return node_address()

    async def _lead(self, limits: EngineConfig, card: ModelCard) -> str:
        """Start the engine, draw a token, open the link; returns the link's address."""
        from arriero.router.link import LinkServer
        from arriero.shards.engine.engine import Engine
        from arriero.shards.engine.types import EngineRequest
        from arriero.shards.sampling import SamplingParams

        assert self._executor is not None
        loop = asyncio.get_running_loop()

        def on_outputs(outputs: Sequence[SequenceOutput]) -> None:
            if self._link is not None:
                self._link.on_outputs(outputs)
            elif outputs[-1].finish_reason is not None:
                loop.call_soon_threadsafe(self._first.set_result, outputs[-1])

        def on_failure(error: Exception) -> None:
            asyncio.run_coroutine_threadsafe(self._fail(str(error)), loop)

        engine = self._engine = Engine(limits, self._executor, on_outputs, on_failure=on_failure)
        engine.start()
        self._say("first token")
        params = SamplingParams(max_tokens=1, temperature=0.0, seed=0, ignore_eos=True)
        engine.submit(EngineRequest(request_id="first-token", prompt=(0,), params=params))
        first = await self._first
        if not first.tokens:
            raise GroupFailed(f"the first token did not come: {first.error or first.finish_reason}")
        self._link = LinkServer(engine, card, f"{node_address()}:0")
        return str(await self._link.start())

    async def _watch(self, rank: int, at: Whereabouts, run: Any) -> None:  # noqa: ANN401
        """Wait for the end of a slice's run, which is a failure unless we are closing."""
        which = f"slice {rank} (pid {at.pid} on {at.address})"
        try:
            await run
            cause = f"{which} stopped"
        except ray.exceptions.RayTaskError as error:
            cause = f"{which} failed: {error.cause}"
        except ray.exceptions.RayError:
            cause = f"{which} died"
        if not self._closing:
            await self._fail(cause)

    async def _fail(self, cause: str) -> None:
        if self._failure is None:
            self._failure = cause
            if not self._first.done():
                self._first.set_exception(GroupFailed(cause))
            await self._tell_failure(GroupFailed.__name__, cause)

    async def _tell_failure(self, kind: str, cause: str) -> None:
        failure = registry.Failure(who=self._group_id, kind=kind, cause=cause)
        await self._registry.fail.remote(failure)

    async def _keep_renewing(self, entry: registry.GroupEntry) -> None:
        while self._failure is None and not self._closing:
            await asyncio.sleep(self._settings.period_s)
            # a registry that is being restarted comes back; leases outlast a few periods
            with contextlib.suppress(ray.exceptions.RayError):
                await self._renew(entry)

    async def _renew(self, entry: registry.GroupEntry) -> None:
        assert self._engine is not None
        entry = replace(entry, stats=asdict(self._engine.stats()))
        await self._registry.register.remote(entry, LEASE_PERIODS * self._settings.period_s)

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
        drain_s = self._settings.drain_s if self._failure is None else 0.0
        if self._link is not None:
            await self._link.stop(drain_s)
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


def _with_threads(config: GroupConfig, where: Sequence[Whereabouts]) -> GroupConfig:
    """Divide each node's cores among the slices that are on it."""
    if config.threads is not None:
        return config
    slices_on = Counter(one.node_id for one in where)
    return replace(
        config, threads=min(max(1, one.cores // slices_on[one.node_id]) for one in where)
    )
