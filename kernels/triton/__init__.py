"""The backend for NVIDIA GPUs: kernels in Triton; torch multiplies unquantized weights.

An import of this package imports neither Triton nor torch: `triton_ops` does, and names a missing
package.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from arriero.kernels.backend import Backend
from arriero.kernels.sizes import PLAIN, KvBlockSize, MatrixSize, PackedBytes
from arriero.kernels.triton.four_bit_sizes import four_bit_form

if TYPE_CHECKING:
    import torch

    from arriero.kernels.triton.backend import TritonOps


class TritonBackend(Backend):
    """Pads four-bit weights to panels of rows and whole words; a bias has the products' dtype."""

    best_on = "cuda"

    def make_ops(
        self, device: torch.device, threads: int | None, *, batch_independent: bool
    ) -> TritonOps:
        """See `Backend.make_ops`; `batch_independent` costs speed, see `TritonOps`."""
        return triton_ops(device, batch_independent=batch_independent or None)

    def packed_nbytes(self, matrix: MatrixSize) -> PackedBytes:
        """See `Backend.packed_nbytes`."""
        rows, columns = matrix.out_features, matrix.in_features
        weights = rows * columns * PLAIN.get(matrix.precision, 1)
        scales = matrix.scales_nbytes(rows)
        if matrix.four_bits:
            form = four_bit_form(columns, min(matrix.group_size, columns))
            weights = 2 * math.prod(form.data_shape(rows))
        if matrix.precision == "int4" and matrix.half_scales:
            scales //= 2
        bias = PLAIN.get(matrix.precision, PLAIN["bfloat16"]) if matrix.bias else 0
        return PackedBytes(weights=weights + rows * bias, scales=scales)

    def kv_block_nbytes(self, block: KvBlockSize) -> int:
        """See `Backend.kv_block_nbytes`."""
        return block.nbytes(slots=block.block_size, value_dim=block.head_dim)


def triton_ops(device: torch.device, *, batch_independent: bool | None = None) -> TritonOps:
    """The backend on `device`.

    Args:
        device: a CUDA device; or for tests the CPU under Triton's interpreter (TRITON_INTERPRET=1
            in the environment before this call).
        batch_independent: see `TritonOps`; None is True under the interpreter, else False.

    Raises:
        RuntimeError: this machine or environment cannot run the backend; the message says why.
    """
    import torch

    try:
        from arriero.kernels.triton import launch
    except ImportError as error:
        raise RuntimeError(
            f"kernels='triton' needs the package triton, which is not installed ({error}); "
            "install triton (CUDA builds of torch include it) or use kernels='reference'"
        ) from error
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise RuntimeError(f"kernels='triton' on {device}: torch finds no CUDA device here")
    elif device.type != "cpu" or not launch.INTERPRETED:
        raise RuntimeError(
            f"kernels='triton' cannot run on {device.type!r}: it needs a CUDA device; "
            "TRITON_INTERPRET=1 in the environment interprets kernels on the CPU (slow, for tests)"
        )
    from arriero.kernels.triton.backend import TritonOps

    if batch_independent is None:
        batch_independent = launch.INTERPRETED
    return TritonOps(device, batch_independent=batch_independent)
