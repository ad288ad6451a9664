"""The CPU backend: C++ behind a plain C interface, loaded with ctypes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from arriero.kernels.backend import Backend
from arriero.kernels.sizes import FLOAT, PLAIN, KvBlockSize, MatrixSize, PackedBytes

if TYPE_CHECKING:
    import torch

    from arriero.kernels.cpu.backend import CpuOps

_PANEL = 32
"""Rows of a panel of a packed matrix."""
_LANES = 16
"""Slots, and numbers of a value, of a group in the KV cache."""


class CpuBackend(Backend):
    """Pads rows to panels, columns to pairs, and the KV cache to groups of lanes."""

    best_on = "cpu"

    def make_ops(
        self, device: torch.device, threads: int | None, *, batch_independent: bool
    ) -> CpuOps:
        """See `Backend.make_ops`; no row depends on other rows in any case."""
        from arriero.kernels.cpu.backend import CpuOps

        return CpuOps(device, threads)

    def packed_nbytes(self, matrix: MatrixSize) -> PackedBytes:
        """See `Backend.packed_nbytes`."""
        rows = _padded(matrix.out_features, _PANEL)
        row_bytes = 2 * matrix.byte_columns * PLAIN.get(matrix.precision, 1)
        scales = matrix.scales_nbytes(rows)
        if matrix.precision == "int4":
            row_bytes = matrix.byte_columns
            scales //= 2 if matrix.half_scales else 1
        elif matrix.precision == "fp4":  # packed as bfloat16, with a scale for each row
            row_bytes, scales = 2 * matrix.byte_columns * PLAIN["bfloat16"], rows * FLOAT
        return PackedBytes(
            weights=rows * (row_bytes + (FLOAT if matrix.bias else 0)), scales=scales
        )

    def kv_block_nbytes(self, block: KvBlockSize) -> int:
        """See `Backend.kv_block_nbytes`."""
        return block.nbytes(
            slots=_padded(block.block_size, _LANES), value_dim=_padded(block.head_dim, _LANES)
        )


def rounding_ops(device: torch.device, threads: int | None, activation_dtype: str) -> CpuOps:
    """Ops that round the inputs of int8 and int4 weights to `activation_dtype`.

    Raises:
        ValueError: the device is not a CPU, or the dtype has no kernels.
        RuntimeError: this machine can use no variant of the library.
    """
    from arriero.kernels.cpu.backend import CpuOps

    return CpuOps(device, threads, activation_dtype=activation_dtype)


def _padded(size: int, unit: int) -> int:
    return -(-size // unit) * unit
