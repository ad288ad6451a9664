"""The lanes of a group: one scheduler for each data-parallel rank, in step with each other.

Ranks of a stage meet in every layer with experts, so each step has a plan for every lane; a lane
with nothing to run gets a plan without rows. Requests go to the lane that has least to do, a found
prefix counting as less to do. Most groups have one lane.

Knows schedulers; knows nothing of what is in a plan.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import fields
from functools import partial

from arriero.shards.engine.cache_report import CacheReport
from arriero.shards.engine.limits import check_config
from arriero.shards.engine.scheduler import Scheduler
from arriero.shards.engine.types import EngineConfig, EngineRequest, EngineStats, SequenceOutput
from arriero.shards.errors import GroupFailed
from arriero.shards.kv.blocks import CacheEvent, CacheListener
from arriero.shards.kv.limits import PeerBlocks
from arriero.shards.kv.transfers import Pool, TransferBatch, TransferResult
from arriero.shards.protocol.step_plan import StepPlan, StepResult

_PREFIX_WORTH = 2.0
"""A prompt found whole in a lane's cache is worth its being so many requests longer."""


class DataParallelScheduler:
    """As `Scheduler`, for all lanes of a group.

    Args:
        config: limits; those of slots, blocks and tokens are each lane's own.
        on_event: told of keys that become findable in some lane, and that cease to be in all.
        clock: seconds, monotonic.

    Raises:
        SpecError: a field of `config` that cannot be.
    """

    def __init__(
        self,
        config: EngineConfig,
        *,
        on_event: CacheListener | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        check_config(config)
        self.config = config
        self._on_event = on_event
        self._stored: Counter[bytes] = Counter()
        self._kept: list[set[bytes]] = [set() for _ in range(config.num_lanes)]
        self._lanes = [
            Scheduler(config, on_event=self._listener(number), clock=clock)
            for number in range(config.num_lanes)
        ]
        self._lane_of: dict[str, Scheduler] = {}

    def check_load(self, request_id: str, *, num_pending: int = 0) -> None:
        """As `Scheduler.check_load`; the queue's limit is the group's."""
        waiting = sum(dp_rank.num_waiting for dp_rank in self._lanes)
        # the lane that has the id first, since it says what is wrong
        for dp_rank in sorted(self._lanes, key=lambda one: not one.is_live(request_id)):
            dp_rank.check_load(request_id, num_pending=num_pending + waiting - dp_rank.num_waiting)

    def enqueue(self, request: EngineRequest) -> None:
        """Queue a request that was checked, in the lane that suits it best."""
        dp_rank = self._lanes[0]
        if len(self._lanes) > 1:
            dp_rank = min(self._lanes, key=lambda one: _cost(one, request))
            self._lane_of[request.request_id] = dp_rank
        dp_rank.enqueue(request)

    def cancel(self, request_id: str) -> list[SequenceOutput]:
        """End a request now; unknown ids are ignored."""
        return self._lane_of.pop(request_id, self._lanes[0]).cancel(request_id)

    def fail(self, cause: str) -> list[SequenceOutput]:
        """End every request with finish_reason "error"; nothing is outstanding from now on."""
        self._lane_of.clear()
        return [output for dp_rank in self._lanes for output in dp_rank.fail(cause)]

    @property
    def num_live(self) -> int:
        """Requests that have not ended."""
        return sum(dp_rank.num_live for dp_rank in self._lanes)

    @property
    def num_outstanding(self) -> int:
        """Plans made whose result is not in."""
        return sum(dp_rank.num_outstanding for dp_rank in self._lanes)

    @property
    def num_moving(self) -> int:
        """Copies of blocks under way or waiting to be made."""
        return sum(dp_rank.num_moving for dp_rank in self._lanes)

    def take_moves(self) -> list[TransferBatch]:
        """Copies of blocks to be made after every plan so far."""
        taken = []
        for number, dp_rank in enumerate(self._lanes):
            for moves in dp_rank.take_moves():
                moves.dp_rank = number
                taken.append(moves)
        return taken

    def take_moved(self, moved: list[TransferResult]) -> None:
        """Hear from slices what came of copies, maybe nothing."""
        for number, dp_rank in enumerate(self._lanes):
            dp_rank.take_moved([one for one in moved if one.dp_rank == number])

    def cache(self) -> CacheReport:
        """What the KV cache holds, and for whom."""
        return CacheReport.total([dp_rank.cache() for dp_rank in self._lanes])

    def pin(self, name: str, tokens: tuple[int, ...]) -> int:
        """Keep a prefix on the device wherever it is; the most tokens of it in one lane."""
        return max(dp_rank.pin(name, tokens) for dp_rank in self._lanes)

    def unpin(self, name: str) -> bool:
        """Let go of a pin; False where there is none of this name."""
        return any([dp_rank.unpin(name) for dp_rank in self._lanes])

    def keeping(self, keys: list[bytes]) -> bool:
        """Whether some of these blocks are on their way to host memory; from any thread."""
        return any(dp_rank.keeping(keys) for dp_rank in self._lanes)

    def shared(self, keys: list[bytes]) -> dict[Pool, PeerBlocks]:
        """What another group may copy of these blocks, by pool: of the lane that has most of them.

        From any thread.
        """
        each = [dp_rank.shared(keys) for dp_rank in self._lanes]
        return max(each, key=lambda one: len(one[Pool.ALL].slots) if one else 0)

    def flush(self) -> int:
        """Forget every block that nobody holds, on the device and below; how many."""
        return sum(dp_rank.flush() for dp_rank in self._lanes)

    @property
    def stats(self) -> EngineStats:
        """A snapshot of all lanes, without `step_us`; safe from any thread."""
        each = [dp_rank.stats for dp_rank in self._lanes]
        if len(each) == 1:
            return each[0]
        apart = ("step_us", "expert_moves", "expert_imbalance", "expert_loads", "tiers")
        names = [field.name for field in fields(EngineStats) if field.name not in apart]
        total = {name: sum(getattr(one, name) for one in each) for name in names}
        tiers = Counter[str]()
        if all(one.tiers for one in each):  # else some are still to open
            for one in each:
                tiers.update(one.tiers)
        return EngineStats(**total | {"steps": each[0].steps, "tiers": dict(tiers)})

    def schedule(self) -> list[StepPlan]:
        """The next step's plans, one for each lane; none when nothing can run."""
        if len(self._lanes) == 1:
            plan = self._lanes[0].schedule()
            return [] if plan is None else [plan]
        if any(dp_rank.num_outstanding >= dp_rank.depth for dp_rank in self._lanes):
            return []
        plans = [dp_rank.schedule() for dp_rank in self._lanes]
        if all(plan is None for plan in plans):
            return []
        step = []
        for number, (dp_rank, made) in enumerate(zip(self._lanes, plans, strict=True)):
            plan = dp_rank.idle() if made is None else made
            plan.dp_rank = number
            step.append(plan)
        return step

    def update(self, result: StepResult) -> list[SequenceOutput]:
        """Take the result of a lane's oldest plan; gives what is new for each sequence.

        Raises:
            GroupFailed: the result does not belong to that plan.
        """
        if not 0 <= result.dp_rank < len(self._lanes):
            raise GroupFailed(
                f"a result of lane {result.dp_rank} came; there are {len(self._lanes)}"
            )
        outputs = self._lanes[result.dp_rank].update(result)
        if self._lane_of:
            dp_rank = self._lanes[result.dp_rank]
            for output in outputs:
                if output.finish_reason is not None and not dp_rank.is_live(output.request_id):
                    self._lane_of.pop(output.request_id, None)
        return outputs

    def _listener(self, dp_rank: int) -> CacheListener | None:
        if self._on_event is None or self.config.num_lanes == 1:
            return self._on_event
        return partial(self._on_lane_event, dp_rank)

    def _on_lane_event(self, dp_rank: int, kind: CacheEvent, key: bytes) -> None:
        assert self._on_event is not None, "set where there is a listener"
        if kind in ("stored", "evicted"):
            before = self._stored[key]
            self._stored[key] += 1 if kind == "stored" else -1
            if not self._stored[key]:
                del self._stored[key]
            elsewhere = before > (kind == "evicted")
        else:  # a tier of its own tells "kept" for itself, the last one "dropped" for all
            elsewhere = any(key in one for i, one in enumerate(self._kept) if i != dp_rank)
            (self._kept[dp_rank].add if kind == "kept" else self._kept[dp_rank].discard)(key)
        if not elsewhere:
            self._on_event(kind, key)


def _cost(dp_rank: Scheduler, request: EngineRequest) -> float:
    return dp_rank.num_live - _PREFIX_WORTH * dp_rank.found_share(request)
