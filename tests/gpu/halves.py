"""A step in two halves with sums on a second stream of a real GPU: the bits of the whole step.

The sums come late on purpose, so that a reader without a wait gets other bits.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from gpu import shapes
from gpu.checks import Where
from torch import Tensor
from torch.distributed import HashStore

from arriero.kernels.halves import PendingSum
from arriero.shards.collectives.beside import Beside

LATE_CYCLES = 1_000_000
"""Clock cycles that a sum waits: half a millisecond, longer than a layer."""
LAYERS = 2


class _LateSums:
    """Sums over two slices with the same weights, after a wait of the second stream."""

    def __init__(self, at: Where, cut: int) -> None:
        self._at, self._cut = at, cut
        self._beside = Beside(at.device)
        self._beside.open(HashStore(), 0, 1)

    def first_half(self, num_rows: int, row_nbytes: int, *, routed: bool) -> int:
        return self._cut

    def begin_reduce(self, part_TH: Tensor) -> PendingSum:
        return self._beside.begin(lambda: self._late(part_TH))

    def _late(self, part_TH: Tensor) -> Tensor:
        if not self._at.tiny:
            torch.cuda._sleep(LATE_CYCLES)
        return _doubled(part_TH)


def _doubled(part_TH: Tensor) -> Tensor:
    return part_TH * 2


def bits_in_halves(at: Where) -> float:
    """Share of elements that differ, for a cut in a sequence and a cut between sequences."""
    ours = at.ops()
    layers = [shapes.layer(ours, at.sizes, at.dtype, at.device) for _ in range(LAYERS)]
    first = at.mixed[0][1]
    x = at.randn(sum(new for _, new in at.mixed), at.sizes.hidden)

    def outcome(cut: int) -> Tensor:
        torch.manual_seed(0)  # the same keys in each cache
        kv = shapes.cache(ours, at.sizes, at.mixed, at.dtype, at.device, layers=LAYERS)
        batch = shapes.batch(at.mixed, at.sizes.head_dim, at.device)
        run = ours.decoder(layers, kv, _doubled, half_sums=_LateSums(at, cut))
        return run(x.clone(), batch)

    whole, cuts = outcome(0), (first // 2, first)
    return sum(float((outcome(cut) != whole).float().mean()) for cut in cuts) / len(cuts)


SAME: dict[str, Callable[[Where], float]] = {"bits, in halves with late sums": bits_in_halves}
