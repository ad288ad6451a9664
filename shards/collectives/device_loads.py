"""Counts of tokens for each expert, added up on the device; read without a wait for the device.

Knows counts; knows nothing of routing and ranks.

Shape legend: E experts, L layers.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor


class DeviceLoads:
    """Counts of each layer that only grow, at fixed addresses, as captured graphs need them."""

    def __init__(self, num_experts: int, device: torch.device) -> None:
        self._num_experts, self._device = num_experts, device
        self._counts: dict[int, Tensor] = {}
        self._taken: dict[int, npt.NDArray[np.int64]] = {}
        self._copy: tuple[list[int], Tensor, torch.cuda.Event] | None = None

    def of(self, layer: int) -> Tensor:
        """Counts of a layer, int64 [E], to add to."""
        counts_E = self._counts.get(layer)
        if counts_E is None:
            counts_E = torch.zeros(self._num_experts, dtype=torch.int64, device=self._device)
            self._counts[layer] = counts_E
        return counts_E

    def take(self) -> dict[int, npt.NDArray[np.int64]]:
        """What has been added since the last call, by layer, where not 0.

        On a GPU the counts are those of an earlier call: each call starts a copy to the host, and a
        later one reads it.
        """
        if not self._counts:
            return {}
        if self._device.type != "cuda":
            return self._new(list(self._counts), torch.stack(list(self._counts.values())))
        new: dict[int, npt.NDArray[np.int64]] = {}
        if self._copy is not None:
            layers, host_LE, copied = self._copy
            if not copied.query():  # type: ignore[no-untyped-call]
                return {}
            new = self._new(layers, host_LE)
        counts_LE = torch.stack(list(self._counts.values()))
        host_LE = torch.empty(counts_LE.shape, dtype=torch.int64, pin_memory=True)
        host_LE.copy_(counts_LE, non_blocking=True)
        copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
        copied.record(torch.cuda.current_stream(self._device))
        self._copy = list(self._counts), host_LE, copied
        return new

    def _new(self, layers: list[int], total_LE: Tensor) -> dict[int, npt.NDArray[np.int64]]:
        new = {}
        for layer, total_E in zip(layers, total_LE.numpy(), strict=True):
            added_E = total_E - self._taken.get(layer, 0)
            self._taken[layer] = total_E.copy()
            if added_E.any():
                new[layer] = added_E
        return new
