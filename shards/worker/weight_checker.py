"""Checks pushed weights on a rank, or receives them, in a thread beside the steps.

Knows files of weights and this rank's share of the work; changes nothing of what the rank serves.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable

import torch

from arriero.shards.checkpoint.content_digest import shape_digest, tensor_hashes
from arriero.shards.checkpoint.formats.stored import tensor_specs
from arriero.shards.checkpoint.overlay import Signature, open_weights, signature
from arriero.shards.checkpoint.pager import ranges_read
from arriero.shards.checkpoint.reader import Checkpoint
from arriero.shards.config.group import GroupConfig
from arriero.shards.errors import ArrieroError, CheckpointError
from arriero.shards.layout.parts import AnyPart
from arriero.shards.protocol.weights import WeightsAction, WeightsCommand, WeightsResult
from arriero.shards.worker.trainer_weights import TrainerWeights

_log = logging.getLogger(__name__)
_READ_BYTES = 4 << 20
_CLOSE_S = 2.0
"""Longest wait at the end for a broadcast; the daemon thread ends with the process."""


class WeightChecker:
    """The thread that reads or receives pushed weights on a rank.

    Args:
        config: resolved config of the group.
        part: part of the rank.
        num_ranks: ranks of the group, which divide the tensors to hash.
    """

    def __init__(self, config: GroupConfig, part: AnyPart, num_ranks: int) -> None:
        self._config, self._part, self._num_ranks = config, part, num_ranks
        self._trainer = TrainerWeights(config, part.rank)
        self._commands: queue.SimpleQueue[WeightsCommand | None] = queue.SimpleQueue()
        self._checked: dict[tuple[str, ...], Signature] = {}
        self._thread: threading.Thread | None = None

    def start(self, on_result: Callable[[WeightsResult], None]) -> None:
        """Start the thread; `on_result` is called there with the end of each check."""
        self._thread = threading.Thread(
            target=self._run, args=(on_result,), name="weights", daemon=True
        )
        self._thread.start()

    def submit(self, command: WeightsCommand) -> None:
        """Queue a check, or a part of a broadcast."""
        self._commands.put(command)

    def note(self, checkpoint: Checkpoint, sources: tuple[str, ...]) -> None:
        """Remember the state of the files of weights that the rank serves."""
        if checkpoint.ranged is None:
            self._checked = {sources: signature(checkpoint)}

    def require_unchanged(self, checkpoint: Checkpoint, sources: tuple[str, ...]) -> None:
        """Refuse files that were written since they were checked or loaded.

        Raises:
            CheckpointError: a file has changed or is gone, or nothing was checked.
        """
        if checkpoint.ranged is not None:
            return
        if self._checked.get(sources) != signature(checkpoint):
            raise CheckpointError(
                f"{checkpoint.path}: files of the weights have changed since they were checked; "
                "push them again, each time under a new path"
            )

    def close(self) -> None:
        """Stop the thread."""
        self._commands.put(None)
        if self._thread is not None:
            self._thread.join(_CLOSE_S)

    def _run(self, on_result: Callable[[WeightsResult], None]) -> None:
        torch.set_grad_enabled(False)
        while (command := self._commands.get()) is not None:
            rank = self._part.rank
            try:
                check = command.action is WeightsAction.CHECK
                result = self._check(command) if check else self._trainer.run(command)
            except ArrieroError as error:
                result = WeightsResult(rank=rank, number=command.number, error=str(error)[:2000])
            except Exception as error:  # the push fails; the group serves on
                _log.exception("the action %s on weights failed", command.action)
                text = f"{type(error).__name__}: {error}"[:2000]
                result = WeightsResult(rank=rank, number=command.number, error=text)
            on_result(result)
        self._trainer.close()

    def _check(self, command: WeightsCommand) -> WeightsResult:
        checkpoint = open_weights(self._config.model_path, command.sources)
        before = signature(checkpoint)
        checkpoint.check_whole()
        hashes = tensor_hashes(checkpoint, self._part.rank, self._num_ranks)
        checkpoint.release_pages()
        self._read_cut(checkpoint)
        sample = checkpoint.digest
        if signature(checkpoint) != before:
            raise CheckpointError(
                f"{command.sources[-1]}: files changed while they were read; push again"
            )
        self._checked[command.sources] = before
        return WeightsResult(
            rank=self._part.rank,
            number=command.number,
            shape=shape_digest(checkpoint),
            sample=sample,
            hashes=hashes,
        )

    def _read_cut(self, checkpoint: Checkpoint) -> None:
        """Read this rank's bytes, so that the load finds them in the page cache."""
        specs = tensor_specs(checkpoint.config, checkpoint.scheme)
        for file, start, stop in ranges_read(checkpoint, specs, self._part):
            with file.open("rb", buffering=0) as stream:
                stream.seek(start)
                left = stop - start
                while left > 0 and (piece := stream.read(min(left, _READ_BYTES))):
                    left -= len(piece)
