"""What `torch._scaled_grouped_mm` computes on a GPU, on the CPU, which has no such kernel.

Refuses what the real op refuses: dtypes, layouts, shapes and scales, by torch's own checks of
tensors without memory.
"""

from __future__ import annotations

import torch
from torch import Tensor


def scaled_grouped_mm(
    rows_XI: Tensor,
    weights_EIO: Tensor,
    scale_X: Tensor,
    scales_EO: Tensor,
    offs: Tensor | None = None,
    bias: Tensor | None = None,
    scale_result: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    use_fast_accum: bool = False,
) -> Tensor:
    """Rows offs[e - 1] .. offs[e] times the e-th matrix; rows from the last offset on are zero."""
    given = (rows_XI, weights_EIO, scale_X, scales_EO, offs, bias, scale_result)
    without_memory = [
        None
        if one is None
        else torch.empty_strided(one.shape, one.stride(), dtype=one.dtype, device="meta")
        for one in given
    ]
    made = torch.ops.aten._scaled_grouped_mm(*without_memory, out_dtype, use_fast_accum)
    assert offs is not None, "rows of two dimensions"
    out_XO = torch.zeros(made.shape, dtype=made.dtype)
    start = 0
    for e, stop in enumerate(offs.tolist()):
        assert start <= stop <= len(rows_XI), "offsets rise, and end within the rows"
        x = rows_XI[start:stop].float() * scale_X[start:stop, None]
        out_XO[start:stop] = (x @ (weights_EIO[e].float() * scales_EO[e])).to(made.dtype)
        start = stop
    return out_XO
