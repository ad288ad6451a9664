"""Routed experts of a layer on CUDA: their weights by address, and their products.

Knows the ways to multiply the rows of each expert with its matrix; knows nothing of routing and of
the order of rows. Shape legend: kernels/ops.py.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from arriero.kernels import input_transform
from arriero.kernels.layers import MoELayer
from arriero.kernels.moe import Permutation
from arriero.kernels.packed_weights import Linear
from arriero.kernels.rounded_rows import Rounding
from arriero.kernels.triton import matmul, scaled_experts
from arriero.kernels.triton.activation import silu_mul, silu_mul_rounded
from arriero.kernels.triton.block_scaled import BlockScaled
from arriero.kernels.triton.expert_weights import ExpertWeights
from arriero.kernels.triton.fused_layers import FusedLayers
from arriero.kernels.triton.weights import Packed


class RoutedExperts(FusedLayers):
    """Products of a layer's experts; a subclass has all other ops.

    Attributes:
        batch_independent: see `TritonOps`.
    """

    batch_independent: bool

    def __init__(self) -> None:
        self._experts: dict[tuple[int, ...], ExpertWeights] = {}

    def expert_mlp(self, x_XH: Tensor, layer: MoELayer, starts_E1: Tensor) -> Tensor:
        """The experts' products with SwiGLU between; see `Ops.expert_mlp`."""
        if self._scales_in_layer(x_XH, layer):
            return self._scaled_experts(x_XH, layer, starts_E1, x_XH.shape[0])
        return super().expert_mlp(x_XH, layer, starts_E1)

    def grouped_linear(self, x_XI: Tensor, experts: Sequence[Linear], starts_E1: Tensor) -> Tensor:
        """The rows of each expert times its matrix, in a single launch."""
        inputs = experts[0].inputs
        if isinstance(experts[0].packed, BlockScaled):  # not of `pack_expert`
            return super().grouped_linear(x_XI, experts, starts_E1)
        if inputs is not None:
            if inputs.bound is not None and self._scales_in_experts(x_XI, experts):
                table, rows = self._table(experts), x_XI.shape[0]
                return scaled_experts.multiply(x_XI, table, inputs.bound, starts_E1, rows)
            return input_transform.grouped_linear(self, x_XI, experts, starts_E1)
        return matmul.grouped_matmul(
            self._input(x_XI, experts[0].packed),
            self._table(experts),
            starts_E1,
            x_XI.shape[0],
            batch_independent=self.batch_independent,
        )

    def replace_experts(self, old: MoELayer, new: MoELayer) -> None:
        """Put other experts into the tables of a layer, which captured graphs read."""
        for before, after in (
            (old.experts_gate_up, new.experts_gate_up),
            (old.experts_down, new.experts_down),
        ):
            table = self._experts.pop(_key(before), None)
            if table is not None:
                table.replace([linear.packed for linear in after])
                self._experts[_key(after)] = table

    def drop_tables(self) -> None:
        """Drop the tables of experts, which keep the weights alive."""
        self._experts.clear()

    def _make_tables(self, layer: MoELayer) -> None:
        self._table(layer.experts_gate_up)
        self._table(layer.experts_down)

    def _routed(self, h_TH: Tensor, layer: MoELayer, order: Permutation, rows: int) -> Tensor:
        """See `FusedLayers._routed`."""
        sorted_by = {"tokens_X": order.token_X, "scores_X": order.score_X}
        if self._scales_in_layer(h_TH, layer):
            return self._scaled_experts(h_TH, layer, order.starts_E1, rows, **sorted_by)
        if layer.experts_down[0].inputs is not None:  # gather rows, then transform and multiply
            # The tail of token_X is arbitrary, but must stay within the rows.
            token_X = order.token_X.long().clamp_(0, h_TH.shape[0] - 1)
            h_XH = h_TH[token_X] * order.score_X[:, None].to(h_TH.dtype)
            return self.expert_mlp(h_XH, layer, order.starts_E1)
        gate_up, down = self._table(layer.experts_gate_up), self._table(layer.experts_down)
        y_XF2 = matmul.grouped_matmul(
            self._input(h_TH, gate_up.first),
            gate_up,
            order.starts_E1,
            rows,
            **sorted_by,
            batch_independent=self.batch_independent,
        )
        return matmul.grouped_matmul(
            self._input(silu_mul(y_XF2), down.first),
            down,
            order.starts_E1,
            rows,
            batch_independent=self.batch_independent,
        )

    def _scales_in_layer(self, x: Tensor, layer: MoELayer) -> bool:
        """Whether torch's grouped float8 product computes both products of the experts."""
        linears = layer.experts_gate_up, layer.experts_down
        return all(self._scales_in_experts(x, experts) for experts in linears)

    def _scaled_experts(
        self,
        x: Tensor,
        layer: MoELayer,
        starts_E1: Tensor,
        rows: int,
        *,
        tokens_X: Tensor | None = None,
        scores_X: Tensor | None = None,
    ) -> Tensor:
        """Outputs of the experts by torch's grouped float8 products; see `scaled_experts`."""
        gate_up, down = self._table(layer.experts_gate_up), self._table(layer.experts_down)
        bound, rounding = _bound(layer.experts_gate_up), Rounding(bound=_bound(layer.experts_down))
        y_XF2 = scaled_experts.multiply(
            x, gate_up, bound, starts_E1, rows, tokens_X=tokens_X, scores_X=scores_X
        )
        gated = silu_mul_rounded(y_XF2, rounding, starts_E1)
        return scaled_experts.multiply_rounded(gated, down, starts_E1)

    def _scales_in_experts(self, x: Tensor, experts: Sequence[Linear]) -> bool:
        """Whether torch's grouped float8 product computes this one; see `scaled_experts`."""
        inputs = experts[0].inputs
        if inputs is None or not inputs.float8 or (x.is_cuda and x.dtype != torch.bfloat16):
            return False
        return self._table(experts).stack is not None

    def _input(self, x: Tensor, w: Packed) -> Tensor:
        """Activations in the weights' dtype on CUDA, in float32 on CPU."""
        return x.to(w.data.dtype) if x.is_cuda and w.kind == "dense" else x

    def _table(self, linears: Sequence[Linear]) -> ExpertWeights:
        key = _key(linears)
        table = self._experts.get(key)
        if table is None:
            stacked = not self.batch_independent and scaled_experts.takes(linears)
            table = self._experts[key] = ExpertWeights(
                [linear.packed for linear in linears],
                stacked=stacked and scaled_experts.works_on(self.device),
            )
        return table


def _key(experts: Sequence[Linear]) -> tuple[int, ...]:
    """Key of a table of experts; the table keeps the experts alive, so that ids stay unique."""
    return tuple(id(expert.packed) for expert in experts)


def _bound(experts: Sequence[Linear]) -> float:
    """Bound of the rows' scales, where `scaled_experts` takes the experts."""
    inputs = experts[0].inputs
    assert inputs is not None and inputs.bound is not None, "the caller checks"
    return inputs.bound
