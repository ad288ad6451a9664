"""Numbers of a one-byte cache as inputs of a matrix product: exact, in few instructions.

A GPU converts four int8 numbers by four slow instructions; here bytes become the low bits of floats
whose high bits are known, and a subtraction takes these away: 5 fast instructions for four float16
numbers, 8 for bfloat16. float8 has an instruction for two float16 numbers and none for bfloat16.
After Kim and others, "Who Says Elephants Can't Run", 2022, for float16. Knows numbers; knows
nothing of caches.
"""

from __future__ import annotations

import torch

import triton.language as tl
from arriero.kernels.triton.launch import INTERPRETED, dot_type, kernel

_COMPILED = tl.constexpr(not INTERPRETED)
_INT8_FLOAT16 = tl.constexpr("""{
.reg .b32 byte, low, high, offset;
mov.b32 offset, 0x64806480;
xor.b32 byte, $2, 0x80808080;
prmt.b32 low, byte, 0x64646464, 0x4140;
prmt.b32 high, byte, 0x64646464, 0x4342;
sub.f16x2 $0, low, offset;
sub.f16x2 $1, high, offset;
}""")
"""0x6400 | b is 1024 + b; with b the number + 128, the number is (0x6400 | b) - 1152."""
_INT8_BFLOAT16 = tl.constexpr("""{
.reg .b32 low, high, size, sign, one;
mov.b32 one, 0x3f803f80;
prmt.b32 low, $2, 0x43434343, 0x4140;
prmt.b32 high, $2, 0x43434343, 0x4342;
and.b32 size, low, 0xff7fff7f;
lop3.b32 sign, low, 0x00800080, 0xc300c300, 0xea;
fma.rn.bf16x2 $0, size, one, sign;
and.b32 size, high, 0xff7fff7f;
lop3.b32 sign, high, 0x00800080, 0xc300c300, 0xea;
fma.rn.bf16x2 $1, size, one, sign;
}""")
"""0x4300 | b is 128 + b for 7 bits; the eighth bit makes 0x4380, 256, of 0x4300, 128. The number is
(0x4300 | 7 bits) - (0x4300 | eighth bit)."""
_FLOAT8_FLOAT16 = tl.constexpr("""{
.reg .b16 low, high;
mov.b32 {low, high}, $2;
cvt.rn.f16x2.e4m3x2 $0, low;
cvt.rn.f16x2.e4m3x2 $1, high;
}""")


@kernel
def widen(x: tl.tensor, TO: tl.constexpr) -> tl.tensor:
    """`x` in the dtype TO; every int8 and float8 number is exact in float16 and in bfloat16.

    The instructions count as having effects: else the compiler transposes the bytes of values, one
    at a time, and widens them afterwards.
    """
    if _COMPILED and x.dtype == tl.int8:
        if TO == tl.float16:
            y = tl.inline_asm_elementwise(
                _INT8_FLOAT16, "=r,=r,r", [x], dtype=tl.float16, is_pure=False, pack=4
            )
        else:
            y = tl.inline_asm_elementwise(
                _INT8_BFLOAT16, "=r,=r,r", [x], dtype=tl.bfloat16, is_pure=False, pack=4
            )
    elif _COMPILED and x.dtype == tl.float8e4nv:
        y = tl.inline_asm_elementwise(
            _FLOAT8_FLOAT16, "=r,=r,r", [x], dtype=tl.float16, is_pure=False, pack=4
        )
    else:
        y = x.to(TO)
    return y


@kernel
def scaled_queries(q_MD: tl.tensor, scale: tl.tensor, QK: tl.constexpr) -> tl.tensor:
    """Queries in the dtype QK, and the factor [M] of their scores, which includes `scale`.

    float16 has no numbers beyond 65,504: there a row is divided by the power of two below its
    greatest number, which changes no digit.
    """
    scale_M = tl.full([q_MD.shape[0]], 0.0, tl.float32) + scale
    if QK == tl.float16:
        q_MD = q_MD.to(tl.float32)
        bits_M = tl.max(tl.abs(q_MD), 1).to(tl.int32, bitcast=True)
        power_M = (bits_M & 0x7F800000).to(tl.float32, bitcast=True)
        power_M = tl.where(power_M > 0.0, power_M, 1.0)
        q_MD = q_MD / power_M[:, None]
        scale_M *= power_M
    return q_MD.to(QK), scale_M


def product_types(dtype: torch.dtype) -> dict[str, object]:
    """Dtypes of the products' inputs over a cache of `dtype`: QK of scores, PV of values.

    Weights of values of an int8 cache include the values' scales, whose range only bfloat16 has.
    The interpreter, which has no bfloat16, takes float32 for both.
    """
    if dtype.itemsize > 1 or INTERPRETED:
        return {"QK": dot_type(dtype), "PV": dot_type(dtype)}
    return {"QK": tl.float16, "PV": tl.bfloat16 if dtype == torch.int8 else tl.float16}
