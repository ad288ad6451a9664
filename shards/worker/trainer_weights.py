"""A rank's part in a trainer's broadcast: join, compare what is announced, receive.

Runs in the thread of the checks of weights, beside the steps; what comes is a file that a push then
names. Knows the broadcast group and the files; changes nothing of what the rank serves.
"""

from __future__ import annotations

from pathlib import Path

import torch

from arriero.shards.checkpoint.overlay import open_weights
from arriero.shards.checkpoint.spool import (
    SpoolWriter,
    complete,
    nbytes_of,
    prepare,
    refuse_announced,
)
from arriero.shards.collectives.broadcast_group import BroadcastGroup, join_group
from arriero.shards.config.group import GroupConfig
from arriero.shards.errors import CheckpointError
from arriero.shards.protocol.trainer import TrainerAddress
from arriero.shards.protocol.weights import WeightsAction, WeightsCommand, WeightsResult


class TrainerWeights:
    """Receives weights on a rank.

    Args:
        config: resolved config of the replica group.
        rank: of this slice.
    """

    def __init__(self, config: GroupConfig, rank: int) -> None:
        self._model_path, self._rank = config.model_path, rank
        self._group: BroadcastGroup | None = None

    def run(self, command: WeightsCommand) -> WeightsResult:
        """Run a command.

        Raises:
            CheckpointError: the trainer did not come, broke off, or announced other tensors than
                the model's. What serves stays; after a broken broadcast join again.
        """
        whole = False
        if command.action is WeightsAction.JOIN:
            assert command.trainer is not None, "of every join"
            self._join(command.trainer)
        elif command.action is WeightsAction.ANNOUNCE:
            base = open_weights(self._model_path, command.sources)
            total = refuse_announced(base, command.tensors)
            prepare(Path(command.file), command.sources, total)
        else:
            whole = self._receive(command)
        return WeightsResult(rank=self._rank, number=command.number, whole=whole)

    def close(self) -> None:
        """Leave the group of the trainer."""
        group, self._group = self._group, None
        if group is not None:
            group.close()

    def _join(self, trainer: TrainerAddress) -> None:
        self.close()
        self._group = join_group(
            trainer.host,
            trainer.port,
            trainer.first_rank + self._rank,
            trainer.world_size,
            trainer.timeout_s,
        )

    def _receive(self, command: WeightsCommand) -> bool:
        """Receive each tensor in a buffer, and write them to the file; whether a model is whole."""
        group = self._group
        if group is None:
            raise CheckpointError(
                "this slice is in no group of a trainer; call /init_weight_transfer_engine first"
            )
        base = open_weights(self._model_path, command.sources)
        file, sizes = Path(command.file), nbytes_of(command.tensors)
        buffer_B = torch.empty(max(sizes), dtype=torch.uint8)
        writer = SpoolWriter(file, command.tensors)
        try:
            for tensor, size in zip(command.tensors, sizes, strict=True):
                if size:
                    group.broadcast(buffer_B[:size], tensor.name)
                    writer.add(buffer_B[:size])
            writer.finish()
            return complete(file, base, command.tensors, writes=writer.writes)
        except BaseException:
            writer.discard()
            self.close()
            raise
