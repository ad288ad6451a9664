"""Quantization of full weights: the choice of levels, scales and zero points.

Knows matrices; knows nothing of checkpoint formats and of packing. `QuantizedWeight` defines the
meaning of the stored numbers.

Shape legend: O rows (outputs), I columns (inputs), G = ceil(I / group_size) groups of C columns.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from arriero.kernels.quantized_weight import FP8_MAX, QuantizedWeight, nonzero, stack

_MIN_HALF_SCALE = 2.0**-17
"""From here on float16 moves the highest of 16 levels by at most 1/32 of a step."""
_MAX_HALF_ZERO = 64
"""Up to here float16 has a number within 1/64 of each zero point."""
_SEARCH_STEPS = 8
_SEARCH_ELEMENTS = 1 << 17
"""Number of weights for a search of scales at a time, small enough for the CPU cache."""


def quantize_int8(
    weight_OI: Tensor, *, scale_dtype: torch.dtype = torch.float32
) -> QuantizedWeight:
    """Round to the nearest of 255 levels; the greatest magnitude of a row is level 127.

    Args:
        weight_OI: any floating dtype.
        scale_dtype: dtype of the scales; scales are rounded before levels are chosen.
    """
    w_OI = weight_OI.float()
    scale_O1 = nonzero((w_OI.abs().amax(1, keepdim=True) / 127).to(scale_dtype).float())
    data = (w_OI / scale_O1).round_().clamp_(-127, 127).to(torch.int8)
    return QuantizedWeight(
        kind="int8", in_features=w_OI.shape[1], data=data, scales=scale_O1, group_size=w_OI.shape[1]
    )


def quantize_fp8(weight_OI: Tensor) -> QuantizedWeight:
    """Round to float8_e4m3fn; the greatest magnitude of a row is 448."""
    w_OI = weight_OI.float()
    scale_O1 = nonzero(w_OI.abs().amax(1, keepdim=True) / FP8_MAX)
    data = (w_OI / scale_O1).clamp_(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)
    return QuantizedWeight(
        kind="fp8", in_features=w_OI.shape[1], data=data, scales=scale_O1, group_size=w_OI.shape[1]
    )


def quantize_int4(
    weight_OI: Tensor,
    group_size: int = 32,
    *,
    search: bool = True,
    importance_I: Tensor | None = None,
    half: bool = False,
) -> QuantizedWeight:
    """Round each group of columns to 16 evenly spaced levels.

    Without search the levels span the range of the group. A search tries several narrower spans;
    for each span, least squares give the best scale and offset of the chosen levels, and the span
    with the smallest squared error wins.

    Args:
        weight_OI: any floating dtype.
        group_size: columns that share a scale and a zero point.
        search: search for better levels than those of the plain range.
        importance_I: float [I], weight of each column in the squared error; with the mean square of
            each input over sample text, the error is that of the product. None for equal weights.
        half: round scales and zero points to numbers of float16, where that moves no level by
            more than 1/32 of a step: CPU kernels then keep both in 16 bits.

    Raises:
        ValueError: the group size is not positive.
    """
    if group_size < 1:
        raise ValueError(f"group_size={group_size} must be at least 1")
    num_columns = weight_OI.shape[1]
    group_size = min(group_size, num_columns)
    share_I = torch.ones(num_columns) if importance_I is None else importance_I.float()
    share_GC = _grouped(share_I.to(weight_OI.device)[None], group_size, pad=0.0)[0]
    rows = max(1, _SEARCH_ELEMENTS // num_columns)
    parts = [
        _levels(_grouped(part.float(), group_size), share_GC, search)
        for part in torch.split(weight_OI, rows)
    ]
    q_OI, scale_OG, low_OG = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    q_OI = q_OI.flatten(1)[:, :num_columns]
    q_OI = F.pad(q_OI, (0, num_columns % 2))
    zero_OG = -low_OG / scale_OG
    rounded = _half_precision(scale_OG, zero_OG) if half else None
    scales_OG, zeros_OG = rounded or (scale_OG, zero_OG)
    return QuantizedWeight(
        kind="int4",
        in_features=num_columns,
        data=q_OI[:, ::2] | q_OI[:, 1::2] << 4,
        scales=scales_OG,
        zeros=zeros_OG,
        group_size=group_size,
        half_scales=rounded is not None,
    )


def _half_precision(scale_OG: Tensor, zero_OG: Tensor) -> tuple[Tensor, Tensor] | None:
    """Scales and zero points rounded to float16; None where float16 is too coarse for some."""
    rounded_OG = scale_OG.half().float()
    moved_OG = zero_OG * (scale_OG / rounded_OG)  # so that the lowest value stays where it is
    fits_OG = (rounded_OG >= _MIN_HALF_SCALE) & rounded_OG.isfinite()
    fits_OG &= moved_OG.abs() <= _MAX_HALF_ZERO
    return (rounded_OG, moved_OG.half().float()) if bool(fits_OG.all()) else None


def quantize_int4_whole(
    weight_OI: Tensor, group_size: int = 32, *, scale_dtype: torch.dtype = torch.bfloat16
) -> QuantizedWeight:
    """Int4 as in checkpoints: zero points are whole levels, scales have dtype `scale_dtype`.

    A search tries several spans for each group. For each span, the zero point is rounded, and the
    scale is the best by least squares for the resulting levels, rounded to its dtype. The span with
    the smallest squared error wins.

    Raises:
        ValueError: the group size is not positive, or does not divide the columns.
    """
    num_columns = weight_OI.shape[1]
    if group_size < 1 or num_columns % group_size:
        raise ValueError(f"group_size={group_size} must divide {num_columns} columns")
    rows = max(1, _SEARCH_ELEMENTS // num_columns)
    parts = [
        _whole_levels(_grouped(part.float(), group_size), scale_dtype)
        for part in torch.split(weight_OI, rows)
    ]
    q_OGC, scale_OG, zero_OG = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    q_OI = F.pad(q_OGC.flatten(1), (0, num_columns % 2))
    return QuantizedWeight(
        kind="int4",
        in_features=num_columns,
        data=q_OI[:, ::2] | q_OI[:, 1::2] << 4,
        scales=scale_OG,
        zeros=zero_OG,
        group_size=group_size,
    )


def _whole_levels(w_OGC: Tensor, scale_dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Levels uint8 [O, G, C], scales and whole zero points float32 [O, G]."""
    # The range includes 0, so that the zero point is a level.
    low_OG1 = w_OGC.amin(2, keepdim=True).clamp(max=0)
    high_OG1 = w_OGC.amax(2, keepdim=True).clamp(min=0)
    span_OG1 = nonzero((high_OG1 - low_OG1) / 15)
    best: tuple[Tensor, Tensor, Tensor] | None = None
    best_error_OG1 = torch.full_like(span_OG1, math.inf)
    for step in range(_SEARCH_STEPS + 2):
        try_OG1 = span_OG1 * (1.04 - 0.04 * step)
        zero_OG1 = (-low_OG1 / span_OG1).round_().clamp_(0, 15)
        centred_OGC = ((w_OGC / try_OG1).round_() + zero_OG1).clamp_(0, 15) - zero_OG1
        scale_OG1 = (w_OGC * centred_OGC).sum(2, keepdim=True) / centred_OGC.square().sum(
            2, keepdim=True
        )
        scale_OG1 = scale_OG1.where(scale_OG1 > 0, try_OG1).to(scale_dtype).float()
        scale_OG1 = nonzero(scale_OG1)
        error_OG1 = (centred_OGC * scale_OG1 - w_OGC).square_().sum(2, keepdim=True)
        better_OG1 = error_OG1 < best_error_OG1
        candidate = (centred_OGC + zero_OG1, scale_OG1, zero_OG1)
        if best is None:
            best = candidate
        else:
            q, scale, zero = (
                torch.where(better_OG1, new, old) for new, old in zip(candidate, best, strict=True)
            )
            best = (q, scale, zero)
        best_error_OG1 = torch.minimum(error_OG1, best_error_OG1)
    assert best is not None, "at least one step"
    q_OGC, scale_OG1, zero_OG1 = best
    return q_OGC.to(torch.uint8), scale_OG1[..., 0], zero_OG1[..., 0]


