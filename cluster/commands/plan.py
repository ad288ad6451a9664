"""`arriero plan`: what a deployment will take, before anything is placed.

Knows flags and the spec; the arithmetic is in `cluster/plan`. Loads neither torch nor Ray.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, get_args

import typer

from arriero.cluster.commands.terminal import OUT
from arriero.cluster.planner.catalog import DEVICES, MODELS, NamedModel, find_model
from arriero.cluster.planner.demand import KvDemand, Layout
from arriero.cluster.planner.kv_room import stored_as
from arriero.cluster.planner.layouts import Machines, Option, best_of, larger_machines, rank_layouts
from arriero.cluster.planner.memory import GroupPlan, plan_group
from arriero.cluster.planner.rank_weights import DTYPES, Dtype, weights_as
from arriero.kernels.packing import KERNELS, Kernels
from arriero.shards.errors import SpecError
from arriero.shards.kv.limits import GroupTierLimits
from arriero.shards.model_config.llama4 import Llama4Config

if TYPE_CHECKING:
    from arriero.cluster.spec.model import ModelSpec

DEFAULT_CONTEXT = 8192


def add_to(app: typer.Typer) -> None:
    """Add the command to `app`."""
    app.command("plan")(plan)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Wish:
    """One model of the request: what to plan, and on what."""

    model: NamedModel
    machines: Machines
    demand: KvDemand
    kernels: Kernels
    dtype: Dtype | None
    layout: Layout | None
    groups: int | None
    spares: int
    tiers: GroupTierLimits = field(default_factory=GroupTierLimits)


def plan(
    spec: Annotated[Path | None, typer.Argument(help="The deployment spec, arriero.yaml.")] = None,
    model: Annotated[
        str | None, typer.Option(help=f"A checkpoint folder, or one of {', '.join(MODELS)}.")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help=f"One of {', '.join(DTYPES)}.")] = None,
    kv_dtype: Annotated[str | None, typer.Option(help="Of the KV cache, also int8.")] = None,
    gpu: Annotated[str, typer.Option(help=f"One of {', '.join(DEVICES)}, or cpu.")] = "h100-80g",
    memory: Annotated[
        str | None, typer.Option(help="Of a GPU, or of a machine with --gpu cpu: 64GiB.")
    ] = None,
    nodes: Annotated[int, typer.Option(help="Machines.")] = 1,
    gpus_per_node: Annotated[
        int | None, typer.Option(help="GPUs (or slices on cpu) of each; by default 8 (cpu: 1).")
    ] = None,
    tp: Annotated[int | None, typer.Option(help="Tensor-parallel slices of a stage.")] = None,
    pp: Annotated[int | None, typer.Option(help="Pipeline stages.")] = None,
    dp: Annotated[int | None, typer.Option(help="Data-parallel attention ranks (MoE).")] = None,
    ep: Annotated[int | None, typer.Option(help="Parts the experts are dealt to (MoE).")] = None,
    context: Annotated[
        int | None, typer.Option(help="Tokens of a sequence that must fit; sizes the ranking.")
    ] = None,
    max_sequences: Annotated[int | None, typer.Option(help="Running at once.")] = None,
    max_batch_tokens: Annotated[int | None, typer.Option(help="Tokens of a step.")] = None,
    block_size: Annotated[int | None, typer.Option(help="Tokens of a KV block.")] = None,
    spare_experts: Annotated[
        int, typer.Option(help="Second copies of hot experts on each rank (MoE).")
    ] = 0,
    reserve: Annotated[str | None, typer.Option(help="Kept free on each device: 4GiB.")] = None,
    kernels: Annotated[
        str | None, typer.Option(help=f"Backend whose packing counts: {', '.join(KERNELS)}.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Everything, as JSON.")] = False,
    plot: Annotated[Path | None, typer.Option(help="Write a PNG of stacked bars.")] = None,
) -> None:
    """Say what each rank will hold, what then fits, and which layouts work."""
    if (spec is None) == (model is None):
        raise SpecError("nothing to plan: give a spec, or --model NAME (not both)")
    demand = KvDemand(
        context=context or 0,
        max_sequences=max_sequences or 256,
        max_batch_tokens=max_batch_tokens or 2048,
        block_size=block_size or 16,
        kv_dtype=kv_dtype or "",
        spare_experts=spare_experts,
        reserve_bytes=None if reserve is None else _size("reserve", reserve),
    )
    for name, value in (
        ("context", context),
        ("max_sequences", max_sequences),
        ("max_batch_tokens", max_batch_tokens),
        ("block_size", block_size),
    ):
        if value is not None and value < 1:
            raise SpecError(f"`{name}`={value} must be at least 1")
    if spare_experts < 0:
        raise SpecError(f"`spare_experts`={spare_experts} must be 0 or more")
    layout = None
    if any(one is not None for one in (tp, pp, dp, ep)):
        layout = Layout(tp=tp or 1, pp=pp or 1, dp=dp or 1, ep=ep)
    on_cpu = gpu == "cpu"
    machines = Machines(
        gpu=gpu,
        nodes=nodes,
        per_node=gpus_per_node or (_cpu_slices(layout, nodes) if on_cpu else 8),
        memory_bytes=None if memory is None else _size("memory", memory),
    )
    if model is not None:
        wishes = [
            _Wish(
                model=find_model(model),
                machines=machines,
                demand=demand,
                kernels=_kernels(kernels, on_cpu),
                dtype=_dtype(dtype),
                layout=layout,
                groups=None,
                spares=0,
            )
        ]
    else:
        assert spec is not None
        wishes = _from_spec(spec, machines, demand, kernels, _dtype(dtype), layout)
    made = [_make(wish) for wish in wishes]
    _show(wishes, made, as_json)
    if plot is not None:
        from arriero.cluster.planner.plot import plot as draw

        draw(made[0][0], plot)
    for (group, _), wish in zip(made, wishes, strict=True):
        why = group.shortfall()
        if why is not None:
            raise SpecError(
                f"{wish.model.name} {group.weights.dtype}, {group.layout} does not fit: {why}"
                f"{_remedy(wish, group)}"
            )


def _remedy(wish: _Wish, group: GroupPlan) -> str:
    """More of the same devices, where it was not said how to use those that there are."""
    if wish.layout is not None or wish.machines.gpu == "cpu":
        return ""
    dtypes = [wish.dtype] if wish.dtype else _dtypes(wish.model, on_cpu=False)
    found = larger_machines(wish.model, wish.machines, group.demand, wish.kernels, dtypes)
    if found is None:
        return ""
    machines, best = found
    return (
        f"; {machines.nodes} x {machines.per_node} {machines.gpu} hold it, as {best.dtype} in "
        f"{best.layout}"
    )


def _make(wish: _Wish) -> tuple[GroupPlan, list[Option]]:
    """The plan asked for (or the best one), and all options ranked."""
    config = wish.model.config
    demand = wish.demand
    if not demand.context:
        demand = replace(demand, context=min(DEFAULT_CONTEXT, config.max_position_embeddings))
    if not demand.kv_dtype:
        plain = wish.dtype if wish.dtype in ("float32", "float16") else "bfloat16"
        demand = replace(demand, kv_dtype=plain)
    layout, machines = wish.layout, wish.machines
    device = machines.device()
    if layout is not None and layout.ep is None and isinstance(config, Llama4Config):
        layout = replace(layout, ep=layout.tp * layout.dp)
    dtypes = [wish.dtype] if wish.dtype else _dtypes(wish.model, wish.machines.gpu == "cpu")
    if layout is not None:
        needed = layout.world_size * ((wish.groups or 1) + wish.spares)
        if needed > machines.total:
            spare = f" and {wish.spares} spare" if wish.spares else ""
            raise SpecError(
                f"{layout} x {wish.groups or 1} group(s){spare} needs {needed} slices, but "
                f"{machines.nodes} x {machines.per_node} {machines.gpu} give {machines.total}; "
                "add machines with --nodes, or use a smaller layout"
            )
        weights = weights_as(config, wish.model.scheme, dtypes[0])
        group = plan_group(wish.model, weights, layout, demand, device, wish.kernels)
        free = replace(demand, kv_bytes=None, num_blocks=None)
        return group, rank_layouts(wish.model, machines, free, wish.kernels, dtypes)
    options = rank_layouts(wish.model, machines, demand, wish.kernels, dtypes)
    best = best_of(options, dtypes)
    if best.plan is None:
        raise SpecError(f"{wish.model.name}: no layout works: {best.layout}: {best.why_not}")
    return best.plan, options


def _dtypes(model: NamedModel, on_cpu: bool) -> list[Dtype]:
    """What is worth ranking where no dtype was named, the nearest to plain weights first."""
    if model.scheme is not None:
        return ["checkpoint"]
    large = isinstance(model.config, Llama4Config) or model.config.num_layers == 126
    shipped: list[Dtype] = ["fp8-shipped"] if large and not on_cpu else []
    return ["bfloat16", *shipped, "fp8", "int8", "int4"]


def _dtype(name: str | None) -> Dtype | None:
    if name is None:
        return None
    for one in DTYPES:
        if one == name:
            return one
    raise SpecError(f"`dtype`={name!r} is none of {', '.join(DTYPES)}")


def _kernels(name: str | None, on_cpu: bool) -> Kernels:
    if name is None:
        return "cpu" if on_cpu else "triton"
    for one in KERNELS:
        if one == name:
            return one
    raise SpecError(f"`kernels`={name!r} is none of {', '.join(get_args(Kernels))}")


def _cpu_slices(layout: Layout | None, nodes: int) -> int:
    return 1 if layout is None else -(-layout.world_size // max(1, nodes))


def _size(name: str, text: str) -> int:
    from arriero.cluster.spec.fields import parse_bytes

    return parse_bytes(name, text)


def _from_spec(
    path: Path,
    machines: Machines,
    demand: KvDemand,
    kernels: str | None,
    dtype: Dtype | None,
    layout: Layout | None,
) -> list[_Wish]:
    from arriero.cluster.spec.load import load

    if layout is not None:
        raise SpecError("the spec says the layout; give --tp, --pp, --dp, --ep with --model")
    spec = load(path, {})
    on_cpu = machines.gpu == "cpu"
    if on_cpu:
        machines = replace(machines, per_node=-(-spec.num_slices // machines.nodes))
    elif spec.num_slices > machines.total:
        raise SpecError(
            f"{path}: {spec.num_slices} slices, but {machines.nodes} x {machines.per_node} "
            f"{machines.gpu} give {machines.total}; add machines with --nodes"
        )
    return [
        _wish_of(one, machines, demand, kernels or one.kernels, dtype, on_cpu)
        for one in spec.models
    ]


def _wish_of(
    one: ModelSpec,
    machines: Machines,
    demand: KvDemand,
    kernels: str | None,
    dtype: Dtype | None,
    on_cpu: bool,
) -> _Wish:
    from arriero.shards.checkpoint.remote import is_url, local_folder
    from arriero.shards.layout.families import visible_keys
    from arriero.shards.layout.resolve import resolve, tier_limits

    folder = local_folder(one.path, weights=False) if is_url(one.path) else one.path
    model = find_model(str(folder))
    named = stored_as(one.dtype, one.quantization, model.scheme)
    demand = replace(
        demand,
        context=demand.context or one.limits.max_model_len or 0,
        max_sequences=one.limits.max_sequences,
        max_batch_tokens=one.limits.max_batch_tokens,
        block_size=one.kv.block_size,
        spare_experts=one.mesh.spare_experts,
        sliding_window=one.attention.sliding_window,
        attention_sinks=one.attention.attention_sinks,
        kv_dtype=demand.kv_dtype or one.dtype,
    )
    asked = one.group_config("cpu" if on_cpu else "cuda")
    visible_keys(model.config, asked)  # a window that the model cannot have is told here
    said = one.kv.memory is not None or one.kv.blocks is not None
    if said or on_cpu:
        # the leader's own decision, so that the pool here is the pool there
        group = resolve(asked, model.config)
        demand = replace(
            demand, num_blocks=group.num_blocks, num_local_blocks=group.num_local_blocks
        )
    mesh = one.mesh
    return _Wish(
        model=replace(model, name=one.name),
        machines=machines,
        demand=demand,
        kernels=_kernels(kernels, on_cpu),
        dtype=dtype or named,
        layout=Layout(
            tp=mesh.tp,
            pp=mesh.pp,
            dp=mesh.dp,
            ep=mesh.ep,
            tp_shares=mesh.tp_shares,
            layer_split=mesh.layer_split,
        ),
        groups=one.groups,
        spares=one.spares,
        tiers=tier_limits(asked, model.config),
    )


def _show(wishes: list[_Wish], made: list[tuple[GroupPlan, list[Option]]], as_json: bool) -> None:
    from arriero.cluster.planner import report

    documents = []
    for (group, options), wish in zip(made, wishes, strict=True):
        groups = wish.groups or wish.machines.total // group.layout.world_size
        if as_json:
            documents.append(report.as_json(group, groups, wish.machines, options, wish.tiers))
        else:
            OUT.print(report.as_tables(group, groups, wish.machines, options, wish.tiers))
    if as_json:
        whole = documents[0] if len(documents) == 1 else {"models": documents}
        OUT.print(json.dumps(whole, indent=2), markup=False, soft_wrap=True)
