"""Least memory of each slice of a group: weights and KV blocks, which the plan knows to the byte.

`arriero up`, `rollout`, `scale` and the autoscaler compare these bytes with the memory of nodes and
GPUs. The real need is larger (activations, libraries), so that no group is refused that could run.
Knows settings and configs of models; knows nothing of clusters. Needs no torch.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

from arriero.cluster.planner.adapter_bytes import adapter_bytes
from arriero.cluster.planner.catalog import NamedModel, cpu
from arriero.cluster.planner.demand import KvDemand
from arriero.cluster.planner.drafter_bytes import Drafter, read_drafter
from arriero.cluster.planner.group_plan import GroupPlan, RankPlan
from arriero.cluster.planner.memory import plan_group
from arriero.cluster.planner.weight_forms import stored_as, weights_as
from arriero.cluster.spec.model import ModelSpec
from arriero.shards.checkpoint.formats.describe import describe
from arriero.shards.checkpoint.formats.scheme import QuantScheme
from arriero.shards.checkpoint.remote import is_url
from arriero.shards.config.group import GroupConfig
from arriero.shards.errors import ArrieroError
from arriero.shards.families.registry import family_of
from arriero.shards.layout.parts import AnyModel
from arriero.shards.layout.resolve import resolve

_BESIDE_LAYERS = ("embeddings", "head", "vision")
"""Kinds of weights outside of the layers, which `offload` leaves in memory."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SliceMemory:
    """Least bytes of a slice.

    Attributes:
        weights: bytes of the weights in memory, with a drafter's and the slots for adapters.
        kv: bytes of the KV pool beside the weights, a drafter's layers included; of one block where
            no size is given.
        host: bytes of the slice's part of `kv.host`, in the memory of the node.
    """

    weights: int
    kv: int
    host: int

    @property
    def device(self) -> int:
        """Bytes in the memory of the slice's device."""
        return self.weights + self.kv


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupMemory:
    """Least memory of a group, and the form of its weights.

    Attributes:
        slices: by rank.
        scheme: quantization of the checkpoint; None for plain weights.
    """

    slices: tuple[SliceMemory, ...]
    scheme: QuantScheme | None


def group_memory(model: ModelSpec, device: str) -> GroupMemory | None:
    """Least memory of a group; None where this machine lacks the model's folder.

    None also for settings that the checks of sizes refuse.

    Args:
        model: settings of the model.
        device: "cpu" or "cuda".
    """
    if is_url(model.path):
        return None
    changed_ns = _changed_ns(model.path)
    if changed_ns is None:
        return None
    drafter = model.speculation.model
    drafter_changed_ns = None if drafter is None else _changed_ns(drafter)
    return _group_memory(model.model_dump_json(), device, (changed_ns, drafter_changed_ns))


def _changed_ns(folder: str) -> int | None:
    """Time of the last change of a folder's config, in nanoseconds; None without the config."""
    try:
        return os.stat(Path(folder) / "config.json").st_mtime_ns
    except OSError:
        return None


@lru_cache(maxsize=64)
def _group_memory(
    settings: str, device: str, changed_ns: tuple[int | None, ...]
) -> GroupMemory | None:
    """`changed_ns` are times of the last change of the configs: a new config is read again."""
    model = ModelSpec.model_validate_json(settings)
    try:
        numbers, scheme = describe(Path(model.path))
        plan = _plan(model, device, numbers, scheme)
        config = model.group_config(device)
        adapters = [adapter_bytes(config, numbers, rank.part) for rank in plan.ranks]
    except ArrieroError:
        return None
    host = (model.kv.host or 0) // model.mesh.num_slices
    slices = tuple(
        SliceMemory(
            weights=_weights_in_memory(rank, model, plan.model.config) + nbytes,
            kv=rank.kv_pool_bytes,
            host=host,
        )
        for rank, nbytes in zip(plan.ranks, adapters, strict=True)
    )
    return GroupMemory(slices=slices, scheme=scheme)


def _plan(
    model: ModelSpec, device: str, numbers: AnyModel, scheme: QuantScheme | None
) -> GroupPlan:
    """The plan of a group with the smallest KV pool that the settings allow."""
    config = model.group_config(device)
    if config.kv_bytes is None and config.num_blocks is None:
        config = replace(config, num_blocks=1)  # without a given size the pool takes what is left
    resolved = resolve(config, numbers)
    demand = KvDemand(
        context=resolved.max_model_len or numbers.max_position_embeddings,
        max_sequences=config.max_sequences,
        max_batch_tokens=config.max_batch_tokens,
        block_size=config.block_size,
        num_blocks=resolved.num_blocks,
        num_local_blocks=resolved.num_local_blocks,
        kv_dtype=config.cache_dtype,
        spare_experts=config.spare_experts,
        sliding_window=config.sliding_window,
        attention_sinks=config.attention_sinks,
        drafter=_drafter(config, numbers),
    )
    return plan_group(
        NamedModel(name=model.name, config=numbers, scheme=scheme),
        weights_as(numbers, scheme, stored_as(config.dtype, config.quantization, scheme)),
        config,
        demand,
        cpu(1, 1),  # the plan's numbers are compared with memory elsewhere
        model.kernels or ("cpu" if device == "cpu" else "triton"),
    )


def _drafter(config: GroupConfig, numbers: AnyModel) -> Drafter | None:
    """The drafter; None where this machine lacks its folder: the result stays a lower bound."""
    try:
        return read_drafter(config, numbers)
    except ArrieroError:
        return None


def _weights_in_memory(rank: RankPlan, model: ModelSpec, numbers: AnyModel) -> int:
    """Bytes of a rank's weights without the layers that `offload` leaves on disk, at least."""
    total, layers = rank.weights_nbytes, rank.part.layers.size
    if not model.offload.layers or not layers:
        return total
    beside = sum(rank.weights.by_kind.get(kind, 0) for kind in _BESIDE_LAYERS)
    share = min(1.0, model.offload.layers / layers)
    if family_of(numbers).experts(numbers) is not None:
        share = 1.0  # layers with experts are larger than others; the bound stays below all
    return total - int(share * (rank.weights.total - beside))
