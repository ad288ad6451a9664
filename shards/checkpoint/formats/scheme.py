"""How the products of a checkpoint are stored: one value that all readers and planners share.

Knows names and numbers; needs no torch and knows nothing of files or of how a config spells it
(see `quant_config`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

from arriero.shards.checkpoint.formats.names import ModuleNames

Method = Literal[
    "fbgemm_fp8", "compressed-tensors", "fp8", "int-quantized", "pack-quantized", "awq", "gptq"
]
FLOAT8 = ("fbgemm_fp8", "compressed-tensors", "fp8")
"""Methods that store float8 `weight` and `weight_scale`."""


@dataclass(frozen=True, kw_only=True)
class QuantScheme:
    """How the products of a checkpoint are stored.

    Attributes:
        method: the form; compressed-tensors stands for its `float-quantized` format, and its
            `int-quantized` (8 bits a byte) and `pack-quantized` ones are named so.
        bits: pack-quantized: of a number, 4 or 8.
        group_size: columns that share a scale (4 bits); 0 where a row has one scale.
        symmetric: pack-quantized: no zero points are stored, all are the middle level.
        act_order: `g_idx` (gptq) or `weight_g_idx` (pack-quantized) names the group of each
            column; else column i is in group i // group_size.
        zero_offset: what a stored zero point lacks: 1 for gptq of version 1.
        activation_bound: float8 forms: each row of activations is rounded to float8 too, its scale
            at most this / 448 (fbgemm_fp8), inf for no bound (dynamic token scales); None:
            activations stay as they are.
        per_tensor: 8-bit forms: a matrix has one scale, which stands for each of its rows.
        ignored: products left as they were: see `ModuleNames`.
        targets: the products that are covered, where not all are.
        notes: what a reader should know of settings that are accepted and not followed.
    """

    method: Method
    bits: int = 0
    group_size: int = 0
    symmetric: bool = True
    act_order: bool = False
    zero_offset: int = 0
    activation_bound: float | None = None
    per_tensor: bool = False
    ignored: tuple[str, ...] = ()
    targets: tuple[str, ...] = ()
    notes: tuple[str, ...] = field(default=(), compare=False)

    def covers(self, name: str, kind: str) -> bool:
        """Whether the product `name` (without `.weight`) of `kind` is quantized."""
        if self.method in ("awq", "gptq", "fp8") and kind in ("head", "vision", "router"):
            return False
        ignored, targets = self._lists
        return (not targets or targets.match(name)) and not ignored.match(name)

    @property
    def kind(self) -> Literal["int4", "int8", "fp8"]:
        """What the numbers of a covered product are."""
        if self.method in FLOAT8:
            return "fp8"
        return "int8" if self.bits == 8 or self.method == "int-quantized" else "int4"

    @cached_property
    def _lists(self) -> tuple[ModuleNames, ModuleNames]:
        return ModuleNames(self.ignored), ModuleNames(self.targets)
