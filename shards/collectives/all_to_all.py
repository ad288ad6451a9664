"""All-to-all of byte rows between the ranks of a stage, in one or two levels.

By exact counts, which the host knows; or with the same number of rows for each pair of ranks, which
can be part of a CUDA graph.

With two levels rows first move within each machine, to the rank with the same local rank as their
destination. Then each rank exchanges across machines only with ranks of the same local rank. So
the network carries one message between two machines for each local rank, not for each pair of
ranks.

Every rank knows the whole matrix of counts, so no rank waits for a size. Knows bytes and ranks;
knows nothing of experts.

Shape legend: R ranks, X rows sent, Y rows received, B bytes of a row, P rows sent and received
where all blocks of rows have one size.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor

from arriero.shards.collectives.host_copy import to_device

Counts = npt.NDArray[np.int64]
"""[R, R]: rows from each rank to each rank."""

Receive = Callable[[], Tensor]
"""Waits for a started exchange; returns uint8 [Y, B], in the order of source ranks."""


class Exchange(ABC):
    """An all-to-all of rows over the ranks 0 .. R - 1 of a stage."""

    @abstractmethod
    def begin(self, rows_XB: Tensor, counts_RR: Counts) -> Receive:
        """Start sending rows.

        Args:
            rows_XB: uint8, contiguous, in the order of destination ranks.
            counts_RR: the same on every rank; row `rank` describes `rows_XB`.
        """

    @abstractmethod
    def swap(self, rows_PB: Tensor) -> Tensor:
        """Send each rank a block of rows, and receive one from each; queued, never waited for.

        Args:
            rows_PB: uint8, contiguous: blocks of the same size, in the order of destination ranks.

        Returns:
            uint8 [P, B], blocks in the order of source ranks.
        """


class DirectExchange(Exchange):
    """Every rank to every rank directly."""

    def __init__(self, rank: int, group: dist.ProcessGroup) -> None:
        self._rank, self._group = rank, group

    def begin(self, rows_XB: Tensor, counts_RR: Counts) -> Receive:
        """See `Exchange.begin`."""
        return _all_to_all(rows_XB, counts_RR[self._rank], counts_RR[:, self._rank], self._group)

    def swap(self, rows_PB: Tensor) -> Tensor:
        """See `Exchange.swap`."""
        return _swap(rows_PB, self._group)


class TwoLevelExchange(Exchange):
    """Within each machine, then across machines.

    Args:
        rank: rank in the stage.
        per_node: ranks of each machine; rank = machine * per_node + local rank.
        node_group: ranks of the same machine.
        rail_group: ranks with the same local rank, one of each machine.
    """

    def __init__(
        self,
        rank: int,
        per_node: int,
        node_group: dist.ProcessGroup,
        rail_group: dist.ProcessGroup,
    ) -> None:
        self._node, self._local_rank = divmod(rank, per_node)
        self._per_node = per_node
        self._node_group, self._rail_group = node_group, rail_group

    def begin(self, rows_XB: Tensor, counts_RR: Counts) -> Receive:
        """See `Exchange.begin`; on return only the step across machines is in flight."""
        size = self._per_node
        nodes = len(counts_RR) // size
        # [source node, source local rank, destination node, destination local rank]
        counts = counts_RR.reshape(nodes, size, nodes, size)
        own = counts[self._node, self._local_rank]  # [destination node, destination local rank]
        by_local_rank = _regrouped(own, rows_XB)
        here = counts[self._node]  # [source local rank, destination node, destination local rank]
        gathered = _all_to_all(
            by_local_rank, own.sum(0), here[:, :, self._local_rank].sum(1), self._node_group
        )()
        by_node = _regrouped(here[:, :, self._local_rank], gathered)
        return _all_to_all(
            by_node,
            here[:, :, self._local_rank].sum(0),
            counts[:, :, self._node, self._local_rank].sum(1),
            self._rail_group,
        )

    def swap(self, rows_PB: Tensor) -> Tensor:
        """See `Exchange.swap`."""
        size, nodes = self._per_node, self._rail_group.size()
        by_local_rank = _transposed(rows_PB, nodes, size)  # (local rank, node) of destinations
        gathered = _swap(by_local_rank, self._node_group)  # (source local rank, destination node)
        return _swap(_transposed(gathered, size, nodes), self._rail_group)


def _transposed(rows_PB: Tensor, a: int, b: int) -> Tensor:
    """Reorder blocks (a, b), b fastest, to the order (b, a)."""
    blocks = rows_PB.view(a, b, -1, rows_PB.shape[1])
    return blocks.transpose(0, 1).contiguous().view_as(rows_PB)


def _swap(rows_PB: Tensor, group: dist.ProcessGroup) -> Tensor:
    out_PB = torch.empty_like(rows_PB)
    dist.all_to_all_single(out_PB, rows_PB, group=group)
    return out_PB


def _regrouped(counts_AB: Counts, rows: Tensor) -> Tensor:
    """Reorder rows in runs (a, b), b fastest, to the order (b, a)."""
    starts = np.cumsum(counts_AB) - counts_AB.reshape(-1)
    order = [
        np.arange(start, start + count)
        for start, count in zip(
            starts.reshape(counts_AB.shape).T.reshape(-1), counts_AB.T.reshape(-1), strict=True
        )
    ]
    return rows.index_select(0, to_device(np.concatenate(order), rows.device))


def _all_to_all(
    rows_XB: Tensor, sent: Counts, received: Counts, group: dist.ProcessGroup
) -> Receive:
    out_YB = rows_XB.new_empty(int(received.sum()), rows_XB.shape[1])
    work = dist.all_to_all_single(
        out_YB, rows_XB, received.tolist(), sent.tolist(), group=group, async_op=True
    )

    def receive() -> Tensor:
        if work is not None:
            work.wait()
        return out_YB

    return receive


def topology(nodes: Sequence[str]) -> int:
    """Ranks of each machine if rows should move in two levels; 0 otherwise.

    Two levels need several machines with the same number of ranks, above 1, in rank order.

    Args:
        nodes: name of each rank's machine.
    """
    per_node = next((i for i, node in enumerate(nodes) if node != nodes[0]), len(nodes))
    if per_node in (1, len(nodes)) or len(nodes) % per_node:
        return 0
    runs = [set(nodes[i : i + per_node]) for i in range(0, len(nodes), per_node)]
    alike = all(len(run) == 1 for run in runs)
    return per_node if alike and len(set().union(*runs)) == len(runs) else 0
