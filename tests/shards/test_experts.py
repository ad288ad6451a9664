"""How rows look on the wire, and where experts lie."""

from __future__ import annotations

import pytest
import torch

from arriero.shards.experts import Wire, decode, encode
from arriero.shards.placement import Placement

ROWS = (
    torch.randn(9, 40, generator=torch.Generator().manual_seed(0))
    * torch.logspace(-3, 3, 9)[:, None]
)


@pytest.mark.parametrize(("wire", "width"), [("float32", 160), ("bfloat16", 80), ("fp8", 44)])
def test_rows_come_back(wire: Wire, width: int) -> None:
    sent = encode(ROWS, wire)
    assert sent.dtype == torch.uint8 and sent.shape == (9, width) and sent.is_contiguous()
    got = decode(sent, wire, ROWS)
    greatest = ROWS.abs().amax(dim=1, keepdim=True)
    bound = {
        "float32": 0.0,
        "bfloat16": 2.0**-8,
        # half a step of e4m3: 2**-4 of a number, or of its least normal one after scaling
        "fp8": 2.0**-4,
    }[wire]
    smallest = greatest * 2.0**-6 / 448 * bound if wire == "fp8" else 0.0
    assert bool(((got - ROWS).abs() <= ROWS.abs() * bound + smallest).all())
    assert decode(encode(ROWS[:0], wire), wire, ROWS).shape == (0, 40)


def test_a_row_of_zeros_is_zeros_in_fp8() -> None:
    assert not decode(encode(torch.zeros(2, 8), "fp8"), "fp8", ROWS).any()


def test_copies_take_turns() -> None:
    slots, copies = Placement.even([2, 1]).slots_EA()
    assert slots.tolist() == [[0], [1], [2]] and copies.tolist() == [1, 1, 1]
    twice = Placement(
        torch.tensor([0, 1, 0, 2], dtype=torch.int32).numpy(),
        torch.tensor([0, 2, 4], dtype=torch.int32).numpy(),
    )
    slots, copies = twice.slots_EA()
    assert slots.tolist() == [[0, 2], [1, 1], [3, 3]] and copies.tolist() == [2, 1, 1]
