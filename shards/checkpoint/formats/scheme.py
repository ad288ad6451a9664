"""The quantized form of a checkpoint's matrices; readers and planners share this value.

Knows names and numbers. Needs no torch; knows nothing of files and of the fields of a config (see
`quant_config`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

from arriero.shards.checkpoint.formats.names import ModuleNames

Method = Literal[
    "fbgemm_fp8",
    "compressed-tensors",
    "fp8",
    "int-quantized",
    "pack-quantized",
    "awq",
    "gptq",
    "modelopt-fp8",
    "modelopt-nvfp4",
]
FLOAT8 = ("fbgemm_fp8", "compressed-tensors", "fp8", "modelopt-fp8")
"""Methods that store float8 `weight` and `weight_scale`."""
_LAYERS_ONLY = ("awq", "gptq", "fp8", "modelopt-fp8", "modelopt-nvfp4")
"""Methods that quantize no head, router and vision tower, whether the config says so or not."""


@dataclass(frozen=True, kw_only=True)
class QuantScheme:
    """The quantized form of a checkpoint's matrices.

    Attributes:
        method: the form; "compressed-tensors" means the `float-quantized` format, while
            `int-quantized` (a byte for each number) and `pack-quantized` are separate methods.
        bits: pack-quantized: bits of a number, 4 or 8.
        group_size: columns that share a scale (4 bits); 0 if each row has a single scale.
        symmetric: pack-quantized: no zero points are stored; each zero point is the middle level.
        act_order: `g_idx` (gptq) or `weight_g_idx` (pack-quantized) gives the group of each
            column; else column i is in group i // group_size.
        zero_offset: number to add to a stored zero point: 1 for gptq version 1.
        activation_bound: 8-bit forms: largest absolute activation; each row of activations is
            rounded to float8 with a scale of at most this / 448 (fbgemm_fp8); inf without a bound
            (dynamic token scales; int-quantized rounds to int8); None: no scales by row.
        input_scale: each matrix has an `input_scale`, the static scale of its rounded activations.
        fused: experts of a layer are stored in fused tensors, as in plain checkpoints.
        per_tensor: 8-bit forms: a matrix has a single scale for all rows.
        ignored: matrices that are not quantized, see `ModuleNames`.
        targets: matrices that are quantized; empty for all matrices.
        notes: sentences about accepted settings without effect.
    """

    method: Method
    bits: int = 0
    group_size: int = 0
    symmetric: bool = True
    act_order: bool = False
    zero_offset: int = 0
    activation_bound: float | None = None
    input_scale: bool = False
    fused: bool = False
    per_tensor: bool = False
    ignored: tuple[str, ...] = ()
    targets: tuple[str, ...] = ()
    notes: tuple[str, ...] = field(default=(), compare=False)

    def covers(self, name: str, kind: str) -> bool:
        """Whether the matrix `name` (without `.weight`) of `kind` is quantized."""
        if self.method in _LAYERS_ONLY and kind in ("head", "vision", "router"):
            return False
        ignored, targets = self._lists
        return (not targets or targets.match(name)) and not ignored.match(name)

    @property
    def rounds_inputs(self) -> bool:
        """Whether activations are rounded."""
        return self.activation_bound is not None or self.input_scale

    @property
    def kind(self) -> Literal["int4", "int8", "fp8", "fp4"]:
        """Number format of a quantized matrix."""
        if self.method == "modelopt-nvfp4":
            return "fp4"
        if self.method in FLOAT8:
            return "fp8"
        return "int8" if self.bits == 8 or self.method == "int-quantized" else "int4"

    @cached_property
    def _lists(self) -> tuple[ModuleNames, ModuleNames]:
        return ModuleNames(self.ignored), ModuleNames(self.targets)
