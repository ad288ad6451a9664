"""Four-bit numbers of packed weights as inputs of matrix products.

A GPU makes the eight numbers of two words by 11 instructions (int4) or 19 (fp4): the bits of a
number become bits of a bfloat16 fraction, and one step by pairs brings them to their value, without
a conversion. All numbers are exact in bfloat16. The interpreter, which has no machine instructions,
computes them by plain operations. Knows words; knows nothing of matrices.
"""

from __future__ import annotations

import triton.language as tl
from arriero.kernels.triton.launch import INTERPRETED, kernel

COMPILED = tl.constexpr(not INTERPRETED)

# In bfloat16 0x4300 is 128, and the last of the seven bits of fraction is 1: 0x4300 | q is 128 + q.
_INT4 = """{{
.reg .b32 a, b, c, d, unit, shift;
mov.b32 unit, 0x3f803f80;
mov.b32 shift, {shift};
shr.b32 b, $4, 4;
shr.b32 c, $4, 8;
shr.b32 d, $4, 12;
lop3.b32 a, $4, 0x000f000f, 0x43004300, 0xea;
lop3.b32 b, b, 0x000f000f, 0x43004300, 0xea;
lop3.b32 c, c, 0x000f000f, 0x43004300, 0xea;
lop3.b32 d, d, 0x000f000f, 0x43004300, 0xea;
fma.rn.bf16x2 $0, a, unit, shift;
fma.rn.bf16x2 $1, b, unit, shift;
fma.rn.bf16x2 $2, c, unit, shift;
fma.rn.bf16x2 $3, d, unit, shift;
}}"""
_INT4_LESS_8 = tl.constexpr(_INT4.format(shift="0xc308c308"))  # -136
_INT4_AS_STORED = tl.constexpr(_INT4.format(shift="0xc300c300"))  # -128

# The three bits of an e2m1 magnitude, as the last two bits of a bfloat16 exponent and the first of
# its fraction, are the number times 2**-126, subnormal numbers included.
_FP4 = tl.constexpr(
    """{
.reg .b32 a, b, c, d, e, f, g, unit, zero;
mov.b32 unit, 0x7e807e80;
mov.b32 zero, 0x80008000;
shl.b32 a, $4, 6;
shl.b32 b, $4, 2;
shr.b32 c, $4, 2;
shr.b32 d, $4, 6;
and.b32 a, a, 0x01c001c0;
and.b32 b, b, 0x01c001c0;
and.b32 c, c, 0x01c001c0;
and.b32 d, d, 0x01c001c0;
shl.b32 e, $4, 12;
shl.b32 f, $4, 8;
shl.b32 g, $4, 4;
lop3.b32 a, e, 0x80008000, a, 0xea;
lop3.b32 b, f, 0x80008000, b, 0xea;
lop3.b32 c, g, 0x80008000, c, 0xea;
lop3.b32 d, $4, 0x80008000, d, 0xea;
fma.rn.bf16x2 $0, a, unit, zero;
fma.rn.bf16x2 $1, b, unit, zero;
fma.rn.bf16x2 $2, c, unit, zero;
fma.rn.bf16x2 $3, d, unit, zero;
}"""
)


@kernel
def _fp4_value(code: tl.tensor) -> tl.tensor:
    """Float32 numbers of e2m1 codes 0 .. 15."""
    magnitude = (code & 7).to(tl.int32)
    shift = tl.maximum(magnitude >> 1, 1) - 1
    doubled = tl.where(magnitude < 2, magnitude, (2 + (magnitude & 1)) << shift)
    value = doubled.to(tl.float32) * 0.5
    return tl.where(code >= 8, -value, value)


@kernel
def _by_pairs(
    word: tl.tensor, ASM: tl.constexpr
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    return tl.inline_asm_elementwise(  # type: ignore[no-any-return]
        asm=ASM,
        constraints="=r,=r,=r,=r,r",
        args=[word],
        dtype=(tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16),
        is_pure=True,
        pack=2,
    )


@kernel
def _level(
    word: tl.tensor,
    PLANE: tl.constexpr,
    KIND: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    DOT: tl.constexpr,
) -> tl.tensor:
    code = (word >> 4 * PLANE) & 15
    if KIND == "fp4":
        level = _fp4_value(code).to(DOT)
    elif HAS_ZEROS:
        level = code.to(DOT)
    else:
        level = (code - 8).to(DOT)
    return level


@kernel
def four_bit_levels(
    word: tl.tensor, KIND: tl.constexpr, HAS_ZEROS: tl.constexpr, DOT: tl.constexpr
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """The numbers of the four planes of words, in the dtype of the product.

    int4 with zero points: 0 .. 15; without: -8 .. 7. fp4: the numbers themselves.
    """
    if COMPILED:
        if KIND == "fp4":
            levels = _by_pairs(word, _FP4)
        elif HAS_ZEROS:
            levels = _by_pairs(word, _INT4_AS_STORED)
        else:
            levels = _by_pairs(word, _INT4_LESS_8)
    else:
        levels = (
            _level(word, 0, KIND, HAS_ZEROS, DOT),
            _level(word, 1, KIND, HAS_ZEROS, DOT),
            _level(word, 2, KIND, HAS_ZEROS, DOT),
            _level(word, 3, KIND, HAS_ZEROS, DOT),
        )
    return levels  # type: ignore[no-any-return]