def in_pieces(
    quantize: Callable[[Tensor], QuantizedWeight], weight_OI: Tensor, elements: int = 1 << 20
) -> QuantizedWeight:
    """Call `quantize` for some rows at a time: a large matrix is never in float32 as a whole."""
    rows = max(1, elements // weight_OI.shape[1])
    parts = [quantize(part) for part in torch.split(weight_OI, rows)]
    return parts[0] if len(parts) == 1 else stack(parts)


def _levels(w_OGC: Tensor, share_GC: Tensor, search: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Levels uint8 [O, G, C], scale and lowest value [O, G]: w is close to q * scale + low."""
    low_OG1, high_OG1 = w_OGC.amin(2, keepdim=True), w_OGC.amax(2, keepdim=True)
    span_OG1 = high_OG1 - low_OG1
    # A constant group is exact with q = 0 and low = its value, but the zero point low / scale must
    # stay finite.
    flat_OG1 = span_OG1 <= 15 * 2.0**-24 * low_OG1.abs() + 1e-30
    scale_OG1 = torch.where(flat_OG1, nonzero(low_OG1.abs()), span_OG1 / 15)
    q_OGC = ((w_OGC - low_OG1) / scale_OG1).round_().clamp_(0, 15)
    if search:
        # A step fits scale and offset of each group to the chosen levels.
        best = (q_OGC, scale_OG1, low_OG1)
        fit = _Fit(w_OGC, share_GC)
        error_OG1 = fit.error_of(*best)
        for step in range(_SEARCH_STEPS):
            shrunk_OG1 = scale_OG1 * (1.04 - 0.04 * step)
            first_OG1 = (low_OG1 + high_OG1) / 2 - 7.5 * shrunk_OG1
            q_OGC = ((w_OGC - first_OG1) / shrunk_OG1).round_().clamp_(0, 15)
            slope_OG1, offset_OG1, fit_error_OG1 = fit.least_squares(q_OGC)
            # NaN (all levels are equal, so there is no slope) compares false and does not win.
            better_OG1 = (fit_error_OG1 < error_OG1) & (slope_OG1 > 0) & ~flat_OG1
            error_OG1 = torch.where(better_OG1, fit_error_OG1, error_OG1)
            best = (
                torch.where(better_OG1, q_OGC, best[0]),
                torch.where(better_OG1, slope_OG1, best[1]),
                torch.where(better_OG1, offset_OG1, best[2]),
            )
        q_OGC, scale_OG1, low_OG1 = best
    return q_OGC.to(torch.uint8), scale_OG1[..., 0], low_OG1[..., 0]


class _Fit:
    """Least squares of w by q * scale + offset in each group; columns have weights `share_GC`."""

    def __init__(self, w_OGC: Tensor, share_GC: Tensor) -> None:
        self.share_GC1 = (share_GC / share_GC.sum(-1, keepdim=True))[..., None]
        self.mean_OG1 = self._mean(w_OGC)
        self.w_OGC = w_OGC - self.mean_OG1
        self.variance_OG1 = self._mean(self.w_OGC.square())

    def _mean(self, value_OGC: Tensor) -> Tensor:
        # [O, G, C] by [G, C, 1]: the products of a batch of G.
        return (value_OGC.transpose(0, 1) @ self.share_GC1).transpose(0, 1)

    def error_of(self, q_OGC: Tensor, scale_OG1: Tensor, low_OG1: Tensor) -> Tensor:
        """Mean squared error [O, G, 1] of given levels."""
        off_OGC = q_OGC * scale_OG1 + (low_OG1 - self.mean_OG1) - self.w_OGC
        return self._mean(off_OGC.square_())

    def least_squares(self, q_OGC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The best scale and offset for given levels, and the remaining mean squared error."""
        mean_OG1 = self._mean(q_OGC)
        spread_OG1 = self._mean(q_OGC.square()) - mean_OG1.square()
        shared_OG1 = self._mean(q_OGC * self.w_OGC)
        scale_OG1 = shared_OG1 / spread_OG1
        error_OG1 = self.variance_OG1 - scale_OG1 * shared_OG1
        return scale_OG1, self.mean_OG1 - scale_OG1 * mean_OG1, error_OG1


def _grouped(w_OI: Tensor, group_size: int, pad: float | None = None) -> Tensor:
    """Columns in groups [O, G, C]; a short last group is filled with its last column, or `pad`."""
    missing = -w_OI.shape[1] % group_size
    if missing:
        last = w_OI[:, -1:] if pad is None else torch.full_like(w_OI[:, -1:], pad)
        w_OI = torch.cat([w_OI, last.expand(-1, missing)], dim=1)
    return w_OI.reshape(w_OI.shape[0], -1, group_size)
