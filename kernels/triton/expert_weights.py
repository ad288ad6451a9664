"""The weights of a layer's experts on the device: a table of addresses, or one stack.

Knows packed weights; knows nothing of kernels. Shape legend: E experts, O outputs, I inputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from arriero.kernels.triton.weights import Packed


@dataclass(frozen=True, slots=True)
class Stack:
    """Float8 weights of all experts in one memory, as torch's grouped product takes them.

    Attributes:
        data_EOI: float8_e4m3fn, contiguous.
        scales_EO: float32, contiguous.
    """

    data_EOI: Tensor
    scales_EO: Tensor


class ExpertWeights:
    """The weights of several experts of the same shape.

    Kernels of our own find each expert by its address. The tables and the stack keep their own
    addresses when other experts come in, so that captured graphs stay valid.

    Attributes:
        first: weights of an expert, for what all experts have in common.
        count: number of experts.
        data, scales, zeros: addresses of the tensors of each expert, int64 [E]; None for none.
        stack: the weights in one memory; None where each expert has memory of its own.
    """

    def __init__(self, experts: Sequence[Packed], *, stacked: bool = False) -> None:
        """Make the tables; the object keeps the experts alive.

        Args:
            experts: the experts.
            stacked: move the experts' weights into one memory. Only the memory of one layer's
                matrices is needed twice meanwhile.
        """
        self.first, self.count = experts[0], len(experts)
        self.stack: Stack | None = None
        if stacked:
            self.stack = _empty_stack(self.first, self.count)
            self._fill(self.stack, experts)
        self._experts = tuple(experts)
        self.data = self._table([expert.data for expert in experts])
        self.scales = self._table([expert.scales for expert in experts])
        self.zeros = self._table([expert.zeros for expert in experts])

    def replace(self, experts: Sequence[Packed]) -> None:
        """Put other experts in place of those before, at the same addresses of tables and stack.

        Args:
            experts: as many as before, packed alike; some may be the same as before.
        """
        assert len(experts) == self.count, "a rank's number of expert slots does not change"
        if self.stack is not None:
            self._fill(self.stack, experts)
        self.first, self._experts = experts[0], tuple(experts)
        for table, tensors in (
            (self.data, [expert.data for expert in experts]),
            (self.scales, [expert.scales for expert in experts]),
            (self.zeros, [expert.zeros for expert in experts]),
        ):
            if table is not None:
                new = self._table(tensors)
                assert new is not None, "experts of one layer are packed alike"
                table.copy_(new)

    @staticmethod
    def _fill(stack: Stack, experts: Sequence[Packed]) -> None:
        """Copy the experts into the stack; each expert's own tensor becomes its part."""
        places = list(zip(experts, stack.data_EOI.unbind(), strict=True))
        moved = [
            # an expert that is in the stack already may lie where another one belongs
            (expert, place, expert.data.clone() if _within(expert.data, stack) else expert.data)
            for expert, place in places
            if expert.data.data_ptr() != place.data_ptr()
        ]
        for expert, place, data in moved:
            place.view(torch.uint8).copy_(data.view(torch.uint8))
            expert.data.set_(place)  # type: ignore[call-overload]  # frees the memory before
        for expert, scale_O in zip(experts, stack.scales_EO, strict=True):
            assert expert.scales is not None, "float8 weights have scales"
            scale_O.copy_(expert.scales[:, 0])

    def _table(self, tensors: Sequence[Tensor | None]) -> Tensor | None:
        addresses = [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
        if not any(addresses):
            return None
        assert all(addresses), "experts of one layer are packed alike"
        return torch.tensor(addresses, dtype=torch.int64, device=self.first.data.device)


def _empty_stack(first: Packed, count: int) -> Stack:
    outputs, inputs = first.data.shape
    device = first.data.device
    return Stack(
        torch.empty(count, outputs, inputs, dtype=first.data.dtype, device=device),
        torch.empty(count, outputs, dtype=torch.float32, device=device),
    )


def _within(data: Tensor, stack: Stack) -> bool:
    start = stack.data_EOI.data_ptr()
    return start <= data.data_ptr() < start + stack.data_EOI.nbytes
