"""Plans for a group of one slice, which runs in this process: no sockets, nothing to install.

Knows threads and queues; knows nothing of what a step computes.
"""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Mapping
from typing import TYPE_CHECKING

from arriero.shards.collectives.expert_parallel import Loads
from arriero.shards.config.group import GroupConfig
from arriero.shards.errors import GroupFailed
from arriero.shards.kv.transfers import TransferBatch, TransferResult
from arriero.shards.protocol.step_plan import StepPlan, StepResult

if TYPE_CHECKING:
    from arriero.shards.worker.runner import Pending, Runner


class LocalExecutor:
    """Runs a single-slice group in a thread of this process."""

    def __init__(self, config: GroupConfig) -> None:
        from arriero.shards.worker.select import runner_for

        self._runner: Runner | None = runner_for(config, 0)
        self._moved: queue.SimpleQueue[TransferResult] = queue.SimpleQueue()
        self._runner.warm_up()
        self._movers = self._runner.open_tiers(self._moved.put)
        self._plans: queue.SimpleQueue[StepPlan | TransferBatch | None] = queue.SimpleQueue()
        self._results: queue.SimpleQueue[Pending | BaseException] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="slice", daemon=True)
        self._thread.start()

    def submit(self, plan: StepPlan) -> None:
        """Queue a plan."""
        self._plans.put(plan)

    def collect(self, timeout_s: float | None = None) -> StepResult | None:
        """Result of the oldest plan outstanding, or None at the time limit."""
        try:
            got = self._results.get(timeout=timeout_s)
        except queue.Empty:
            return None
        if isinstance(got, BaseException):
            raise GroupFailed(f"slice 0 failed in a step: {type(got).__name__}: {got}") from got
        return got.wait()

    def take_loads(self) -> Mapping[int, Loads]:
        """One slice holds all experts: there is nothing to balance."""
        return {}

    def move(self, moves: TransferBatch) -> None:
        """Queue copies of blocks behind the plans."""
        self._plans.put(moves)

    def moved(self, timeout_s: float = 0.0) -> list[TransferResult]:
        """What came of copies since the last call; waits for the first until the limit."""
        found: list[TransferResult] = []
        with contextlib.suppress(queue.Empty):
            found.append(self._moved.get(timeout_s > 0, timeout_s))
            while True:
                found.append(self._moved.get_nowait())
        return found

    def close(self) -> None:
        """Stop the threads and give the weights back; safe to call twice."""
        self._plans.put(None)
        self._thread.join()
        self._movers.close()
        if self._runner is not None:
            self._runner.close()
        self._runner = None

    def _run(self) -> None:
        runner = self._runner
        assert runner is not None, "set before the thread starts"
        held: list[Pending] = []

        def hand_on() -> None:
            while held:
                self._results.put(held.pop())

        try:
            while (plan := self._plans.get()) is not None:
                if isinstance(plan, TransferBatch):
                    self._movers.submit(plan)
                else:
                    # The engine's thread wants the interpreter as soon as it has a result: where
                    # another plan waits, it gets it when that one's layers run without it.
                    pending = runner.launch(plan, at_layers=hand_on)
                    assert pending is not None, "the only slice of a group samples"
                    held.append(pending)
                if self._plans.empty():
                    hand_on()
        except Exception as error:
            hand_on()
            self._results.put(error)
