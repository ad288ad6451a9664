"""The generator against the known answers published with Random123, and the uniform's bits."""

from __future__ import annotations

import pytest
import torch

from arriero.kernels.philox import philox_4x32, uniform

from .draws import uniform53

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
    for got, word in zip(philox_4x32((c0, c1, c2, c3), (k0, k1)), words, strict=True):
        assert got.tolist() == [word, word]


def test_uniform_is_53_exact_bits_of_seed_and_position() -> None:
    seeds = [0, 1, 2**63 - 1, 2**32, 2**32 - 1, 123456789012345678]
    positions = [0, 1, 2**32, 131071, 7, 2**40 + 3]
    got = uniform(torch.tensor(seeds), torch.tensor(positions)).tolist()
    assert got == [uniform53(s, p) for s, p in zip(seeds, positions, strict=True)]


def test_uniform_is_uniform() -> None:
    u = uniform(torch.full((100_000,), 42), torch.arange(100_000))
    assert u.min() >= 0 and u.max() < 1
    counts = torch.histc(u.float(), bins=64, min=0, max=1)
    # Chi-square with 63 degrees: mean 63, deviation 11.2.
    assert ((counts - 1562.5) ** 2 / 1562.5).sum() < 63 + 5 * 11.2
    assert abs(torch.corrcoef(torch.stack([u[:-1], u[1:]]))[0, 1]) < 0.02
