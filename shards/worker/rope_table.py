"""Cosines and sines of rotary positions, one table per rank.

Knows frequencies and positions; knows nothing of attention.
"""

from __future__ import annotations

import torch
from torch import Tensor

ROPE_TABLE_BYTES = 64 << 20
"""Largest table of cosines and sines; for larger contexts each step computes the values."""


class Rope:
    """Cosines and sines at given positions, float32, as Hugging Face computes them."""

    def __init__(self, inv_freq_D: Tensor, max_positions: int, device: torch.device) -> None:
        self._inv_freq = inv_freq_D.to(device)
        self._table: Tensor | None = None
        if max_positions * len(inv_freq_D) * 8 <= ROPE_TABLE_BYTES:
            self._table = self._compute(torch.arange(max_positions, device=device))

    def at(self, positions_T: Tensor) -> tuple[Tensor, Tensor]:
        """(cosines, sines), each [T, D / 2]."""
        both_2TD = self.both_at(positions_T)
        return both_2TD[0], both_2TD[1]

    def both_at(self, positions_T: Tensor, out: Tensor | None = None) -> Tensor:
        """Cosines and sines in a tensor [2, T, D / 2]; writes to `out` if given."""
        if self._table is not None:
            return torch.index_select(self._table, 1, positions_T, out=out)
        both_2TD = self._compute(positions_T)
        return both_2TD if out is None else out.copy_(both_2TD)

    def _compute(self, positions_T: Tensor) -> Tensor:
        angles = positions_T.to(torch.float32)[:, None] * self._inv_freq
        return torch.stack((angles.cos(), angles.sin()))
