"""Rows as bytes between ranks: the formats themselves, and each backend's packing of them."""

from __future__ import annotations

import struct

import pytest
import torch

from arriero.kernels import expert_rows
from arriero.kernels.expert_rows import RowFormat
from arriero.kernels.ops import Ops

HIDDEN = 40
ROWS = (
    torch.randn(9, HIDDEN, generator=torch.Generator().manual_seed(0))
    * torch.logspace(-3, 3, 9)[:, None]
)
FORMATS: list[RowFormat] = ["float32", "bfloat16", "fp8"]


@pytest.fixture(params=FORMATS)
def format(request: pytest.FixtureRequest) -> RowFormat:
    chosen: RowFormat = request.param
    return chosen


def every_bfloat16() -> torch.Tensor:
    """All finite ones, 256 of one exponent or so a row."""
    bits = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16)
    values = bits.view(torch.bfloat16).float().view(-1, 256)
    return values[values.isfinite().all(1)]


def ties() -> torch.Tensor:
    """Numbers half-way between neighbours of e4m3 and of bfloat16, and their own neighbours."""
    levels = torch.arange(0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    middles = (levels[1:] + levels[:-1]) / 2
    near = [middles, middles * (1 - 2.0**-23), middles * (1 + 2.0**-23), -middles]
    row = torch.cat([levels, *near, torch.tensor([448.0, 0.0, -0.0])])
    return torch.stack([row, row * 2.0**-20, row * 1.003])


@pytest.mark.parametrize(
    "rows", [ROWS, every_bfloat16(), ties(), torch.zeros(3, 8), torch.full((1, 5), 1e-20)]
)
def test_bytes_are_the_definitions(ops: Ops, format: RowFormat, rows: torch.Tensor) -> None:
    every = torch.arange(len(rows), dtype=torch.int32)
    sent = ops.pack_rows(rows, every, None, format)
    assert sent.dtype == torch.uint8 and sent.is_contiguous()
    assert sent.shape == (len(rows), expert_rows.row_bytes(rows.shape[1], format))
    assert torch.equal(sent, expert_rows.pack(rows, format))
    got = ops.unpack_rows(sent, every, rows.shape[1], format, torch.float32)
    assert torch.equal(got, expert_rows.unpack(sent, format, torch.float32))


def test_rows_are_gathered_and_scaled(ops: Ops, format: RowFormat) -> None:
    rows = torch.tensor([3, 3, 8, 0, 5, 7, 1], dtype=torch.int32)
    scores = torch.linspace(0.1, 1.0, 7)
    sent = ops.pack_rows(ROWS, rows, scores, format)
    assert torch.equal(sent, expert_rows.pack(ROWS[rows.long()] * scores[:, None], format))
    back = torch.tensor([6, 0, 2, 2], dtype=torch.int32)
    got = ops.unpack_rows(sent, back, HIDDEN, format, torch.float16)
    assert got.dtype == torch.float16
    assert torch.equal(got, expert_rows.unpack(sent[back.long()], format, torch.float16))


def test_a_view_of_wider_rows(ops: Ops, format: RowFormat) -> None:
    wide = torch.cat([ROWS, ROWS.flip(0)], dim=1)
    every = torch.arange(9, dtype=torch.int32)
    sent = ops.pack_rows(wide[:, HIDDEN:], every, None, format)
    assert torch.equal(sent, expert_rows.pack(ROWS.flip(0), format))


def test_no_rows(ops: Ops, format: RowFormat) -> None:
    none = torch.empty(0, dtype=torch.int32)
    sent = ops.pack_rows(ROWS, none, none.float(), format)
    assert sent.shape == (0, expert_rows.row_bytes(HIDDEN, format))
    assert ops.unpack_rows(sent, none, HIDDEN, format, torch.float32).shape == (0, HIDDEN)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # of the interpreter's numpy
def test_what_is_not_finite_stays_so(ops: Ops, format: RowFormat) -> None:
    rows = torch.ones(3, 6)
    rows[0, 2], rows[1, 4] = torch.nan, torch.inf
    every = torch.arange(3, dtype=torch.int32)
    got = ops.unpack_rows(ops.pack_rows(rows, every, None, format), every, 6, format, torch.float32)
    assert not got[0, 2].isfinite() and not got[1, 4].isfinite()
    assert got[2].tolist() == [1.0] * 6


def test_rows_of_another_size_are_refused(ops: Ops, format: RowFormat) -> None:
    every = torch.arange(9, dtype=torch.int32)
    sent = ops.pack_rows(ROWS, every, None, format)
    with pytest.raises(ValueError, match=f"41 numbers in {format} are"):
        ops.unpack_rows(sent, every, 41, format, torch.float32)


def test_what_comes_back_is_near(format: RowFormat) -> None:
    got = expert_rows.unpack(expert_rows.pack(ROWS, format), format, torch.float32)
    greatest = ROWS.abs().amax(dim=1, keepdim=True)
    # of fp8 half a step of e4m3: 2**-4 of a number, or of its least normal one after scaling
    bound = {"float32": 0.0, "bfloat16": 2.0**-8, "fp8": 2.0**-4}[format]
    smallest = greatest * 2.0**-6 / 448 * bound if format == "fp8" else 0.0
    assert bool(((got - ROWS).abs() <= ROWS.abs() * bound + smallest).all())


def test_the_bytes_of_fp8() -> None:
    sent = expert_rows.pack(torch.tensor([[448.0, -1.0, 0.5, 0.0]]), "fp8")
    assert bytes(sent[0].numpy()) == bytes([0x7E, 0xB8, 0x30, 0x00]) + struct.pack("<f", 1.0)
