"""A backend as the registry holds it: how its ops are made, and the bytes that it allocates.

Knows names and sizes; the packages that a backend runs on are imported by `make_ops` alone, so that
planners count bytes without torch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

from arriero.kernels.sizes import KvBlockSize, MatrixSize, PackedBytes

if TYPE_CHECKING:
    import torch

    from arriero.kernels.ops import Ops


class Backend(ABC):
    """A way to compute the op list.

    Attributes:
        best_on: type of the devices on which this backend is the best one; None for none.
    """

    best_on: str | None = None

    @abstractmethod
    def make_ops(
        self, device: torch.device, threads: int | None, *, batch_independent: bool
    ) -> Ops:
        """The ops on `device`.

        Args:
            device: device of weights and cache.
            threads: CPU threads; None for the backend's own choice.
            batch_independent: the bits of a row must not depend on other rows.

        Raises:
            ValueError: an argument is not supported.
            RuntimeError: the backend cannot run here; the message says why.
        """

    @abstractmethod
    def packed_nbytes(self, matrix: MatrixSize) -> PackedBytes:
        """Bytes that `Ops.pack_linear`, `pack_vocab` and `pack_quantized` allocate for a matrix."""

    @abstractmethod
    def kv_block_nbytes(self, block: KvBlockSize) -> int:
        """Bytes that `Ops.kv_cache` allocates for a KV block of a layer.

        Raises:
            KeyError: no cache has this dtype.
        """
