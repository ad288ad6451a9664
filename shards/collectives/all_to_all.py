"""Rows of bytes between the ranks of a stage, by true counts: all-to-all, in one level or in two.

In two levels rows first gather, within each machine, on the rank that has the place on its machine
which their destination has on its own; then each rank speaks across machines with its like only. So
the network carries one message between two machines for each place, not one for each pair of ranks.

Every rank knows the whole matrix of counts, so no rank waits to be told a size. Knows bytes and
ranks; knows nothing of experts.

Shape legend: R ranks, X rows sent, Y rows received, B bytes of a row.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor

Counts = npt.NDArray[np.int64]
"""[R, R]: rows from each rank to each rank."""

Receive = Callable[[], Tensor]
"""Waits for an exchange that was begun; gives uint8 [Y, B], in the order of source ranks."""


class Exchange(ABC):
    """An all-to-all of rows over the ranks 0 .. R - 1 of a stage."""

    @abstractmethod
    def begin(self, rows_XB: Tensor, counts_RR: Counts) -> Receive:
        """Send rows on their way.

        Args:
            rows_XB: uint8, contiguous, in the order of destination ranks.
            counts_RR: the same on every rank; row `rank` is of `rows_XB`.
        """


class DirectExchange(Exchange):
    """Every rank to every rank at once."""

    def __init__(self, rank: int, group: dist.ProcessGroup) -> None:
        self._rank, self._group = rank, group

    def begin(self, rows_XB: Tensor, counts_RR: Counts) -> Receive:
        """See `Exchange.begin`."""
        return _all_to_all(rows_XB, counts_RR[self._rank], counts_RR[:, self._rank], self._group)


class TwoLevelExchange(Exchange):
    """Within each machine, then across.

    Args:
        rank: this one.
        per_node: ranks of each machine; rank = machine * per_node + place.
        node_group: of the ranks of this machine.
        rail_group: of the ranks with this place, one of each machine.
    """

    def __init__(
        self,
        rank: int,
        per_node: int,
        node_group: dist.ProcessGroup,
        rail_group: dist.ProcessGroup,
    ) -> None:
        self._node, self._place = divmod(rank, per_node)
        self._per_node = per_node
        self._node_group, self._rail_group = node_group, rail_group

    def begin(self, rows_XB: Tensor, counts_RR: Counts) -> Receive:
        """See `Exchange.begin`; the step across machines is what is left on its way."""
        size = self._per_node
        nodes = len(counts_RR) // size
        # [source node, source place, destination node, destination place]
        counts = counts_RR.reshape(nodes, size, nodes, size)
        own = counts[self._node, self._place]  # [destination node, destination place]
        by_place = _regrouped(own, rows_XB)
        here = counts[self._node]  # [source place, destination node, destination place]
        gathered = _all_to_all(
            by_place, own.sum(0), here[:, :, self._place].sum(1), self._node_group
        )()
        by_node = _regrouped(here[:, :, self._place], gathered)
        return _all_to_all(
            by_node,
            here[:, :, self._place].sum(0),
            counts[:, :, self._node, self._place].sum(1),
            self._rail_group,
        )


def _regrouped(counts_AB: Counts, rows: Tensor) -> Tensor:
    """Rows in runs (a, b), b fastest, put into the order (b, a)."""
    starts = np.cumsum(counts_AB) - counts_AB.reshape(-1)
    order = [
        np.arange(start, start + count)
        for start, count in zip(
            starts.reshape(counts_AB.shape).T.reshape(-1), counts_AB.T.reshape(-1), strict=True
        )
    ]
    index = torch.from_numpy(np.concatenate(order)).to(rows.device)
    return rows.index_select(0, index)


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
    """Ranks of each machine where rows are to go in two levels; 0 where directly.

    Two levels need several machines of several ranks each, as many on each, in rank order.

    Args:
        nodes: name of each rank's machine.
    """
    per_node = next((i for i, one in enumerate(nodes) if one != nodes[0]), len(nodes))
    if per_node in (1, len(nodes)) or len(nodes) % per_node:
        return 0
    runs = [set(nodes[i : i + per_node]) for i in range(0, len(nodes), per_node)]
    alike = all(len(run) == 1 for run in runs)
    return per_node if alike and len(set().union(*runs)) == len(runs) else 0
