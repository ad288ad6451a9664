"""Partition of a dense model over pipeline stages and tensor-parallel ranks.

Pure functions of the model's numbers and the mesh. Global indices everywhere. Knows nothing of
files, tensors or processes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from arriero.shards.config.group import GroupConfig
from arriero.shards.errors import SpecError
from arriero.shards.model_config.dense import ModelConfig

COLUMN_MULTIPLE = 16
"""Unit of cuts of MLP columns and vocabulary rows: the narrowest packing panel."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Span:
    """The half-open range [start, stop) of global indices."""

    start: int
    stop: int

    @property
    def size(self) -> int:
        """Number of indices."""
        return self.stop - self.start


@dataclass(frozen=True, kw_only=True, slots=True)
class SlicePart:
    """The part of a model on one rank.

    Attributes:
        rank, stage, tp_rank: rank = stage * tp + tp_rank.
        layers: layers of the stage.
        q_heads: query heads.
        kv_heads: key/value heads of the query heads. With more ranks than key/value heads,
            several ranks have the same head.
        columns: columns of the MLP's inner dimension.
        vocab: rows of the embedding and of the head.
        first_stage: whether the rank embeds tokens.
        last_stage: whether the rank computes logits.
    """

    rank: int
    stage: int
    tp_rank: int
    layers: Span
    q_heads: Span
    kv_heads: Span
    columns: Span
    vocab: Span
    first_stage: bool
    last_stage: bool


def split(total: int, shares: Sequence[float], multiple: int = 1) -> list[Span]:
    """Cut [0, total) in proportion to `shares`, at multiples of `multiple`, without empty parts.

    Raises:
        ValueError: there are more parts than multiples.
    """
    units = -(-total // multiple)
    if units < len(shares):
        raise ValueError(f"{total} cannot be cut into {len(shares)} parts of at least {multiple}")
    weight, cuts = sum(shares), [0]
    for i in range(1, len(shares)):
        ideal = round(units * sum(shares[:i]) / weight)
        cuts.append(min(max(ideal, cuts[-1] + 1), units - (len(shares) - i)))
    cuts.append(units)
    edges = [min(cut * multiple, total) for cut in cuts]
    return [Span(start=a, stop=b) for a, b in pairwise(edges)]


def split_heads(
    num_heads: int, num_kv_heads: int, shares: Sequence[float]
) -> list[tuple[Span, Span]]:
    """Cut attention heads: (query heads, key/value heads) of each rank.

    Whole key/value groups while there are enough; beyond that several ranks share a key/value
    head and each rank takes some of its query heads.

    Raises:
        ValueError: there are more ranks than query heads.
    """
    ratio, parts = num_heads // num_kv_heads, len(shares)
    if parts <= num_kv_heads:
        return [
            (Span(start=s.start * ratio, stop=s.stop * ratio), s)
            for s in split(num_kv_heads, shares)
        ]
    if parts > num_heads:
        raise ValueError(f"{num_heads} query heads cannot be cut into {parts} parts")
    out: list[tuple[Span, Span]] = []
    for kv, ranks in enumerate(split(parts, [1.0] * num_kv_heads)):
        if ranks.size > ratio:
            raise ValueError(f"{ratio} query heads a group cannot be cut into {ranks.size} parts")
        for s in split(ratio, shares[ranks.start : ranks.stop]):
            q = Span(start=kv * ratio + s.start, stop=kv * ratio + s.stop)
            out.append((q, Span(start=kv, stop=kv + 1)))
    return out


def split_layers(model: ModelConfig, pp: int) -> tuple[int, ...]:
    """Layers of each stage with the lowest maximum cost, the head counted as layers.

    Cost is the number of weights read for a token; decode and prefill both scale with this number.
    """
    hidden, d = model.hidden_size, model.head_dim
    layer = hidden * d * (2 * model.num_heads + 2 * model.num_kv_heads)
    layer += 3 * hidden * model.intermediate_size
    head = model.vocab_size * hidden / layer
    per_stage = (model.num_layers + head) / pp
    last = max(1, round(per_stage - head)) if pp > 1 else model.num_layers
    if pp > 1:
        last = min(last, model.num_layers - (pp - 1))
    rest = model.num_layers - last
    counts = [rest // (pp - 1) + (i < rest % (pp - 1)) for i in range(pp - 1)] if pp > 1 else []
    return (*counts, last)


def partition(model: ModelConfig, group: GroupConfig) -> list[SlicePart]:
    """Cut `model` into a part for each rank of `group`.

    Raises:
        SpecError: the mesh does not fit the model; names the field, its value and the limit.
    """
    if group.pp < 1 or group.pp > model.num_layers:
        raise SpecError(f"`pp`={group.pp} must be 1 to {model.num_layers}, the model's layers")
    if group.tp < 1 or group.tp > model.num_heads:
        raise SpecError(f"`tp`={group.tp} must be 1 to {model.num_heads}, the model's query heads")
    shares = group.tp_shares or (1.0,) * group.tp
    if len(shares) != group.tp or min(shares) <= 0:
        raise SpecError(f"`tp_shares`={shares} must be {group.tp} positive numbers, one a tp rank")
    counts = group.layer_split or split_layers(model, group.pp)
    if len(counts) != group.pp or sum(counts) != model.num_layers or min(counts) < 1:
        raise SpecError(
            f"`layer_split`={counts} must be {group.pp} positive counts "
            f"that add up to {model.num_layers}, the model's layers"
        )
    try:
        heads = split_heads(model.num_heads, model.num_kv_heads, shares)
        columns = split(model.intermediate_size, shares, _multiple(model.intermediate_size, shares))
        vocab = split(model.vocab_size, [1.0] * group.tp, _multiple(model.vocab_size, shares))
    except ValueError as error:
        raise SpecError(f"`tp`={group.tp}: {error}; use fewer slices a stage") from None
    starts = [sum(counts[:i]) for i in range(group.pp)]
    return [
        SlicePart(
            rank=stage * group.tp + tp_rank,
            stage=stage,
            tp_rank=tp_rank,
            layers=Span(start=starts[stage], stop=starts[stage] + counts[stage]),
            q_heads=heads[tp_rank][0],
            kv_heads=heads[tp_rank][1],
            columns=columns[tp_rank],
            vocab=vocab[tp_rank],
            first_stage=stage == 0,
            last_stage=stage == group.pp - 1,
        )
        for stage in range(group.pp)
        for tp_rank in range(group.tp)
    ]


def _multiple(total: int, shares: Sequence[float]) -> int:
    """The packing multiple, or 1 where the dimension is too small for the multiple."""
    return COLUMN_MULTIPLE if total >= COLUMN_MULTIPLE * len(shares) else 1
