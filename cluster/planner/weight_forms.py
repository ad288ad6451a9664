"""Forms of a model's weights in memory: dtype, precision and groups of each matrix.

Knows the dtypes that `plan` and a spec name, and what a checkpoint's own form makes of them; knows
nothing of ranks and bytes. Needs no torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from arriero.kernels.sizes import Precision
from arriero.shards.checkpoint.formats.modules import Module
from arriero.shards.checkpoint.formats.scheme import QuantScheme
from arriero.shards.errors import SpecError
from arriero.shards.families.registry import family_of
from arriero.shards.layout.parts import AnyModel

Dtype = Literal[
    "float32",
    "bfloat16",
    "float16",
    "fp8",
    "fp8-shipped",
    "int8",
    "int4",
    "fp8-onload",
    "int4-onload",
    "checkpoint",
]
DTYPES: tuple[Dtype, ...] = (
    "bfloat16",
    "fp8",
    "fp8-shipped",
    "int8",
    "int4",
    "fp8-onload",
    "int4-onload",
    "float16",
    "float32",
    "checkpoint",
)
ON_LOAD: dict[str, Dtype] = {"int8": "int8", "fp8": "fp8-onload", "int4": "int4-onload"}
"""The planner's dtype for each value of a spec's `quantization`."""
GROUP_SIZE = 128
ON_LOAD_GROUP_SIZE = 32
WHOLE_ROW = 1 << 30
"""A group size larger than any row: a single scale for each row."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Weights:
    """The form of a model's weights in memory.

    Attributes:
        dtype: the planner's name for the form.
        base: precision of weights that are not quantized, and of activations on a GPU.
        scheme: quantization of the checkpoint; only products that the scheme covers are quantized.
        precision: precision of the quantized products.
        group_size: columns that share a scale in int4.
        zeros: int4 has zero points.
        half_scales: scales and zero points of int4 are numbers of float16.
        tables: precision of the embedding and the head; None for `base`.
    """

    dtype: Dtype
    base: Precision
    scheme: QuantScheme | None = None
    precision: Precision | None = None
    group_size: int = GROUP_SIZE
    zeros: bool = True
    half_scales: bool = False
    tables: Precision | None = None

    def precision_of(self, module: Module) -> Precision:
        """Precision of a module in memory."""
        if self.tables is not None and module.kind in ("embeddings", "head"):
            return self.tables
        if self.precision is None or not module.product:
            return self.base
        if self.scheme is not None:
            return self.precision if self.scheme.covers(module.name, module.kind) else self.base
        plain = module.kind in ("head", "router", "vision")
        return self.base if plain else self.precision


def weights_as(model: AnyModel, scheme: QuantScheme | None, dtype: Dtype) -> Weights:
    """The form of a model's weights in memory for a dtype.

    Args:
        model: sizes of the model.
        scheme: quantization of the checkpoint; None for plain weights.
        dtype: "float32", "bfloat16", "float16": plain. "fp8", "int4": each product of the decoder,
            as in checkpoints of these forms (int4 in groups of 128); tables, head, router and
            vision stay plain. "fp8-shipped": as in the family's FP8 releases: the MLPs of all
            layers except the first and the last, or Llama 4's experts. "int8", "fp8-onload",
            "int4-onload": as slices quantize plain weights on load, tables included, which are
            int8 always (int4 in groups of 32). "checkpoint": the form of the checkpoint.

    Raises:
        SpecError: the dtype is unknown, or differs from the form of a quantized checkpoint.
    """
    if dtype == "checkpoint":
        return _as_stored(model, scheme)
    if dtype not in DTYPES:
        raise SpecError(f"`dtype`={dtype!r} is none of {', '.join(DTYPES)}")
    if dtype == "fp8-shipped":
        return Weights(dtype=dtype, base="bfloat16", scheme=shipped_fp8(model), precision="fp8")
    if scheme is not None:
        raise SpecError(
            f"`dtype`={dtype!r}: the checkpoint is quantized already ({scheme.method}); use "
            "`dtype`=checkpoint, or give a checkpoint of plain weights"
        )
    if dtype == "int8":
        return Weights(dtype=dtype, base="bfloat16", precision="int8", tables="int8")
    if dtype == "fp8-onload":
        return Weights(dtype=dtype, base="bfloat16", precision="fp8", tables="int8")
    if dtype == "int4-onload":
        return Weights(
            dtype=dtype,
            base="bfloat16",
            precision="int4",
            group_size=ON_LOAD_GROUP_SIZE,
            half_scales=True,
            tables="int8",
        )
    if dtype == "fp8" or dtype == "int4":
        return Weights(dtype=dtype, base="bfloat16", precision=dtype)
    return Weights(dtype=dtype, base=dtype)


def stored_as(dtype: str, quantization: str | None, scheme: QuantScheme | None) -> Dtype:
    """The planner's name for the form of a group's weights in memory.

    Args:
        dtype: dtype of the group.
        quantization: quantization of the weights on load; None for none.
        scheme: quantization of the checkpoint; None for plain weights.
    """
    if quantization is not None:
        return ON_LOAD[quantization]
    if scheme is not None:
        return "checkpoint"
    return next(name for name in DTYPES if name == dtype)


def _as_stored(model: AnyModel, scheme: QuantScheme | None) -> Weights:
    base: dict[str, Precision] = {
        "bfloat16": "bfloat16",
        "float16": "float16",
        "float32": "float32",
    }
    plain = base[model.torch_dtype]
    if scheme is None:
        return Weights(dtype="checkpoint", base=plain)
    return Weights(
        dtype="checkpoint",
        base=plain,
        scheme=scheme,
        precision=scheme.kind,
        group_size=scheme.group_size or WHOLE_ROW,
        zeros=scheme.method != "pack-quantized" or not scheme.symmetric or scheme.act_order,
        # CPU kernels keep the few matrices in float32 whose scales are no numbers of float16
        half_scales=scheme.kind == "int4",
    )


def shipped_fp8(model: AnyModel) -> QuantScheme:
    """The quantization of the FP8 releases of the model's family.

    Raises:
        SpecError: no release of the family is known.
    """
    family = family_of(model)
    if family.fp8_release is None:
        raise SpecError(
            f"`dtype`='fp8-shipped': no FP8 release of {family.name} is known; use `dtype`=fp8"
        )
    return family.fp8_release.scheme(model)
