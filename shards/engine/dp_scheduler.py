"""Schedulers of a group: one for each data-parallel rank, all at the same step.

The ranks of a stage exchange tokens in every layer with experts, so each step has a plan for every
data-parallel (DP) rank; a rank with no work gets a plan without rows. A request goes to the rank
with the least work; a prefix in a rank's cache counts as less work. Most groups have one DP rank.

Knows schedulers; knows nothing of the content of a plan.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Container
from dataclasses import fields
from functools import partial

import numpy as np

from arriero.shards.engine.cache_report import CacheReport
from arriero.shards.engine.holds import Activity, Gate
from arriero.shards.engine.limits import check_config
from arriero.shards.engine.scheduler import Scheduler
from arriero.shards.engine.speculation.proposer import ProposerFactory
from arriero.shards.engine.stats import AdapterStats, EngineStats, SpeculationStats
from arriero.shards.engine.types import EngineConfig, EngineRequest, SequenceOutput, ends_of
from arriero.shards.errors import GroupFailed, InvalidRequest
from arriero.shards.kv.blocks import CacheEvent, CacheListener
from arriero.shards.kv.limits import PeerBlocks
from arriero.shards.kv.transfers import Pool, TransferBatch, TransferResult
from arriero.shards.protocol.adapters import AdapterBatch, AdapterResult
from arriero.shards.protocol.step_plan import StepPlan, StepResult

_PREFIX_WORTH = 2.0
"""A prompt that is wholly in a rank's cache outweighs so many more live requests."""


