"""How rows of logits are cut into programs: some rows, and one chunk of the vocabulary, each."""

from __future__ import annotations

from dataclasses import dataclass

from arriero.kernels.triton.launch import INTERPRETED, power_of_two

CHUNK = 4096


@dataclass(frozen=True, slots=True)
class LogitTiles:
    """How rows and vocabulary are cut into programs."""

    num_rows: int
    size: int
    rows: int
    chunk: int

    @property
    def chunks(self) -> int:
        """Chunks of a row."""
        return -(-self.size // self.chunk)

    @property
    def chunks_power(self) -> int:
        """The power of two that holds them."""
        return power_of_two(self.chunks)

    @property
    def row_programs(self) -> int:
        """Programs across the rows."""
        return -(-self.num_rows // self.rows)

    @property
    def grid(self) -> tuple[int, int]:
        """Programs for all rows and chunks."""
        return self.row_programs, self.chunks


def cut_of(num_rows: int, size: int) -> LogitTiles:
    """The cut of [num_rows, size] logits."""
    chunk, rows = min(CHUNK, power_of_two(size)), 1
    if INTERPRETED:
        chunk = chunk if size <= 2 * CHUNK else power_of_two(size) // 2
        rows = min(power_of_two(num_rows), max(1, (1 << 18) // chunk))
    return LogitTiles(num_rows, size, rows, chunk)
