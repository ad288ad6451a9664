"""What one rank holds of a model's weights, packed as the runner packs it.

Knows how modules are stacked into products and in which precision each is kept; bytes come from
`packing`. Needs no torch.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from math import ceil, prod, sqrt
from typing import Literal

from arriero.kernels.packing import Kernels, Precision, packed_nbytes
from arriero.shards.checkpoint.formats.modules import Cut, Module, Place
from arriero.shards.checkpoint.formats.scheme import QuantScheme
from arriero.shards.checkpoint.formats.stored import cut_group, modules_of, span_of
from arriero.shards.errors import SpecError
from arriero.shards.layout.dense import Span
from arriero.shards.layout.parts import AnyModel, AnyPart
from arriero.shards.model_config.dense import ModelConfig

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
"""What a spec's `quantization` is called here."""
GROUP_SIZE = 128
ON_LOAD_GROUP_SIZE = 32
ORDER_ITEMSIZE = 8
"""Bytes that name the input of a sorted column."""
WHOLE_ROW = 1 << 30
"""A group size that no row reaches: one scale a row."""

_STACKED = re.compile(r"(.*\.)(?:([qkv])|(?:gate|up))_proj$")


@dataclass(frozen=True, kw_only=True, slots=True)
class Weights:
    """What a model's weights are kept as.

    Attributes:
        dtype: what was asked for.
        base: precision of what is not quantized, and of activations on a GPU.
        scheme: the checkpoint's own form; only products that it covers are quantized.
        precision: of the quantized products.
        group_size: of int4.
        zeros: int4: whether zero points are kept.
        tables: precision of the embedding and the head, None for `base`.
    """

    dtype: Dtype
    base: Precision
    scheme: QuantScheme | None = None
    precision: Precision | None = None
    group_size: int = GROUP_SIZE
    zeros: bool = True
    tables: Precision | None = None

    def of(self, module: Module) -> Precision:
        """What a module is kept as."""
        if self.tables is not None and module.kind in ("embeddings", "head"):
            return self.tables
        if self.precision is None or not module.product:
            return self.base
        if self.scheme is not None:
            return self.precision if self.scheme.covers(module.name, module.kind) else self.base
        kept = module.kind in ("head", "router", "vision")
        return self.base if kept else self.precision


def weights_as(model: AnyModel, scheme: QuantScheme | None, dtype: Dtype) -> Weights:
    """Decide what each product is kept as.

    Args:
        model: its numbers.
        scheme: its checkpoint's form, None for plain weights.
        dtype: "float32", "bfloat16", "float16": plain. "fp8", "int4": every product of the
            decoder, as checkpoints in those forms have them (int4 in groups of 128); tables, head,
            router and vision stay. "fp8-shipped": as Meta's FP8 releases: the MLPs of all layers
            but the first and the last, or Llama 4's experts. "int8", "fp8-onload", "int4-onload":
            as slices quantize plain weights while they load: tables too, always in int8 (int4's
            groups are of 32). "checkpoint": what the checkpoint says.

    Raises:
        SpecError: an unknown dtype, or a quantized checkpoint asked for as something else.
    """
    if dtype == "checkpoint":
        return _as_stored(model, scheme)
    if dtype not in DTYPES:
        raise SpecError(f"`dtype`={dtype!r} is none of {', '.join(DTYPES)}")
    if dtype == "fp8-shipped":
        return Weights(dtype=dtype, base="bfloat16", scheme=shipped_fp8(model), precision="fp8")
    if scheme is not None:
        raise SpecError(
            f"`dtype`={dtype!r}: the checkpoint is quantized ({scheme.method}); leave it as it is "
            "with `dtype`=checkpoint, or give the checkpoint of plain weights"
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
            tables="int8",
        )
    if dtype == "fp8" or dtype == "int4":
        return Weights(dtype=dtype, base="bfloat16", precision=dtype)
    return Weights(dtype=dtype, base=dtype)


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
    )


def shipped_fp8(model: AnyModel) -> QuantScheme:
    """The form of Meta's FP8 releases: Llama 3.1 405B's, or Llama 4 Maverick's."""
    if isinstance(model, ModelConfig):
        ends = (0, model.num_layers - 1)
        names = ["lm_head", *(f"model.layers.{layer}.mlp" for layer in ends)]
        names += [f"model.layers.{layer}.self_attn" for layer in range(model.num_layers)]
        return QuantScheme(method="fbgemm_fp8", activation_bound=1200.0, ignored=tuple(names))
    kept = [
        module.name
        for module in modules_of(model, QuantScheme(method="compressed-tensors"))
        if module.product and module.kind != "experts"
    ]
    return QuantScheme(method="compressed-tensors", ignored=tuple(kept))


@dataclass(frozen=True, kw_only=True, slots=True)
class RankWeights:
    """Bytes of one rank's weights.

    Attributes:
        by_kind: without scales.
        scales: of all kinds.
        expert_bytes: of one routed expert as held here, scales included, over the layers of the
            stage; 0 without experts.
        active_bytes: what a step of one token reads: of the experts, one a layer.
    """

    by_kind: dict[str, int]
    scales: int
    expert_bytes: int
    active_bytes: int

    @property
    def total(self) -> int:
        """Bytes allocated, as a slice reports them."""
        return sum(self.by_kind.values()) + self.scales


@dataclass(frozen=True, kw_only=True, slots=True)
class _Stack:
    """Modules that the runner packs as one product (q, k and v; gate and up), or one vector.

    Their names are left out: layers whose stacks are equal take equal bytes.
    """

    modules: tuple[Module, ...]
    precision: Precision


