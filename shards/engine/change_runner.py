"""Runs the changes of a group step by step: pause, sleep, wake and pushed weights.

Carries the decisions of `Holds` out on scheduler and executor, in the engine's thread. Knows both;
decides nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future

from arriero.shards.engine.dp_scheduler import DataParallelScheduler
from arriero.shards.engine.holds import Change, Gate, Holds, HoldStatus
from arriero.shards.engine.types import Executor, SequenceOutput
from arriero.shards.errors import CheckpointError

OnWeights = Callable[[str], bytes]
"""Called in the engine's thread with the digest of the weights that serve from now on; gives the
salt of the keys of blocks. All outputs of the weights before have been delivered."""


class ChangeRunner:
    """Runs one change at a time.

    Args:
        scheduler: of the group.
        executor: of the group.
        num_ranks: slices of the group.
    """

    def __init__(
        self, scheduler: DataParallelScheduler, executor: Executor, num_ranks: int
    ) -> None:
        self._scheduler, self._executor = scheduler, executor
        self._num_ranks = num_ranks
        self._holds = Holds(num_ranks)
        self._future: Future[HoldStatus] | None = None
        self.on_weights: OnWeights | None = None

    def name_weights(self, digest: str, sources: tuple[str, ...], on_weights: OnWeights) -> None:
        """Name the weights that serve now; before the first change."""
        self._holds = Holds(self._num_ranks, digest, sources)
        self._scheduler.set_weights(digest)
        self.on_weights = on_weights

    @property
    def status(self) -> HoldStatus:
        """State of the group."""
        return self._holds.status(self._scheduler.num_held)

    @property
    def busy(self) -> bool:
        """Whether a change is running."""
        return self._holds.busy

    @property
    def holding(self) -> bool:
        """Whether new requests are held."""
        return self._holds.gate is not Gate.OPEN

    @property
    def pending(self) -> bool:
        """Whether `advance` may have something to do."""
        return self._holds.busy or self._holds.gate is not self._scheduler.gate

    def begin(self, change: Change, future: Future[HoldStatus]) -> None:
        """Begin a change; the future gets the state after it, or why nothing has changed.

        Raises:
            InvalidRequest: see `Holds.begin`.
        """
        if self._holds.begin(change, self._scheduler.activity):
            future.set_result(self.status)
        else:
            self._future = future

    def advance(
        self,
        emit: Callable[[list[SequenceOutput]], None],
        deliver: Callable[[], None],
        reset: Callable[[], None],
        timeout_s: float = 0.0,
    ) -> None:
        """Go on with the running change as far as possible now.

        Args:
            emit: gets ends of requests.
            deliver: delivers all outputs so far.
            reset: called after the slices have loaded weights: placements are those of the start.
            timeout_s: longest wait for a result of the slices.
        """
        if self._holds.waits_for_slices:
            for result in self._executor.collect_weights(timeout_s):
                self._holds.apply(result)
        emit(self._scheduler.set_gate(self._holds.gate))
        while (step := self._holds.next(self._scheduler.activity)) is not None:
            if step.end_all:
                emit(self._scheduler.abort(step.end_all))
            if step.empty_cache:
                self._scheduler.empty_cache()
                for batch in self._scheduler.take_transfers():  # files to drop
                    self._executor.transfer(batch)
            if step.command is not None:
                self._executor.change_weights(step.command)
            if step.digest:
                deliver()
                salt = None if self.on_weights is None else self.on_weights(step.digest)
                self._scheduler.set_weights(step.digest, salt)
            if step.loaded:
                reset()
            if step.done:
                self._end(step.error)
            emit(self._scheduler.set_gate(self._holds.gate))

    def _end(self, error: str) -> None:
        future, self._future = self._future, None
        if future is None or future.done():  # the caller has left
            return
        if error:
            future.set_exception(CheckpointError(error))
        else:
            future.set_result(self.status)

    def fail(self, cause: Exception) -> None:
        """The engine ends."""
        future, self._future = self._future, None
        if future is not None and not future.done():
            future.set_exception(cause)
