"""The contract of a file with packed weights: a second start reads it in place of packing again.

Knows keys; knows nothing of checkpoints and of the packed form.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

from arriero.kernels.packed_weights import Linear, Vocab


class PackedFile(ABC):
    """Packed weights of a rank, by key.

    Attributes:
        complete: an earlier load has written the file, so that checkpoints need not be read ahead.
    """

    complete: bool

    @abstractmethod
    def linear(self, key: str, make: Callable[[], Linear]) -> Linear:
        """The weights under `key`; packed by `make` and kept for the file where it lacks them."""

    @abstractmethod
    def vocab(self, key: str, first_row: int, make: Callable[[], Vocab]) -> Vocab:
        """As `linear`, for rows of a table; `first_row` is the first row's number."""

    @abstractmethod
    def close(self, *, whole: bool) -> None:
        """End the file, beside the caller; no weights follow.

        Args:
            whole: all weights of the rank have been asked for; else nothing is kept.
        """
