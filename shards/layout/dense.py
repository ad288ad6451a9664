"""Partition of a dense model over pipeline stages and tensor-parallel ranks.

Pure functions of the model's numbers and the mesh. Global indices everywhere. Knows nothing of
files, tensors or processes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

from arriero.shards.config.parallel import ParallelConfig
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


def runs_of(counts: Sequence[int]) -> list[Span]:
    """Consecutive spans of these sizes, from 0."""
    edges = accumulate(counts, initial=0)
    return [Span(start=a, stop=b) for a, b in pairwise(edges)]


def partition(model: ModelConfig, mesh: ParallelConfig) -> list[SlicePart]:
    """Cut `model` into a part for each rank of `mesh`.

    Raises:
        SpecError: the mesh does not fit the model; names the field, its value and the limit.
    """
    mesh.check_fits(num_layers=model.num_layers, num_heads=model.num_heads, num_experts=0)
    shares = mesh.tp_shares or (1.0,) * mesh.tp
    layers = runs_of(mesh.layer_split or split_layers(model, mesh.pp))
    try:
        heads = split_heads(model.num_heads, model.num_kv_heads, shares)
        columns = split(model.intermediate_size, shares, _multiple(model.intermediate_size, shares))
        vocab = split(model.vocab_size, [1.0] * mesh.tp, _multiple(model.vocab_size, shares))
    except ValueError as error:
        raise SpecError(f"`tp`={mesh.tp}: {error}; use fewer slices a stage") from None
    parts = []
    for rank in range(mesh.world_size):
        at = mesh.coordinates(rank)
        part = SlicePart(
            rank=rank,
            stage=at.stage,
            tp_rank=at.tp_rank,
            layers=layers[at.stage],
            q_heads=heads[at.tp_rank][0],
            kv_heads=heads[at.tp_rank][1],
            columns=columns[at.tp_rank],
            vocab=vocab[at.tp_rank],
            first_stage=at.stage == 0,
            last_stage=at.stage == mesh.pp - 1,
        )
        parts.append(part)
    return parts


def _multiple(total: int, shares: Sequence[float]) -> int:
    """The packing multiple, or 1 where the dimension is too small for the multiple."""
    return COLUMN_MULTIPLE if total >= COLUMN_MULTIPLE * len(shares) else 1
