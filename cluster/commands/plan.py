"""`arriero plan`: memory and layouts of a deployment, before anything starts.

Knows flags and the spec; the arithmetic is in `cluster/planner/`. Imports neither torch nor Ray.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from arriero.cluster.commands.options import with_option_groups
from arriero.cluster.commands.plan_options import DemandOptions, MachineOptions, MeshOptions
from arriero.cluster.commands.terminal import OUT
from arriero.cluster.planner.catalog import MODELS, NamedModel, find_model
from arriero.cluster.planner.demand import KvDemand
from arriero.cluster.planner.drafter_bytes import read_drafter
from arriero.cluster.planner.group_plan import GroupPlan
from arriero.cluster.planner.layouts import Machines, Option, best_of, larger_machines, rank_layouts
from arriero.cluster.planner.memory import plan_group
from arriero.cluster.planner.weight_forms import DTYPES, Dtype, stored_as, weights_as
from arriero.kernels.registry import BACKENDS, Kernels
from arriero.shards.config.parallel import ParallelConfig
from arriero.shards.errors import SpecError
from arriero.shards.families.registry import family_of
from arriero.shards.kv.limits import GroupTierLimits

if TYPE_CHECKING:
    from arriero.cluster.spec.model import ModelSpec

DEFAULT_CONTEXT = 8192


def add_to(app: typer.Typer) -> None:
    """Add the command to `app`."""
    app.command("plan")(plan)


@dataclass(frozen=True, kw_only=True, slots=True)
class _PlanRequest:
    """A model to plan, and the machines for the model.

    Attributes:
        model: numbers of the checkpoint.
        machines: GPUs, or CPU nodes.
        demand: sequences and KV cache of a group.
        kernels: backend, for the bytes of packed weights.
        dtype: of the weights; None compares dtypes.
        layout: of a group; None takes the best layout.
        groups: number of groups; None for as many as the machines hold.
        spares: number of spare groups.
        tiers: host memory and disk for KV blocks.
    """

    model: NamedModel
    machines: Machines
    demand: KvDemand
    kernels: Kernels
    dtype: Dtype | None
    layout: ParallelConfig | None
    groups: int | None
    spares: int
    tiers: GroupTierLimits = field(default_factory=GroupTierLimits)


@with_option_groups
def plan(
    spec: Annotated[Path | None, typer.Argument(help="Deployment spec, arriero.yaml.")] = None,
    model: Annotated[
        str | None, typer.Option(help=f"Checkpoint folder, or one of {', '.join(MODELS)}.")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help=f"Dtype of the weights: {', '.join(DTYPES)}.")
    ] = None,
    kv_dtype: Annotated[
        str | None, typer.Option(help="Dtype of the KV cache; also int8, fp8.")
    ] = None,
    *,
    machine: MachineOptions,
    mesh: MeshOptions,
    load: DemandOptions,
    kernels: Annotated[
        str | None, typer.Option(help=f"Backend that packs the weights: {', '.join(BACKENDS)}.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="The whole plan as JSON.")] = False,
    plot: Annotated[Path | None, typer.Option(help="PNG file for a chart of the ranks.")] = None,
) -> None:
    """Compute the memory of each rank, the sequences that fit, and the layouts that work."""
    if (spec is None) == (model is None):
        raise SpecError("nothing to plan: give a spec, or --model NAME (not both)")
    demand, layout = load.demand(kv_dtype), mesh.layout()
    machines = machine.machines(layout)
    if model is not None:
        requests = [
            _PlanRequest(
                model=find_model(model),
                machines=machines,
                demand=demand,
                kernels=_kernels(kernels, machines.gpu == "cpu"),
                dtype=_dtype(dtype),
                layout=layout,
                groups=None,
                spares=0,
            )
        ]
    else:
        assert spec is not None
        requests = _from_spec(spec, machines, demand, kernels, _dtype(dtype), layout)
    plans = [_make(request) for request in requests]
    _print(requests, plans, as_json)
    if plot is not None:
        from arriero.cluster.planner.plot import plot as draw

        draw(plans[0][0], plot)
    for (group, _), request in zip(plans, requests, strict=True):
        _check_fits(request, group)


def _check_fits(request: _PlanRequest, group: GroupPlan) -> None:
    """Refuse a group that needs more memory than the machines have."""
    shortfall = group.shortfall()
    if shortfall is not None:
        raise SpecError(
            f"{request.model.name} {group.weights.dtype}, {group.layout} does not fit: {shortfall}"
            f"{_remedy(request, group)}"
        )


def _remedy(request: _PlanRequest, group: GroupPlan) -> str:
    """A sufficient number of the same GPUs, if the request leaves the layout open; else ""."""
    if request.layout is not None or request.machines.gpu == "cpu":
        return ""
    dtypes = [request.dtype] if request.dtype else _dtypes(request.model, on_cpu=False)
    sufficient = larger_machines(
        request.model, request.machines, group.demand, request.kernels, dtypes
    )
    if sufficient is None:
        return ""
    machines, best = sufficient
    return (
        f"; {machines.nodes} x {machines.per_node} {machines.gpu} hold it, as {best.dtype} in "
        f"{best.layout}"
    )


def _make(request: _PlanRequest) -> tuple[GroupPlan, list[Option]]:
    """The plan of the requested layout (or of the best layout), and all options, best first."""
    config = request.model.config
    demand = request.demand
    if not demand.context:
        demand = replace(demand, context=min(DEFAULT_CONTEXT, config.max_position_embeddings))
    if not demand.kv_dtype:
        kv_dtype = request.dtype if request.dtype in ("float32", "float16") else "bfloat16"
        demand = replace(demand, kv_dtype=kv_dtype)
    layout, machines = request.layout, request.machines
    device = machines.device()
    has_experts = family_of(config).experts(config) is not None
    if layout is not None and layout.ep is None and has_experts:
        layout = replace(layout, ep=layout.tp * layout.dp)
    dtypes = [request.dtype] if request.dtype else _dtypes(request.model, machines.gpu == "cpu")
    if layout is not None:
        num_slices = layout.world_size * ((request.groups or 1) + request.spares)
        if num_slices > machines.total:
            spare = f" and {request.spares} spare" if request.spares else ""
            raise SpecError(
                f"{layout} x {request.groups or 1} group(s){spare} needs {num_slices} slices, but "
                f"{machines.nodes} x {machines.per_node} {machines.gpu} give {machines.total}; "
                "add machines with --nodes, or use a smaller layout"
            )
        weights = weights_as(config, request.model.scheme, dtypes[0])
        group = plan_group(request.model, weights, layout, demand, device, request.kernels)
        free = replace(demand, kv_bytes=None, num_blocks=None)
        return group, rank_layouts(request.model, machines, free, request.kernels, dtypes)
    options = rank_layouts(request.model, machines, demand, request.kernels, dtypes)
    best = best_of(options, dtypes)
    if best.plan is None:
        raise SpecError(f"{request.model.name}: no layout works: {best.layout}: {best.why_not}")
    return best.plan, options


def _dtypes(model: NamedModel, on_cpu: bool) -> list[Dtype]:
    """Dtypes to compare for a model, the nearest to the published weights first."""
    if model.scheme is not None:
        return ["checkpoint"]
    release = family_of(model.config).fp8_release
    has_release = release is not None and release.exists(model.config)
    shipped: list[Dtype] = ["fp8-shipped"] if has_release and not on_cpu else []
    return ["bfloat16", *shipped, "fp8", "int8", "int4"]


def _dtype(name: str | None) -> Dtype | None:
    if name is None:
        return None
    for dtype in DTYPES:
        if dtype == name:
            return dtype
    raise SpecError(f"`dtype`={name!r} is none of {', '.join(DTYPES)}")


def _kernels(name: str | None, on_cpu: bool) -> Kernels:
    if name is None:
        return "cpu" if on_cpu else "triton"
    if name not in BACKENDS:
        raise SpecError(f"`kernels`={name!r} is none of {', '.join(BACKENDS)}")
    return name


def _from_spec(
    path: Path,
    machines: Machines,
    demand: KvDemand,
    kernels: str | None,
    dtype: Dtype | None,
    layout: ParallelConfig | None,
) -> list[_PlanRequest]:
    from arriero.cluster.spec.load import load

    if layout is not None:
        raise SpecError(
            "the spec sets the layout; give --tp, --pp, --dp and --ep with --model only"
        )
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
        _from_model_spec(model, machines, demand, kernels or model.kernels, dtype, on_cpu)
        for model in spec.models
    ]


def _from_model_spec(
    spec: ModelSpec,
    machines: Machines,
    demand: KvDemand,
    kernels: str | None,
    dtype: Dtype | None,
    on_cpu: bool,
) -> _PlanRequest:
    from arriero.shards.checkpoint.remote import is_url, local_folder
    from arriero.shards.layout.families import visible_keys
    from arriero.shards.layout.resolve import resolve, tier_limits

    folder = local_folder(spec.path, weights=False) if is_url(spec.path) else spec.path
    model = find_model(str(folder))
    stored_dtype = stored_as(spec.dtype, spec.quantization, model.scheme)
    demand = replace(
        demand,
        context=demand.context or spec.limits.max_model_len or 0,
        max_sequences=spec.limits.max_sequences,
        max_batch_tokens=spec.limits.max_batch_tokens,
        block_size=spec.kv.block_size,
        spare_experts=spec.mesh.spare_experts,
        sliding_window=spec.attention.sliding_window,
        attention_sinks=spec.attention.attention_sinks,
        kv_dtype=demand.kv_dtype or spec.kv.dtype or spec.dtype,
    )
    config = spec.group_config("cpu" if on_cpu else "cuda")
    demand = replace(demand, drafter=read_drafter(config, model.config))
    visible_keys(model.config, config)  # raises for a window that the model cannot have
    sets_pool = spec.kv.memory is not None or spec.kv.blocks is not None
    if sets_pool or on_cpu:
        # The leader calls `resolve` too, so that this pool equals the pool of the group.
        group = resolve(config, model.config)
        demand = replace(
            demand, num_blocks=group.num_blocks, num_local_blocks=group.num_local_blocks
        )
    return _PlanRequest(
        model=replace(model, name=spec.name),
        machines=machines,
        demand=demand,
        kernels=_kernels(kernels, on_cpu),
        dtype=dtype or stored_dtype,
        layout=spec.mesh.parallel(),
        groups=spec.groups,
        spares=spec.spares,
        tiers=tier_limits(config, model.config),
    )


def _print(
    requests: list[_PlanRequest], plans: list[tuple[GroupPlan, list[Option]]], as_json: bool
) -> None:
    from arriero.cluster.planner import report

    documents = []
    for (group, options), request in zip(plans, requests, strict=True):
        machines, tiers = request.machines, request.tiers
        groups = request.groups or machines.total // group.layout.world_size
        if as_json:
            documents.append(report.as_json(group, groups, machines, options, tiers))
        else:
            OUT.print(report.as_tables(group, groups, machines, options, tiers))
    if as_json:
        document = documents[0] if len(documents) == 1 else {"models": documents}
        OUT.print(json.dumps(document, indent=2), markup=False, soft_wrap=True)
