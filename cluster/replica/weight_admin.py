"""Changes of a group's weights and pauses, for the operator.

Knows the group's engine; knows nothing of callers and of other groups.
"""

from __future__ import annotations

import asyncio

from arriero.cluster.replica.weight_actions import WeightArguments, WeightReport
from arriero.shards.config.speculation import SpeculationConfig
from arriero.shards.engine.engine import Engine
from arriero.shards.engine.holds import Change, HoldStatus, Kind
from arriero.shards.errors import ArrieroError, InvalidRequest
from arriero.shards.protocol import wire


class WeightAdminHandler:
    """Makes one change after another.

    Args:
        engine: of the group.
        speculation: how the group drafts.
    """

    def __init__(self, engine: Engine, speculation: SpeculationConfig) -> None:
        self._engine = engine
        self._draft_model = speculation.model_path if speculation.in_slices else None
        self._running: asyncio.Future[HoldStatus] | None = None
        self._change: Change | None = None

    async def answer(self, arguments: memoryview) -> WeightReport:
        """Begin a change, or wait for the same change that is running; then tell the state.

        Args:
            arguments: bytes of `WeightArguments`.

        Raises:
            InvalidRequest: another change is running, or the change makes no sense now.
            WireError: the arguments are of another type.
        """
        wanted = wire.decode(arguments, WeightArguments)
        if wanted.change is not None:
            if self._running is not None and not self._running.done():
                if wanted.change != self._change:
                    state = self._engine.holds.change
                    raise InvalidRequest("change", f"the group is in the middle of {state}")
            else:
                self._begin(wanted.change)
        if self._running is not None and wanted.wait_s > 0:
            await asyncio.wait([self._running], timeout=wanted.wait_s)
        error = self._take_error()
        if isinstance(error, InvalidRequest) and wanted.change is not None:
            raise error
        return WeightReport(
            status=self._engine.holds, error="" if error is None else str(error), notes=self._notes
        )

    def _begin(self, change: Change) -> None:
        self._change = change
        self._running = asyncio.wrap_future(self._engine.change(change))

    def _take_error(self) -> Exception | None:
        if self._running is None or not self._running.done() or self._running.cancelled():
            return None
        error = self._running.exception()
        if error is not None and not isinstance(error, ArrieroError):
            raise error
        return error if isinstance(error, Exception) else None

    @property
    def _notes(self) -> tuple[str, ...]:
        pushed = self._change is not None and self._change.kind is Kind.PUSH
        if not pushed or self._draft_model is None:
            return ()
        return (
            f"the draft model {self._draft_model} keeps its weights: no token changes, but fewer "
            "drafts may be right; `arriero rollout` changes the draft model",
        )
