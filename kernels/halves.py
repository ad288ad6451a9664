"""The rows of a step in two halves, so that a sum over slices hides behind products.

While the sum of a half is under way, the device computes the other half. A cut may fall within a
sequence: the second half then reads the keys that the first half wrote in the same layer, as a
later chunk of a prompt does. Knows batches; knows nothing of layers, streams and ranks. Shape
legend: kernels/ops.py.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Protocol

from torch import Tensor

from arriero.kernels.flat_batch import FlatBatch


class PendingSum(Protocol):
    """A sum over the slices that has been started."""

    def wait(self) -> Tensor:
        """The sum [T, H]; what is queued after this call reads it. Call once."""


class HalfSums(Protocol):
    """Sums over the slices of a stage beside the products of other rows."""

    def first_half(self, num_rows: int, row_nbytes: int, *, routed: bool) -> int:
        """Rows of the first half of a step; 0: the step stays whole. The same on all slices.

        Args:
            num_rows: rows of the step.
            row_nbytes: bytes of a row of a sum.
            routed: whether some layers have routed experts.
        """

    def begin_reduce(self, part_TH: Tensor) -> PendingSum:
        """Start the sum of a partial result, perhaps in place; every slice in the same order."""


def halved(batch: FlatBatch, num_rows: int) -> tuple[FlatBatch, FlatBatch]:
    """The first `num_rows` tokens of a step without adapters, and the others.

    Both halves have all sequences of the step; a sequence may have no tokens in a half. Nothing
    waits for the device.
    """
    assert batch.adapters is None, "rows with adapters have host arrays of their own"
    starts_S1 = batch.query_start_S1
    second_starts_S1 = (starts_S1 - num_rows).clamp(min=0)
    local = (None, None) if batch.local is None else halved(batch.local, num_rows)
    first = replace(
        _rows(batch, 0, num_rows),
        query_start_S1=starts_S1.clamp(max=num_rows),
        context_S=batch.context_S - second_starts_S1.diff(),
        local=local[0],
    )
    second = replace(
        _rows(batch, num_rows, len(batch.positions_T)),
        query_start_S1=second_starts_S1,
        local=local[1],
    )
    return first, second


def _rows(batch: FlatBatch, start: int, stop: int) -> FlatBatch:
    """The batch with the rows `start` to `stop` alone in what has a row for each token."""
    return replace(
        batch,
        positions_T=batch.positions_T[start:stop],
        slots_T=batch.slots_T[start:stop],
        cos_TD=batch.cos_TD[start:stop],
        sin_TD=batch.sin_TD[start:stop],
        max_query=min(batch.max_query, stop - start),
    )
