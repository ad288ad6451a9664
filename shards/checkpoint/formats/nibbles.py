"""Four-bit numbers in 32-bit words and in bytes: unpack, cut and pack.

Knows bit positions; knows nothing of files, scales and matrices. The functions on tensors need
torch, the constant and `word_span` do not.

Shape legend: O rows (outputs), I columns (inputs), W words of eight numbers, N numbers of a word.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from arriero.shards.layout.dense import Span

if TYPE_CHECKING:  # planners count words without loading torch
    from torch import Tensor

NIBBLES = 8
"""Four-bit numbers in a 32-bit word."""


def word_span(rows: Span | None) -> Span | None:
    """The words that contain `rows`; None for all."""
    if rows is None:
        return None
    return Span(start=rows.start // NIBBLES, stop=-(-rows.stop // NIBBLES))


def unpack_columns(words_IW: Tensor, order: tuple[int, ...] | range) -> Tensor:
    """Numbers uint8 [I, 8 W] of words along the last dimension; `order`: column of each nibble."""
    import torch

    out_IWN = torch.empty(*words_IW.shape, NIBBLES, dtype=torch.uint8)
    for nibble, column in enumerate(order):
        out_IWN[..., column] = (words_IW >> 4 * nibble & 15).to(torch.uint8)
    return out_IWN.flatten(1)


def unpack_rows(words_WO: Tensor) -> Tensor:
    """Numbers uint8 [8 W, O] of words along the first dimension."""
    import torch

    out_WNO = torch.empty(words_WO.shape[0], NIBBLES, words_WO.shape[1], dtype=torch.uint8)
    for nibble in range(NIBBLES):
        out_WNO[:, nibble] = (words_WO >> 4 * nibble & 15).to(torch.uint8)
    return out_WNO.flatten(0, 1)


def trim(value_IO: Tensor, rows: Span | None) -> Tensor:
    """Keep `rows` of the last dimension; the first and last word contain other rows too."""
    if rows is None:
        return value_IO
    first = rows.start % NIBBLES
    return value_IO[:, first : first + rows.size]


def pack_columns(levels_IO: Tensor) -> Tensor:
    """Levels as in `QuantizedWeight`: uint8 [O, I / 2], the even column in the low half."""
    import torch

    if levels_IO.shape[0] % 2:
        levels_IO = torch.cat([levels_IO, torch.zeros_like(levels_IO[:1])])
    return (levels_IO[::2] | levels_IO[1::2] << 4).t().contiguous()
