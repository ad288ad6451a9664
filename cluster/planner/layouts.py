"""All layouts that the machines allow, in order of speed, with the reason where a layout fails.

The speed is tokens per second of all groups together, from a roofline: a decode step reads the
weights and the keys and values of all sequences once from device memory, and waits for the sums
over ranks. A rough figure, good for comparing layouts of the same model on the same machines.

Knows plans of groups; knows nothing of the output for users.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from arriero.cluster.planner import catalog
from arriero.cluster.planner.catalog import Device, NamedModel
from arriero.cluster.planner.demand import KvDemand
from arriero.cluster.planner.group_plan import GroupPlan
from arriero.cluster.planner.memory import plan_group
from arriero.cluster.planner.step_model.speed import Speed, speed
from arriero.cluster.planner.weight_forms import Dtype, weights_as
from arriero.kernels.registry import Kernels
from arriero.shards.config.parallel import ParallelConfig
from arriero.shards.errors import SpecError
from arriero.shards.families.registry import family_of

NODE_SUM_S = 15e-6
"""Seconds for a sum of a token's activations over the ranks of a machine."""
NETWORK_SUM_S = 60e-6
"""Seconds for such a sum across machines."""
_SIZES = (1, 2, 4, 8, 16, 32, 64)
_MOST_STAGES = 16
_MOST_NODES, _USUAL_PER_NODE = 16, 8


@dataclass(frozen=True, kw_only=True, slots=True)
class Machines:
    """The machines to run on.

    Attributes:
        gpu: a name of `catalog.DEVICES`, or "cpu".
        nodes: number of machines.
        per_node: number of devices of a machine; for "cpu" the number of slices.
        memory_bytes: bytes of a device (of a machine for "cpu"); None takes the catalogue's size.
    """

    gpu: str
    nodes: int = 1
    per_node: int = 8
    memory_bytes: int | None = None

    @property
    def total(self) -> int:
        """Number of devices of all machines."""
        return self.nodes * self.per_node

    def device(self) -> Device:
        """A device of the machines.

        Raises:
            SpecError: see `catalog.device`.
        """
        for name, value in (("nodes", self.nodes), ("gpus_per_node", self.per_node)):
            if value < 1:
                raise SpecError(f"`{name}`={value} must be at least 1")
        return catalog.device(self.gpu, self.memory_bytes, self.per_node)


@dataclass(frozen=True, kw_only=True, slots=True)
class Option:
    """A layout in a dtype, with its plan.

    Attributes:
        layout, dtype: the layout and the dtype.
        groups: number of groups for which the machines have devices.
        plan: plan of a group; None where the layout cannot divide the model.
        why_not: reason against the layout; None where the layout works.
        concurrency: sequences of the wanted context at once, all groups together.
        tokens_per_s: decode rate of all groups at that concurrency (bounded by `max_sequences`).
        speed: estimated speed of a group; None where no estimate is made.
        note: remarks on a layout that works.
    """

    layout: ParallelConfig
    dtype: Dtype
    groups: int
    plan: GroupPlan | None = None
    why_not: str | None = None
    concurrency: int = 0
    tokens_per_s: float = 0.0
    speed: Speed | None = None
    note: str = ""


def rank_layouts(
    model: NamedModel,
    machines: Machines,
    demand: KvDemand,
    kernels: Kernels,
    dtypes: Sequence[Dtype],
) -> list[Option]:
    """All layouts of up to all devices: first the layouts that work, the fastest first.

    Then follow the layouts that cannot divide the model, each reason once, and then the layouts
    that do not fit, the smallest shortfall first.

    Raises:
        SpecError: the machines or the demand are not valid.
    """
    device = machines.device()
    options: list[Option] = []
    reasons: set[str] = set()
    for dtype in dtypes:
        for layout in layouts(model, machines):
            option = _option(model, machines, demand, kernels, dtype, layout, device)
            if option.plan is None and option.why_not is not None:
                if option.why_not in reasons:
                    continue
                reasons.add(option.why_not)
            options.append(option)
    return sorted(options, key=_order)


def best_of(options: Sequence[Option], dtypes: Sequence[Dtype]) -> Option:
    """The fastest layout that works in the dtype nearest to the published weights.

    Args:
        options: result of `rank_layouts`.
        dtypes: dtypes, the nearest to the published weights first.

    Returns:
        The option; where no layout works, the option with the smallest shortfall.
    """
    working = [option for option in options if option.why_not is None]
    return min(working, key=lambda option: dtypes.index(option.dtype)) if working else options[0]


def larger_machines(
    model: NamedModel,
    machines: Machines,
    demand: KvDemand,
    kernels: Kernels,
    dtypes: Sequence[Dtype],
) -> tuple[Machines, Option] | None:
    """More devices of the same kind that hold the model, with the layout; None for too many.

    The number doubles until the model fits: first the devices of a single machine, then machines.
    """
    while machines.nodes < _MOST_NODES:
        if machines.nodes == 1 and machines.per_node < _USUAL_PER_NODE:
            machines = replace(machines, per_node=2 * machines.per_node)
        else:
            machines = replace(machines, nodes=2 * machines.nodes)
        best = best_of(rank_layouts(model, machines, demand, kernels, dtypes), dtypes)
        if best.why_not is None:
            return machines, best
    return None


