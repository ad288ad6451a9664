"""The sections of a model in `arriero.yaml`, and what each of its groups runs with.

Knows what may be asked for; knows nothing of whether a checkpoint can be cut the way it is asked
(the engine says so when it loads).
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from arriero.cluster.spec.fields import Bytes, Count, EverywherePath, Name, Seconds, SpecSection
from arriero.cluster.spec.scale_limits import ScaleLimits
from arriero.shards.config.group import GroupConfig
from arriero.shards.config.kv_tiers import RowType, TierConfig


class MeshSpec(SpecSection):
    """How a group cuts its model.

    Attributes:
        tp: tensor-parallel slices of each stage.
        pp: pipeline stages.
        dp: data-parallel attention, for mixtures of experts: so many times `tp` slices a stage,
            each `tp` with sequences of their own; the experts are dealt to all of them.
        ep: parts that the experts are dealt to; None for one to each slice of a stage.
        expert_wire: how rows travel to experts on other slices: float32, bfloat16 or fp8; None: as
            the model's dtype says.
        spare_experts: slots of each slice, in each layer, for second copies of experts that are
            asked much; with them experts are moved as the load asks. Needs `dp` > 1.
        tp_shares: relative size of each slice's share, `tp` numbers; None for as even as it goes.
        layer_split: layers of each stage, `pp` numbers; None splits by cost.
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
        return self.tp * self.dp * self.pp

    @model_validator(mode="after")
    def _lengths(self) -> MeshSpec:
        for field, values, axis, size in (
            ("tp_shares", self.tp_shares, "tp", self.tp),
            ("layer_split", self.layer_split, "pp", self.pp),
        ):
            if values is not None and len(values) != size:
                raise ValueError(
                    f"`{field}` has {len(values)} entries for {axis}={size}; give {size} of them"
                )
        return self


class KvDiskSpec(SpecSection):
    """Blocks kept on the disks of a group's nodes; what is there outlives the group.

    Attributes:
        path: folder on each slice's node. Groups of one model may name the same: what one wrote,
            another finds when it starts.
        size: most bytes that the group uses of it, over all its slices.
    """

    path: EverywherePath
    size: Bytes


class KvSpec(SpecSection):
    """The KV cache of a group.

    Attributes:
        memory: bytes of the whole group's pool ("512MiB"); None takes what the GPUs leave beside
            weights, graphs and a step; on CPUs 2 GiB, a quarter of memory at most.
        blocks: blocks outright, instead of `memory`.
        local_blocks: blocks of the pool for layers that attend within a chunk (Llama 4);
            None divides the memory for sequences of four chunks.
        block_size: tokens in a block.
        prefix_cache: keep and find blocks of shared prefixes.
        host: bytes of host memory of the whole group for blocks that leave the device.
        disk: likewise on disk.
        shared: folder of a store that all nodes reach, as fsspec spells it ("s3://bucket/kv"),
            for the blocks of all groups. It is not bounded here; have the store expire objects.
        tenant_share: the most of host memory and disk that one tenant's blocks may hold.
        tier_dtype: "int8" and "fp8" hold blocks below the device in about half of bfloat16's bytes;
            answers whose prefix comes up from there are close to the others, and no more the same.
            null holds them as the device does.
        transfer: how blocks come from a group on another node: "tcp"; "nixl", where both ends have
            NIXL installed (`pip install 'arriero[nixl]'`), else TCP; "auto" for NIXL where there
            are network cards with RDMA too. Groups of one node read each other's memory.
        same_layout: use kept blocks only where a group of the same mesh and kernels wrote them;
            else meshes share, and agree to rounding.
    """

    memory: Bytes | None = None
    blocks: Count | None = None
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
        """As a group takes them."""
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
    def _one_size(self) -> KvSpec:
        if self.memory is not None and self.blocks is not None:
            raise ValueError("`memory` and `blocks` both set the pool's size; keep one of them")
        return self


class AttentionSpec(SpecSection):
    """Attention within bounded memory, for dense models.

    Attributes:
        sliding_window: a token sees the last so many tokens alone, itself among them, and a
            sequence's KV cache holds no more of them; None for the model's own attention.
        attention_sinks: the first so many tokens are seen and kept besides.
        changes_answers: the window is wanted although the model was not trained with it, so that
            its answers to longer texts become others; without this word such a window is refused.
    """

    sliding_window: Count | None = None
    attention_sinks: Annotated[int, Field(ge=0)] = 0
    changes_answers: bool = False

    @model_validator(mode="after")
    def _sinks_beside_a_window(self) -> AttentionSpec:
        if self.sliding_window is None and (self.attention_sinks or self.changes_answers):
            raise ValueError(
                f"`attention_sinks`={self.attention_sinks} and `changes_answers`="
                f"{self.changes_answers} mean nothing without `sliding_window`; give it, or leave "
                "them out"
            )
        return self


class OffloadSpec(SpecSection):
    """Weights that do not fit the device.

    Attributes:
        layers: of each stage, the last so many stay on disk, mapped, and are read ahead of use
            (device cpu alone); of a mixture of experts, these layers' routed experts.
        folder: where; None takes the system's folder for temporary files.
    """

    layers: Annotated[int, Field(ge=0)] = 0
    folder: Path | None = None


class LimitsSpec(SpecSection):
    """What the scheduler takes on.

    Attributes:
        max_model_len: most tokens of a sequence; None takes the model's own limit.
        max_sequences: most sequences running at once.
        max_batch_tokens: most tokens of a step; longer prompts are prefilled in chunks.
        max_queued: most requests that wait before one is refused.
    """

    max_model_len: Count | None = None
    max_sequences: Count = 256
    max_batch_tokens: Count = 2048
    max_queued: Count = 4096


