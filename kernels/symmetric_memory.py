"""Memory that the ranks of a group share: what a kernel that sums the ranks' parts needs of it.

Every rank has a block of the same size, and every rank's kernels can read all blocks. A block has
signals, then two buffers for parts. Program p of a kernel has its own signals and its own region of
each buffer, so that programs need no order among them.

Knows addresses and sizes; knows nothing of how the memory was made. Needs no torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor

    from arriero.kernels.rounded_rows import InputRows, Rounding

PROGRAMS = 64
"""Most programs of a kernel. A program waits for the same program of every other rank, so that all
programs must run at once; GPUs from A100 on have at least 98 multiprocessors."""
SIGNAL_SLOTS = 16
"""Signals of a program, one from each rank: the most ranks."""
SIGNAL_NBYTES = 8
SIGNALS_NBYTES = PROGRAMS * SIGNAL_SLOTS * SIGNAL_NBYTES
BUFFERS = 2
"""A sum uses the buffer that the sum before did not use. When a rank writes into a buffer again,
all ranks have come to the sum in between, and so have read what the buffer had."""


@dataclass(frozen=True, slots=True)
class SymmetricMemory:
    """The blocks of all ranks, as this rank sees them.

    Attributes:
        address_N: int64, on the device: address of the block of rank n of the group.
        epoch_P: int64 [PROGRAMS], on the device: signals that each program has passed. Counts on
            the device, so that a captured graph can be replayed any number of times.
        rank: this rank.
        size: number of ranks, at most `SIGNAL_SLOTS`.
        buffer_nbytes: bytes of a buffer; a multiple of 16 * `PROGRAMS`.
    """

    address_N: Tensor
    epoch_P: Tensor
    rank: int
    size: int
    buffer_nbytes: int

    @property
    def region_nbytes(self) -> int:
        """Bytes of a program's region of a buffer."""
        return self.buffer_nbytes // PROGRAMS


class RankSums(Protocol):
    """Sums of the ranks' parts [T, H] in rank order; the bits are those of `Ops.add_parts`.

    Every rank calls the same sums in the same order, with parts of the same shape; the wait for
    the other ranks is on the device. The caller has asked `holds`. With `divides`, each rank sums
    some of the rows, and reads the sums of the others.
    """

    def reduce(
        self, memory: SymmetricMemory, part_TH: Tensor, *, divides: bool, most_polls: int = 0
    ) -> Tensor:
        """The sum [T, H].

        Args:
            memory: memory of the ranks.
            part_TH: this rank's part.
            divides: see above.
            most_polls: reads of the signals before the kernel stops waiting and gives wrong
                numbers; 0 for no limit.
        """

    def add_rms_norm(
        self,
        memory: SymmetricMemory,
        part_TH: Tensor,
        x_TH: Tensor,
        weight_H: Tensor,
        eps: float,
        *,
        divides: bool,
        rounding: Rounding | None = None,
    ) -> InputRows:
        """Add the sum to x, in place, and give the norm of x; x has the dtype of the parts.

        With `rounding` the norm is rounded to float8, for the product that reads it.
        """


def stored_nbytes(row_nbytes: int) -> int:
    """Bytes between two rows of a region: rows start at multiples of 16, the widest access."""
    return -(-row_nbytes // 16) * 16


def block_nbytes(buffer_nbytes: int) -> int:
    """Bytes of a rank's block."""
    return SIGNALS_NBYTES + BUFFERS * buffer_nbytes


def holds(buffer_nbytes: int, num_rows: int, row_nbytes: int) -> bool:
    """Whether a buffer has room for so many rows: each program stores whole rows in its region."""
    return -(-num_rows // PROGRAMS) * stored_nbytes(row_nbytes) <= buffer_nbytes // PROGRAMS
