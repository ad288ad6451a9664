"""Bytes of a rank's weights, packed as the runner packs them.

Knows which modules are stacked into a matrix product and the precision of each; the bytes come from
`packing`. Knows nothing of KV cache and activations. Needs no torch.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from math import ceil, prod, sqrt

from arriero.cluster.planner.packed_stack import PackedStack
from arriero.cluster.planner.weight_forms import (
    WHOLE_ROW,
    Weights,
)
from arriero.kernels.registry import BACKENDS, Kernels
from arriero.kernels.sizes import MatrixSize, Precision
from arriero.shards.checkpoint.formats.modules import Cut, Module, Place
from arriero.shards.checkpoint.formats.stored import cut_group, modules_of, span_of
from arriero.shards.layout.dense import Span
from arriero.shards.layout.parts import AnyModel, AnyPart

INPUT_SCALE_NBYTES = 4
"""Bytes of the static scale of a matrix's inputs."""
ORDER_ITEMSIZE = 8
"""Bytes of a sorted column's index of its input column."""
_STACKED = re.compile(r"(.*\.)(?:([qkv])|(?:gate|up))_proj$")


@dataclass(frozen=True, kw_only=True, slots=True)
class RankWeights:
    """Bytes of a rank's weights.

    Attributes:
        by_kind: bytes by kind of module, without scales.
        scales: bytes of the scales of all kinds.
        expert_bytes: bytes of a routed expert on this rank, scales included, over the layers of
            the stage; 0 without experts.
        active_bytes: bytes that a step of a single token reads: of the experts, one in each layer.
    """

    by_kind: dict[str, int]
    scales: int
    expert_bytes: int
    active_bytes: int

    @property
    def total(self) -> int:
        """Allocated bytes, as a slice reports them."""
        return sum(self.by_kind.values()) + self.scales


@dataclass(frozen=True, kw_only=True, slots=True)
class _Stack:
    """Modules that the runner packs into a single matrix (q, k and v; gate and up), or a vector.

    The modules have no names here, so that layers with equal stacks compare equal.
    """

    modules: tuple[Module, ...]
    precision: Precision


def rank_weights(model: AnyModel, part: AnyPart, weights: Weights, kernels: Kernels) -> RankWeights:
    """Bytes of the weights of a part.

    Args:
        model: sizes of the model.
        part: the part of a rank.
        weights: form of the weights in memory.
        kernels: the backend that packs the weights.
    """
    return _bytes_of(_rank_stacks(model, part, weights), part, weights, kernels)


def modules_weights(
    modules: Iterable[Module], part: AnyPart, weights: Weights, kernels: Kernels
) -> RankWeights:
    """As `rank_weights`, of modules that a rank holds beside its model."""
    return _bytes_of(_stacked(modules, weights).items(), part, weights, kernels)


def rank_stacks(
    model: AnyModel, part: AnyPart, weights: Weights, kernels: Kernels
) -> list[PackedStack]:
    """The matrices and vectors of a part, of which `rank_weights` is the sum."""
    return list(_packed(_rank_stacks(model, part, weights), part, weights, kernels))


def _bytes_of(
    stacks: Iterable[tuple[_Stack, int]], part: AnyPart, weights: Weights, kernels: Kernels
) -> RankWeights:
    by_kind: Counter[str] = Counter()
    scales, experts_total, num_experts = 0, 0, 0
    for stack in _packed(stacks, part, weights, kernels):
        count = stack.copies * stack.times
        by_kind[stack.kind] += stack.weights * count
        scales += stack.scales * count
        if stack.kind == "experts" and stack.columns:
            experts_total += (stack.weights + stack.scales) * count
            num_experts = stack.copies
    expert_bytes = experts_total // num_experts if num_experts else 0
    total = sum(by_kind.values()) + scales
    return RankWeights(
        by_kind=dict(by_kind),
        scales=scales,
        expert_bytes=expert_bytes,
        active_bytes=total - experts_total + expert_bytes,
    )