class PlacementSpec(SpecSection):
    """Where a group's slices may be.

    Attributes:
        span: the tensor-parallel slices of a stage may be on several nodes; without it they are on
            one, since each layer makes all of them wait for the network twice.
        stages: "pack" puts stages close together, "spread" on different nodes where it can.
        accelerator: Ray's name of the GPU type that slices want ("H100", "H200").
        labels: of the nodes, as Ray's label selectors write them: {"region": "in(us-a,us-b)"}.
    """

    span: bool = False
    stages: Literal["pack", "spread"] = "pack"
    accelerator: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{1,64}$")] | None = None
    labels: dict[str, str] = Field(default_factory=dict)


class AutoscaleSpec(SpecSection):
    """How many groups there are, by what is asked; see `autoscale`.

    Attributes:
        min: groups at least; 0 lets an idle model go, and its next request wait for a start.
        max: groups at most.
        target: share of a group's `max_sequences` that should be taken.
        wait_s: requests should not wait for their turn for longer.
        up_s: how long more groups must be wanted before they come.
        down_s: how long fewer must do before they go.
    """

    min: Annotated[int, Field(ge=0)] = 1
    max: Count
    target: Annotated[float, Field(gt=0, le=1)] = 0.6
    wait_s: Seconds = 2
    up_s: Seconds = 5
    down_s: Seconds = 300

    @model_validator(mode="after")
    def _order(self) -> AutoscaleSpec:
        if self.min > self.max:
            raise ValueError(f"`min`={self.min} is more than `max`={self.max}")
        return self

    def limits(self) -> ScaleLimits:
        """As the policy takes them."""
        return ScaleLimits(
            least=self.min,
            most=self.max,
            target=self.target,
            wait_s=self.wait_s,
            up_s=self.up_s,
            down_s=self.down_s,
        )


class ModelSpec(SpecSection):
    """One model and the groups that serve it.

    Attributes:
        name: what clients call it.
        path: folder with config.json, weights and tokenizer.json, on every node; or its fsspec URL
            (s3://, gs://, https://...), which each node copies to its cache once.
        dtype: of weights and KV cache.
        quantization: of the weights while they load: int8, int4, fp8; None keeps them in `dtype`.
        groups: replica groups; with `autoscale`, those of the beginning.
        autoscale: have as many as are needed; null keeps `groups`.
        spares: groups kept started beside those that serve: placed, their slices' code loaded and
            the weights in their nodes' page cache, as far as memory is free. One takes the place of
            a group that is lost, whose own place then becomes the spare's. Each takes a group's
            CPUs and GPUs, and none of their memory.
        prefill_groups: so many of them compute prompts and hand over, through host memory, to the
            others, which go on; 0 has each do both. Changed by a rollout without any restart.
        placement: which nodes slices go to.
        mesh, kv, attention, offload, limits: of each group.
        device: "cpu", "cuda", or "auto": cuda where the cluster has a GPU for each slice.
        kernels: backend of the operations; None picks the best for the device.
        batch_independent: on GPUs, answers are the same bit for bit whatever else is served
            beside them, at some cost in speed; on CPUs they always are.
        threads: CPU threads of a slice; None divides its node's cores among the slices on it.
        cpus_per_slice: Ray's logical CPUs that a slice takes; None takes 1, or an equal part of
            the machine on the local cluster that `arriero up` starts.
    """

    name: Name
    path: str
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    quantization: Literal["int8", "int4", "fp8"] | None = None
    groups: Count = 1
    autoscale: AutoscaleSpec | None = None
    spares: Annotated[int, Field(ge=0)] = 0
    prefill_groups: Annotated[int, Field(ge=0)] = 0
    placement: PlacementSpec = PlacementSpec()
    mesh: MeshSpec = MeshSpec()
    kv: KvSpec = KvSpec()
    attention: AttentionSpec = AttentionSpec()
    offload: OffloadSpec = OffloadSpec()
    limits: LimitsSpec = LimitsSpec()
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
    def _prefill_groups_hand_over(self) -> ModelSpec:
        if not self.prefill_groups:
            return self
        if self.prefill_groups >= self.most_groups:
            raise ValueError(
                f"`prefill_groups`={self.prefill_groups} of {self.most_groups} groups leaves none "
                "to go on with prompts; have more `groups`, or fewer for prompts"
            )
        if not self.kv.host or not self.kv.prefix_cache:
            raise ValueError(
                f"`prefill_groups`={self.prefill_groups} hands blocks over through host memory; "
                "give `kv.host` a size, and leave `kv.prefix_cache` on"
            )
        return self

    @property
    def most_groups(self) -> int:
        """Groups that there may be, updates aside."""
        return self.groups if self.autoscale is None else self.autoscale.max

    @property
    def most_places(self) -> int:
        """Groups that there may be, with the spare ones, updates aside."""
        return self.most_groups + self.spares

    def group_config(self, device: str) -> GroupConfig:
        """What each group of this model runs with, on `device` ("cpu" or "cuda")."""
        return GroupConfig(
            model_path=self.path,
            dtype=self.dtype,
            quantization=self.quantization,
            tp=self.mesh.tp,
            pp=self.mesh.pp,
            dp=self.mesh.dp,
            ep=self.mesh.ep,
            expert_wire=self.mesh.expert_wire,
            spare_experts=self.mesh.spare_experts,
            tp_shares=self.mesh.tp_shares,
            layer_split=self.mesh.layer_split,
            device=device,
            kernels=self.kernels,
            batch_independent=self.batch_independent,
            threads=self.threads,
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
            offload_layers=self.offload.layers,
            offload_folder=None if self.offload.folder is None else str(self.offload.folder),
        )


COUNTS = ("groups", "autoscale", "prefill_groups", "spares")
