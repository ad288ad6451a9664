"""A plan as JSON and as tables.

Knows the names and units that users see; knows nothing of how a plan is computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import Any, get_args

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from arriero.cluster.planner.checkpoint_bytes import stored_bytes
from arriero.cluster.planner.group_plan import GroupPlan, RankPlan
from arriero.cluster.planner.layouts import Machines, Option
from arriero.shards.checkpoint.formats.modules import Kind
from arriero.shards.kv.limits import GroupTierLimits

KINDS: tuple[Kind, ...] = get_args(Kind)
MOST_WORKING, MOST_REFUSED = 12, 6
"""Largest number of layouts in a table: layouts that work, and layouts that do not."""
CONTEXTS = (1024, 4096, 8192, 16384, 32768, 65536, 131072, 1048576, 10485760)


def contexts(plan: GroupPlan) -> list[int]:
    """Context lengths in the capacity table, up to the model's limit."""
    limit = plan.model.config.max_position_embeddings
    rows = {context for context in CONTEXTS if context <= limit} | {plan.demand.context}
    return sorted(rows)


def as_json(
    plan: GroupPlan,
    groups: int,
    machines: Machines,
    options: Sequence[Option],
    tiers: GroupTierLimits,
) -> dict[str, Any]:
    """The whole plan; bytes are whole numbers."""
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
        "drafter": _drafter_json(plan),
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


def _drafter_json(plan: GroupPlan) -> dict[str, Any] | None:
    if plan.demand.drafter is None:
        return None
    return {
        "kind": plan.demand.drafter.kind,
        "weights_bytes": sum(rank.drafter.weights for rank in plan.ranks),
        "kv_pool_bytes": sum(plan.drafter_pool_bytes(rank) for rank in plan.ranks),
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
        "drafter_weights_bytes": rank.drafter.weights,
        "drafter_kv_pool_bytes": plan.drafter_pool_bytes(rank),
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
        "estimate": _speed_json(option),
    }


def _speed_json(option: Option) -> dict[str, float] | None:
    """Estimated tokens per second; None where no estimate is made."""
    estimated = option.speed
    if estimated is None:
        return None
    return {
        "single_request_tokens_per_s": round(estimated.single, 1),
        "full_batch_tokens_per_s": round(estimated.full * option.groups, 1),
        "prefill_tokens_per_s": round(estimated.prefill * option.groups, 1),
    }


def as_tables(
    plan: GroupPlan,
    groups: int,
    machines: Machines,
    options: Sequence[Option],
    tiers: GroupTierLimits,
) -> RenderableType:
    """The plan as text and tables for a terminal.

    Args:
        plan: plan of a group.
        groups: number of groups on the machines.
        machines: the machines.
        options: result of `rank_layouts`.
        tiers: limits of the KV tiers below the device.
    """
    parts: list[RenderableType] = [Text(verdict(plan, groups, machines))]
    parts.append(_rank_table(plan))
    if plan.shortfall() is None:
        parts.append(_capacity_table(plan))
    if tiers.enabled:
        parts.append(_tier_table(plan, tiers))
    if options:
        parts.append(_option_table(options, plan.demand.context))
    return Group(*parts)


def verdict(plan: GroupPlan, groups: int, machines: Machines) -> str:
    """The result in a few lines."""
    total = sum(rank.weights.total for rank in plan.ranks)
    fullest = max(plan.ranks, key=lambda rank: rank.fixed)
    context = plan.demand.context
    lines = [
        f"{plan.model.name}, {plan.weights.dtype}, on {machines.nodes} x {machines.per_node} "
        f"{machines.gpu} of {_gb(plan.ranks[0].memory_bytes)} GB",
    ]
    if plan.shortfall() is None:
        lines.append(
            f"{plan.layout} works, {groups} group{'s' if groups > 1 else ''} of "
            f"{plan.layout.world_size}: a group's weights take {_gb(total)} GB, the fullest "
            f"rank's {_gb(fullest.weights.total)} GB"
        )
        lines.append(
            f"KV cache of a group: {plan.pool_tokens:,} tokens, "
            f"{plan.concurrency(context):,} sequences of {context:,} at once"
        )
    else:
        lines.append(f"{plan.layout} does not fit; the reason is below the tables")
    if plan.demand.drafter is not None:
        weights = sum(rank.drafter.weights for rank in plan.ranks)
        pool = sum(plan.drafter_pool_bytes(rank) for rank in plan.ranks)
        lines.append(
            f"drafter {plan.demand.drafter.kind} on the last stage: weights {_gb(weights)} GB, "
            f"KV cache {_gb(pool)} GB of a group"
        )
    return "\n".join(lines)


def _tiers(tiers: GroupTierLimits) -> list[tuple[str, int, int]]:
    """Name of each bounded tier, with the number of blocks for all tokens and for chunks."""
    each = (
        ("host", tiers.all.host_blocks, tiers.local.host_blocks),
        ("disk", tiers.all.disk_blocks, tiers.local.disk_blocks),
    )
    return [tier for tier in each if tier[1]]


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