def _packed(
    stacks: Iterable[tuple[_Stack, int]], part: AnyPart, weights: Weights, kernels: Kernels
) -> Iterator[PackedStack]:
    for stack, times in stacks:
        first = stack.modules[0]
        parts = len(stack.modules) * first.stacked
        rows = sum(_share(module, part, 0) for module in stack.modules) * first.stacked
        columns = _share(first, part, -1)
        copies = span_of(part, "experts").size if first.experts else 1
        weight_bytes, scales = 4 * prod(first.shape), 0  # vectors stay float32
        if not _is_matrix(first):
            rows, columns = prod(first.shape), 0
        else:
            group, beside = _group(first, part, weights), 0
            scheme = weights.scheme
            if scheme is not None and scheme.input_scale and stack.precision == weights.precision:
                beside = INPUT_SCALE_NBYTES
            if scheme is not None and scheme.act_order and stack.precision == "int4":
                columns, group = _sorted(first, columns, weights)
                beside = ORDER_ITEMSIZE * columns
            matrix = MatrixSize(
                out_features=rows,
                in_features=columns,
                precision=stack.precision,
                group_size=group,
                zeros=weights.zeros,
                half_scales=weights.half_scales,
                bias=first.bias and (first.columns is None or part.tp_rank == 0),
            )
            packed = BACKENDS[kernels].packed_nbytes(matrix)
            weight_bytes, scales = packed.weights, packed.scales + beside
        yield PackedStack(
            kind=first.kind,
            num_modules=parts,
            rows=rows,
            columns=columns,
            precision=stack.precision,
            weights=weight_bytes,
            scales=scales,
            copies=copies if _is_matrix(first) else 1,
            times=times,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class _ModelStacks:
    """The stacks of a whole model; layers with equal stacks share an entry.

    Attributes:
        entries: stacks with the number of each: an entry for each kind of layer, and for each
            place outside of the layers.
        index: index of the entry of a layer or a place.
    """

    entries: tuple[tuple[tuple[_Stack, int], ...], ...]
    index: dict[int | Place, int]


@lru_cache(maxsize=16)
def _model_stacks(model: AnyModel, weights: Weights) -> _ModelStacks:
    modules_by_place: dict[int | Place, list[Module]] = {}
    for module in modules_of(model, None):
        place = module.place if module.layer is None else module.layer
        modules_by_place.setdefault(place, []).append(module)
    entries: dict[tuple[tuple[_Stack, int], ...], int] = {}
    index: dict[int | Place, int] = {}
    for place, modules in modules_by_place.items():
        stacks = tuple(_stacked(modules, weights).items())
        index[place] = entries.setdefault(stacks, len(entries))
    return _ModelStacks(entries=tuple(entries), index=index)


def _stacked(modules: Iterable[Module], weights: Weights) -> Counter[_Stack]:
    """The stacks of the modules of a place, with the number of each."""
    groups: dict[str, list[Module]] = {}
    for module in modules:
        matched = None if module.experts else _STACKED.match(module.name)
        key = f"{module.name}{module.suffix}"
        if matched is not None:
            key = f"{matched[1]}{'qkv' if matched[2] else 'gate_up'}"
        groups.setdefault(key, []).append(module)
    return Counter(
        _Stack(
            modules=tuple(replace(module, name="", layer=None) for module in group),
            precision=weights.precision_of(group[0]),
        )
        for group in groups.values()
    )


def _rank_stacks(model: AnyModel, part: AnyPart, weights: Weights) -> Iterator[tuple[_Stack, int]]:
    """The stacks of a rank's stage, with the number of each."""
    whole = _model_stacks(model, weights)
    ends: dict[Place, bool] = {
        "first": part.first_stage,
        "last": part.last_stage,
        "ends": part.first_stage or part.last_stage,
    }
    places: list[int | Place] = list(range(part.layers.start, part.layers.stop))
    places += [place for place, present in ends.items() if present and place in whole.index]
    for index, times in Counter(whole.index[place] for place in places).items():
        for stack, count in whole.entries[index]:
            yield stack, count * times


def _is_matrix(module: Module) -> bool:
    return len(module.shape) == 2


def _group(module: Module, part: AnyPart, weights: Weights) -> int:
    """Columns that share a scale on a rank; a cut inside a stored group makes smaller groups.

    Weights that are quantized on load are cut first and grouped afterwards.
    """
    cut, size, group = module.columns, module.shape[-1], weights.group_size
    if cut is None or group >= WHOLE_ROW or weights.tables is not None:
        return group
    span = span_of(part, cut.axis)
    own = Span(start=span.start * cut.per, stop=min(span.stop * cut.per, size))
    return cut_group(own, size, group)


def _sorted(module: Module, columns: int, weights: Weights) -> tuple[int, int]:
    """Columns of a matrix that a slice sorts by group (act-order), and columns of such a group.

    A slice of the columns has a part of each group; all parts are padded to the largest part. The
    largest part depends on the data of the checkpoint: an upper estimate, exact for whole rows.
    """
    size = module.shape[-1]
    group = min(weights.group_size, size)
    width, num_groups = group, -(-size // group)
    if columns < size and not module.experts:
        mean = group * columns / size
        width = min(group, ceil(mean + 5 * sqrt(mean)))  # five deviations above a random choice
    width += width % 2
    return num_groups * width, width


def _share(module: Module, part: AnyPart, dim: int) -> int:
    cut: Cut | None = module.rows if dim == 0 else module.columns
    size = module.shape[dim] // (module.stacked if dim == 0 else 1)
    if cut is None:
        return size
    return min(span_of(part, cut.axis).size * cut.per, size)
