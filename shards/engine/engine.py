"""The loop of one replica group: requests in, plans to the slices, tokens out.

One thread owns the scheduler and the executor; callers leave requests and cancellations in an
inbox. Knows threads and time; the scheduler decides, and the slices compute.
"""

from __future__ import annotations

import gc
import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from time import perf_counter_ns
from typing import Any, TypeVar

from arriero.shards.engine.change_runner import ChangeRunner, OnWeights
from arriero.shards.engine.dp_scheduler import DataParallelScheduler
from arriero.shards.engine.expert_balance import ExpertBalance
from arriero.shards.engine.holds import Change, HoldStatus
from arriero.shards.engine.limits import check_request
from arriero.shards.engine.pending_adapters import PendingAdapters
from arriero.shards.engine.phase_means import PhaseMeans
from arriero.shards.engine.speculation.proposer import ProposerFactory
from arriero.shards.engine.stats import EngineStats
from arriero.shards.engine.types import (
    EngineConfig,
    EngineRequest,
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
"""Longest wait for a result, in seconds, before the engine checks for `stop`."""
_TRANSFER_WAIT_S = 0.001
"""Longest wait for transfers, in seconds, before the engine reads the inbox again."""
_SLICES_WAIT_S = 0.005
"""The same for the ends of commands on weights."""


class Engine:
    """Serves requests on one group's slices.

    `start` runs the engine in a thread of its own; without `start` the caller may call `step`.

    Args:
        config: limits.
        executor: runs plans on the slices; closed when the engine stops or fails.
        on_outputs: callback with all outputs of a step, from the engine's thread. The callback
            must not block: the next plan waits for the return.
        on_failure: callback when the group is lost; called once, from the engine's thread.
        on_event: callback for keys stored in and evicted from the prefix cache.
        proposers: makes the sources of drafted tokens; None for those of the config.

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
        proposers: ProposerFactory | None = None,
    ) -> None:
        self.config = config
        self.failure: GroupFailed | None = None
        self._executor = executor
        self._on_outputs = on_outputs
        self._on_failure = on_failure
        self._scheduler = DataParallelScheduler(config, on_event=on_event, proposers=proposers)
        self._balance: ExpertBalance | None = None
        self._start_balance()
        self._outputs: list[SequenceOutput] = []
        self._means = PhaseMeans()
        self._pending = PendingAdapters()
        ranks = config.num_ranks * config.num_dp_ranks
        self._changes = ChangeRunner(self._scheduler, executor, ranks)
        self._thread: threading.Thread | None = None
        self._wake = threading.Condition()
        # Guarded by `_wake`:
        self._arrived: dict[str, EngineRequest] = {}
        self._cancelled: list[str] = []
        self._calls: list[tuple[Callable[[DataParallelScheduler], Any], Future[Any]]] = []
        self._stopping = False

    # ---- any thread ----

    def start(self) -> None:
        """Run in a thread of its own until `stop`."""
        assert self._thread is None, "the engine is started already"
        self._thread = threading.Thread(target=self._run, name="arriero-engine", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End all requests with finish_reason "lost" and close the executor; safe to call twice.

        Do not call from a callback.
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
            InvalidRequest: the request could never run, or its id is in use.
            Overloaded: the queue is full.
            Unavailable: the engine has failed or was stopped.
        """
        check_request(self.config, request, self._scheduler.adapters)
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
        """End a request within a step; ended requests are ignored."""
        with self._wake:
            self._cancelled.append(request_id)
            self._wake.notify()

    def ask(self, function: Callable[[DataParallelScheduler], T]) -> Future[T]:
        """Call a function of the scheduler between two steps, in the engine's thread.

        The future has the function's result, or `Unavailable` if the engine ends first.
        """
        future: Future[T] = Future()
        with self._wake:
            if self.failure is not None or self._stopping:
                future.set_exception(Unavailable("the group is lost or was stopped"))
            else:
                self._calls.append((function, future))
                self._wake.notify()
        return future

    def release(self, tenant: str, session: str) -> None:
        """Retain the blocks of a tenant's session no longer, from the next step on."""
        self.ask(lambda scheduler: scheduler.release(tenant, session))

    def add_adapter(self, digest: str, path: str) -> Future[str]:
        """Serve an adapter from now on, once every slice has loaded its cut.

        Returns:
            Future of the error; "" after success. After an error the adapter is not served.
        """
        future: Future[str] = Future()

        def offer(scheduler: DataParallelScheduler) -> None:
            self._pending.add(digest, future, scheduler.offer_adapter(digest, path))

        self.ask(offer).add_done_callback(partial(_pass_error, future))
        return future

    def remove_adapter(self, digest: str) -> Future[None]:
        """Accept no more requests for an adapter; live requests end as usual."""
        return self.ask(lambda scheduler: scheduler.withdraw_adapter(digest))

    def name_weights(self, digest: str, sources: tuple[str, ...], on_weights: OnWeights) -> None:
        """Name the weights that serve now; before `start`."""
        self._changes.name_weights(digest, sources, on_weights)

    def change(self, change: Change) -> Future[HoldStatus]:
        """Pause, resume, sleep, wake, or push weights.

        The future has the state after the change; or `InvalidRequest`: the change makes no sense
        now; or `CheckpointError`: the weights are refused. Then nothing has changed.
        """
        future: Future[HoldStatus] = Future()
        begun = self.ask(lambda scheduler: self._changes.begin(change, future))
        begun.add_done_callback(partial(_pass_error, future))
        return future

    @property
    def holds(self) -> HoldStatus:
        """Whether the group is paused or asleep, and its weights; thread-safe."""
        return self._changes.status

    def shared(self, keys: list[bytes]) -> tuple[dict[Pool, PeerBlocks], bool]:
        """Blocks of these keys that another group may copy, and whether more are being saved.

        Returns at once, from any thread. The answer may be outdated on arrival; the reader
        of the blocks verifies the keys.
        """
        return self._scheduler.shared(keys), self._scheduler.is_saving(keys)

    def stats(self) -> EngineStats:
        """A snapshot; `step_us` has running means of a step's phases, in microseconds."""
        stats = self._scheduler.stats
        waiting = stats.num_waiting + len(self._arrived) + self._scheduler.num_held
        stats = replace(
            stats,
            num_waiting=waiting,
            step_us=self._means.snapshot(),
            holding=self._changes.holding,
        )
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
        gc.freeze()  # all objects loaded so far stay: full collections may skip them
        while self._wait_for_work():
            self.step()

    def _wait_for_work(self) -> bool:
        """Sleep without work; False when the engine is to end."""
        with self._wake:
            while not self._stopping and self.failure is None and not self._has_work():
                self._wake.wait()
            return not self._stopping and self.failure is None

    def _has_work(self) -> bool:
        scheduler = self._scheduler
        inbox = self._arrived or self._cancelled or self._calls
        return bool(
            inbox
            or self._changes.busy
            or scheduler.num_runnable
            or scheduler.num_outstanding
            or scheduler.num_transfers
            or scheduler.num_loading
        )

    def step(self) -> bool:
        """Schedule ahead, apply the oldest result, deliver its outputs; True while work is left.

        Any error ends the group: every live request gets the error; `step` never raises.
        """
        try:
            self._take_inbox()
            self._collect_transfers()
            self._collect_adapters()
            self._advance_change()
            self._submit_plans()
            self._collect_oldest()
            if not self._scheduler.num_outstanding:  # the slices wait: their plan goes first
                self._submit_plans()
            self._deliver()
        except Exception as error:
            self._fail(error)
        return self.failure is None and self._has_work()

    def _take_inbox(self) -> None:
        # Under the lock, so that an id is always in the inbox or in the scheduler.
        with self._wake:
            for request in self._arrived.values():
                self._outputs += self._scheduler.enqueue(request)
            self._arrived.clear()
            cancelled, self._cancelled = self._cancelled, []
            calls, self._calls = self._calls, []
        for request_id in cancelled:
            self._outputs += self._scheduler.cancel(request_id)
        for function, future in calls:
            try:
                future.set_result(function(self._scheduler))
            except Exception as error:  # the caller's function failed
                future.set_exception(error)

    def _submit_plans(self) -> None:
        start_ns = perf_counter_ns()
        while plans := self._scheduler.schedule():
            change = None if self._balance is None else self._next_placement(self._balance)
            for plan in plans:
                if change is not None:
                    plan.placement_layer, plan.placement = change
                self._executor.submit(plan)
        for batch in self._scheduler.take_transfers():
            self._executor.transfer(batch)
        for changes in self._scheduler.take_adapters():
            self._executor.change_adapters(changes)
        self._means.note("schedule", perf_counter_ns() - start_ns)

    def _collect_transfers(self, timeout_s: float = 0.0) -> None:
        if self.config.tiers.enabled:
            self._scheduler.apply_results(self._executor.collect_transfers(timeout_s))

    def _collect_adapters(self, timeout_s: float = 0.0) -> None:
        if not self._scheduler.num_loading:
            return
        results = self._executor.collect_adapters(timeout_s)
        outputs, loaded = self._scheduler.apply_adapters(results)
        self._outputs += outputs
        for digest, error in loaded:
            if self._pending.ended(digest, error):
                self._scheduler.withdraw_adapter(digest)

    def _advance_change(self, timeout_s: float = 0.0) -> None:
        if self._changes.pending:
            self._changes.advance(self._emit, self._deliver, self._start_balance, timeout_s)

    def _emit(self, outputs: list[SequenceOutput]) -> None:
        self._outputs += outputs

    def _start_balance(self) -> None:
        """Balance experts from their placement at the start."""
        if self.config.experts is not None:
            self._balance = ExpertBalance(self.config.experts, enabled=self.config.move_experts)

    def _next_placement(self, balance: ExpertBalance) -> tuple[int, Int32] | None:
        balance.note(self._executor.take_loads())
        return balance.next_placement()

    def _collect_oldest(self) -> None:
        if not self._scheduler.num_outstanding:
            if self._scheduler.num_transfers:
                self._collect_transfers(_TRANSFER_WAIT_S)
                return
            if self._scheduler.num_loading:
                self._collect_adapters(_TRANSFER_WAIT_S)
                return
            if self._changes.busy:
                self._advance_change(_SLICES_WAIT_S)
                return
            # Otherwise the loop would spin forever without a message.
            assert not self._scheduler.num_runnable, "requests are live and nothing can run"
            return
        start_ns = perf_counter_ns()
        result: StepResult | None = None
        while result is None:
            if self._stopping:
                return
            result = self._executor.collect(_COLLECT_S)
        arrived_ns = perf_counter_ns()
        self._outputs += self._scheduler.update(result)
        self._means.note("wait", arrived_ns - start_ns)
        self._means.note("update", perf_counter_ns() - arrived_ns)

    def _deliver(self) -> None:
        outputs, self._outputs = self._outputs, []
        if outputs:
            start_ns = perf_counter_ns()
            self._on_outputs(outputs)
            self._means.note("deliver", perf_counter_ns() - start_ns)

    def _fail(self, error: Exception) -> None:
        if isinstance(error, GroupFailed):
            cause = error
            _log.error("the group is lost: %s", cause)
        else:
            cause = GroupFailed(f"the engine failed with {type(error).__name__}: {error}")
            cause.__cause__ = error
            _log.error("the engine failed", exc_info=error)
        with self._wake:
            self.failure = cause  # from now on `submit` refuses
        self._end_all(str(cause))
        if self._on_failure is not None:  # before closing, which hanging slices may delay
            self._on_failure(cause)
        self._executor.close()

    def _end_all(self, cause: str) -> None:
        """End every request, including those in the inbox."""
        try:
            self._take_inbox()
            self._outputs += self._scheduler.fail(cause)
            self._pending.fail(Unavailable(f"the group is lost: {cause}"))
            self._changes.fail(Unavailable(f"the group is lost: {cause}"))
            self._deliver()
        except Exception:  # a callback failed: there is no other way to report
            _log.exception("the last outputs could not be delivered")


def _pass_error(future: Future[Any], begun: Future[None]) -> None:
    """Give a future the error of the call that should have begun its work, if any."""
    if (error := begun.exception()) is not None:
        future.set_exception(error)