def _order(option: Option) -> tuple[bool, bool, float, int, str]:
    missing_bytes = option.plan.missing_bytes() if option.plan and option.why_not else 0
    return (
        option.why_not is not None,
        option.plan is not None,
        missing_bytes - option.tokens_per_s,
        option.layout.world_size,
        option.dtype,
    )


def layouts(model: NamedModel, machines: Machines) -> Iterator[ParallelConfig]:
    """Layouts to try: tp and dp are powers of two, and the devices suffice.

    Experts are dealt whole to the ranks of a stage, or each is cut over them as MLPs are: then no
    rank waits for another's expert in a small batch.
    """
    moe = family_of(model.config).experts(model.config) is not None
    for tp in _SIZES:
        for pp in range(1, min(_MOST_STAGES, model.config.num_layers) + 1):
            for dp in _SIZES if moe else (1,):
                if tp * pp * dp > machines.total or (pp > 2 and machines.total % pp):
                    continue
                for ep in _expert_parts(tp, dp) if moe else (None,):
                    yield ParallelConfig(tp=tp, pp=pp, dp=dp, ep=ep)


def _expert_parts(tp: int, dp: int) -> tuple[int, ...]:
    """Values of `ep` to try: experts of different tokens' ranks (`dp`) are not cut."""
    return (tp * dp, 1) if dp == 1 and tp > 1 else (tp * dp,)


def _option(
    model: NamedModel,
    machines: Machines,
    demand: KvDemand,
    kernels: Kernels,
    dtype: Dtype,
    layout: ParallelConfig,
    device: Device,
) -> Option:
    groups = machines.total // layout.world_size
    try:
        weights = weights_as(model.config, model.scheme, dtype)
        plan = plan_group(model, weights, layout, demand, device, kernels)
    except SpecError as error:
        return Option(layout=layout, dtype=dtype, groups=groups, why_not=str(error))
    why = plan.shortfall()
    if why is not None:
        return Option(layout=layout, dtype=dtype, groups=groups, plan=plan, why_not=why)
    concurrency = plan.concurrency(demand.context)
    return Option(
        layout=layout,
        dtype=dtype,
        groups=groups,
        plan=plan,
        concurrency=concurrency * groups,
        tokens_per_s=groups * decode_rate(plan, machines.per_node),
        speed=speed(plan, machines.per_node),
        note=_note(plan, machines),
    )


def decode_rate(plan: GroupPlan, per_node: int) -> float:
    """Tokens per second that a group decodes at the demand's context (a roofline).

    Args:
        plan: plan of the group.
        per_node: number of ranks on a machine.
    """
    layout, demand = plan.layout, plan.demand
    batch = min(plan.concurrency(demand.context), demand.max_sequences * layout.dp)
    if not batch:
        return 0.0
    micro = -(-batch // layout.pp)  # there are as many micro-batches in flight as stages
    stage_size = layout.tp * layout.dp
    sum_s = 0.0
    if stage_size > 1:
        sum_s = NODE_SUM_S if stage_size <= per_node else NETWORK_SUM_S
    slowest = 0.0
    for rank in plan.ranks:
        sequences = -(-micro // layout.dp)
        read = _weights_read(plan, rank.weights.active_bytes, rank.weights.expert_bytes, micro)
        read += sequences * plan.sequence_bytes(rank, demand.context)
        stage_s = read / plan.device.bandwidth + 2 * rank.part.layers.size * sum_s
        slowest = max(slowest, stage_s)
    return micro / slowest


def _weights_read(plan: GroupPlan, active: int, expert: int, tokens: int) -> float:
    """Bytes of a rank's weights that a step of `tokens` tokens reads."""
    sizes = family_of(plan.model.config).experts(plan.model.config)
    if sizes is None or not expert:
        return active
    local_experts = sizes.num_experts / (plan.layout.ep or 1)
    unused_share = (1 - sizes.top_k / sizes.num_experts) ** tokens
    return active - expert + expert * max(1.0, local_experts * (1 - unused_share))


def _note(plan: GroupPlan, machines: Machines) -> str:
    notes = []
    layout = plan.layout
    heads = {rank.part.q_heads.size for rank in plan.ranks}
    if len(heads) > 1:
        notes.append(f"uneven: ranks have {min(heads)} to {max(heads)} query heads")
    config = plan.model.config
    if layout.dp > 1:
        notes.append(f"{layout.dp} copies of the attention weights")
    if layout.tp > config.num_kv_heads:
        notes.append(f"{layout.tp // config.num_kv_heads} copies of each KV head")
    if layout.tp * layout.dp > machines.per_node:
        notes.append("a stage spans machines: every layer waits for the network")
    idle = machines.total - layout.world_size * (machines.total // layout.world_size)
    if idle:
        notes.append(f"{idle} devices stay idle")
    return "; ".join(notes)
