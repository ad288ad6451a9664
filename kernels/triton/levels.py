"""Four-bit numbers of packed weights as inputs of matrix products.

A GPU makes eight numbers of a 32-bit word by 12 instructions (int4) or 22 (fp4): the bits of a
number become bits of a bfloat16 fraction, and one step by pairs brings them to their value, without
a conversion. All numbers are exact in bfloat16. The interpreter, which has no machine instructions,
computes them by plain operations. Knows bytes; knows nothing of matrices.
"""

from __future__ import annotations

import triton.language as tl
from arriero.kernels.triton.launch import INTERPRETED, kernel

COMPILED = tl.constexpr(not INTERPRETED)

# Bytes 0 and 1 of a word go to the halves of `a`, bytes 2 and 3 to those of `b`. In bfloat16
# 0x4300 is 128, and the last of the seven bits of fraction is 1: 0x4300 | q is 128 + q.
_INT4 = """{{
.reg .b32 a, b, c, d, unit, shift;
mov.b32 unit, 0x3f803f80;
mov.b32 shift, {shift};
prmt.b32 a, $4, $4, 0x1100;
prmt.b32 b, $4, $4, 0x3322;
shr.b32 c, a, 4;
shr.b32 d, b, 4;
lop3.b32 a, a, 0x000f000f, 0x43004300, 0xea;
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
.reg .b32 a, b, c, d, e, f, g, h, unit, zero;
mov.b32 unit, 0x7e807e80;
mov.b32 zero, 0x80008000;
prmt.b32 a, $4, $4, 0x1100;
prmt.b32 b, $4, $4, 0x3322;
shl.b32 c, a, 6;
shl.b32 d, b, 6;
shl.b32 e, a, 2;
shl.b32 f, b, 2;
and.b32 c, c, 0x01c001c0;
and.b32 d, d, 0x01c001c0;
and.b32 e, e, 0x01c001c0;
and.b32 f, f, 0x01c001c0;
shl.b32 g, a, 12;
shl.b32 h, b, 12;
shl.b32 a, a, 8;
shl.b32 b, b, 8;
lop3.b32 c, g, 0x80008000, c, 0xea;
lop3.b32 d, h, 0x80008000, d, 0xea;
lop3.b32 e, a, 0x80008000, e, 0xea;
lop3.b32 f, b, 0x80008000, f, 0xea;
fma.rn.bf16x2 $0, c, unit, zero;
fma.rn.bf16x2 $1, d, unit, zero;
fma.rn.bf16x2 $2, e, unit, zero;
fma.rn.bf16x2 $3, f, unit, zero;
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
def _by_pairs(both: tl.tensor, ASM: tl.constexpr) -> tuple[tl.tensor, tl.tensor]:
    low, high = tl.inline_asm_elementwise(
        asm=ASM,
        constraints="=r,=r,=r,=r,r",
        args=[both],
        dtype=(tl.bfloat16, tl.bfloat16),
        is_pure=True,
        pack=4,
    )
    return low, high


@kernel
def four_bit_levels(
    both: tl.tensor, KIND: tl.constexpr, HAS_ZEROS: tl.constexpr, DOT: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """The numbers in the low and in the high bits of bytes, in the dtype of the product.

    int4 with zero points: 0 .. 15; without: -8 .. 7. fp4: the numbers themselves.
    """
    if COMPILED:
        if KIND == "fp4":
            low, high = _by_pairs(both, _FP4)
        elif HAS_ZEROS:
            low, high = _by_pairs(both, _INT4_AS_STORED)
        else:
            low, high = _by_pairs(both, _INT4_LESS_8)
    elif KIND == "fp4":
        low, high = _fp4_value(both & 15).to(DOT), _fp4_value(both >> 4).to(DOT)
    elif HAS_ZEROS:
        low, high = (both & 15).to(DOT), (both >> 4).to(DOT)
    else:
        low = ((both & 15).to(tl.int8) - 8).to(DOT)
        high = ((both >> 4).to(tl.int8) - 8).to(DOT)
    return low, high
