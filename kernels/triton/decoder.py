"""The decoder's loop on CUDA: residual sums fused with norms, and sums over slices beside products.

A norm rounds its rows where the product that reads them takes rounded ones; x itself, which taps
and experts on other ranks read, is never rounded.

A step with many rows goes through the layers in two halves that take turns: while the sum of a half
is under way, the other half computes until its own next sum. A row's numbers are the same either
way, as far as products do not depend on the number of rows. Knows the order of a layer's parts;
knows nothing of kernels and streams. Shape legend: kernels/ops.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import TYPE_CHECKING, Protocol

from torch import Tensor

from arriero.kernels.flat_batch import FlatBatch
from arriero.kernels.halves import HalfSums, PendingSum, halved
from arriero.kernels.layer_cache import LayerCache
from arriero.kernels.layers import DenseLayer, MoELayer
from arriero.kernels.ops import Experts, LayerTaps, Reduce, ReduceNorm
from arriero.kernels.rounded_rows import InputRows, Rounding
from arriero.kernels.triton.norm import norm_rows

if TYPE_CHECKING:
    from arriero.kernels.triton.fused_layers import FusedLayers


class _Sum(Protocol):
    """The sum of a partial result over the slices, and what reads it."""

    def add_norm(
        self, x_TH: Tensor, weight_H: Tensor, eps: float, rounding: Rounding | None
    ) -> InputRows:
        """Add the sum to x, in place, and give the norm of x, rounded for its reader."""

    def add(self, x_TH: Tensor) -> None:
        """Add the sum to x, in place."""


@dataclass(frozen=True, slots=True)
class _SumInTurn:
    """A sum that begins where it is read, fused with its reader where a kernel does both."""

    part_TH: Tensor
    reduce: Reduce | None
    reduce_norm: ReduceNorm | None

    def add_norm(
        self, x_TH: Tensor, weight_H: Tensor, eps: float, rounding: Rounding | None
    ) -> InputRows:
        if self.reduce_norm is not None:
            h = self.reduce_norm(self.part_TH, x_TH, weight_H, eps, rounding)
            if h is not None:
                return h
        return norm_rows(x_TH, self._total(), weight_H, eps, rounding)

    def add(self, x_TH: Tensor) -> None:
        x_TH += self._total()

    def _total(self) -> Tensor:
        return self.part_TH if self.reduce is None else self.reduce(self.part_TH)


@dataclass(frozen=True, slots=True)
class _SumBeside:
    """A sum that is under way."""

    pending: PendingSum

    def add_norm(
        self, x_TH: Tensor, weight_H: Tensor, eps: float, rounding: Rounding | None
    ) -> InputRows:
        return norm_rows(x_TH, self.pending.wait(), weight_H, eps, rounding)

    def add(self, x_TH: Tensor) -> None:
        x_TH += self.pending.wait()


@dataclass(frozen=True, kw_only=True, slots=True)
class TritonDecoder:
    """The pass through a stage's layers; see `Ops.decoder`.

    Attributes:
        ops: kernels of a layer's parts.
        layers, caches: layers of the stage, and the cache of each.
        reduce, reduce_norm, experts, taps, half_sums: see `Ops.decoder`.
        with_adapters: the pass of a batch with adapters.
    """

    ops: FusedLayers
    layers: Sequence[DenseLayer]
    caches: Sequence[LayerCache]
    reduce: Reduce | None
    reduce_norm: ReduceNorm | None
    experts: Experts | None
    taps: LayerTaps
    half_sums: HalfSums | None
    with_adapters: Callable[[Tensor, FlatBatch], Tensor]

    def __call__(self, x_TH: Tensor, batch: FlatBatch) -> Tensor:
        """Run a step; x is changed in place."""
        if batch.adapters is not None:
            return self.with_adapters(x_TH, batch)
        rows = self._first_half(x_TH, batch)
        if rows:
            first, second = halved(batch, rows)
            self._run(
                self._parts(x_TH[:rows], first, self._begin_beside, None),
                self._parts(x_TH[rows:], second, self._begin_beside, x_TH),
            )
        else:
            self._run(self._parts(x_TH, batch, self._begin_in_turn, x_TH))
        if len(self.layers) in self.taps:
            self.taps[len(self.layers)](x_TH)
        return x_TH

    def _first_half(self, x_TH: Tensor, batch: FlatBatch) -> int:
        """Rows of the first half; 0 for a whole step.

        Steps of decodes stay whole, since they are graphs. With experts on other data-parallel
        ranks each exchange is collective, and these ranks have other numbers of rows.
        """
        if self.half_sums is None or self.experts is not None or batch.max_query == 1:
            return 0
        routed = any(isinstance(layer, MoELayer) for layer in self.layers)
        row_nbytes = x_TH.shape[1] * x_TH.element_size()
        return self.half_sums.first_half(len(x_TH), row_nbytes, routed=routed)

    @staticmethod
    def _run(*passes: Iterator[None]) -> None:
        """Let the passes take turns, the first one ahead, until all have ended."""
        for _ in zip_longest(*passes):
            pass

    def _begin_in_turn(self, part_TH: Tensor) -> _Sum:
        return _SumInTurn(part_TH, self.reduce, self.reduce_norm)

    def _begin_beside(self, part_TH: Tensor) -> _Sum:
        assert self.half_sums is not None, "halves come with sums beside them"
        return _SumBeside(self.half_sums.begin_reduce(part_TH))

    def _parts(
        self,
        x_TH: Tensor,
        batch: FlatBatch,
        begin: Callable[[Tensor], _Sum],
        step_TH: Tensor | None,
    ) -> Iterator[None]:
        """Run rows through all layers; yields after each start of a sum, before what reads it.

        Args:
            x_TH: the rows, changed in place.
            batch: the tokens of the rows.
            begin: starts a sum.
            step_TH: all rows of the step, for taps; None for a half before others. When the last
                half enters a layer, the first has not changed its rows since it entered the layer.
        """
        ops, layers = self.ops, self.layers
        first = layers[0]
        rounding = ops.attention_rounding(first)
        h = norm_rows(x_TH, None, first.attn_norm_H, first.eps, rounding)
        for i, (layer, cache) in enumerate(zip(layers, self.caches, strict=True)):
            if step_TH is not None and i in self.taps:
                self.taps[i](step_TH)
            total = begin(ops.run_attention(h, layer, cache, batch))
            yield
            if isinstance(layer, MoELayer) and self.experts is not None:
                total.add(x_TH)
                total = begin(self.experts(x_TH, layer, None))
            else:
                h = total.add_norm(x_TH, layer.mlp_norm_H, layer.eps, ops.mlp_rounding(layer))
                total = begin(ops.run_mlp(h, layer))
            yield
            if i + 1 < len(layers):
                after = layers[i + 1]
                rounding = ops.attention_rounding(after)
                h = total.add_norm(x_TH, after.attn_norm_H, after.eps, rounding)
            else:
                total.add(x_TH)