def rank_weights(model: AnyModel, part: AnyPart, weights: Weights, kernels: Kernels) -> RankWeights:
    """Bytes of what `part` holds.

    Args:
        model: its numbers.
        part: of one rank.
        weights: what they are kept as.
        kernels: the backend that packs them.
    """
    by_kind: Counter[str] = Counter()
    scales, experts_total, expert_held = 0, 0, 0
    for stack, times in _held(model, part, weights):
        first = stack.modules[0]
        rows = sum(_share(one, part, 0) for one in stack.modules) * first.stacked
        columns = _share(first, part, -1)
        copies = span_of(part, "experts").size if first.experts else 1
        if not _is_matrix(first):
            by_kind[first.kind] += 4 * prod(first.shape) * times  # vectors are kept in float32
            continue
        group, order = _group(first, part, weights), 0
        if stack.precision == "int4" and weights.scheme is not None and weights.scheme.act_order:
            columns, group = _sorted(first, columns, weights)
            order = ORDER_ITEMSIZE * columns
        packed = packed_nbytes(
            kernels,
            rows,
            columns,
            stack.precision,
            group_size=group,
            zeros=weights.zeros,
            bias=first.bias and (first.columns is None or part.tp_rank == 0),
        )
        by_kind[first.kind] += packed.weights * copies * times
        scales += (packed.scales + order) * copies * times
        if first.experts:
            experts_total += (packed.total + order) * copies * times
            expert_held = copies
    expert_bytes = experts_total // expert_held if expert_held else 0
    total = sum(by_kind.values()) + scales
    return RankWeights(
        by_kind=dict(by_kind),
        scales=scales,
        expert_bytes=expert_bytes,
        active_bytes=total - experts_total + expert_bytes,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Stacks:
    """Those of a whole model, layers that are alike listed once.

    Attributes:
        lists: stacks and how many there are of each: a list for each kind of layer, and for each
            place outside of the layers.
        of: which of the lists a layer, or a place, is made of.
    """

    lists: tuple[tuple[tuple[_Stack, int], ...], ...]
    of: dict[int | Place, int]


@lru_cache(maxsize=16)
def _stacks(model: AnyModel, weights: Weights) -> _Stacks:
    found: dict[int | Place, dict[str, list[Module]]] = {}
    for module in modules_of(model, None):
        matched = None if module.experts else _STACKED.match(module.name)
        key = f"{module.name}{module.suffix}"
        if matched is not None:
            key = f"{matched[1]}{'qkv' if matched[2] else 'gate_up'}"
        where = module.place if module.layer is None else module.layer
        found.setdefault(where, {}).setdefault(key, []).append(module)
    lists: dict[tuple[tuple[_Stack, int], ...], int] = {}
    of: dict[int | Place, int] = {}
    for where, stacks in found.items():
        made = Counter(
            _Stack(
                modules=tuple(replace(one, name="", layer=None) for one in modules),
                precision=weights.of(modules[0]),
            )
            for modules in stacks.values()
        )
        of[where] = lists.setdefault(tuple(made.items()), len(lists))
    return _Stacks(lists=tuple(lists), of=of)


def _held(model: AnyModel, part: AnyPart, weights: Weights) -> Iterator[tuple[_Stack, int]]:
    """The stacks of a rank's stage, and how many there are of each."""
    whole = _stacks(model, weights)
    ends: dict[Place, bool] = {
        "first": part.first_stage,
        "last": part.last_stage,
        "ends": part.first_stage or part.last_stage,
    }
    here: list[int | Place] = list(range(part.layers.start, part.layers.stop))
    here += [place for place, held in ends.items() if held and place in whole.of]
    for index, times in Counter(whole.of[where] for where in here).items():
        for stack, in_one in whole.lists[index]:
            yield stack, in_one * times


def _is_matrix(module: Module) -> bool:
    return len(module.shape) == 2


def _group(module: Module, part: AnyPart, weights: Weights) -> int:
    """Columns that share a scale on this rank: a cut inside a stored group makes smaller ones.

    What is quantized on load is cut first and grouped then.
    """
    cut, size, group = module.columns, module.shape[-1], weights.group_size
    if cut is None or group >= WHOLE_ROW or weights.tables is not None:
        return group
    span = span_of(part, cut.axis)
    own = Span(start=span.start * cut.per, stop=min(span.stop * cut.per, size))
    return cut_group(own, size, group)


def _sorted(module: Module, columns: int, weights: Weights) -> tuple[int, int]:
    """Columns of a matrix that a slice sorts by group (act-order), and of a group of them.

    A slice of the columns holds a part of every group, and the largest part is the size of all.
    Which it holds only the checkpoint's data says; an upper estimate here, except of whole ones.
    """
    size = module.shape[-1]
    group = min(weights.group_size, size)
    width, num_groups = group, -(-size // group)
    if columns < size and not module.experts:
        mean = group * columns / size
        width = min(group, ceil(mean + 5 * sqrt(mean)))  # five deviations of a random choice
    width += width % 2
    return num_groups * width, width


def _share(module: Module, part: AnyPart, dim: int) -> int:
    cut: Cut | None = module.rows if dim == 0 else module.columns
    size = module.shape[dim] // (module.stacked if dim == 0 else 1)
    if cut is None:
        return size
    return min(span_of(part, cut.axis).size * cut.per, size)
