"""Executor of a group of a single slice, in this process: no sockets, no set-up.

Knows threads and queues; knows nothing of how a step is computed.
"""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Mapping
from typing import TYPE_CHECKING, TypeVar

from arriero.shards.collectives.expert_parallel import Loads
from arriero.shards.config.group import GroupConfig
from arriero.shards.errors import GroupFailed
from arriero.shards.kv.transfers import TransferBatch, TransferResult
from arriero.shards.protocol.adapters import AdapterBatch, AdapterResult
from arriero.shards.protocol.step_plan import StepPlan, StepResult
from arriero.shards.protocol.weights import WeightsCommand, WeightsResult

if TYPE_CHECKING:
    from arriero.shards.worker.runner import Runner
from arriero.shards.worker.step_results import Pending
from arriero.shards.worker.weight_commands import run_command

T = TypeVar("T")
_Message = StepPlan | TransferBatch | AdapterBatch | WeightsCommand


class LocalExecutor:
    """Runs a single-slice group in a thread of this process."""

    def __init__(self, config: GroupConfig) -> None:
        from arriero.shards.worker.select import runner_for

        self._runner: Runner | None = runner_for(config, 0)
        self._transfer_results: queue.SimpleQueue[TransferResult] = queue.SimpleQueue()
        self._runner.warm_up()
        self._adapter_results: queue.SimpleQueue[AdapterResult] = queue.SimpleQueue()
        self._weights_results: queue.SimpleQueue[WeightsResult] = queue.SimpleQueue()
        self._runner.weight_checker.start(self._weights_results.put)
        self._transfer_workers = self._runner.open_tiers(self._transfer_results.put)
        if self._runner.adapter_store is not None:
            self._runner.adapter_store.start(self._adapter_results.put)
        self._plans: queue.SimpleQueue[_Message | None] = queue.SimpleQueue()
        self._results: queue.SimpleQueue[Pending | BaseException] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="slice", daemon=True)
        self._thread.start()

    def submit(self, plan: StepPlan) -> None:
        """Queue a plan."""
        self._plans.put(plan)

    def collect(self, timeout_s: float | None = None) -> StepResult | None:
        """Result of the oldest outstanding plan, or None at the time limit."""
        try:
            result = self._results.get(timeout=timeout_s)
        except queue.Empty:
            return None
        if isinstance(result, BaseException):
            name = type(result).__name__
            raise GroupFailed(f"slice 0 failed in a step: {name}: {result}") from result
        return result.wait()

    def take_loads(self) -> Mapping[int, Loads]:
        """Nothing to balance: the single slice has all experts."""
        return {}

    def transfer(self, batch: TransferBatch) -> None:
        """Queue transfers of blocks behind the plans."""
        self._plans.put(batch)

    def collect_transfers(self, timeout_s: float = 0.0) -> list[TransferResult]:
        """Transfer results since the last call; waits for the first until the time limit."""
        return _take(self._transfer_results, timeout_s)

    def change_adapters(self, batch: AdapterBatch) -> None:
        """Queue loads and drops of adapters behind the plans."""
        self._plans.put(batch)

    def collect_adapters(self, timeout_s: float = 0.0) -> list[AdapterResult]:
        """Ends of loads since the last call; waits for the first until the time limit."""
        return _take(self._adapter_results, timeout_s)

    def change_weights(self, command: WeightsCommand) -> None:
        """Queue a command on weights behind the plans."""
        self._plans.put(command)

    def collect_weights(self, timeout_s: float = 0.0) -> list[WeightsResult]:
        """Ends of commands since the last call; waits for the first until the time limit."""
        return _take(self._weights_results, timeout_s)

    def close(self) -> None:
        """Stop the threads and give the weights back; safe to call twice."""
        self._plans.put(None)
        self._thread.join()
        self._transfer_workers.close()
        if self._runner is not None:
            self._runner.close()
        self._runner = None

    def _run(self) -> None:
        runner = self._runner
        assert runner is not None, "set before the thread starts"
        launched: list[Pending] = []

        def publish() -> None:
            while launched:
                self._results.put(launched.pop())

        try:
            while (plan := self._plans.get()) is not None:
                if isinstance(plan, TransferBatch):
                    self._transfer_workers.submit(plan)
                elif isinstance(plan, AdapterBatch):
                    assert runner.adapter_store is not None, "the engine knows the slots"
                    runner.adapter_store.submit(plan)
                elif isinstance(plan, WeightsCommand):
                    run_command(runner, plan, self._weights_results.put)
                else:
                    # The engine's thread needs the interpreter as soon as a result is published.
                    # While another plan waits, publish when that plan's layers run without the
                    # interpreter.
                    pending = runner.launch(plan, at_layers=publish)
                    assert pending is not None, "the single slice of a group always samples"
                    launched.append(pending)
                if self._plans.empty():
                    publish()
        except Exception as error:
            publish()
            self._results.put(error)


def _take(results: queue.SimpleQueue[T], timeout_s: float) -> list[T]:
    """All entries of a queue; waits for the first until the time limit."""
    taken: list[T] = []
    with contextlib.suppress(queue.Empty):
        taken.append(results.get(timeout_s > 0, timeout_s))
        while True:
            taken.append(results.get_nowait())
    return taken