def _rank_table(plan: GroupPlan) -> Table:
    """A column for all ranks of equal sizes, since a narrow terminal has room for few columns."""
    kinds = [kind for kind in KINDS if any(kind in r.weights.by_kind for r in plan.ranks)]
    sizes: dict[str, list[int]] = {
        kind.replace("_", " "): [rank.weights.by_kind.get(kind, 0) for rank in plan.ranks]
        for kind in kinds
    }
    sizes["scales"] = [rank.weights.scales for rank in plan.ranks]
    sizes["all weights"] = [rank.weights.total for rank in plan.ranks]
    if plan.demand.drafter is not None:
        kind = plan.demand.drafter.kind
        sizes[f"{kind} weights"] = [rank.drafter.weights for rank in plan.ranks]
        sizes[f"{kind} KV cache"] = [plan.drafter_pool_bytes(rank) for rank in plan.ranks]
    sizes["KV cache"] = [rank.kv_pool_bytes - plan.drafter_pool_bytes(rank) for rank in plan.ranks]
    sizes["activations"] = [rank.activations for rank in plan.ranks]
    sizes["CUDA graphs"] = [rank.graphs for rank in plan.ranks]
    sizes["communication"] = [rank.communication for rank in plan.ranks]
    sizes["spare experts"] = [rank.spare_experts for rank in plan.ranks]
    sizes["reserve"] = [rank.reserve for rank in plan.ranks]
    sizes["left over" if plan.shortfall() is None else "left over (-: short)"] = [
        rank.unused for rank in plan.ranks
    ]
    sizes["device memory"] = [rank.memory_bytes for rank in plan.ranks]
    sections = {"layers", "all weights", list(sizes)[-2]}
    rows = {name: [_gb(size) for size in row] for name, row in sizes.items() if any(row)}
    layers = [f"{rank.part.layers.start}-{rank.part.layers.stop - 1}" for rank in plan.ranks]
    ranks_by_cells: dict[tuple[str, ...], list[int]] = {}
    for rank, *cells in zip(plan.ranks, layers, *rows.values(), strict=True):
        ranks_by_cells.setdefault(tuple(map(str, cells)), []).append(rank.part.rank)
    table = Table(title="GB of each rank", title_justify="left")
    table.add_column("rank")
    for numbers in ranks_by_cells.values():
        table.add_column(_ranges(numbers), justify="right", overflow="fold")
    for name, *values in zip(("layers", *rows), *ranks_by_cells, strict=True):
        table.add_row(name, *values, end_section=name in sections)
    return table


def _capacity_table(plan: GroupPlan) -> Table:
    table = Table(title="capacity of a group's KV cache", title_justify="left")
    for name in ("context", "sequences at once", "GB per sequence on the fullest rank"):
        table.add_column(name, justify="right")
    for context in contexts(plan):
        most = max(plan.sequence_bytes(rank, context) for rank in plan.ranks)
        table.add_row(f"{context:,}", f"{plan.concurrency(context):,}", _gb(most))
    return table


def _option_table(options: Sequence[Option], context: int) -> Table:
    working = [option for option in options if option.why_not is None]
    failing = [option for option in options if option.why_not is not None]
    table = Table(
        title=f"layouts, fastest first; sequences of {context:,} tokens", title_justify="left"
    )
    names = ("layout", "dtype", "groups", "sequences", "tokens/s", "estimated tokens/s", "remarks")
    for name in names:
        left = name == "remarks"
        table.add_column(name, justify="left" if left else "right", overflow="fold")
    for option in working[:MOST_WORKING]:
        table.add_row(
            str(option.layout),
            option.dtype,
            str(option.groups),
            f"{option.concurrency:,}",
            f"{option.tokens_per_s:,.0f}",
            _speed(option),
            option.note,
        )
    if working and failing:
        table.add_section()
    for option in failing[:MOST_REFUSED]:
        table.add_row(str(option.layout), option.dtype, "-", "-", "-", "-", _short_reason(option))
    notes = ["tokens/s of all groups: an upper bound by memory bandwidth, to compare layouts"]
    if any(option.speed is not None for option in working[:MOST_WORKING]):
        notes.append(
            "estimated tokens/s: of a request alone / of full batches / of prompts; estimates by "
            "constants that are not all measured"
        )
    hidden = [
        f"{len(rows) - limit} more {verb}"
        for rows, limit, verb in (
            (working, MOST_WORKING, "work"),
            (failing, MOST_REFUSED, "do not"),
        )
        if len(rows) > limit
    ]
    if hidden:
        notes += [*hidden, "--json lists all"]
    table.caption = "; ".join(notes)
    table.caption_justify = "left"
    return table


def _speed(option: Option) -> str:
    """Estimated tokens per second: of a request alone, of full batches, of prompts."""
    estimated = option.speed
    if estimated is None:
        return "-"
    of_groups = (estimated.full * option.groups, estimated.prefill * option.groups)
    return " / ".join(f"{rate:,.0f}" for rate in (estimated.single, *of_groups))


def _short_reason(option: Option) -> str:
    """Reason against a layout: missing bytes, or why the layout cannot divide the model."""
    if option.plan is None:
        return option.why_not or ""
    rank = option.plan.fullest
    return (
        f"rank {rank.part.rank} lacks {_gb(option.plan.missing_bytes())} GB: its weights take "
        f"{_gb(rank.weights.total)} of {_gb(rank.memory_bytes)} GB"
    )


def _gb(count: int) -> str:
    return f"{count / 1e9:.2f}"


def _ranges(numbers: Sequence[int]) -> str:
    ranges: list[list[int]] = []
    for number in numbers:
        if ranges and ranges[-1][1] == number - 1:
            ranges[-1][1] = number
        else:
            ranges.append([number, number])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in ranges)
