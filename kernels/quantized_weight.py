"""A quantized weight: the meaning of the stored numbers.

Knows matrices. Knows nothing of checkpoint formats (a reader converts AWQ, GPTQ or fbgemm tensors
to a `QuantizedWeight`) and of packing (`Ops.pack_quantized`).

Shape legend: O rows (outputs), I columns (inputs), G = ceil(I / group_size) groups of columns.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

QuantKind = Literal["int8", "int4", "fp8", "fp4"]
FOUR_BITS = ("int4", "fp4")
"""Kinds with two columns in a byte and scales for groups of columns."""

FP8_MAX = 448.0
"""The greatest finite float8_e4m3fn."""
INT4_ZERO = 8.0
"""Zero point of an int4 weight without stored zero points."""
FP4_MAX = 6.0
"""The greatest e2m1 number."""
FP4_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""E2m1 numbers (a sign, two bits of exponent, one of fraction) by code; code + 8 is negative."""


@dataclass(frozen=True, kw_only=True, slots=True)
class QuantizedWeight:
    """A matrix [O, I]: element (o, i) is (q[o, i] - zero[o, g]) * scale[o, g], g = i // group_size.

    With row scales each element is multiplied with row_scale[o] too.

    Attributes:
        kind: int8: symmetric, -127 .. 127, a group is a row. int4: 0 .. 15, groups of columns.
            fp8: float8_e4m3fn, a group is a row. fp4: e2m1, groups of columns.
        in_features: I. With an odd I half of the last byte of a four-bit row is unused.
        data: int8 [O, I]; or float8_e4m3fn [O, I]; or for int4 and fp4 uint8 [O, ceil(I / 2)], with
            even columns in the low half of a byte.
        scales: float32 [O, G].
        zeros: float32 [O, G] for int4, perhaps with fractions; None means 8. None for other kinds.
        row_scales: float32 [O, 1] for fp4, else None. The scales of fp4 are float8_e4m3fn numbers,
            so that q * scale is exact in bfloat16.
        group_size: columns that share a scale; I where a group is a row. The last group of a row
            may be shorter.
        half_scales: int4: scales and zeros are numbers of float16, so that a backend may keep
            them in 16 bits.
    """

    kind: QuantKind
    in_features: int
    data: Tensor
    scales: Tensor
    zeros: Tensor | None = None
    row_scales: Tensor | None = None
    group_size: int
    half_scales: bool = False

    def __post_init__(self) -> None:
        rows = self.data.shape[0]
        columns = -(-self.in_features // 2) if self.four_bits else self.in_features
        dtype = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}.get(self.kind, torch.uint8)
        groups = -(-self.in_features // self.group_size)
        if self.data.dtype != dtype or self.data.shape != (rows, columns):
            raise ValueError(
                f"{self.kind} data must be {dtype} {[rows, columns]}, "
                f"not {self.data.dtype} {list(self.data.shape)}"
            )
        if not self.four_bits and groups != 1:
            raise ValueError(f"{self.kind} weights have a single scale for each row and no zeros")
        if self.kind != "int4" and self.zeros is not None:
            raise ValueError(f"{self.kind} weights have no zeros")
        if (self.kind == "fp4") != (self.row_scales is not None):
            raise ValueError("fp4 weights have row_scales, and weights of other kinds have none")
        for name, value, width in (
            ("scales", self.scales, groups),
            ("zeros", self.zeros, groups),
            ("row_scales", self.row_scales, 1),
        ):
            if value is not None and (value.dtype != torch.float32 or value.shape != (rows, width)):
                raise ValueError(
                    f"{self.kind} {name} must be float32 {[rows, width]}, "
                    f"not {value.dtype} {list(value.shape)}"
                )

    @property
    def four_bits(self) -> bool:
        """Whether a byte holds two columns, and scales belong to groups of columns."""
        return self.kind in FOUR_BITS

    @property
    def out_features(self) -> int:
        """O."""
        return self.data.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes of data, scales and zeros."""
        tensors = (self.data, self.scales, self.zeros, self.row_scales)
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)

    def levels(self) -> Tensor:
        """The stored numbers q as float32 [O, I]."""
        if not self.four_bits:
            return self.data.float()
        halves = torch.stack([self.data & 15, self.data >> 4], dim=-1)
        codes_OI = halves.flatten(1)[:, : self.in_features]
        if self.kind == "int4":
            return codes_OI.float()
        values = torch.tensor([*FP4_VALUES, *(-value for value in FP4_VALUES)])
        return values.to(codes_OI.device)[codes_OI.int()]

    def dequantize(self) -> Tensor:
        """The matrix that the stored numbers represent, float32 [O, I]."""
        q_OI = self.levels()
        if self.kind == "int4":
            q_OI -= INT4_ZERO if self.zeros is None else self._spread(self.zeros)
        q_OI = q_OI.mul_(self._spread(self.scales))
        return q_OI if self.row_scales is None else q_OI.mul_(self.row_scales)

    def without_row_scales(self) -> Tensor:
        """The matrix of fp4 numbers times the scales of their groups: exact in bfloat16."""
        return self.levels().mul_(self._spread(self.scales))

    def rows(self, start: int, stop: int) -> QuantizedWeight:
        """Rows [start, stop), as views."""
        return self._mapped(lambda tensor: tensor[start:stop])

    def columns(self, start: int, stop: int) -> QuantizedWeight:
        """Columns [start, stop), as views.

        Raises:
            ValueError: a cut is inside a group (four bits) or between the halves of a byte.
        """
        if not self.four_bits:
            return replace(
                self,
                in_features=stop - start,
                data=self.data[:, start:stop],
                group_size=stop - start,
            )
        for cut in (start, stop):
            if cut != self.in_features and (cut % self.group_size or cut % 2):
                raise ValueError(
                    f"columns [{start}, {stop}) cut a group of {self.group_size}; "
                    "cut at even multiples of the group size"
                )
        groups = slice(start // self.group_size, -(-stop // self.group_size))
        return replace(
            self,
            in_features=stop - start,
            data=self.data[:, start // 2 : -(-stop // 2)],
            scales=self.scales[:, groups],
            zeros=None if self.zeros is None else self.zeros[:, groups],
        )

    def with_half_scales(self) -> QuantizedWeight:
        """The same numbers, with `half_scales` where float16 represents each of them exactly."""
        numbers = (self.scales,) if self.zeros is None else (self.scales, self.zeros)
        exact = all(torch.equal(number.half().float(), number) for number in numbers)
        return replace(self, half_scales=True) if self.kind == "int4" and exact else self

    def to(self, device: torch.device) -> QuantizedWeight:
        """The matrix with its tensors on a device."""
        return self._mapped(lambda tensor: tensor.to(device))

    def _mapped(self, change: Callable[[Tensor], Tensor]) -> QuantizedWeight:
        return replace(
            self,
            data=change(self.data),
            scales=change(self.scales),
            zeros=None if self.zeros is None else change(self.zeros),
            row_scales=None if self.row_scales is None else change(self.row_scales),
        )

    def _spread(self, value_OG: Tensor) -> Tensor:
        """The number of a group, repeated for each column of the group."""
        if value_OG.shape[1] == 1:
            return value_OG
        return value_OG.repeat_interleave(self.group_size, dim=1)[:, : self.in_features]


def stack(weights: list[QuantizedWeight]) -> QuantizedWeight:
    """A matrix of all rows, copied.

    Raises:
        ValueError: kinds, group sizes or numbers of columns differ.
    """
    first = weights[0]
    shapes = {(w.kind, w.group_size, w.in_features) for w in weights}
    if len(shapes) > 1:
        raise ValueError(f"stacked weights differ in kind, group or columns: {shapes}")
    zeros = None
    if any(w.zeros is not None for w in weights):
        zeros = torch.cat(
            [torch.full_like(w.scales, INT4_ZERO) if w.zeros is None else w.zeros for w in weights]
        )
    row_scales = [w.row_scales for w in weights if w.row_scales is not None]
    return replace(
        first,
        data=torch.cat([w.data.view(torch.uint8) for w in weights]).view(first.data.dtype),
        scales=torch.cat([w.scales for w in weights]),
        zeros=zeros,
        row_scales=None if not row_scales else torch.cat(row_scales),
        half_scales=all(w.half_scales for w in weights),
    )


def nonzero(scale: Tensor) -> Tensor:
    """The scale, but 1 for a row of zeros: its levels are 0, without a division by zero."""
    return scale.where(scale > 0, 1.0)
