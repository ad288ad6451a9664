"""The number of groups that the cluster can hold; refuses a change that asks for more. Sans-I/O.

Counts all resources of the nodes, free or not, without the CPUs of Prompt Guard: groups that run
make room for others, and other applications end. A count is therefore an upper limit; of memory it
counts only what the plan of a group knows to the byte (`group_memory`). Knows resources of nodes
and of groups; knows nothing of running groups.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from arriero.cluster.hosts.capacity import SERVICE_CPUS, ClusterCapacity, PlacementBundles
from arriero.cluster.planner.group_memory import GroupMemory, group_memory
from arriero.cluster.planner.memory_check import (
    Bundle,
    bundle_bytes,
    check_gpu_types,
    groups_by_memory,
    memory_shortage,
)
from arriero.cluster.spec.deployment import DeploymentSpec
from arriero.cluster.spec.model import ModelSpec
from arriero.shards.errors import SpecError

_ROUNDING = 1e-6
"""Ray rounds resources to 0.0001; a quotient this close below a whole number counts as whole."""


@dataclass(frozen=True, kw_only=True, slots=True)
class WantedGroups:
    """Groups of a model that should run; spare groups, which wait for room, left out.

    Attributes:
        model: settings of the model.
        count: number of groups.
        memory: least memory of a group; None where it is not known.
    """

    model: ModelSpec
    count: int
    memory: GroupMemory | None = None

    @classmethod
    def of(cls, model: ModelSpec, count: int, capacity: ClusterCapacity) -> WantedGroups:
        """Groups with their memory, from the model's folder if this machine has the folder."""
        memory = group_memory(model, capacity.device(model))
        return cls(model=model, count=count, memory=memory)


def most_groups(
    model: ModelSpec,
    capacity: ClusterCapacity,
    others: Iterable[WantedGroups] = (),
    memory: GroupMemory | None = None,
) -> int:
    """Largest number of groups of a model that the cluster can hold.

    Args:
        model: settings of the model.
        capacity: of the cluster.
        others: groups of the other models.
        memory: least memory of a group of the model.
    """
    others = list(others)
    bundles = capacity.bundles(model)
    labelled = capacity.labelled(model)
    by_nodes = _num_bundles(bundles[0], labelled) // len(bundles)
    taken = [(_resources(other.model, capacity), other.count) for other in others]
    by_sum = []
    for name, amount in _resources(model, capacity).items():
        total = sum(node.get(name, 0.0) for node in capacity.nodes)
        left = total - sum(count * resources.get(name, 0.0) for resources, count in taken)
        if name == "CPU":
            left -= capacity.prompt_guard_cpus
        by_sum.append(int(left / amount + _ROUNDING))
    used = sum(
        other.count * sum(bundle_bytes(other.model, other.memory, capacity)) for other in others
    )
    if labelled is not capacity:
        used = 0  # the other groups may lie on the other nodes
    by_memory = groups_by_memory(_bundle(model, capacity, memory), labelled.nodes, used)
    limits = [by_nodes, *by_sum] if by_memory is None else [by_nodes, by_memory, *by_sum]
    return max(0, min(limits))


def can_hold(
    model: ModelSpec, capacity: ClusterCapacity, memory: GroupMemory | None = None
) -> bool:
    """Whether the cluster can hold a group of a model, and has the GPUs that a leader asks for."""
    try:
        capacity.check_gpus(model)
        check_gpu_types(model, memory, capacity)
    except SpecError:
        return False
    return most_groups(model, capacity, memory=memory) > 0


def refuse_beyond(
    capacity: ClusterCapacity, wanted: Iterable[WantedGroups], before: Iterable[WantedGroups]
) -> None:
    """Refuse groups that the cluster can never hold.

    A model that asks for no more than before passes, even where nodes are lost.

    Args:
        capacity: of the cluster.
        wanted: groups of all models after the change.
        before: groups of all models before the change.

    Raises:
        SpecError: names the model, the field, its value, the limit and a remedy.
    """
    wanted, before_by_name = list(wanted), {entry.model.name: entry for entry in before}
    for entry in wanted:
        if not _asks_for_more(entry, before_by_name.get(entry.model.name)):
            continue
        capacity.check_gpus(entry.model)
        check_gpu_types(entry.model, entry.memory, capacity)
        labelled = capacity.labelled(entry.model)
        if entry.count and capacity.nodes and not labelled.nodes:
            raise SpecError(_no_label(entry.model, capacity))
        if entry.count and not most_groups(entry.model, replace(capacity, prompt_guard=None)):
            raise SpecError(_no_group(entry.model, capacity))
        bundle = _bundle(entry.model, capacity, entry.memory)
        if entry.count and groups_by_memory(bundle, labelled.nodes) == 0:
            raise SpecError(memory_shortage(entry.model, entry.memory, bundle, labelled.nodes))
        others = [other for other in wanted if other is not entry]
        most = most_groups(entry.model, capacity, others, entry.memory)
        if entry.count > most:
            raise SpecError(_too_many(entry, most, capacity))


def refuse_spec(spec: DeploymentSpec, capacity: ClusterCapacity) -> None:
    """Refuse a deployment whose groups and gateways the nodes can never hold.

    Raises:
        SpecError: names the model, the field, its value, the limit and a remedy.
    """
    wanted = [WantedGroups.of(model, model.groups, capacity) for model in spec.models]
    refuse_beyond(replace(capacity, prompt_guard=None), wanted, [])
    check_gateways(spec, len(capacity.nodes))
    check_prompt_guard(wanted, spec.gateway.count, capacity)


