"""Memory of nodes and GPUs against the least memory of groups. Sans-I/O.

Knows bytes of nodes, GPUs and slices; knows nothing of counts of other resources.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from arriero.cluster.hosts.capacity import ClusterCapacity, PlacementBundles
from arriero.cluster.planner.catalog import DEVICES, RAY_TYPES, Device
from arriero.cluster.planner.group_memory import GroupMemory
from arriero.cluster.spec.model import ModelSpec
from arriero.shards.errors import SpecError

_TYPE = "accelerator_type:"
_ROUNDING = 1e-6


@dataclass(frozen=True, kw_only=True, slots=True)
class Bundle:
    """What the bundles of a group need of their nodes.

    Attributes:
        resources: resources of each bundle, each on one node.
        nbytes: least bytes of node memory by bundle; 0 where not known.
    """

    resources: Mapping[str, float]
    nbytes: Sequence[int]


def bundle_bytes(
    model: ModelSpec, memory: GroupMemory | None, capacity: ClusterCapacity
) -> list[int]:
    """Least bytes of node memory of each placement bundle of a group; 0 where not known."""
    placement = PlacementBundles.of(model)
    if memory is None:
        return [0] * placement.count
    on_cpu = capacity.device(model) == "cpu"
    slices = [each.host + (each.device if on_cpu else 0) for each in memory.slices]
    size = placement.slices_per_bundle
    return [sum(slices[start : start + size]) for start in range(0, len(slices), size)]


def groups_by_memory(
    bundle: Bundle, nodes: Iterable[Mapping[str, float]], used: int = 0
) -> int | None:
    """Largest number of groups for which the nodes have memory; None for no limit.

    Args:
        bundle: bundles of a group.
        nodes: resources of each node; a node without "memory" sets no limit.
        used: bytes of the groups of other models.
    """
    sizes = [size for size in bundle.nbytes if size]
    rooms = [
        node["memory"] if "memory" in node else float("inf")
        for node in nodes
        if all(node.get(name, 0.0) >= need - _ROUNDING for name, need in bundle.resources.items())
    ]
    if not sizes or any(room == float("inf") for room in rooms):
        return None
    if not rooms or max(sizes) > max(rooms):
        return 0
    by_node = sum(int(room / min(sizes)) for room in rooms) // len(sizes)
    by_sum = int((sum(rooms) - used) / sum(sizes))
    return max(0, min(by_node, by_sum))


def memory_shortage(
    model: ModelSpec,
    memory: GroupMemory | None,
    bundle: Bundle,
    nodes: Sequence[Mapping[str, float]],
) -> str:
    """Why no group of a model fits the memory of the nodes: field, need, limit and remedy."""
    assert memory is not None, "only known memory can be short"
    rooms = [node.get("memory", 0.0) for node in nodes]
    need, largest = max(bundle.nbytes), max(rooms, default=0.0)
    if need > largest:
        short = (
            f"a stage of {PlacementBundles.of(model).slices_per_bundle} slices needs {_gb(need)} on"
            f" one node, and the largest of {len(rooms)} nodes has {_gb(largest)}"
        )
    else:
        short = f"the {len(rooms)} nodes have {_gb(sum(rooms))} together"
    return (
        f"model `{model.name}`: `mesh` {model.mesh.parallel()} does not fit the memory of the"
        f" nodes: a group needs at least {_gb(sum(bundle.nbytes))} ({_parts(memory)}); {short};"
        f" {_remedy(model, more_slices=sum(bundle.nbytes) <= sum(rooms))}, or add nodes with more"
        " memory"
    )


def check_gpu_types(
    model: ModelSpec, memory: GroupMemory | None, capacity: ClusterCapacity
) -> None:
    """Refuse weights that no GPU of the cluster can hold or compute with.

    GPUs of a type that the catalogue lacks pass.

    Raises:
        SpecError: names field, value, limit and remedy.
    """
    if capacity.device(model) != "cuda" or memory is None:
        return
    devices = _gpus(model, capacity)
    if not devices:
        return
    names = ", ".join(sorted({device.name for device in devices}))
    scheme = memory.scheme
    kind = model.quantization or (None if scheme is None else scheme.kind)
    if kind == "fp8" and model.kernels != "reference" and not any(gpu.fp8 for gpu in devices):
        field = "`quantization`='fp8'" if model.quantization else "the checkpoint's fp8 format"
        raise SpecError(
            f"model `{model.name}`: {field} needs compute capability 8.9 or newer, and {names} is"
            " older; use `quantization`: int8 with a plain checkpoint"
        )
    largest = max(devices, key=lambda device: device.memory_bytes)
    need = max(each.device for each in memory.slices)
    if need > largest.memory_bytes:
        raise SpecError(
            f"model `{model.name}`: `mesh` {model.mesh.parallel()} does not fit the memory of"
            f" {names}: a slice needs at least {_gb(need)} ({_parts(memory)} in the group), and a"
            f" GPU has {_gb(largest.memory_bytes)}; {_remedy(model)}"
        )


def _gpus(model: ModelSpec, capacity: ClusterCapacity) -> list[Device]:
    """GPU types for a model's slices; empty where a type is not in the catalogue."""
    devices = []
    for node in capacity.nodes:
        if not node.get("GPU"):
            continue
        types = [name.removeprefix(_TYPE) for name in node if name.startswith(_TYPE)]
        if model.placement.accelerator is not None:
            types = [name for name in types if name == model.placement.accelerator]
            if not types:
                continue
        if not types or any(name not in RAY_TYPES for name in types):
            return []
        devices += [DEVICES[RAY_TYPES[name]] for name in types]
    return devices


def _parts(memory: GroupMemory) -> str:
    totals = {
        "weights": sum(each.weights for each in memory.slices),
        "KV cache": sum(each.kv for each in memory.slices),
        "`kv.host`": sum(each.host for each in memory.slices),
    }
    return ", ".join(f"{name} {_gb(nbytes)}" for name, nbytes in totals.items() if nbytes)


def _remedy(model: ModelSpec, *, more_slices: bool = True) -> str:
    remedies = ["raise `mesh.pp` or `mesh.tp`"] if more_slices else []
    if model.quantization is None:
        remedies.append("set `quantization`")
    if model.kv.memory or model.kv.blocks or model.kv.host:
        remedies.append("lower the sizes of `kv`")
    return ", ".join(remedies) or "take a smaller model"


def _gb(count: float) -> str:
    return f"{count / 1e9:.2f} GB"
