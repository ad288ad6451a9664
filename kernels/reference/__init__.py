"""The backend that defines the results of the others: plain torch, on any device."""

from __future__ import annotations

from typing import TYPE_CHECKING

from arriero.kernels.backend import Backend
from arriero.kernels.sizes import FLOAT, PLAIN, KvBlockSize, MatrixSize, PackedBytes

if TYPE_CHECKING:
    import torch

    from arriero.kernels.reference.backend import ReferenceOps


class ReferenceBackend(Backend):
    """Keeps every tensor as it is: no padding."""

    def make_ops(
        self, device: torch.device, threads: int | None, *, batch_independent: bool
    ) -> ReferenceOps:
        """See `Backend.make_ops`; `threads` are torch's, and None leaves them."""
        if batch_independent:
            raise ValueError(
                "batch_independent=True: rows of the reference kernels are independent to rounding "
                "only; use kernels='cpu' or 'triton'"
            )
        import torch

        from arriero.kernels.reference.backend import ReferenceOps

        if threads is not None:
            torch.set_num_threads(threads)
        return ReferenceOps(device)

    def packed_nbytes(self, matrix: MatrixSize) -> PackedBytes:
        """See `Backend.packed_nbytes`."""
        rows = matrix.out_features
        row_scales = FLOAT if matrix.precision == "fp4" else 0
        row_bytes = matrix.in_features * PLAIN.get(matrix.precision, 1)
        if matrix.four_bits:
            row_bytes = matrix.byte_columns
        return PackedBytes(
            weights=rows * (row_bytes + (FLOAT if matrix.bias else 0)),
            scales=matrix.scales_nbytes(rows) + rows * row_scales,
        )

    def kv_block_nbytes(self, block: KvBlockSize) -> int:
        """See `Backend.kv_block_nbytes`."""
        return block.nbytes(slots=block.block_size, value_dim=block.head_dim)
