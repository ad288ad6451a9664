"""The instructions that widen int8: run on numbers here, since Triton's interpreter has none."""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest
import torch

from support import triton_interpreter

triton_interpreter.install()
pytest.importorskip("triton")

from arriero.kernels.triton import widen  # noqa: E402

Words = npt.NDArray[np.uint32]


def permute(low: Words, high: Words, selector: Words) -> Words:
    """`prmt`: digit i of the selector names the byte of (low, high) that is byte i."""
    source = np.stack([low, high], -1).astype("<u4").view(np.uint8)
    digits = [int(selector.flat[0]) >> (4 * i) & 15 for i in range(4)]
    return np.ascontiguousarray(source[..., digits]).view("<u4")[..., 0]


def logic(a: Words, b: Words, c: Words, table: Words) -> Words:
    """`lop3`: bit by bit, the bit of the table at (a, b, c)."""
    at = np.zeros_like(a)
    for i in range(32):
        place = (a >> i & 1) << 2 | (b >> i & 1) << 1 | (c >> i & 1)
        at |= (table >> place & 1) << np.uint32(i)
    return at


def halves(words: Words, dtype: torch.dtype) -> torch.Tensor:
    return torch.from_numpy(words.astype("<u4").view("<i2").copy()).view(dtype)


def whole(numbers: torch.Tensor) -> Words:
    words: Words = numbers.view(torch.int16).numpy().copy().view("<u4")
    return words


def subtract(a: Words, b: Words) -> Words:
    return whole(halves(a, torch.float16) - halves(b, torch.float16))


def fused(a: Words, b: Words, c: Words) -> Words:
    a64, b64, c64 = (halves(words, torch.bfloat16).double() for words in (a, b, c))
    return whole((a64 * b64 + c64).bfloat16())


OPERATIONS: dict[str, Callable[..., Words]] = {
    "mov.b32": lambda a: a,
    "xor.b32": lambda a, b: a ^ b,
    "and.b32": lambda a, b: a & b,
    "prmt.b32": permute,
    "lop3.b32": logic,
    "sub.f16x2": subtract,
    "fma.rn.bf16x2": fused,
}


def run(asm: str, word: Words) -> tuple[Words, Words]:
    """Run the instructions on words of four bytes each; the two words that they give."""
    registers: dict[str, Words] = {"$2": word}
    for line in re.split(r"[;{}]", asm):
        name, _, rest = line.strip().partition(" ")
        if not name or name == ".reg":
            continue
        to, *sources = (text.strip() for text in rest.split(","))
        values = [
            registers[text] if text in registers else np.full_like(word, int(text, 16))
            for text in sources
        ]
        registers[to] = OPERATIONS[name](*values)
    return registers["$0"], registers["$1"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_every_int8_is_exact(dtype: torch.dtype) -> None:
    asm = widen._INT8_FLOAT16 if dtype == torch.float16 else widen._INT8_BFLOAT16
    levels = np.arange(-128, 128, dtype=np.int8)
    words: Words = np.concatenate([levels, levels[::-1], np.roll(levels, 1)]).view("<u4")
    low, high = run(asm.value, words)
    got = torch.stack([halves(low, dtype).view(-1, 2), halves(high, dtype).view(-1, 2)], 1)
    assert got.flatten().double().tolist() == words.view(np.int8).tolist()
