"""The generator against the known answers published with Random123, and the words of a row."""

from __future__ import annotations

import pytest
import torch

from arriero.kernels import philox

from .draws import row_key

ONES = 0xFFFFFFFF
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((ONES,) * 4, (ONES,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN, ids=["zeros", "ones", "pi"])
def test_known_answers(
    counter: tuple[int, ...], key: tuple[int, ...], words: tuple[int, ...]
) -> None:
    def tensors(values: tuple[int, ...]) -> list[torch.Tensor]:
        return [torch.tensor([v, v]) for v in values]

    c0, c1, c2, c3 = tensors(counter)
    k0, k1 = tensors(key)
    for got, word in zip(philox.philox_4x32((c0, c1, c2, c3), (k0, k1)), words, strict=True):
        assert got.tolist() == [word, word]


def test_a_rows_key_is_the_word_of_seed_and_position() -> None:
    seeds = [0, 1, -1, 2**63 - 1, -(2**63), 2**32, 2**32 - 1, 123456789012345678]
    positions = [0, 1, 7, 2**32, 131071, 99, 7, 2**40 + 3]
    got = torch.stack(philox.row_key(torch.tensor(seeds), torch.tensor(positions)), -1)
    assert got.tolist() == [row_key(s, p) for s, p in zip(seeds, positions, strict=True)]