class DataParallelScheduler:
    """Same as `Scheduler`, for all data-parallel ranks of a group.

    Args:
        config: limits; slots, blocks and tokens are counted for each rank.
        on_event: callback for keys that the first rank stores and the last rank evicts.
        clock: monotonic time in seconds.
        proposers: makes the sources of drafted tokens; None for those of the config.

    Raises:
        SpecError: a field of `config` is out of range.
    """

    def __init__(
        self,
        config: EngineConfig,
        *,
        on_event: CacheListener | None = None,
        clock: Callable[[], float] = time.monotonic,
        proposers: ProposerFactory | None = None,
    ) -> None:
        check_config(config)
        self.config = config
        self._on_event = on_event
        self._stored: Counter[bytes] = Counter()
        self._offloaded_keys: list[set[bytes]] = [set() for _ in range(config.num_dp_ranks)]
        self._schedulers = [
            Scheduler(config, on_event=self._listener(number), clock=clock, proposers=proposers)
            for number in range(config.num_dp_ranks)
        ]
        self._scheduler_of: dict[str, Scheduler] = {}
        self._gate = Gate.OPEN
        self._held: dict[str, EngineRequest] = {}
        self._weights = ""

    def check_load(self, request_id: str, *, num_pending: int = 0) -> None:
        """Same as `Scheduler.check_load`; the limit of the queue is the group's."""
        waiting = sum(scheduler.num_waiting for scheduler in self._schedulers) + len(self._held)
        if request_id in self._held:
            raise InvalidRequest(
                "request_id", f"`request_id`={request_id!r} waits already; choose another"
            )
        # start with the rank that has the id already: its error is the right one
        for scheduler in sorted(self._schedulers, key=lambda s: not s.is_live(request_id)):
            others = waiting - scheduler.num_waiting
            scheduler.check_load(request_id, num_pending=num_pending + others)

    def enqueue(self, request: EngineRequest) -> list[SequenceOutput]:
        """Queue a checked request, at the rank of the lowest cost; see `Scheduler.enqueue`.

        While the gate is not open, requests are held; a request that continues tokens of other
        weights than the group's ends with finish_reason "lost", so that another group continues it.
        """
        if request.weights and self._weights and request.weights != self._weights:
            cause = "the group serves other weights than those that gave the tokens so far"
            return ends_of(request.request_id, range(request.params.n), "lost", cause)
        if self._gate is Gate.CLOSED or (self._gate is Gate.DRAIN and not request.resumed):
            self._held[request.request_id] = request
            return []
        scheduler = self._schedulers[0]
        if len(self._schedulers) > 1:
            scheduler = min(self._schedulers, key=lambda scheduler: _cost(scheduler, request))
            self._scheduler_of[request.request_id] = scheduler
        outputs = scheduler.enqueue(request)
        if outputs:
            self._scheduler_of.pop(request.request_id, None)
        return outputs

    def cancel(self, request_id: str) -> list[SequenceOutput]:
        """End a request now; unknown ids are ignored."""
        if (request := self._held.pop(request_id, None)) is not None:
            return ends_of(request_id, range(request.params.n), "cancelled", None)
        return self._scheduler_of.pop(request_id, self._schedulers[0]).cancel(request_id)

    def fail(self, cause: str) -> list[SequenceOutput]:
        """End every request with finish_reason "lost"; nothing is outstanding from now on."""
        self._scheduler_of.clear()
        ends = self._end_held("lost", cause)
        return ends + [out for scheduler in self._schedulers for out in scheduler.fail(cause)]

    # ---- pauses and changes of weights ----

    @property
    def gate(self) -> Gate:
        """What may be scheduled."""
        return self._gate

    @property
    def num_held(self) -> int:
        """Requests that wait for the gate to open."""
        return len(self._held)

    @property
    def num_runnable(self) -> int:
        """Requests that may be scheduled now."""
        return 0 if self._gate is Gate.CLOSED else self.num_live

    @property
    def activity(self) -> Activity:
        """Requests that have started, and work in flight."""
        return Activity(
            started=sum(scheduler.num_started for scheduler in self._schedulers),
            in_flight=self.num_outstanding + self.num_transfers + self.num_loading,
        )

    def set_gate(self, gate: Gate) -> list[SequenceOutput]:
        """Hold requests, or let held requests go; gives the ends of those that cannot run."""
        if gate is self._gate:
            return []
        before, self._gate = self._gate, gate
        if before is Gate.OPEN:
            self._hold_unstarted()
        if gate is not Gate.OPEN:
            return []
        requests, self._held = self._held, {}
        return [output for request in requests.values() for output in self.enqueue(request)]

    def set_weights(self, digest: str, salt: bytes | None = None) -> None:
        """Serve these weights from now on; a salt begins the keys of all blocks anew."""
        self._weights = digest
        for scheduler in self._schedulers if salt is not None else ():
            assert salt is not None, "checked in the line above"
            scheduler.set_salt(salt)

    def empty_cache(self) -> None:
        """Put running sequences back into the queue and drop every block; nothing is in flight."""
        for scheduler in self._schedulers:
            scheduler.stop_all()
        self._hold_unstarted()
        for scheduler in self._schedulers:
            scheduler.empty_cache()

    def abort(self, cause: str) -> list[SequenceOutput]:
        """End every request with finish_reason "error", held ones included."""
        self._scheduler_of.clear()
        ends = self._end_held("error", cause)
        return ends + [out for scheduler in self._schedulers for out in scheduler.abort(cause)]

    def _hold_unstarted(self) -> None:
        back = [r for scheduler in self._schedulers for r in scheduler.withdraw_unstarted()]
        for request in back:
            self._scheduler_of.pop(request.request_id, None)
        earlier = {request.request_id: request for request in back}
        self._held = earlier | self._held

    def _end_held(self, reason: str, cause: str) -> list[SequenceOutput]:
        requests, self._held = self._held, {}
        each = [(name, range(request.params.n)) for name, request in requests.items()]
        return [out for name, samples in each for out in ends_of(name, samples, reason, cause)]

    # ---- requests and plans ----

    @property
    def num_live(self) -> int:
        """Requests that have not ended."""
        return sum(scheduler.num_live for scheduler in self._schedulers)

    @property
    def num_outstanding(self) -> int:
        """Plans without a result so far."""
        return sum(scheduler.num_outstanding for scheduler in self._schedulers)

    @property
    def num_transfers(self) -> int:
        """Transfers of blocks in flight or waiting."""
        return sum(scheduler.num_transfers for scheduler in self._schedulers)

    def take_transfers(self) -> list[TransferBatch]:
        """Transfers of blocks, to be sent after all plans so far."""
        batches = []
        for number, scheduler in enumerate(self._schedulers):
            for batch in scheduler.take_transfers():
                batch.dp_rank = number
                batches.append(batch)
        return batches

    def apply_results(self, results: list[TransferResult]) -> None:
        """Apply transfer results, maybe none."""
        for number, scheduler in enumerate(self._schedulers):
            scheduler.apply_results([r for r in results if r.dp_rank == number])

    @property
    def adapters(self) -> Container[str]:
        """Digests of the adapters that a new request may ask for; thread-safe."""
        return self._schedulers[0].adapters.offered

    @property
    def num_loading(self) -> int:
        """Loads of adapters in flight or waiting."""
        return sum(scheduler.adapters.num_loading for scheduler in self._schedulers)

    def offer_adapter(self, digest: str, path: str) -> int:
        """Serve an adapter from now on; returns the number of data-parallel ranks that load it."""
        return sum(scheduler.adapters.offer(digest, path) for scheduler in self._schedulers)

    def withdraw_adapter(self, digest: str) -> None:
        """Accept no more requests for an adapter; live requests end as usual."""
        for scheduler in self._schedulers:
            scheduler.adapters.withdraw(digest)

    def take_adapters(self) -> list[AdapterBatch]:
        """Loads and drops of adapters, to be sent after all plans so far."""
        batches = []
        for number, scheduler in enumerate(self._schedulers):
            batch = scheduler.adapters.take_batch()
            if batch is not None:
                batch.dp_rank = number
                batches.append(batch)
        return batches

    def apply_adapters(
        self, results: list[AdapterResult]
    ) -> tuple[list[SequenceOutput], list[tuple[str, str]]]:
        """Apply the ends of loads; see `Scheduler.apply_adapters`.

        Returns:
            Ends of requests; and digest and error of each load, of every data-parallel rank.
        """
        outputs: list[SequenceOutput] = []
        loaded: list[tuple[str, str]] = []
        for number, scheduler in enumerate(self._schedulers):
            own = [result for result in results if result.dp_rank == number]
            ends, done = scheduler.apply_adapters(own)
            outputs += ends
            loaded += done.items()
        for output in outputs:
            self._scheduler_of.pop(output.request_id, None)
        return outputs, loaded

    def cache(self) -> CacheReport:
        """Contents of the KV cache by tier and tenant."""
        return CacheReport.total([scheduler.cache() for scheduler in self._schedulers])

    def pin(self, name: str, tokens: tuple[int, ...]) -> int:
        """Keep a prefix on the device of every rank; the most pinned tokens of a rank."""
        return max(scheduler.pin(name, tokens) for scheduler in self._schedulers)

    def unpin(self, name: str) -> bool:
        """Remove a pin; False without a pin of this name."""
        return any([scheduler.unpin(name) for scheduler in self._schedulers])

    def release(self, tenant: str, session: str) -> None:
        """Retain the blocks of a tenant's session no longer."""
        for scheduler in self._schedulers:
            scheduler.release(tenant, session)

    def is_saving(self, keys: list[bytes]) -> bool:
        """Whether a transfer of any of these blocks to host memory is in flight; thread-safe."""
        return any(scheduler.is_saving(keys) for scheduler in self._schedulers)

    def shared(self, keys: list[bytes]) -> dict[Pool, PeerBlocks]:
        """Blocks of these keys that another group may copy, by pool: of the rank with the most.

        Thread-safe.
        """
        each = [scheduler.shared(keys) for scheduler in self._schedulers]
        return max(each, key=lambda pools: len(pools[Pool.ALL].slots) if pools else 0)

    def flush(self) -> int:
        """Drop every unused block, on the device and below; returns the number of blocks."""
        return sum(scheduler.flush() for scheduler in self._schedulers)

    @property
    def stats(self) -> EngineStats:
        """A snapshot over all ranks, without `step_us`; thread-safe."""
        each = [scheduler.stats for scheduler in self._schedulers]
        if len(each) == 1:
            return each[0]
        own = ("step_us", "expert_moves", "expert_imbalance", "expert_loads", "holding")
        apart = (*own, "tiers", "speculation", "adapters")
        names = [field.name for field in fields(EngineStats) if field.name not in apart]
        total = {name: sum(getattr(stats, name) for stats in each) for name in names}
        tiers = Counter[str]()
        if all(stats.tiers for stats in each):  # else some tiers are not open yet
            for stats in each:
                tiers.update(stats.tiers)
        drafts = SpeculationStats.total(stats.speculation for stats in each)
        adapters = AdapterStats.total(stats.adapters for stats in each)
        apart_total = {
            "steps": each[0].steps,
            "tiers": dict(tiers),
            "speculation": drafts,
            "adapters": adapters,
        }
        return EngineStats(**total | apart_total)

    def schedule(self) -> list[StepPlan]:
        """The next step's plans, one for each rank; none when nothing can run."""
        if self._gate is Gate.CLOSED:
            return []
        if len(self._schedulers) == 1:
            plan = self._schedulers[0].schedule()
            return [] if plan is None else [plan]
        if any(scheduler.num_outstanding >= scheduler.depth for scheduler in self._schedulers):
            return []
        plans = [scheduler.schedule() for scheduler in self._schedulers]
        if all(plan is None for plan in plans):
            return []
        step = []
        for number, (scheduler, scheduled) in enumerate(zip(self._schedulers, plans, strict=True)):
            plan = scheduler.idle() if scheduled is None else scheduled
            plan.dp_rank = number
            step.append(plan)
        most = max(len(plan.tokens) for plan in step)
        adapted = self.config.adapters or self.config.adapter_slots is not None
        if not adapted and all(_only_decodes(plan) for plan in step):
            for plan in step:
                plan.decodes = most
        return step

    def update(self, result: StepResult) -> list[SequenceOutput]:
        """Apply the result of a rank's oldest plan; returns the new output of each sequence.

        Raises:
            GroupFailed: the result does not belong to that plan.
        """
        if not 0 <= result.dp_rank < len(self._schedulers):
            raise GroupFailed(
                f"a result of DP rank {result.dp_rank} came; the group has {len(self._schedulers)}"
            )
        outputs = self._schedulers[result.dp_rank].update(result)
        if self._scheduler_of:
            scheduler = self._schedulers[result.dp_rank]
            for output in outputs:
                if output.finish_reason is not None and not scheduler.is_live(output.request_id):
                    self._scheduler_of.pop(output.request_id, None)
        return outputs

    def _listener(self, dp_rank: int) -> CacheListener | None:
        if self._on_event is None or self.config.num_dp_ranks == 1:
            return self._on_event
        return partial(self._on_rank_event, dp_rank)

    def _on_rank_event(self, dp_rank: int, kind: CacheEvent, key: bytes) -> None:
        assert self._on_event is not None, "set where there is a listener"
        if kind in ("stored", "evicted"):
            before = self._stored[key]
            self._stored[key] += 1 if kind == "stored" else -1
            if not self._stored[key]:
                del self._stored[key]
            elsewhere = before > (kind == "evicted")
        else:  # tiers are per rank: report the first "kept" and the last "dropped" of a key
            keys = self._offloaded_keys
            elsewhere = any(key in keys[rank] for rank in range(len(keys)) if rank != dp_rank)
            (keys[dp_rank].add if kind == "kept" else keys[dp_rank].discard)(key)
        if not elsewhere:
            self._on_event(kind, key)


def _cost(scheduler: Scheduler, request: EngineRequest) -> float:
    return scheduler.num_live - _PREFIX_WORTH * scheduler.cached_share(request)


def _only_decodes(plan: StepPlan) -> bool:
    """Whether a token is drawn after each token of a plan, as in decodes with or without drafts."""
    return not plan.prompt_rows.any() and np.array_equal(plan.counts, plan.samples)
