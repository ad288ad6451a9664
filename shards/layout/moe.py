"""Partition of a model with experts over stages, data- and tensor-parallel ranks, and experts.

A stage has `dp` x `tp` ranks. Attention, dense MLPs, shared experts, vocabulary and vision are cut
over `tp` and repeated on `dp` ranks; each `dp` rank has sequences of its own. Routed experts are
dealt to `ep` parts of the stage's ranks; the ranks of a part divide each expert's columns. Pure
functions of the model's numbers and the mesh; global indices everywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from arriero.shards.config.parallel import ParallelConfig
from arriero.shards.errors import SpecError
from arriero.shards.layout.dense import Span, runs_of, split, split_heads

_COLUMN_MULTIPLE = 16


class VisionNumbers(Protocol):
    """The numbers of a vision tower that decide its cuts."""

    @property
    def num_heads(self) -> int:
        """Attention heads of a layer."""

    @property
    def intermediate_size(self) -> int:
        """Columns of an MLP."""

    @property
    def projector_output_dim(self) -> int:
        """Columns of the adapter."""

    def num_parameters(self, text_hidden_size: int) -> int:
        """Number of weights, with the projection into a text model of this width."""


class MoENumbers(Protocol):
    """The numbers of a model with experts that decide its cuts."""

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding and of the head."""

    @property
    def hidden_size(self) -> int:
        """Width of the residual stream."""

    @property
    def intermediate_size(self) -> int:
        """Columns of each routed and shared expert."""

    @property
    def intermediate_size_mlp(self) -> int:
        """Columns of the MLP of a dense layer."""

    @property
    def num_layers(self) -> int:
        """Number of decoder layers."""

    @property
    def num_heads(self) -> int:
        """Number of query heads."""

    @property
    def num_kv_heads(self) -> int:
        """Number of key/value heads."""

    @property
    def q_size(self) -> int:
        """Rows of the query matrix."""

    @property
    def kv_size(self) -> int:
        """Rows of the key matrix."""

    @property
    def num_experts(self) -> int:
        """Routed experts of a layer; 0 for a model whose layers are all dense."""

    @property
    def vision(self) -> VisionNumbers | None:
        """The vision tower; None without."""

    def routes(self, layer: int) -> bool:
        """Whether a layer has experts."""

    def mlp_columns(self, layer: int) -> int:
        """Columns of the shared expert or of the dense MLP of a layer."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MoEPart:
    """The part of a model on one rank.

    Attributes:
        rank, stage, dp_rank, tp_rank, ep_rank: coordinates of the rank in the mesh.
        layers: layers of the stage.
        q_heads, kv_heads: heads of attention.
        columns: columns of the MLPs of dense layers.
        shared_columns: columns of shared experts.
        vocab: rows of the embedding and of the head.
        experts: experts of each routed layer.
        expert_columns: columns of each of these experts.
        vision_heads, vision_columns: heads and columns of the vision tower's layers.
        adapter_columns: columns of the vision adapter.
        first_stage: whether the rank embeds tokens and images.
        last_stage: whether the rank computes logits.
    """

    rank: int
    stage: int
    dp_rank: int
    tp_rank: int
    ep_rank: int
    layers: Span
    q_heads: Span
    kv_heads: Span
    columns: Span
    shared_columns: Span
    vocab: Span
    experts: Span
    expert_columns: Span
    vision_heads: Span
    vision_columns: Span
    adapter_columns: Span
    first_stage: bool
    last_stage: bool


def layer_weights(model: MoENumbers, layer: int) -> int:
    """Number of weights of one layer, over all ranks."""
    hidden = model.hidden_size
    total = 2 * hidden * (model.q_size + model.kv_size)
    total += 3 * hidden * model.mlp_columns(layer)
    if model.routes(layer):
        total += model.num_experts * hidden * (3 * model.intermediate_size + 1)
    return total


def balance(costs: Sequence[int], pp: int, first: int, last: int) -> tuple[int, ...]:
    """Cut `costs` into `pp` runs with the lowest maximum; the ends include `first` and `last`.

    Args:
        costs: cost of each layer.
        pp: number of runs; at most the number of layers.
        first: extra cost of the first run.
        last: extra cost of the last run.

    Returns:
        Length of each run.
    """
    sums = [0]
    for cost in costs:
        sums.append(sums[-1] + cost)
    num = len(costs)
    # best[k][n]: highest cost of k runs over the first n layers, and the start of the last run
    best: list[dict[int, tuple[int, int]]] = [{0: (0, 0)}]
    for k in range(1, pp + 1):
        extra = (first if k == 1 else 0) + (last if k == pp else 0)
        row: dict[int, tuple[int, int]] = {}
        for n in range(k, num - (pp - k) + 1):
            row[n] = min(
                (max(before, sums[n] - sums[m] + extra), m)
                for m, (before, _) in best[-1].items()
                if m < n
            )
        best.append(row)
    counts, stop = [], num
    for k in range(pp, 0, -1):
        start = best[k][stop][1]
        counts.append(stop - start)
        stop = start
    return tuple(reversed(counts))


def partition_moe(model: MoENumbers, mesh: ParallelConfig) -> list[MoEPart]:
    """Cut `model` into a part for each rank of `mesh`.

    Raises:
        SpecError: the mesh does not fit the model; names the field, its value and the limit.
    """
    _check(model, mesh)
    shares = mesh.tp_shares or (1.0,) * mesh.tp
    extra = model.vocab_size * model.hidden_size
    vision = 0 if model.vision is None else model.vision.num_parameters(model.hidden_size)
    counts = mesh.layer_split or balance(
        [layer_weights(model, layer) for layer in range(model.num_layers)],
        mesh.pp,
        extra + vision,
        extra,
    )
    expert_tp = mesh.stage_size // mesh.num_expert_parts
    even = [1.0] * mesh.tp
    try:
        heads = split_heads(model.num_heads, model.num_kv_heads, shares)
        columns = split(model.intermediate_size_mlp, shares, _COLUMN_MULTIPLE)
        shared = split(model.intermediate_size, shares, _COLUMN_MULTIPLE)
        vocab = split(model.vocab_size, even, _COLUMN_MULTIPLE)
        none = Span(start=0, stop=0)
        experts, expert_columns = [none] * mesh.num_expert_parts, [none] * expert_tp
        if model.num_experts:
            experts = split(model.num_experts, [1.0] * mesh.num_expert_parts)
            expert_columns = split(model.intermediate_size, [1.0] * expert_tp, _COLUMN_MULTIPLE)
        vision_heads = [none] * mesh.tp
        vision_columns = adapter_columns = vision_heads
        if model.vision is not None:
            vision_heads = split(model.vision.num_heads, even)
            vision_columns = split(model.vision.intermediate_size, even, _COLUMN_MULTIPLE)
            adapter_columns = split(model.vision.projector_output_dim, even, _COLUMN_MULTIPLE)
    except ValueError as error:
        raise SpecError(f"`tp`={mesh.tp}, `ep`={mesh.num_expert_parts}: {error}") from None
    layers = runs_of(counts)
    parts = []
    for rank in range(mesh.world_size):
        at = mesh.coordinates(rank)
        ep_rank, expert_tp_rank = divmod(rank % mesh.stage_size, expert_tp)
        part = MoEPart(
            rank=rank,
            stage=at.stage,
            dp_rank=at.dp_rank,
            tp_rank=at.tp_rank,
            ep_rank=ep_rank,
            layers=layers[at.stage],
            q_heads=heads[at.tp_rank][0],
            kv_heads=heads[at.tp_rank][1],
            columns=columns[at.tp_rank],
            shared_columns=shared[at.tp_rank],
            vocab=vocab[at.tp_rank],
            experts=experts[ep_rank],
            expert_columns=expert_columns[expert_tp_rank],
            vision_heads=vision_heads[at.tp_rank],
            vision_columns=vision_columns[at.tp_rank],
            adapter_columns=adapter_columns[at.tp_rank],
            first_stage=at.stage == 0,
            last_stage=at.stage == mesh.pp - 1,
        )
        parts.append(part)
    return parts


def _check(model: MoENumbers, mesh: ParallelConfig) -> None:
    mesh.check_fits(
        num_layers=model.num_layers, num_heads=model.num_heads, num_experts=model.num_experts
    )
    rest = model.num_heads % mesh.tp
    if rest and mesh.tp_shares is None:
        even = max(n for n in range(1, mesh.tp) if not mesh.tp % n and not model.num_heads % n)
        spread = ""
        if model.num_experts:
            spread = (
                f" and `dp`={mesh.tp // even} (attention data-parallel, experts over all ranks)"
            )
        raise SpecError(
            f"`tp`={mesh.tp}: attention cannot be cut evenly: {model.num_heads} query heads % "
            f"{mesh.tp} = {rest}; use `tp`={even}{spread}, or ask for unequal slices with "
            "`tp_shares`"
        )
