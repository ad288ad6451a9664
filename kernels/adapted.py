"""Products and blocks of a layer, the embedding and the head, with the adapters of the rows.

Knows the order of a layer's products; `Ops` computes each. Without adapters each function is the
base model's definition. Shape legend: kernels/ops.py and kernels/moe.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from arriero.kernels.layers import DenseLayer, MoELayer
from arriero.kernels.lora import AdapterRows, EmbeddingLora, LoraBank
from arriero.kernels.moe import Routing
from arriero.kernels.moe import route as route_by_logits
from arriero.kernels.packed_weights import Vocab

if TYPE_CHECKING:
    from arriero.kernels.ops import Ops


def linear(
    ops: Ops, x_TI: Tensor, layer: DenseLayer, name: str, rows: AdapterRows | None
) -> Tensor:
    """The product of a layer's matrix: [T, O].

    Args:
        ops: backend.
        x_TI: inputs.
        layer: the layer.
        name: field of the layer with the matrix.
        rows: rows with an adapter; None for none.
    """
    y_TO = ops.linear(x_TI, getattr(layer, name))
    add(ops, y_TO, x_TI, layer, name, rows)
    return y_TO


def add(
    ops: Ops, y_TO: Tensor, x_TI: Tensor, layer: DenseLayer, name: str, rows: AdapterRows | None
) -> None:
    """Add the products of the rows' adapters to y, in place; see `linear`."""
    if rows is not None and layer.lora is not None and (banks := layer.lora.of(name)):
        ops.add_lora(y_TO, x_TI, banks, rows)


def embed(
    ops: Ops, tokens_T: Tensor, vocab: Vocab, lora: EmbeddingLora | None, rows: AdapterRows | None
) -> Tensor:
    """Embeddings [T, H] of this rank's rows of the table; 0 for tokens of other ranks."""
    x_TH = ops.embed(tokens_T, vocab)
    if rows is not None and lora is not None:
        ops.add_lora(x_TH, lora.columns(tokens_T, rows.slot_T), (lora.bank,), rows)
    return x_TH


def logits(
    ops: Ops,
    x_RH: Tensor,
    norm_H: Tensor,
    eps: float,
    vocab: Vocab,
    banks: Sequence[LoraBank],
    rows: AdapterRows | None,
) -> Tensor:
    """Logits [R, V] of this rank's rows of the head, float32.

    Args:
        ops: backend.
        x_RH: output of the last layer.
        norm_H: final norm.
        eps: epsilon of the norm.
        vocab: rows of the head.
        banks: adapters of the head; empty for none.
        rows: rows of `x_RH` with an adapter; None for none.
    """
    logits_RV = ops.logits(x_RH, norm_H, eps, vocab)
    if rows is not None and banks:
        ops.add_lora(logits_RV, ops.rms_norm(x_RH, norm_H, eps), banks, rows)
    return logits_RV


def gated_mlp(ops: Ops, h_TH: Tensor, layer: DenseLayer, rows: AdapterRows | None = None) -> Tensor:
    """Gate and up, SwiGLU, down: a partial result [T, H] from normed inputs."""
    gated_TF = ops.silu_mul(linear(ops, h_TH, layer, "gate_up", rows))
    return linear(ops, gated_TF, layer, "down", rows)


def route(ops: Ops, h_TH: Tensor, layer: MoELayer, rows: AdapterRows | None) -> Routing:
    """The experts of each token, by the router with the adapters of the rows."""
    if rows is None or layer.lora is None or not layer.lora.of("router"):
        return ops.moe_route(h_TH, layer.router, layer.top_k)
    logits_TE = linear(ops, h_TH, layer, "router", rows)
    return route_by_logits(logits_TE.float(), layer.top_k)


def experts(
    ops: Ops, x_XH: Tensor, layer: MoELayer, starts_E1: Tensor, rows: AdapterRows | None
) -> Tensor:
    """Outputs of the local experts for rows sorted by expert: [X, H].

    Args:
        ops: backend.
        x_XH: inputs, times the scores.
        layer: the layer.
        starts_E1: first row of each expert.
        rows: rows with an adapter, by slot and expert; None for none.
    """
    y_XF2 = ops.grouped_linear(x_XH, layer.experts_gate_up, starts_E1)
    add(ops, y_XF2, x_XH, layer, "experts_gate_up", rows)
    gated_XF = ops.silu_mul(y_XF2)
    y_XH = ops.grouped_linear(gated_XF, layer.experts_down, starts_E1)
    add(ops, y_XH, gated_XF, layer, "experts_down", rows)
    return y_XH


def moe(ops: Ops, h_TH: Tensor, layer: MoELayer, rows: AdapterRows | None = None) -> Tensor:
    """Shared expert and local routed experts: a partial result [T, H] from normed inputs."""
    routing = route(ops, h_TH, layer, rows)
    num_experts = len(layer.experts_down)
    order = ops.moe_permute(routing, layer.first_expert, num_experts)
    h_XH = h_TH[order.token_X.long()] * order.score_X[:, None].to(h_TH.dtype)
    expert_rows = None
    if rows is not None:
        expert_X = np.repeat(np.arange(num_experts), order.starts_E1.diff().cpu().numpy())
        token_X = order.token_X.cpu().numpy()
        expert_rows = rows.of_experts(token_X, expert_X.astype(np.int32), num_experts)
    y_XH = experts(ops, h_XH, layer, order.starts_E1, expert_rows)
    return gated_mlp(ops, h_TH, layer, rows) + ops.moe_combine(y_XH, order)
