"""The sections of a model in `arriero.yaml`, and the settings of each group of the model.

Knows fields, limits and defaults; knows nothing of checkpoints (the planner and the engine check
whether a checkpoint can be divided as the spec says).
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from arriero.cluster.spec.adapters import AdapterSpec, check_room, slots_of
from arriero.cluster.spec.autoscale import AutoscaleSpec
from arriero.cluster.spec.fields import Bytes, Count, EverywherePath, Name, Seconds, SpecSection
from arriero.cluster.spec.label_selector import label_selector
from arriero.cluster.spec.speculation import SpeculationSpec
from arriero.shards.config.adapters import AdapterFile
from arriero.shards.config.group import GroupConfig
from arriero.shards.config.kv_tiers import RowType, TierConfig
from arriero.shards.config.parallel import ParallelConfig
from arriero.shards.errors import SpecError


class MeshSpec(SpecSection):
    """How a group divides its model over slices.

    Attributes:
        tp, pp, dp, ep, tp_shares, layer_split: as in `ParallelConfig`.
        expert_wire: dtype of rows on the way to experts on other slices: float32, bfloat16 or fp8;
            None takes the model's dtype.
        spare_experts: places on each slice, in each layer, for second copies of busy experts;
            experts then move with the load. Needs `dp` > 1.
    """

    tp: Count = 1
    pp: Count = 1
    dp: Count = 1
    ep: Count | None = None
    expert_wire: Literal["float32", "bfloat16", "fp8"] | None = None
    spare_experts: Annotated[int, Field(ge=0)] = 0
    tp_shares: tuple[Annotated[float, Field(gt=0, allow_inf_nan=False)], ...] | None = None
    layer_split: tuple[Count, ...] | None = None

    @property
    def num_slices(self) -> int:
        """Slices of a group."""
        return self.parallel().world_size

    def parallel(self) -> ParallelConfig:
        """The mesh of a group."""
        return ParallelConfig(
            tp=self.tp,
            pp=self.pp,
            dp=self.dp,
            ep=self.ep,
            tp_shares=self.tp_shares,
            layer_split=self.layer_split,
        )

    @model_validator(mode="after")
    def _check(self) -> MeshSpec:
        try:
            self.parallel().check()
        except SpecError as error:
            raise ValueError(str(error)) from None
        return self


class KvDiskSpec(SpecSection):
    """KV blocks on the disks of a group's nodes; the blocks outlive the group.

    Attributes:
        path: folder on each slice's node. Groups of the same model may share a folder: a group
            that starts reads the blocks that another group wrote.
        size: largest number of bytes in use by the group, over all slices.
    """

    path: EverywherePath
    size: Bytes


class KvSpec(SpecSection):
    """The KV cache of a group.

    Attributes:
        memory: bytes of the whole group's pool ("512MiB"); None takes the memory that GPUs have
            left beside weights, graphs and a step; on CPUs 2 GiB, at most a quarter of memory.
        blocks: number of blocks, instead of `memory`.
        dtype: "int8" holds keys and values in about half of bfloat16's bytes, with a scale for each
            head and token; "fp8" in half, with the scales of the checkpoint, if there are any.
            Answers are close to those of null, the model's dtype, but not equal.
        local_blocks: blocks of the pool for layers that attend within a chunk (Llama 4);
            None divides the memory for sequences of four chunks.
        block_size: tokens in a block.
        prefix_cache: reuse the blocks of shared prefixes.
        host: bytes of host memory of the whole group for blocks that leave the device.
        disk: disk space for blocks that leave the device.
        shared: folder of a store that all nodes reach, as an fsspec URL ("s3://bucket/kv"), for the
            blocks of all groups. arriero does not limit the size; let the store expire objects.
        tenant_share: largest share of host memory and disk for the blocks of a tenant.
        tier_dtype: "int8" and "fp8" store blocks below the device in about half of bfloat16's
            bytes; an answer whose prefix comes from such blocks is close to the exact answer, but
            may differ. null stores the blocks in the device's dtype.
        transfer: how blocks come from a group on another node: "tcp"; "nixl" where both ends have
            NIXL installed (`pip install 'arriero[nixl]'`), otherwise TCP; "auto" for NIXL only
            where network cards with RDMA exist too. Groups on the same node use shared memory.
        same_layout: reuse blocks only from groups of the same mesh and kernels; otherwise all
            meshes share blocks, and results agree to rounding.
    """

    memory: Bytes | None = None
    blocks: Count | None = None
    dtype: Literal["int8", "fp8"] | None = None
    local_blocks: Count | None = None
    block_size: Count = 16
    prefix_cache: bool = True
    host: Bytes | None = None
    disk: KvDiskSpec | None = None
    shared: str | None = None
    tenant_share: Annotated[float, Field(gt=0, le=1)] = 1.0
    tier_dtype: RowType | None = None
    transfer: Literal["auto", "tcp", "nixl"] = "auto"
    same_layout: bool = False

    def tiers(self) -> TierConfig:
        """Settings of the KV tiers for a group."""
        return TierConfig(
            host_bytes=self.host or 0,
            disk_path=None if self.disk is None else str(self.disk.path),
            disk_bytes=0 if self.disk is None else self.disk.size,
            shared_url=self.shared,
            max_tenant_share=self.tenant_share,
            dtype=self.tier_dtype,
            transfer=self.transfer,
            same_layout=self.same_layout,
        )

    @model_validator(mode="after")
    def _memory_or_blocks(self) -> KvSpec:
        if self.memory is not None and self.blocks is not None:
            raise ValueError("`memory` and `blocks` both set the pool's size; keep one")
        return self


class AttentionSpec(SpecSection):
    """Attention within bounded memory, for dense models.

    Attributes:
        sliding_window: number of last tokens that a token attends to, the token itself included;
            the KV cache of a sequence holds no more tokens. None for the model's own attention.
        attention_sinks: number of first tokens that stay visible and cached besides.
        changes_answers: accepts a window that the model was not trained with, although answers to
            longer texts change; without this field such a window is refused.
    """

    sliding_window: Count | None = None
    attention_sinks: Annotated[int, Field(ge=0)] = 0
    changes_answers: bool = False

    @model_validator(mode="after")
    def _sinks_beside_a_window(self) -> AttentionSpec:
        if self.sliding_window is None and (self.attention_sinks or self.changes_answers):
            raise ValueError(
                f"`attention_sinks`={self.attention_sinks} and `changes_answers`="
                f"{self.changes_answers} mean nothing without `sliding_window`; set it, or "
                "leave both out"
            )
        return self


class OffloadSpec(SpecSection):
    """Weights that do not fit the device.

    Attributes:
        layers: number of last layers of each stage whose weights stay on disk, mapped, and are
            read ahead of use (device cpu only); of a mixture of experts, the routed experts of
            these layers.
        folder: folder on disk; None takes the system's folder for temporary files.
    """

    layers: Annotated[int, Field(ge=0)] = 0
    folder: Path | None = None


class LimitsSpec(SpecSection):
    """Limits of the scheduler.

    Attributes:
        max_model_len: largest number of tokens of a sequence; None takes the model's own limit.
        max_sequences: largest number of sequences that run at once.
        max_batch_tokens: largest number of tokens in a step; longer prompts run in chunks.
        max_queued: largest number of waiting requests; further requests are refused.
    """

    max_model_len: Count | None = None
    max_sequences: Count = 256
    max_batch_tokens: Count = 2048
    max_queued: Count = 4096


class PlacementSpec(SpecSection):
    """Nodes for a group's slices.

    Attributes:
        span: the tensor-parallel slices of a stage may be on several nodes. By default all are on
            the same node, since each layer waits for the network twice.
        stages: "pack" puts stages close together, "spread" on different nodes where possible.
        accelerator: Ray's name of the GPU type that slices need ("H100", "H200").
        labels: labels of the nodes, as Ray's label selectors: {"region": "in(us-a,us-b)"}.
    """

    span: bool = False
    stages: Literal["pack", "spread"] = "pack"
    accelerator: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{1,64}$")] | None = None
    labels: dict[str, Annotated[str, AfterValidator(label_selector)]] = Field(default_factory=dict)


class ModelSpec(SpecSection):
    """A model and the groups that serve the model.

    Attributes:
        name: model id for clients.
        path: folder with config.json, weights and tokenizer.json, on every node; or an fsspec URL
            (s3://, gs://, https://...): each node fetches into its cache the parts that its slices
            read.
        dtype: dtype of weights, and of the KV cache without `kv.dtype`.
        quantization: form of the weights after loading: int8, int4, fp8; None keeps `dtype`.
        activation_dtype: int8 rounds the inputs of int8 and int4 weights (CPUs): faster, with other
            answers; None for no rounding.
        groups: number of replica groups; with `autoscale`, the number at the start.
        autoscale: lets the number of groups follow the load; null keeps `groups`.
        spares: number of groups on standby: placed, code loaded, and the weights in the page cache
            of the nodes as far as memory is free. A spare group replaces a lost group; the rebuilt
            group is then the spare. A spare group takes the CPUs and GPUs of a group, and no device
            memory.
        prefill_groups: number of groups that only compute prompts and hand the sequences over,
            through host memory, to the other groups; with 0 each group does both. A rollout changes
            the number without a restart.
        rollout_deadline_s: seconds within which all groups of a new revision must serve; later the
            rollout is taken back. None sets no limit.
        placement: nodes for slices.
        packed_cache: most disk space on each node for packed weights, which a later start reads
            in place of packing again (CPUs); None keeps none.
        mesh, kv, attention, offload, limits, speculation: settings of each group.
        adapters: LoRA adapters that each group serves beside the model; requests name one.
        adapter_slots: largest number of adapters on the device at once; lets adapters come and go
            while groups serve. None gives each adapter of the list a slot, and takes no others.
        max_adapter_rank: largest rank of an adapter in these slots.
        host_adapters: largest number of adapters in a slice's host memory; None: 4 for each slot.
        adapter_root: folder of all adapters of the model; without it only listed adapters serve.
        guard: kind of a guard model with a plain chat template; None: what the template says.
        device: "cpu", "cuda", or "auto": cuda where the cluster has a GPU for each slice.
        kernels: backend of the operations; None takes the fastest for the device.
        batch_independent: on GPUs, makes an answer the same bit for bit in any batch, at some cost
            in speed; on CPUs answers always are.
        threads: CPU threads of a slice; None divides the cores of a node among the node's slices;
            hyperthreads count as one core.
        cpus_per_slice: Ray's logical CPUs of a slice; None takes 1, or an equal part of the machine
            on the local cluster that `arriero up` starts.
    """

    name: Name
    path: str
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    quantization: Literal["int8", "int4", "fp8"] | None = None
    activation_dtype: Literal["int8"] | None = None
    groups: Count = 1
    autoscale: AutoscaleSpec | None = None
    spares: Annotated[int, Field(ge=0)] = 0
    rollout_deadline_s: Seconds | None = None
    prefill_groups: Annotated[int, Field(ge=0)] = 0
    placement: PlacementSpec = PlacementSpec()
    mesh: MeshSpec = MeshSpec()
    kv: KvSpec = KvSpec()
    attention: AttentionSpec = AttentionSpec()
    packed_cache: Bytes | None = None
    offload: OffloadSpec = OffloadSpec()
    limits: LimitsSpec = LimitsSpec()
    adapters: tuple[AdapterSpec, ...] = ()
    adapter_slots: Annotated[int, Field(ge=1, le=4096)] | None = None
    max_adapter_rank: Annotated[int, Field(ge=1, le=1024)] = 64
    host_adapters: Count | None = None
    adapter_root: Path | None = None
    speculation: SpeculationSpec = SpeculationSpec()
    guard: Literal["llama-guard-3", "llama-guard-4"] | None = None
    device: Literal["cpu", "cuda", "auto"] = "auto"
    kernels: str | None = None
    batch_independent: bool = False
    threads: Count | None = None
    cpus_per_slice: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None

    @model_validator(mode="after")
    def _groups_within(self) -> ModelSpec:
        scale = self.autoscale
        if scale is not None and not scale.min <= self.groups <= scale.max:
            raise ValueError(
                f"`groups`={self.groups} is not within `autoscale`'s {scale.min} to {scale.max}"
            )
        return self

    @model_validator(mode="after")
    def _room_for_adapters(self) -> ModelSpec:
        check_room(self.adapter_slots, self.host_adapters, self.adapter_root)
        return self

    @model_validator(mode="after")
    def _prefill_groups_hand_over(self) -> ModelSpec:
        if not self.prefill_groups:
            return self
        if self.prefill_groups >= self.most_groups:
            raise ValueError(
                f"`prefill_groups`={self.prefill_groups} of {self.most_groups} groups leaves none "
                "for decoding; raise `groups`, or lower `prefill_groups`"
            )
        if not self.kv.host or not self.kv.prefix_cache:
            raise ValueError(
                f"`prefill_groups`={self.prefill_groups} hands blocks over through host memory; "
                "give `kv.host` a size, and leave `kv.prefix_cache` on"
            )
        return self

    @property
    def most_groups(self) -> int:
        """Largest number of groups outside of an update."""
        return self.groups if self.autoscale is None else self.autoscale.max

    @property
    def most_seats(self) -> int:
        """Largest number of groups, spare groups included, outside of an update."""
        return self.most_groups + self.spares

    def group_config(self, device: str) -> GroupConfig:
        """Settings of each group of this model on `device` ("cpu" or "cuda")."""
        return GroupConfig(
            model_path=self.path,
            dtype=self.dtype,
            quantization=self.quantization,
            activation_dtype=self.activation_dtype,
            **self.mesh.model_dump(),
            device=device,
            kernels=self.kernels,
            batch_independent=self.batch_independent,
            threads=self.threads,
            kv_dtype=self.kv.dtype,
            block_size=self.kv.block_size,
            kv_bytes=self.kv.memory,
            num_blocks=self.kv.blocks,
            num_local_blocks=self.kv.local_blocks,
            max_model_len=self.limits.max_model_len,
            max_sequences=self.limits.max_sequences,
            max_batch_tokens=self.limits.max_batch_tokens,
            max_queued=self.limits.max_queued,
            prefix_cache=self.kv.prefix_cache,
            tiers=self.kv.tiers(),
            sliding_window=self.attention.sliding_window,
            attention_sinks=self.attention.attention_sinks,
            changes_answers=self.attention.changes_answers,
            speculation=self.speculation.config(),
            packed_cache_bytes=self.packed_cache or 0,
            offload_layers=self.offload.layers,
            offload_folder=None if self.offload.folder is None else str(self.offload.folder),
            adapters=tuple(
                AdapterFile(name=adapter.name, path=str(adapter.path)) for adapter in self.adapters
            ),
            adapter_slots=slots_of(
                self.adapter_slots, self.max_adapter_rank, self.host_adapters, self.adapter_root
            ),
        )


COUNTS = ("groups", "autoscale", "prefill_groups", "spares", "rollout_deadline_s")
"""Fields that change without a restart of a group."""
