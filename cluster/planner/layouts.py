"""Every layout that the machines allow: which fit, in what order, and why the others do not.

Order is by tokens a second of all groups together, from a roofline: a decode step reads its
weights and its sequences' keys and values once from the device's memory, and waits for the sums
over ranks. A rough figure, good for comparing layouts of one model on one kind of machine.

Knows plans of groups; knows nothing of how they are shown.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from arriero.cluster.planner.catalog import Device, NamedModel, device
from arriero.cluster.planner.memory import GroupPlan, KvDemand, Layout, plan_group
from arriero.cluster.planner.rank_weights import Dtype, weights_as
from arriero.kernels.packing import Kernels
from arriero.shards.errors import SpecError
from arriero.shards.model_config.llama4 import Llama4Config

NODE_SUM_S = 15e-6
"""One sum of a token's activations over the ranks of a machine."""
NETWORK_SUM_S = 60e-6
"""The same across machines."""
_SIZES = (1, 2, 4, 8, 16, 32, 64)
_MOST_STAGES = 16
_MOST_NODES, _USUAL_PER_NODE = 16, 8


@dataclass(frozen=True, kw_only=True, slots=True)
class Machines:
    """What there is to run on.

    Attributes:
        gpu: a name of the table of devices, or "cpu".
        nodes: machines.
        per_node: devices of each, or slices for "cpu".
        memory_bytes: of each device (of each machine for "cpu"); None takes the table's.
    """

    gpu: str
    nodes: int = 1
    per_node: int = 8
    memory_bytes: int | None = None

    @property
    def total(self) -> int:
        """Devices of all machines."""
        return self.nodes * self.per_node

    def device(self) -> Device:
        """One of them.

        Raises:
            SpecError: see `catalog.device`.
        """
        for name, value in (("nodes", self.nodes), ("gpus_per_node", self.per_node)):
            if value < 1:
                raise SpecError(f"`{name}`={value} must be at least 1")
        return device(self.gpu, self.memory_bytes, self.per_node)


@dataclass(frozen=True, kw_only=True, slots=True)
class Option:
    """One layout in one dtype.

    Attributes:
        layout, dtype: what it is.
        groups: how many of them the machines hold.
        plan: None where the layout cannot cut the model.
        why_not: None where it works.
        concurrency: sequences of the wanted context at once, all groups together.
        tokens_per_s: of all groups, decoding at that concurrency (bounded by `max_sequences`).
        note: what to know of a layout that works.
    """

    layout: Layout
    dtype: Dtype
    groups: int
    plan: GroupPlan | None = None
    why_not: str | None = None
    concurrency: int = 0
    tokens_per_s: float = 0.0
    note: str = ""


def rank_layouts(
    model: NamedModel,
    machines: Machines,
    demand: KvDemand,
    kernels: Kernels,
    dtypes: Sequence[Dtype],
) -> list[Option]:
    """All layouts of up to all devices, those that work first and the fastest of them first.

    Of those that do not, the ones that cannot cut the model come first, each reason once; then
    the others, the smallest shortfall first.

    Raises:
        SpecError: the machines or the demand cannot be at all.
    """
    one = machines.device()
    options: list[Option] = []
    said: set[str] = set()
    for dtype in dtypes:
        for layout in layouts(model, machines):
            option = _option(model, machines, demand, kernels, dtype, layout, one)
            if option.plan is None and option.why_not is not None:
                if option.why_not in said:
                    continue
                said.add(option.why_not)
            options.append(option)
    return sorted(options, key=_order)


def best_of(options: Sequence[Option], dtypes: Sequence[Dtype]) -> Option:
    """The form nearest to the published weights that works, and of its layouts the fastest.

    Args:
        options: ranked.
        dtypes: the nearest first.

    Returns:
        Where none works, the option that lacks least.
    """
    works = [one for one in options if one.why_not is None]
    return min(works, key=lambda one: dtypes.index(one.dtype)) if works else options[0]