def check_prompt_guard(
    wanted: Iterable[WantedGroups], num_gateways: int, capacity: ClusterCapacity
) -> None:
    """Refuse processes of Prompt Guard that do not fit beside the groups and the gateways.

    Raises:
        SpecError: names the fields, their values, the CPUs that are left and a remedy.
    """
    guard = capacity.prompt_guard
    if guard is None:
        return
    groups = sum(entry.count * _resources(entry.model, capacity)["CPU"] for entry in wanted)
    left = capacity.num_cpus - groups - SERVICE_CPUS * num_gateways
    by_nodes = _num_bundles({"CPU": guard.cpus}, capacity)
    if guard.replicas > by_nodes or guard.all_cpus > left + _ROUNDING:
        raise SpecError(
            f"`gateway.prompt_guard`: `replicas`={guard.replicas} with `cpus`={guard.cpus:g} do"
            f" not fit the {len(capacity.nodes)} nodes of the cluster, whose groups leave"
            f" {max(0.0, left):g} CPUs; lower `replicas`, `cpus` or the groups of models, or add"
            " nodes"
        )


def check_gateways(spec: DeploymentSpec, num_nodes: int) -> None:
    """Refuse more gateways with a fixed port than nodes.

    Raises:
        SpecError: names the field, its value, the limit and a remedy.
    """
    gateway = spec.gateway
    if (gateway.port or gateway.http_port) and gateway.count > num_nodes:
        field = "gateway.port" if gateway.port else "gateway.http.port"
        raise SpecError(
            f"`gateway.count`={gateway.count} exceeds {num_nodes}, the number of nodes: with a"
            f" fixed `{field}` each gateway needs a node of its own; lower `gateway.count`, add"
            " nodes, or set the port to 0"
        )


def _asks_for_more(entry: WantedGroups, before: WantedGroups | None) -> bool:
    """Whether there are more groups than before, or groups with other resources."""
    if before is None or entry.count > before.count:
        return True
    after = (PlacementBundles.of(entry.model), entry.model.device, entry.model.cpus_per_slice)
    old = before.model
    if after != (PlacementBundles.of(old), old.device, old.cpus_per_slice):
        return True
    return entry.memory is not None and entry.memory != before.memory


def _bundle(model: ModelSpec, capacity: ClusterCapacity, memory: GroupMemory | None) -> Bundle:
    """Resources of a bundle of a group, with the bytes of each bundle."""
    return Bundle(
        resources=capacity.bundles(model)[0], nbytes=bundle_bytes(model, memory, capacity)
    )


def _resources(model: ModelSpec, capacity: ClusterCapacity) -> dict[str, float]:
    """Sum of the resources of a group, the leader included."""
    bundles = [{"CPU": SERVICE_CPUS}, *capacity.bundles(model)]
    names = dict.fromkeys(name for bundle in bundles for name in bundle)
    return {name: sum(bundle.get(name, 0.0) for bundle in bundles) for name in names}


def _num_bundles(bundle: Mapping[str, float], capacity: ClusterCapacity) -> int:
    """Number of bundles that fit the nodes, each bundle on one node."""
    return sum(
        min(int(node.get(name, 0.0) / amount + _ROUNDING) for name, amount in bundle.items())
        for node in capacity.nodes
    )


def _needs(model: ModelSpec, capacity: ClusterCapacity) -> str:
    bundles = capacity.bundles(model)
    resources = ", ".join(f"{amount:g} {name}" for name, amount in bundles[0].items())
    return f"a group needs {len(bundles)} x ({resources}), each on one node"


def _no_label(model: ModelSpec, capacity: ClusterCapacity) -> str:
    labels = ", ".join(f"{name}: {value}" for name, value in model.placement.labels.items())
    return (
        f"model `{model.name}`: `placement.labels` {{{labels}}} fits none of the"
        f" {len(capacity.nodes)} nodes of the cluster; change the labels, or start nodes with them"
        " (`ray start --labels`)"
    )


def _no_group(model: ModelSpec, capacity: ClusterCapacity) -> str:
    mesh = model.mesh
    have = _num_bundles(capacity.bundles(model)[0], capacity)
    return (
        f"model `{model.name}`: `mesh` {mesh.parallel()} has {mesh.num_slices} slices:"
        f" {_needs(model, capacity)}, and the {len(capacity.nodes)} nodes of the cluster hold"
        f" {have}; lower `mesh.tp` or `mesh.pp`, set `placement.span`, or add nodes"
    )


def _too_many(entry: WantedGroups, most: int, capacity: ClusterCapacity) -> str:
    model = entry.model
    remedy = f"lower `groups` to {most} or less" if most else "lower the groups of other models"
    guard = capacity.prompt_guard
    beside = "" if guard is None else f" beside the {guard.all_cpus:g} CPUs of Prompt Guard"
    less = "" if guard is None else ", lower `gateway.prompt_guard.replicas` or `cpus`"
    return (
        f"model `{model.name}`: `groups`={entry.count} exceeds {most}, the number that the"
        f" {len(capacity.nodes)} nodes of the cluster hold{beside} ({_needs(model, capacity)}"
        f"{_memory_words(entry, capacity)}); {remedy}{less}, or add nodes"
    )


def _memory_words(entry: WantedGroups, capacity: ClusterCapacity) -> str:
    nbytes = sum(bundle_bytes(entry.model, entry.memory, capacity))
    return f", and {nbytes / 1e9:.2f} GB of memory" if nbytes else ""
