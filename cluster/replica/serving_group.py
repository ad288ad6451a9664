"""The parts of a group that serves: executor, engine, canary and link, from start to end.

Knows how the parts are made and ended; knows nothing of the registry's entries, of Serve or of the
treatment of a loss (`leader`).
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from arriero.cluster.hosts.nodes import node_address
from arriero.cluster.replica.group_card import group_card
from arriero.cluster.replica.group_settings import GroupSettings
from arriero.cluster.replica.group_slices import GroupSlices
from arriero.cluster.replica.registration import Registration
from arriero.cluster.spec.live_settings import LiveSettings
from arriero.shards.config.group import GroupConfig
from arriero.shards.errors import ArrieroError, GroupFailed
from arriero.shards.protocol.failure import KEEP_LINES, Evidence, FirstCause

if TYPE_CHECKING:
    from arriero.cluster.replica.canary import Canary
    from arriero.cluster.replica.weight_actions import WantedWeights
    from arriero.router.directory.journal import Journal
    from arriero.router.link.server import LinkServer
    from arriero.router.observability.tracing import Tracing
    from arriero.router.text.model_card import ModelCard
    from arriero.shards.adapters.reader import AdapterReader
    from arriero.shards.checkpoint.formats.scheme import QuantScheme
    from arriero.shards.engine.engine import Engine
    from arriero.shards.engine.stats import EngineStats
    from arriero.shards.engine.types import EngineConfig, SequenceOutput
    from arriero.shards.layout.parts import AnyModel
    from arriero.shards.leader.remote_executor import RemoteExecutor

LOG_TIMEOUT_S = 1.0
"""Longest wait for the last log lines of a lost slice; the loss is recorded only after."""


class ServingGroup:
    """Executor, engine, canary and link of a group; for use in one event loop.

    Args:
        settings: of the group.
        slices: of the group, placed before `start`.
        registration: takes reports of the progress.
        on_lost: called with the cause when the group is lost; from any thread, perhaps more than
            once.

    Attributes:
        link_token: secret that gateways must send; new for each leader.
    """

    def __init__(
        self,
        settings: GroupSettings,
        slices: GroupSlices,
        registration: Registration,
        on_lost: Callable[[str], None],
    ) -> None:
        self.link_token = secrets.token_hex(32)
        self._settings, self._slices = settings, slices
        self._registration, self._on_lost = registration, on_lost
        self._executor: RemoteExecutor | None = None
        self._engine: Engine | None = None
        self._canary: Canary | None = None
        self._link: LinkServer | None = None
        self._tracing: Tracing | None = None
        self._digest = ""
        self._ending = False

    async def start(self) -> tuple[str, str]:
        """Load the model on all slices, generate a token, and open the link.

        Returns:
            Address of the link, and digest of weights and numerics.
        """
        started_s = time.monotonic()
        # late imports: meanwhile the slices import torch
        import arriero.router.text.model_card  # noqa: F401
        from arriero.router.directory.journal import Journal
        from arriero.shards.checkpoint.formats.describe import describe
        from arriero.shards.checkpoint.remote import local_folder
        from arriero.shards.engine.config import engine_config

        path = self._settings.config.model_path
        folder = await asyncio.to_thread(local_folder, path, weights=False)
        model, scheme = describe(folder)
        pushed = await asyncio.to_thread(_pushed_weights, self._settings)
        if pushed is not None:
            pushed_config = replace(self._settings.config, weights=pushed.sources)
            self._settings = replace(self._settings, config=pushed_config)
        config = await self._load(model, scheme, started_s)
        sources = None if pushed is None else pushed.sources
        digest = await self._slices.actors[0].digest.remote(path, sources)
        self._digest = digest
        limits = engine_config(config, model, digest)
        card = group_card(
            folder,
            settings=self._settings,
            registration=self._registration,
            config=config,
            model=model,
            limits=limits,
            digest=digest,
        )
        journal = Journal((limits.num_blocks + limits.tiers.num_blocks) * limits.num_dp_ranks)
        await self._start_engine(limits, journal, partial(self._on_weights, config))
        reader = await asyncio.to_thread(_adapter_reader, config, model)
        return await self._open_link(card, journal, reader), card.compat_key

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
            self._registration.report("reading the free memory of the GPUs")
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
        await asyncio.to_thread(executor.wait_ready, left_s, self._registration.report_loading)
        return config

    def _on_weights(self, config: GroupConfig, digest: str) -> bytes:
        """Tell gateways of pushed weights; in the engine's thread. See `OnWeights`."""
        from arriero.shards.kv.blocks import model_root
        from arriero.shards.layout.resolve import cache_salt

        salt = cache_salt(config, digest)
        if self._link is not None:
            self._link.set_weights(digest, model_root(salt) if config.prefix_cache else b"")
        self._registration.set_digest(f"{digest} {self._settings.numerics}")
        return salt

    async def _start_engine(
        self, limits: EngineConfig, journal: Journal, on_weights: Callable[[str], bytes]
    ) -> None:
        """Start the engine, and generate a token."""
        from arriero.cluster.replica.canary import Canary
        from arriero.shards.engine.engine import Engine

        assert self._executor is not None, "the executor starts before the engine"

        def on_outputs(outputs: Sequence[SequenceOutput]) -> None:
            canary.take(outputs)
            if self._link is not None:
                self._link.on_outputs(outputs)

        def on_failure(error: Exception) -> None:
            self._on_lost(str(error))

        engine = self._engine = Engine(
            limits, self._executor, on_outputs, on_failure=on_failure, on_event=journal.note
        )
        engine.name_weights(self._digest, self._settings.config.weights, on_weights)
        canary = self._canary = Canary(engine)
        engine.start()
        self._registration.report("first token")
        await canary.draw()

    async def _open_link(
        self, card: ModelCard, journal: Journal, reader: AdapterReader | None
    ) -> str:
        """Open the link; returns its address."""
        from arriero.cluster.replica import adapter_actions, weight_actions
        from arriero.cluster.replica.adapter_admin import AdapterAdminHandler
        from arriero.cluster.replica.kv_admin import KvAdminHandler
        from arriero.cluster.replica.weight_admin import WeightAdminHandler
        from arriero.router.link.leader_rpc import PeerGroups
        from arriero.router.link.server import LinkServer
        from arriero.router.observability.tracing import Tracing

        assert self._engine is not None and self._canary is not None, "the engine has started"
        tls, tracing = self._settings.link_tls, self._settings.tracing
        self._tracing = Tracing.from_config(
            "arriero-leader", None if tracing is None else tracing.config()
        )
        kv = KvAdminHandler(self._engine, self._canary, card)
        weights = WeightAdminHandler(self._engine, self._settings.config.speculation)

        async def answer(action: str, arguments: memoryview) -> object:
            if action == adapter_actions.ACTION:
                return await adapters.answer(arguments)
            if action == weight_actions.ACTION:
                return await weights.answer(arguments)
            return await kv.answer(action, arguments)

        link = self._link = LinkServer(
            self._engine,
            card,
            f"{node_address()}:0",
            token=self.link_token,
            tls=None if tls is None else tls.files().link_server("link_tls"),
            tracing=self._tracing,
            kv=answer,
            journal=journal,
            peers=PeerGroups(None if tls is None else tls.files().link_client("link_tls")),
        )
        slots = self._engine.config.adapter_slots
        adapters = AdapterAdminHandler(
            self._engine,
            reader,
            has_root=slots is not None and bool(slots.root),
            listed=card.adapters,
            publish=link.set_adapters,
        )
        return str(await link.start())

    def stats(self) -> EngineStats:
        """The counters of the engine, which has started."""
        assert self._engine is not None, "the engine has started"
        return self._engine.stats()

    async def draw_when_idle(self) -> None:
        """Generate a test token after each `canary_s` seconds without a step."""
        assert self._canary is not None, "the engine has started"
        while not self._ending:
            steps = self.stats().steps
            await asyncio.sleep(self._settings.canary_s)
            if self.stats().steps == steps and not self._ending and not self.stats().holding:
                limit_s = self._settings.limits.step_s
                try:
                    async with asyncio.timeout(limit_s):
                        await self._canary.draw()
                except (ArrieroError, TimeoutError) as error:
                    cause = str(error) or f"no answer in {limit_s:g} s"
                    self._on_lost(f"the canary token did not come: {cause}")

    def apply_live(self, live: LiveSettings) -> None:
        """Apply the limits and the period of test tokens that `reload` changed."""
        self._settings = replace(self._settings, limits=live.health, canary_s=live.canary_s)
        if self._executor is not None:
            self._executor.set_limits(live.health)

    def report_loss(self, evidence: Evidence) -> None:
        """Report evidence of a loss that was noticed outside the executor."""
        assert self._executor is not None, "the executor exists before anything is watched"
        self._executor.report(evidence)

    def give_up(self, cause: str) -> None:
        """The group is lost: generate no more test tokens, and end the wait for the current one."""
        self._ending = True
        if self._canary is not None:
            self._canary.give_up(GroupFailed(cause))

    async def first_cause(self) -> FirstCause | None:
        """The first cause, with the last log lines of the slice that failed first."""
        if self._executor is None:
            return None
        record = await asyncio.to_thread(self._executor.first_cause)
        if record is None or record.cause.rank is None:  # no failure of a slice
            return record
        lines = await self._slices.log_tail(record.cause.rank, KEEP_LINES, LOG_TIMEOUT_S)
        log = tuple(dict.fromkeys((*record.cause.log, *lines)))[-KEEP_LINES:]
        return replace(record, cause=replace(record.cause, log=log))

    def expect_end(self) -> None:
        """From now on the end of a slice is no failure, and no test token is generated."""
        self._ending = True
        self._slices.expect_end()

    async def drain(self, limit_s: float) -> None:
        """Close the link; running streams may continue for `limit_s` seconds."""
        if self._link is not None:
            await self._link.stop(limit_s)

    async def close(self) -> None:
        """Stop engine, executor and slices."""
        if self._engine is not None:
            await asyncio.to_thread(self._engine.stop)
        if self._executor is not None:
            await asyncio.to_thread(self._executor.close)
        await self._slices.close()
        if self._tracing is not None:
            await asyncio.to_thread(self._tracing.close)


def _pushed_weights(settings: GroupSettings) -> WantedWeights | None:
    """The pushed weights of the model folder; None without."""
    from arriero.cluster.hosts import kv_store
    from arriero.cluster.replica.weight_actions import STORED, WantedWeights

    wanted = (kv_store.get(STORED, dict[str, WantedWeights]) or {}).get(settings.model)
    return wanted if wanted is not None and wanted.path == settings.config.model_path else None


def _adapter_reader(config: GroupConfig, model: AnyModel) -> AdapterReader | None:
    """Opens adapters that come while the group serves; None in a group that takes none."""
    from arriero.shards.adapters.adapter import open_adapters
    from arriero.shards.adapters.reader import AdapterReader

    slots = config.adapter_slots
    if slots is None:
        return None
    return AdapterReader(slots, model, open_adapters(config, model), config.model_path)
