"""Runs the leader's commands on the weights of a rank.

Checks and a trainer's broadcasts run in a thread and report later; release and load run between two
steps and report at once. Knows the runner's methods; knows nothing of sockets.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from arriero.shards.errors import CheckpointError
from arriero.shards.protocol.weights import WeightsAction, WeightsCommand, WeightsResult

if TYPE_CHECKING:
    from arriero.shards.worker.runner import Runner


def run_command(
    runner: Runner, command: WeightsCommand, on_result: Callable[[WeightsResult], None]
) -> None:
    """Run a command; `on_result` gets its end, at once or later from another thread.

    Call between two steps, with no launched step left.
    """
    if not command.action.between_steps:
        runner.weight_checker.submit(command)
        return
    error = ""
    try:
        if command.action is WeightsAction.RELEASE:
            runner.release(keep_on_host=command.keep_on_host)
        else:
            runner.load(command.sources)
    except CheckpointError as failure:
        error = str(failure)[:2000]
    on_result(
        WeightsResult(
            rank=runner.mesh.part.rank,
            number=command.number,
            error=error,
            weights_bytes=runner.weights_nbytes,
            kv_bytes=runner.kv_nbytes,
        )
    )
