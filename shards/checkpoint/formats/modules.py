"""A model as a list of matrices and vectors, independent of checkpoint formats.

Each entry states the tensor-parallel cut: the axis of the partition, and the number of rows or
columns for each index of the axis. Formats, load plans and memory plans follow from the lists.
Needs no torch; knows nothing of files.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal[
    "attention",
    "mlp",
    "experts",
    "shared_expert",
    "router",
    "embeddings",
    "head",
    "norms",
    "vision",
]
Axis = Literal[
    "q_heads",
    "kv_heads",
    "columns",
    "shared_columns",
    "vocab",
    "experts",
    "expert_columns",
    "vision_heads",
    "vision_columns",
    "adapter_columns",
    "draft_vocab",
    "taps",
]
"""Attribute names of the spans in `SlicePart`, `MoEPart` and `Eagle3Part`."""
Place = Literal["layer", "first", "last", "ends"]
"""Pipeline stage: of the layer, first, last, or (a tied table) both ends."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Cut:
    """Cut of a dimension: `per` entries for each index of `axis`."""

    axis: Axis
    per: int = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Module:
    """A matrix [out, in], or a vector or table that no format changes.

    Attributes:
        name: name of the module, without `.weight`.
        kind: kind of module.
        shape: [out, in] of a matrix; any shape for others.
        product: whether the tensor is the weight of a matrix product, which a format may quantize.
        layer: decoder layer; None outside the layers.
        place: pipeline stage that holds the tensor, for modules outside the layers.
        rows, columns: cuts of the first and of the last dimension.
        bias: whether a vector `.bias` of the rows exists.
        suffix: end of the tensor's name.
        experts: number of experts fused along a leading dimension; 0 without fused experts. With
            fused experts `shape` is [out, in] of an expert; stored are [experts, in, out].
        expert: number of the expert, if each expert is a separate module.
        stacked: parts stacked along the rows with equal cuts (gate and up in one matrix).
    """

    name: str
    kind: Kind
    shape: tuple[int, ...]
    product: bool = False
    layer: int | None = None
    place: Place = "layer"
    rows: Cut | None = None
    columns: Cut | None = None
    bias: bool = False
    suffix: str = ".weight"
    experts: int = 0
    expert: int | None = None
    stacked: int = 1


NORMS = ("input_layernorm", "post_attention_layernorm")


def norm(name: str, hidden: int, layer: int | None) -> Module:
    """The norm of a layer."""
    return Module(name=name, kind="norms", shape=(hidden,), layer=layer)


def attention(
    prefix: str, layer: int, hidden: int, q: Cut, kv: Cut, num_heads: int, num_kv_heads: int
) -> list[Module]:
    """The q, k, v and o matrices of a layer."""
    q_size, kv_size = num_heads * q.per, num_kv_heads * kv.per
    shapes: dict[str, tuple[tuple[int, int], Cut | None, Cut | None]] = {
        "q_proj": ((q_size, hidden), q, None),
        "k_proj": ((kv_size, hidden), kv, None),
        "v_proj": ((kv_size, hidden), kv, None),
        "o_proj": ((hidden, q_size), None, q),
    }
    return [
        Module(
            name=f"{prefix}self_attn.{name}",
            kind="attention",
            shape=shape,
            product=True,
            layer=layer,
            rows=rows,
            columns=columns,
        )
        for name, (shape, rows, columns) in shapes.items()
    ]


def gated_mlp(
    prefix: str,
    kind: Kind,
    layer: int,
    hidden: int,
    inner_size: int,
    inner: Cut,
    expert: int | None = None,
) -> list[Module]:
    """Gate, up and down matrices."""
    up, down = (inner_size, hidden), (hidden, inner_size)
    shapes = {"gate_proj": (up, True), "up_proj": (up, True), "down_proj": (down, False)}
    return [
        Module(
            name=f"{prefix}{name}",
            kind=kind,
            shape=shape,
            product=True,
            layer=layer,
            rows=inner if by_rows else None,
            columns=None if by_rows else inner,
            expert=expert,
        )
        for name, (shape, by_rows) in shapes.items()
    ]
