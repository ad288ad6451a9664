"""Places of experts' rows in an exchange of a fixed number of rows for each pair of ranks.

Each rank sends every rank a block of `room` rows: first its rows for that rank's experts, in order
of the slots, and padding after. All numbers of rows stay on the device, so that the exchange can be
part of a CUDA graph, and the host waits for nothing. The room is the worst case: no row is ever
left over. Knows slots and rows; knows nothing of bytes and transports.

Shape legend: R ranks of the stage, S expert slots on all ranks, E slots of this rank, C rows of a
block (the room), P = R * C rows of a message, X rows of this rank's (token, expert) pairs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from arriero.shards.collectives.host_copy import to_device
from arriero.shards.protocol.step_plan import Int32


def room_of(num_tokens: int, top_k: int, tp: int, starts_R1: Int32) -> int:
    """Most rows that a rank sends to another rank.

    Args:
        num_tokens: most tokens of a data-parallel rank.
        top_k: experts of a token, all different.
        tp: ranks with the same tokens; each sends the rows of a share of the tokens.
        starts_R1: first slot of each rank.
    """
    slots = int((starts_R1[1:] - starts_R1[:-1]).max())
    return -(-num_tokens // tp) * min(top_k, slots)


class PaddedRows:
    """Places of rows in messages of blocks.

    Args:
        starts_R1: first slot of each rank, and the number of slots.
        rank: this rank.
        room: rows of a block.
        device: device of all tensors.
    """

    def __init__(self, starts_R1: Int32, rank: int, room: int, device: torch.device) -> None:
        ranks = len(starts_R1) - 1
        self.num_rows = ranks * room
        self._own = slice(int(starts_R1[rank]), int(starts_R1[rank + 1]))
        self._ranks, self._room = ranks, room
        self._starts_R = to_device(starts_R1[:-1].copy(), device)
        sizes = torch.from_numpy(starts_R1[1:] - starts_R1[:-1]).long()
        rank_S = torch.arange(ranks, dtype=torch.int32).repeat_interleave(sizes)
        self._rank_S = to_device(rank_S.numpy(), device)
        self._block_R = torch.arange(ranks, dtype=torch.int32, device=device) * room
        self._row_C = torch.arange(room, dtype=torch.int32, device=device)
        self.no_scores_P1 = torch.zeros(self.num_rows, 1, device=device)

    def first_rows(self, starts_S1: Tensor) -> Tensor:
        """First row for each rank, int32 [R]; `starts_S1`: first row of each slot."""
        return starts_S1.index_select(0, self._starts_R)

    def sent(self, first_R: Tensor, num_rows: int) -> Tensor:
        """The row at each place of the message to send, int32 [P]; any row at padding.

        Args:
            first_R: of `first_rows`.
            num_rows: X, at least 1.
        """
        row_RC = first_R[:, None] + self._row_C
        return row_RC.view(-1).clamp_(max=num_rows - 1)

    def slots(self, counts_RS: Tensor) -> Tensor:
        """The slot of this rank at each place of the received message, int32 [P]; E at padding.

        Args:
            counts_RS: int32, rows from each rank to each slot.
        """
        end_RE = counts_RS.view(self._ranks, -1)[:, self._own].cumsum(1)
        passed_RCE = self._row_C[None, :, None] >= end_RE[:, None, :]
        return passed_RCE.sum(-1, dtype=torch.int32).view(-1)

    def returned(self, first_R: Tensor, slot_X: Tensor, row_X: Tensor) -> Tensor:
        """The place of each row in the message that comes back, int32 [X].

        Args:
            first_R: of `first_rows`.
            slot_X: int32, slot of each pair.
            row_X: int32, row of each pair among the rows in order of the slots.
        """
        shift_R = self._block_R - first_R
        rank_X = self._rank_S.index_select(0, slot_X)
        return row_X + shift_R.index_select(0, rank_X)
