"""The loop of one replica group: requests in, plans to the slices, tokens out.

One thread owns the scheduler and the executor; callers leave requests and cancellations in an
inbox. Knows threads and time; decides nothing (the scheduler does) and computes nothing (the
slices do).
"""

from __future__ import annotations

import gc
import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from time import perf_counter_ns
from typing import Any, TypeVar

from arriero.shards.engine.dp_scheduler import DataParallelScheduler
from arriero.shards.engine.expert_balance import ExpertBalance
from arriero.shards.engine.limits import check_request
from arriero.shards.engine.types import (
    EngineConfig,
    EngineRequest,
    EngineStats,
    Executor,
    SequenceOutput,
)
from arriero.shards.errors import GroupFailed, InvalidRequest, Unavailable
from arriero.shards.kv.blocks import CacheListener
from arriero.shards.kv.limits import PeerBlocks
from arriero.shards.kv.transfers import Pool
from arriero.shards.protocol.step_plan import Int32, StepResult

_log = logging.getLogger(__name__)
T = TypeVar("T")

_COLLECT_S = 0.25
"""How long a wait for a result lasts before `stop` is heeded."""
_MOVED_S = 0.001
"""How long a wait for copies of blocks lasts, when nothing else can run, before requests are."""


class Engine:
    """Serves requests on one group's slices.

    `start` runs it in a thread of its own; without that, the caller may call `step` itself.

    Args:
        config: limits.
        executor: runs plans on the slices; closed when the engine stops or fails.
        on_outputs: called once a step with all that the step gave, from the engine's thread. It
            must not block: the next plan waits for it.
        on_failure: called once, from the engine's thread, when the group is lost.
        on_event: told of keys stored in and evicted from the prefix cache.

    Attributes:
        failure: why the group is lost, or None.
    """

    def __init__(
        self,
        config: EngineConfig,
        executor: Executor,
        on_outputs: Callable[[list[SequenceOutput]], None],
        *,
        on_failure: Callable[[GroupFailed], None] | None = None,
        on_event: CacheListener | None = None,
    ) -> None:
        self.config = config
        self.failure: GroupFailed | None = None
        self._executor = executor
        self._on_outputs = on_outputs
        self._on_failure = on_failure
        self._scheduler = DataParallelScheduler(config, on_event=on_event)
        self._balance: ExpertBalance | None = None
        if config.experts is not None:
            self._balance = ExpertBalance(config.experts, moves=config.move_experts)
        self._outputs: list[SequenceOutput] = []
        self._means = _Means()
        self._thread: threading.Thread | None = None
        self._wake = threading.Condition()
        # Guarded by `_wake`:
        self._arrived: dict[str, EngineRequest] = {}
        self._cancelled: list[str] = []
        self._asked: list[tuple[Callable[[DataParallelScheduler], Any], Future[Any]]] = []
        self._stopping = False

    # ---- any thread ----

    def start(self) -> None:
        """Run in a thread of its own until `stop`."""
        assert self._thread is None, "the engine is started already"
        self._thread = threading.Thread(target=self._run, name="arriero-engine", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End what runs with finish_reason "lost" and close the executor; safe to call twice.

        Not to be called from a callback.
        """
        with self._wake:
            self._stopping = True
            self._wake.notify()
        if self._thread is not None:
            self._thread.join()
        self._end_all("the engine was stopped")
        self._executor.close()

    def submit(self, request: EngineRequest) -> None:
        """Queue a request; its outputs come through `on_outputs`.

        Raises:
            InvalidRequest: it could never run, or its id runs already.
            Overloaded: as many requests wait as may.
            Unavailable: the engine has failed or was stopped.
        """
        check_request(self.config, request)
        with self._wake:
            if self.failure is not None:
                raise Unavailable(f"the group is lost: {self.failure}; retry on another")
            if self._stopping:
                raise Unavailable("the engine was stopped; retry on another group")
            if request.request_id in self._arrived:
                raise InvalidRequest(
                    "request_id",
                    f"`request_id`={request.request_id!r} runs already; choose another",
                )
            self._scheduler.check_load(request.request_id, num_pending=len(self._arrived))
            self._arrived[request.request_id] = request
            self._wake.notify()

    def cancel(self, request_id: str) -> None:
        """End a request within a step; one that has ended already is left alone."""
        with self._wake:
            self._cancelled.append(request_id)
            self._wake.notify()

    def ask(self, question: Callable[[DataParallelScheduler], T]) -> Future[T]:
        """Have the scheduler asked between two steps, in the engine's thread.

        The answer is the question's; `Unavailable` if the engine ends first.
        """
        answer: Future[T] = Future()
        with self._wake:
            if self.failure is not None or self._stopping:
                answer.set_exception(Unavailable("the group is lost or was stopped"))
            else:
                self._asked.append((question, answer))
                self._wake.notify()
        return answer

    def shared(self, keys: list[bytes]) -> tuple[dict[Pool, PeerBlocks], bool]:
        """What another group may copy of these blocks, and whether more of them is on its way.

        At once, whatever the engine is at: it may have changed by the time it is heard, which
        those who copy check.
        """
        return self._scheduler.shared(keys), self._scheduler.keeping(keys)

    def stats(self) -> EngineStats:
        """A snapshot; `step_us` has running means of a step's phases, in microseconds."""
        stats = self._scheduler.stats
        waiting = stats.num_waiting + len(self._arrived)
        stats = replace(stats, num_waiting=waiting, step_us=self._means.snapshot())
        if self._balance is None:
            return stats
        return replace(
            stats,
            expert_moves=self._balance.num_moves,
            expert_imbalance=self._balance.imbalance,
            expert_loads=self._balance.totals,
        )

    # ---- the engine's thread ----

    def _run(self) -> None:
        gc.freeze()  # what is loaded stays: full collections need not walk it
        while self._wait_for_work():
            self.step()

    def _wait_for_work(self) -> bool:
        """Sleep while there is nothing to do; False when the engine is to end."""
        with self._wake:
            while not self._stopping and self.failure is None and not self._has_work():
                self._wake.wait()
            return not self._stopping and self.failure is None

    def _has_work(self) -> bool:
        scheduler = self._scheduler
        inbox = self._arrived or self._cancelled or self._asked
        return bool(
            inbox or scheduler.num_live or scheduler.num_outstanding or scheduler.num_moving
        )

    def step(self) -> bool:
        """Plan ahead, take the oldest result, hand out what it gave; True while work is left.

        Whatever goes wrong is the end of the group: it is told to every live request, never
        raised here.
        """
        try:
            self._take_inbox()
            self._take_moved()
            self._submit_plans()
            self._collect_oldest()
            self._deliver()
        except Exception as error:
            self._fail(error)
        return self.failure is None and self._has_work()

    def _take_inbox(self) -> None:
        # Under the lock, so that an id is always either in the inbox or in the scheduler.
        with self._wake:
            for request in self._arrived.values():
                self._scheduler.enqueue(request)
            self._arrived.clear()
            cancelled, self._cancelled = self._cancelled, []
            asked, self._asked = self._asked, []
        for request_id in cancelled:
            self._outputs += self._scheduler.cancel(request_id)
        for question, answer in asked:
            try:
                answer.set_result(question(self._scheduler))
            except Exception as error:  # the asker's
                answer.set_exception(error)

    def _submit_plans(self) -> None:
        begun = perf_counter_ns()
        while plans := self._scheduler.schedule():
            move = None if self._balance is None else self._next_move(self._balance)
            for plan in plans:
                if move is not None:
                    plan.placement_layer, plan.placement = move
                self._executor.submit(plan)
        for moves in self._scheduler.take_moves():
            self._executor.move(moves)
        self._means.note("schedule", perf_counter_ns() - begun)

    def _take_moved(self, timeout_s: float = 0.0) -> None:
        if self.config.tiers.enabled:
            self._scheduler.take_moved(self._executor.moved(timeout_s))

    def _next_move(self, balance: ExpertBalance) -> tuple[int, Int32] | None:
        balance.note(self._executor.take_loads())
        return balance.next_move()

    def _collect_oldest(self) -> None:
        if not self._scheduler.num_outstanding:
            if self._scheduler.num_moving:
                self._take_moved(_MOVED_S)
                return
            # Else the loop would spin for ever without a word.
            assert not self._scheduler.num_live, "requests are live and nothing can run"
            return
        begun = perf_counter_ns()
        result: StepResult | None = None
        while result is None:
            if self._stopping:
                return
            result = self._executor.collect(_COLLECT_S)
        arrived = perf_counter_ns()
        self._outputs += self._scheduler.update(result)
        self._means.note("wait", arrived - begun)
        self._means.note("update", perf_counter_ns() - arrived)

    def _deliver(self) -> None:
        outputs, self._outputs = self._outputs, []
        if outputs:
            begun = perf_counter_ns()
            self._on_outputs(outputs)
            self._means.note("deliver", perf_counter_ns() - begun)

    def _fail(self, error: Exception) -> None:
        if isinstance(error, GroupFailed):
            cause = error
            _log.error("the group is lost: %s", cause)
        else:
            cause = GroupFailed(f"the engine failed with {type(error).__name__}: {error}")
            cause.__cause__ = error
            _log.error("the engine failed", exc_info=error)
        with self._wake:
            self.failure = cause  # from here on `submit` refuses
        self._end_all(str(cause))
        if self._on_failure is not None:  # first: slices that hang may be slow to close
            self._on_failure(cause)
        self._executor.close()

    def _end_all(self, cause: str) -> None:
        """End every request, those in the inbox too."""
        try:
            self._take_inbox()
            self._outputs += self._scheduler.fail(cause)
            self._deliver()
        except Exception:  # a callback's: there is nobody left to tell
            _log.exception("the last outputs could not be handed out")


class _Means:
    """Running means of the phases of a step, over the last hundred steps or so."""

    def __init__(self) -> None:
        self._mean_us: dict[str, float] = {}

    def note(self, phase: str, elapsed_ns: int) -> None:
        """Count one more step's time for a phase."""
        elapsed_us = elapsed_ns / 1000
        mean = self._mean_us.get(phase, elapsed_us)
        self._mean_us[phase] = mean + 0.01 * (elapsed_us - mean)

    def snapshot(self) -> dict[str, float]:
        """Means by phase, in microseconds."""
        return dict(self._mean_us)