def enough(
    model: NamedModel,
    machines: Machines,
    demand: KvDemand,
    kernels: Kernels,
    dtypes: Sequence[Dtype],
) -> tuple[Machines, Option] | None:
    """How many of the same devices hold a model that these do not, and how; None for too many.

    Doubled until they do: first the devices of a single machine, then the machines.
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
    lacking = option.plan.lacking() if option.plan and option.why_not else 0
    return (
        option.why_not is not None,
        option.plan is not None,
        lacking - option.tokens_per_s,
        option.layout.world_size,
        option.dtype,
    )


def layouts(model: NamedModel, machines: Machines) -> Iterator[Layout]:
    """Layouts worth a look: powers of two that the devices suffice for."""
    moe = isinstance(model.config, Llama4Config)
    for tp in _SIZES:
        for pp in range(1, min(_MOST_STAGES, model.config.num_layers) + 1):
            for dp in _SIZES if moe else (1,):
                if tp * pp * dp > machines.total or (pp > 2 and machines.total % pp):
                    continue
                yield Layout(tp=tp, pp=pp, dp=dp, ep=tp * dp if moe else None)


def _option(
    model: NamedModel,
    machines: Machines,
    demand: KvDemand,
    kernels: Kernels,
    dtype: Dtype,
    layout: Layout,
    one: Device,
) -> Option:
    groups = machines.total // layout.world_size
    try:
        weights = weights_as(model.config, model.scheme, dtype)
        plan = plan_group(model, weights, layout, demand, one, kernels)
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
        note=_note(plan, machines),
    )


def decode_rate(plan: GroupPlan, per_node: int) -> float:
    """Tokens a second that one group decodes at the demand's context (a roofline).

    Args:
        plan: of the group.
        per_node: ranks that share a machine.
    """
    layout, demand = plan.layout, plan.demand
    batch = min(plan.concurrency(demand.context), demand.max_sequences * layout.dp)
    if not batch:
        return 0.0
    micro = -(-batch // layout.pp)  # as many micro-batches in flight as stages
    stage_size = layout.tp * layout.dp
    sum_s = 0.0
    if stage_size > 1:
        sum_s = NODE_SUM_S if stage_size <= per_node else NETWORK_SUM_S
    slowest = 0.0
    for rank in plan.ranks:
        own = -(-micro // layout.dp)
        read = _weights_read(plan, rank.weights.active_bytes, rank.weights.expert_bytes, micro)
        read += own * plan.sequence_bytes(rank, demand.context)
        stage_s = read / plan.device.bandwidth + 2 * rank.part.layers.size * sum_s
        slowest = max(slowest, stage_s)
    return micro / slowest


def _weights_read(plan: GroupPlan, active: int, expert: int, tokens: int) -> float:
    """Bytes of a rank's weights that a step of so many tokens touches."""
    config = plan.model.config
    if not isinstance(config, Llama4Config) or not expert:
        return active
    held = config.num_experts / (plan.layout.ep or 1)
    missed = (1 - config.top_k / config.num_experts) ** tokens
    return active - expert + expert * max(1.0, held * (1 - missed))


def _note(plan: GroupPlan, machines: Machines) -> str:
    notes = []
    layout = plan.layout
    heads = {rank.part.q_heads.size for rank in plan.ranks}
    if len(heads) > 1:
        notes.append(f"uneven: ranks hold {min(heads)} to {max(heads)} query heads")
    config = plan.model.config
    if layout.dp > 1:
        notes.append(f"attention's weights are held {layout.dp} times")
    if layout.tp > config.num_kv_heads:
        notes.append(f"each KV head is held {layout.tp // config.num_kv_heads} times")
    if layout.tp * layout.dp > machines.per_node:
        notes.append("a stage spans machines: every layer waits for the network")
    idle = machines.total - layout.world_size * (machines.total // layout.world_size)
    if idle:
        notes.append(f"{idle} devices stay idle")
    return "; ".join(notes)
