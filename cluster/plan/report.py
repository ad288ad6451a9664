"""A plan as JSON and as tables.

Knows the names and units that users see; computes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import Any, get_args

from rich.console import Group, RenderableType
from rich.table import Table

from arriero.cluster.plan.layouts import Machines, Option
from arriero.cluster.plan.memory import GroupPlan, RankPlan
from arriero.cluster.plan.stored import stored_bytes
from arriero.shards.checkpoint.formats.modules import Kind
from arriero.shards.kv.limits import GroupTierLimits

KINDS: tuple[Kind, ...] = get_args(Kind)
CONTEXTS = (1024, 4096, 8192, 16384, 32768, 65536, 131072, 1048576, 10485760)


def contexts(plan: GroupPlan) -> list[int]:
    """Context lengths worth a row, up to the model's limit."""
    limit = plan.model.config.max_position_embeddings
    rows = {one for one in CONTEXTS if one <= limit} | {plan.demand.context}
    return sorted(rows)


def as_json(
    plan: GroupPlan,
    groups: int,
    machines: Machines,
    options: Sequence[Option],
    tiers: GroupTierLimits,
) -> dict[str, Any]:
    """All of it, bytes as whole numbers."""
    layout, demand = plan.layout, plan.demand
    why = plan.shortfall()
    return {
        "model": plan.model.name,
        "parameters": plan.model.config.num_parameters(),
        "dtype": plan.weights.dtype,
        "kv_dtype": demand.kv_dtype,
        "kernels": plan.kernels,
        "gpu": machines.gpu,
        "nodes": machines.nodes,
        "gpus_per_node": machines.per_node,
        "layout": {"tp": layout.tp, "pp": layout.pp, "dp": layout.dp, "ep": layout.ep or 1},
        "groups": groups,
        "fits": why is None,
        "why_not": why,
        "weights_bytes": sum(rank.weights.total for rank in plan.ranks),
        "checkpoint_bytes": stored_bytes(plan.model.config, plan.weights),
        "kv_tokens": plan.pool_tokens,
        "kv_tiers": {
            name: {
                "tokens": blocks * plan.demand.block_size,
                "bytes_by_rank": [
                    _tier_bytes(rank, blocks, local, tiers.bytes_share) for rank in plan.ranks
                ],
            }
            for name, blocks, local in _tiers(tiers)
        },
        "ranks": [_rank_json(plan, rank) for rank in plan.ranks],
        "capacity": [
            {
                "context": context,
                "concurrency": plan.concurrency(context),
                "kv_bytes_per_sequence": sum(
                    plan.sequence_bytes(rank, context)
                    for rank in plan.ranks
                    if getattr(rank.part, "dp_rank", 0) == 0
                ),
            }
            for context in contexts(plan)
        ],
        "layouts": [_option_json(option) for option in options],
    }


def _rank_json(plan: GroupPlan, rank: RankPlan) -> dict[str, Any]:
    part, size = rank.part, plan.demand.block_size
    kinds = rank.weights.by_kind
    return {
        "rank": part.rank,
        "stage": part.stage,
        "tp_rank": part.tp_rank,
        "dp_rank": getattr(part, "dp_rank", 0),
        "layers": [part.layers.start, part.layers.stop],
        "q_heads": part.q_heads.size,
        "kv_heads": part.kv_heads.size,
        "memory_bytes": rank.memory_bytes,
        "weights_bytes": rank.weights.total,
        "weights_by_kind": {kind: kinds[kind] for kind in KINDS if kind in kinds},
        "scales_bytes": rank.weights.scales,
        "kv_bytes_per_token": rank.kv_block // size,
        "kv_global_bytes_per_token": rank.kv_global_block // size,
        "kv_local_bytes_per_token": rank.kv_local_block // size,
        "kv_local_tokens": plan.chunk,
        "kv_block_bytes": rank.kv_block,
        "kv_pool_bytes": rank.kv_pool_bytes,
        "activations_bytes": rank.activations,
        "cuda_graphs_bytes": rank.graphs,
        "communication_bytes": rank.communication,
        "spare_experts_bytes": rank.spare_experts,
        "reserve_bytes": rank.reserve,
        "unused_bytes": rank.unused,
    }


def _option_json(option: Option) -> dict[str, Any]:
    layout = option.layout
    return {
        "tp": layout.tp,
        "pp": layout.pp,
        "dp": layout.dp,
        "ep": layout.ep or 1,
        "dtype": option.dtype,
        "groups": option.groups,
        "works": option.why_not is None,
        "why_not": option.why_not,
        "note": option.note,
        "concurrency": option.concurrency,
        "decode_tokens_per_s": round(option.tokens_per_s),
    }


