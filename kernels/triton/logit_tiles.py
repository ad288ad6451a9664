"""Tiles of logits: a program takes some rows and a chunk of the vocabulary.

Knows sizes; knows nothing of logits.
"""

from __future__ import annotations

from dataclasses import dataclass

from arriero.kernels.triton.launch import INTERPRETED, power_of_two

CHUNK = 4096


@dataclass(frozen=True, slots=True)
class LogitTiles:
    """Division of [num_rows, size] logits into tiles.

    Attributes:
        num_rows: number of rows.
        size: size of the vocabulary.
        rows: rows of a tile.
        chunk: tokens of a tile.
    """

    num_rows: int
    size: int
    rows: int
    chunk: int

    @property
    def chunks(self) -> int:
        """Number of chunks of a row."""
        return -(-self.size // self.chunk)

    @property
    def chunks_power(self) -> int:
        """The smallest power of two that is at least `chunks`."""
        return power_of_two(self.chunks)

    @property
    def row_programs(self) -> int:
        """Number of programs for all rows."""
        return -(-self.num_rows // self.rows)

    @property
    def grid(self) -> tuple[int, int]:
        """Number of programs for all rows and for all chunks."""
        return self.row_programs, self.chunks


def logit_tiles(num_rows: int, size: int) -> LogitTiles:
    """The tiles of [num_rows, size] logits."""
    chunk, rows = min(CHUNK, power_of_two(size)), 1
    if INTERPRETED:
        chunk = chunk if size <= 2 * CHUNK else power_of_two(size) // 2
        rows = min(power_of_two(num_rows), max(1, (1 << 18) // chunk))
    return LogitTiles(num_rows, size, rows, chunk)
