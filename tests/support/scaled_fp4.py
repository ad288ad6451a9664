"""What `torch.nn.functional.scaled_mm` computes of NVFP4 on a GPU, on the CPU, which refuses it.

Refuses what the real op refuses: dtypes, layouts, shapes and scales, by torch's own checks of
tensors without memory. Reads scales and numbers as the documents of cuBLAS and of the formats place
them; shares no code with the product.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from unittest import mock

import torch
from torch import Tensor

from support.modelopt_files import E2M1

_VALUES = torch.tensor([*E2M1, *(-value for value in E2M1)])


@contextmanager
def block_scaled_product(product: Callable[..., Tensor]) -> Iterator[None]:
    """`product` in place of torch's op; the GPU's kernels decide anew whether they use it."""
    from arriero.kernels.triton import block_scaled

    with mock.patch.object(torch, "_scaled_mm_v2", product):
        block_scaled.works_on.cache_clear()
        try:
            yield
        finally:
            block_scaled.works_on.cache_clear()


def scaled_mm_v2(
    a_MB: Tensor,
    b_BN: Tensor,
    scale_a: Sequence[Tensor],
    recipe_a: Sequence[int],
    swizzle_a: Sequence[int],
    scale_b: Sequence[Tensor],
    recipe_b: Sequence[int],
    swizzle_b: Sequence[int],
    bias: Tensor | None,
    out_dtype: torch.dtype | None,
    contraction_dim: Sequence[int] = (),
    use_fast_accum: bool = False,
) -> Tensor:
    """A Bᵀ with the scales of blocks, and of both matrices where there are two of a side."""
    assert a_MB.dtype == b_BN.dtype == torch.float4_e2m1fn_x2, "of NVFP4 alone"
    assert len(swizzle_a) == len(recipe_a) and len(swizzle_b) == len(recipe_b)
    assert bias is None and not contraction_dim and not use_fast_accum
    made = torch.ops.aten._scaled_mm_v2(
        *(_without_memory(matrix) for matrix in (a_MB, b_BN)),
        [_without_memory(scale) for scale in scale_a],
        list(recipe_a),
        list(swizzle_a),
        [_without_memory(scale) for scale in scale_b],
        list(recipe_b),
        list(swizzle_b),
        None,
        out_dtype,
    )
    y_MN = _numbers(a_MB, scale_a[0]) @ _numbers(b_BN.t(), scale_b[0]).T
    for scale in (*scale_a[1:], *scale_b[1:]):
        y_MN *= scale.double()
    return y_MN.to(made.dtype)


def _without_memory(tensor: Tensor) -> Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")


def _numbers(packed_RB: Tensor, scales: Tensor) -> Tensor:
    """Numbers times the scales of their groups, float64 [rows, columns]."""
    bytes_RB = packed_RB.view(torch.uint8).int()
    codes_RC = torch.stack([bytes_RB & 15, bytes_RB >> 4], -1).flatten(1)
    rows, columns = codes_RC.shape
    row, group = torch.meshgrid(torch.arange(rows), torch.arange(columns // 16), indexing="ij")
    tiles = -(-(columns // 16) // 4)
    at = (row // 128 * tiles + group // 4) * 512 + row % 32 * 16 + row % 128 // 32 * 4 + group % 4
    spread = scales.double()[at].repeat_interleave(16, 1)
    return _VALUES.double()[codes_RC] * spread