def as_tables(
    plan: GroupPlan,
    groups: int,
    machines: Machines,
    options: Sequence[Option],
    limit: int,
    tiers: GroupTierLimits,
) -> RenderableType:
    """What a person reads.

    Args:
        plan: of one group.
        groups: how many the machines hold.
        machines: they.
        options: ranked.
        limit: most options shown of those that work, and of those that do not.
        tiers: of the KV cache below the device.
    """
    total = sum(rank.weights.total for rank in plan.ranks)
    title = (
        f"{plan.model.name} {plan.weights.dtype}, {plan.layout} on {machines.nodes} x "
        f"{machines.per_node} {machines.gpu}: {groups} group(s), weights {_gb(total)} GB a group"
    )
    parts: list[RenderableType] = [_rank_table(plan, title), _capacity_table(plan)]
    if tiers.enabled:
        parts.append(_tier_table(plan, tiers))
    if options:
        parts.append(_option_table(options, limit))
    return Group(*parts)


def _tiers(tiers: GroupTierLimits) -> list[tuple[str, int, int]]:
    """Name of each bounded tier, its blocks of all tokens, and its chunk-local ones."""
    each = (
        ("host", tiers.all.host_blocks, tiers.local.host_blocks),
        ("disk", tiers.all.disk_blocks, tiers.local.disk_blocks),
    )
    return [one for one in each if one[1]]


def _tier_bytes(rank: RankPlan, blocks: int, local: int, share: Fraction) -> int:
    return int((blocks * rank.kv_global_block + local * rank.kv_local_block) * share)


def _tier_table(plan: GroupPlan, tiers: GroupTierLimits) -> Table:
    table = Table(title="KV cache below the device, of one group", title_justify="left")
    for name in ("tier", "tokens", "GB of each rank"):
        table.add_column(name, justify="right")
    for name, blocks, local in _tiers(tiers):
        sizes = dict.fromkeys(
            _gb(_tier_bytes(rank, blocks, local, tiers.bytes_share)) for rank in plan.ranks
        )
        table.add_row(name, f"{blocks * plan.demand.block_size:,}", ", ".join(sizes))
    if tiers.all.shared:
        table.add_row("shared store", "not bounded", "-")
    return table


def _rank_table(plan: GroupPlan, title: str) -> Table:
    """A column for each kind of rank, since a narrow terminal has room for a few."""
    table = Table(title=f"{title}\nGB of each rank", title_justify="left")
    kinds = [kind for kind in KINDS if any(kind in r.weights.by_kind for r in plan.ranks)]
    rows = ["layers", *(one.replace("_", " ") for one in kinds), "scales", "weights, all"]
    rows += ["KV pool", "KV bytes a token", "activations", "CUDA graphs", "communication"]
    rows += ["spare experts", "reserve", "unused"]
    alike: dict[tuple[str, ...], list[int]] = {}
    for rank in plan.ranks:
        sizes = [rank.weights.by_kind.get(kind, 0) for kind in kinds]
        cells = [f"{rank.part.layers.start}-{rank.part.layers.stop - 1}"]
        cells += [_gb(one) for one in (*sizes, rank.weights.scales, rank.weights.total)]
        cells += [_gb(rank.kv_pool_bytes), f"{rank.kv_block // plan.demand.block_size:,}"]
        rest = (rank.activations, rank.graphs, rank.communication, rank.spare_experts)
        cells += [_gb(one) for one in (*rest, rank.reserve, rank.unused)]
        alike.setdefault(tuple(cells), []).append(rank.part.rank)
    table.add_column("rank")
    for numbers in alike.values():
        table.add_column(_ranges(numbers), justify="right", overflow="fold")
    for name, *values in zip(rows, *alike, strict=True):
        table.add_row(name, *values)
    return table


def _capacity_table(plan: GroupPlan) -> Table:
    table = Table(
        title=f"what one group holds: {plan.pool_tokens:,} tokens in all", title_justify="left"
    )
    for name in ("context", "sequences at once", "KV a sequence, GB on the fullest rank"):
        table.add_column(name, justify="right")
    for context in contexts(plan):
        most = max(plan.sequence_bytes(rank, context) for rank in plan.ranks)
        table.add_row(f"{context:,}", f"{plan.concurrency(context):,}", _gb(most))
    return table


def _option_table(options: Sequence[Option], limit: int) -> Table:
    table = Table(title="layouts", title_justify="left")
    for name in ("layout", "dtype", "groups", "sequences", "tokens/s", ""):
        table.add_column(name, justify="left" if not name else "right", overflow="fold")
    work = [one for one in options if one.why_not is None]
    rest = [one for one in options if one.why_not is not None]
    for one in work[:limit]:
        table.add_row(
            str(one.layout),
            one.dtype,
            str(one.groups),
            f"{one.concurrency:,}",
            f"{one.tokens_per_s:,.0f}",
            one.note,
        )
    if work and rest:
        table.add_section()
    for one in rest[:limit]:
        table.add_row(str(one.layout), one.dtype, "-", "-", "-", one.why_not or "")
    for name, listed in (("work", work), ("do not", rest)):
        if len(listed) > limit:
            table.caption = f"{table.caption or ''}{len(listed) - limit} more {name}. "
    return table


def _gb(count: int) -> str:
    return f"{count / 1e9:.2f}"


def _ranges(numbers: Sequence[int]) -> str:
    out: list[list[int]] = []
    for one in numbers:
        if out and out[-1][1] == one - 1:
            out[-1][1] = one
        else:
            out.append([one, one])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in out)
