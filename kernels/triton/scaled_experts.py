"""Products of experts with float8 rows by torch's own kernel (`torch._scaled_grouped_mm`).

As `scaled_products`, for rows sorted by expert: one launch rounds the rows, or gathers, multiplies
by scores and rounds them; a grouped product multiplies float8 and applies the scale of each row and
of each output. The offsets of the experts are on the device, and the host waits for nothing. The
weights of all experts must lie in one memory (`ExpertWeights.stack`). A product of known result
decides on a device while weights load; else Triton's product serves. For the fast mode, not for
`batch_independent`. Has not run on a GPU yet. Knows packed weights; knows nothing of layers.

Shape legend: X rows sorted by expert, E experts, O outputs, I inputs, T tokens.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from arriero.kernels.packed_weights import Linear
from arriero.kernels.rounded_rows import RoundedRows
from arriero.kernels.triton import scaled_products
from arriero.kernels.triton.expert_weights import ExpertWeights, Stack
from arriero.kernels.triton.float8 import quantize_expert_rows

_LOG = logging.getLogger(__name__)
_STARTS = (0, 11, 11, 40)
"""First rows of the experts in the product that shows whether the kernel works: counts that are
odd, and an expert without rows."""
_ROWS, _OUTPUTS, _INPUTS = 48, 64, 96
_BOUND = 0.01
"""Greatest error of that product, over its greatest number: bfloat16 rounds to 1/256."""
_MOST_EXPERTS = 1024
"""The kernel takes fewer experts than this."""


def takes(experts: Sequence[Linear]) -> bool:
    """Whether the kernel takes these experts: rows are rounded with dynamic scales, all alike."""
    inputs = [expert.inputs for expert in experts]
    return len(experts) < _MOST_EXPERTS and all(
        each is not None
        and each.float8
        and each.bound is not None
        and each.order_I is None
        and inputs[0] is not None
        and each.bound == inputs[0].bound
        and expert.bias is None
        and scaled_products.takes(expert.packed)
        for each, expert in zip(inputs, experts, strict=True)
    )


@functools.cache
def works_on(device: torch.device) -> bool:
    """Whether the device has the kernel, and the kernel gives a known product."""
    generator = torch.Generator().manual_seed(0)
    experts, rows = len(_STARTS) - 1, _STARTS[-1]
    x = torch.randn(_ROWS, _INPUTS, generator=generator).to(torch.float8_e4m3fn)
    w = torch.randn(experts, _OUTPUTS, _INPUTS, generator=generator).to(torch.float8_e4m3fn)
    scale_X1 = torch.rand(_ROWS, 1, generator=generator) + 0.5
    scales_EO = torch.rand(experts, _OUTPUTS, generator=generator) + 0.5
    expected = torch.cat(
        [
            (x[a:b].float() * scale_X1[a:b]) @ (w[e].float() * scales_EO[e, :, None]).T
            for e, (a, b) in enumerate(pairwise(_STARTS))
        ]
    )
    try:
        starts_E1 = torch.tensor(_STARTS, dtype=torch.int32, device=device)
        stack = Stack(w.to(device), scales_EO.to(device))
        actual = _multiply(x.to(device), scale_X1.to(device), stack, starts_E1)[:rows].float().cpu()
    except (RuntimeError, NotImplementedError, ValueError) as error:
        _LOG.info(
            "float8 products of experts by Triton: %s has no torch._scaled_grouped_mm (%s)",
            device,
            str(error).splitlines()[0],
        )
        return False
    error_share = float((actual - expected).abs().max() / expected.abs().max())
    if not error_share < _BOUND:
        _LOG.warning(
            "float8 products of experts by Triton: torch._scaled_grouped_mm on %s is off by %.3g "
            "of the greatest number, more than %.3g",
            device,
            error_share,
            _BOUND,
        )
        return False
    return True


def multiply(
    x: Tensor,
    experts: ExpertWeights,
    bound: float,
    starts_E1: Tensor,
    num_rows: int,
    *,
    tokens_X: Tensor | None = None,
    scores_X: Tensor | None = None,
) -> Tensor:
    """Round the rows of each expert to float8, times the expert's matrix: [num_rows, O].

    Args:
        x: [X, I] rows sorted by expert; or with `tokens_X` [T, I].
        experts: weights with a stack.
        bound: largest scale of a row times 448; inf for no bound.
        starts_E1: int32 [E + 1], on the device.
        num_rows: at least starts[E].
        tokens_X: int32, the row of x for each row; None for x sorted already.
        scores_X: float32, the factor of each row; given with `tokens_X`.

    Returns:
        [num_rows, O] in the dtype of x; rows from starts[E] on are arbitrary.
    """
    assert experts.stack is not None, "the caller checks `takes` before it makes the tables"
    if not num_rows:
        return x.new_empty((0, experts.first.out_features))
    q_XI, scale_X1 = quantize_expert_rows(
        x, bound, starts_E1, num_rows, tokens_X=tokens_X, scores_X=scores_X
    )
    return _multiply(q_XI, scale_X1, experts.stack, starts_E1).to(x.dtype)


def multiply_rounded(rows: RoundedRows, experts: ExpertWeights, starts_E1: Tensor) -> Tensor:
    """As `multiply`, for rows sorted by expert that the kernel before has rounded."""
    assert experts.stack is not None, "the caller checks `takes` before it makes the tables"
    if not len(rows.levels_TI):
        return rows.scale_T1.new_empty((0, experts.first.out_features), dtype=rows.dtype)
    return _multiply(rows.levels_TI, rows.scale_T1, experts.stack, starts_E1).to(rows.dtype)


def _multiply(q_XI: Tensor, scale_X1: Tensor, stack: Stack, starts_E1: Tensor) -> Tensor:
    y_XO: Tensor = torch._scaled_grouped_mm(
        q_XI,
        stack.data_EOI.transpose(1, 2),
        scale_X1[:, 0],
        stack.scales_EO,
        offs=starts_E1[1:],  # the last row of each expert, plus one
        out_dtype=torch.bfloat16,
    )
    return y_XO
