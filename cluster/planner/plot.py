"""A plan as a picture: a stacked bar for each rank.

Knows matplotlib, needed only here; knows nothing of how a plan is computed.
"""

from __future__ import annotations

from pathlib import Path

from arriero.cluster.planner.group_plan import GroupPlan, RankPlan
from arriero.shards.errors import SpecError

_COLOURS = {
    "attention": "#4477aa",
    "MLP": "#66ccee",
    "experts": "#228833",
    "shared, router": "#88bb66",
    "tables, norms": "#ccbb44",
    "vision": "#997700",
    "scales": "#ee6677",
    "drafter": "#ddaa33",
    "KV pool": "#aa3377",
    "activations": "#bbbbbb",
    "graphs, comm.": "#888888",
    "spare experts": "#55aa88",
    "reserve": "#444444",
}


def plot(plan: GroupPlan, file: Path) -> None:
    """Write a PNG.

    Raises:
        SpecError: matplotlib is not installed, or the file's name does not end in .png.
    """
    if file.suffix != ".png":
        raise SpecError(f"`plot`={file}: the picture is a PNG; name it {file.stem}.png")
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise SpecError("--plot needs matplotlib: pip install matplotlib") from None
    ranks = range(len(plan.ranks))
    figure = Figure(figsize=(max(6.0, 0.5 * len(plan.ranks) + 3), 5), layout="constrained")
    axes = figure.add_subplot()
    bottom = [0.0] * len(plan.ranks)
    for name, colour in _COLOURS.items():
        heights = [_bytes_by_label(rank)[name] / 1e9 for rank in plan.ranks]
        if not any(heights):
            continue
        axes.bar(ranks, heights, bottom=bottom, color=colour, label=name, width=0.8)
        bottom = [a + b for a, b in zip(bottom, heights, strict=True)]
    memory = plan.device.memory_bytes / 1e9
    axes.axhline(memory, color="black", linestyle="--", linewidth=1)
    axes.text(-0.5, memory, f" {plan.device.name}: {memory:.1f} GB", va="bottom", fontsize=8)
    axes.set_xticks(list(ranks))
    axes.set_xlabel("rank")
    axes.set_ylabel("GB")
    axes.set_ylim(0, 1.08 * max(memory, *bottom))
    axes.set_title(f"{plan.model.name} {plan.weights.dtype}, {plan.layout}")
    figure.legend(loc="outside right upper", fontsize=8, reverse=True)
    FigureCanvasAgg(figure)
    figure.savefig(file)


def _bytes_by_label(rank: RankPlan) -> dict[str, int]:
    kinds = rank.weights.by_kind
    return {
        "attention": kinds.get("attention", 0),
        "MLP": kinds.get("mlp", 0),
        "experts": kinds.get("experts", 0),
        "shared, router": kinds.get("shared_expert", 0) + kinds.get("router", 0),
        "tables, norms": sum(kinds.get(kind, 0) for kind in ("embeddings", "head", "norms")),
        "vision": kinds.get("vision", 0),
        "scales": rank.weights.scales,
        "drafter": rank.drafter.weights,
        "KV pool": rank.kv_pool_bytes,
        "activations": rank.activations,
        "graphs, comm.": rank.graphs + rank.communication,
        "spare experts": rank.spare_experts,
        "reserve": rank.reserve,
    }
