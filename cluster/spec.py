"""The deployment spec, `arriero.yaml`: its fields and what they may be.

Knows what may be asked for and how each field is spelt; knows nothing of Ray, of placement, or of
whether a checkpoint can be cut the way it is asked (the engine says so when it loads).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    model_validator,
)

from arriero.cluster.autoscale import ScaleLimits
from arriero.router.gateway import GatewayConfig
from arriero.router.request_log import RequestLogConfig
from arriero.router.tenants.tenant import ANYONE, QueueLimits, Tenant
from arriero.router.tls import TlsFiles
from arriero.router.tracing import TracingConfig
from arriero.shards.errors import SpecError
from arriero.shards.group import GroupConfig
from arriero.shards.health import HealthLimits
from arriero.shards.kv.config import RowType, TierConfig

DEFAULT_PORT = 50051
DEFAULT_HTTP_PORT = 8000
_UNITS = {
    "": 1,
    "b": 1,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "kib": 2**10,
    "mib": 2**20,
    "gib": 2**30,
}
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


def _bytes(value: Any) -> Any:  # noqa: ANN401
    if not isinstance(value, str):
        return value
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", value)
    if found is None or found[2].lower() not in _UNITS:
        raise ValueError("write bytes as a number with an optional unit: 200MB, 1.5GiB")
    return int(float(found[1]) * _UNITS[found[2].lower()])


def parse_bytes(name: str, text: str) -> int:
    """Bytes written as in a spec, such as "64GiB".

    Raises:
        SpecError: they are not; names `name`.
    """
    try:
        found = _bytes(text)
    except ValueError as error:
        raise SpecError(f"`{name}`={text!r}: {error}") from None
    if found < 1:
        raise SpecError(f"`{name}`={text!r} must be more than nothing")
    return int(found)


def _everywhere(value: Path) -> Path:
    path = value.expanduser()
    if not path.is_absolute():
        raise ValueError("give an absolute path: it is the same on every node")
    return path


def _name(value: str) -> str:
    if not _NAME.fullmatch(value):
        raise ValueError("use 1 to 128 letters, digits, dots, dashes or underscores")
    return value


Bytes = Annotated[int, BeforeValidator(_bytes), Field(gt=0)]
Name = Annotated[str, AfterValidator(_name)]
Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]
Port = Annotated[int, Field(ge=0, le=65535)]
LogLevel = Literal["debug", "info", "warning", "error"]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Mesh(_Part):
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
    def _lengths(self) -> Mesh:
        for field, values, axis, size in (
            ("tp_shares", self.tp_shares, "tp", self.tp),
            ("layer_split", self.layer_split, "pp", self.pp),
        ):
            if values is not None and len(values) != size:
                raise ValueError(
                    f"`{field}` has {len(values)} entries for {axis}={size}; give {size} of them"
                )
        return self


class KvDisk(_Part):
    """Blocks kept on the disks of a group's nodes; what is there outlives the group.

    Attributes:
        path: folder on each slice's node. Groups of one model may name the same: what one wrote,
            another finds when it starts.
        size: most bytes that the group uses of it, over all its slices.
    """

    path: Annotated[Path, AfterValidator(_everywhere)]
    size: Bytes


class Kv(_Part):
    """The KV cache of a group.

    Attributes:
        memory: bytes of the whole group's pool ("512MiB"); None takes the default.
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
    disk: KvDisk | None = None
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
    def _one_size(self) -> Kv:
        if self.memory is not None and self.blocks is not None:
            raise ValueError("`memory` and `blocks` both set the pool's size; keep one of them")
        return self


class Attention(_Part):
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
    def _sinks_beside_a_window(self) -> Attention:
        if self.sliding_window is None and (self.attention_sinks or self.changes_answers):
            raise ValueError(
                f"`attention_sinks`={self.attention_sinks} and `changes_answers`="
                f"{self.changes_answers} mean nothing without `sliding_window`; give it, or leave "
                "them out"
            )
        return self


class Offload(_Part):
    """Weights that do not fit the device.

    Attributes:
        layers: of each stage, the last so many stay on disk, mapped, and are read ahead of use
            (device cpu alone); of a mixture of experts, these layers' routed experts.
        folder: where; None takes the system's folder for temporary files.
    """

    layers: Annotated[int, Field(ge=0)] = 0
    folder: Path | None = None


class Limits(_Part):
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


class Placement(_Part):
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
    labels: dict[str, str] = {}


class Autoscale(_Part):
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
    def _order(self) -> Autoscale:
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


class ModelSpec(_Part):
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
    autoscale: Autoscale | None = None
    spares: Annotated[int, Field(ge=0)] = 0
    prefill_groups: Annotated[int, Field(ge=0)] = 0
    placement: Placement = Placement()
    mesh: Mesh = Mesh()
    kv: Kv = Kv()
    attention: Attention = Attention()
    offload: Offload = Offload()
    limits: Limits = Limits()
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


class HttpSpec(_Part):
    """The HTTP listener of a gateway.

    Attributes:
        host: address it listens on.
        port: 0 takes any free one; None takes 8000, or any free one where gRPC's is 0.
    """

    host: str = "127.0.0.1"
    port: Port | None = None


class TlsSpec(_Part):
    """PEM files, on every node that uses them.

    Attributes:
        certificate: the chain, its own certificate first.
        key: the private key.
        ca: certificates that sign the other side's. Of a gateway: its clients must then show one
            (mutual TLS). Of the links: both sides must.
    """

    certificate: Path
    key: Path
    ca: Path | None = None

    def files(self) -> TlsFiles:
        """As the router takes them."""
        return TlsFiles(certificate=self.certificate, key=self.key, ca=self.ca)


class TracingSpec(_Part):
    """Where spans of requests go; wants `arriero[trace]`. The fields are `TracingConfig`'s."""

    endpoint: str
    sample: Annotated[float, Field(ge=0, le=1)] = 1.0

    def config(self) -> TracingConfig:
        """As the router takes it."""
        return TracingConfig(endpoint=self.endpoint, sample=self.sample)


class RequestLogSpec(_Part):
    """A line of JSON for each request; the fields are `RequestLogConfig`'s."""

    path: Path | None = None
    prompts: bool = False


class TenantSpec(_Part):
    """What one tenant may take, over all gateways; the fields are `Tenant`'s."""

    name: Name
    weight: Annotated[float, Field(gt=0, le=1000, allow_inf_nan=False)] = 1.0
    priority: Annotated[int, Field(ge=-1000, le=1000)] = 0
    requests_per_minute: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    tokens_per_minute: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    max_running: Count | None = None
    max_queued: Count | None = None
    metrics: bool = False
    private_cache: bool = False


class QueueSpec(_Part):
    """What a gateway keeps waiting, of each model; the fields are `QueueLimits`'."""

    max_queued: Count = 4096
    max_wait_s: Seconds = 60


class GatewaySpec(_Part):
    """The front door.

    Attributes:
        host: address it listens on.
        port: of gRPC; 0 takes any free one.
        http: the HTTP listener; null for none.
        count: gateways; each needs a node of its own when a port is fixed.
        drain_s: how long running streams may go on when it is told to stop.
        tls: of both listeners; null listens in the clear.
        keys: file of API keys (`arriero keys`), on every node; null asks for none.
        tenants: those whose keys have limits.
        queue: what may wait.
        request_log: a line for each request; null writes none.
        lost_s: how long a stream whose group was lost waits for one that goes on with it.
    """

    host: str = "127.0.0.1"
    port: Port = DEFAULT_PORT
    http: HttpSpec | None = HttpSpec()
    count: Count = 1
    drain_s: Seconds = 10
    tls: TlsSpec | None = None
    keys: Path | None = None
    tenants: tuple[TenantSpec, ...] = ()
    queue: QueueSpec = QueueSpec()
    request_log: RequestLogSpec | None = None
    lost_s: Seconds = 120

    @model_validator(mode="after")
    def _tenants_have_keys(self) -> GatewaySpec:
        names = [tenant.name for tenant in self.tenants]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"tenant `{name}` occurs twice; keep one")
        if self.keys is None and any(name != ANYONE for name in names):
            raise ValueError(
                f"`tenants` without `keys`: nobody can tell them apart; give a key file, or limit "
                f"all callers together as the one tenant `{ANYONE}`"
            )
        return self

    @property
    def http_port(self) -> int:
        """The port of HTTP; 0 for any free one, or for none at all."""
        if self.http is None:
            return 0
        if self.http.port is not None:
            return self.http.port
        return DEFAULT_HTTP_PORT if self.port else 0

    def shares(self) -> tuple[Tenant, ...]:
        """The tenants, as gateways take them."""
        return tuple(Tenant(**dict(tenant)) for tenant in self.tenants)

    def config(
        self,
        models: tuple[str, ...],
        link_tls: TlsSpec | None = None,
        tracing: TracingSpec | None = None,
        wake_s: Mapping[str, float] | None = None,
    ) -> GatewayConfig:
        """What each gateway runs with; see there for the arguments."""
        log = None if self.request_log is None else RequestLogConfig(**dict(self.request_log))
        return GatewayConfig(
            address=f"{self.host}:{self.port}",
            http_address=None if self.http is None else f"{self.http.host}:{self.http_port}",
            models=models,
            tls=None if self.tls is None else self.tls.files(),
            link_tls=None if link_tls is None else link_tls.files(),
            keys=self.keys,
            tenants=self.shares(),
            limits=QueueLimits(**dict(self.queue)),
            num_gateways=self.count,
            tracing=None if tracing is None else tracing.config(),
            request_log=log,
            lost_s=self.lost_s,
            wake_s=wake_s or {},
        )


class HealthSpec(_Part):
    """How fast a loss is noticed (Ray's own defaults, 10 s and three failures, are too slow).

    Attributes:
        period_s: time between two checks of a group or gateway.
        timeout_s: a check that takes longer has failed.
        start_timeout_s: a group that has not given a token by then has failed to start.
        drain_s: how long a group's running streams may go on when it is told to stop; what still
            runs then moves to another group.
        silence_s: a slice that sends no pulse for so long is lost; it sends two a second.
        hang_s: a step in which every slice waits and nothing moves for so long is lost.
        step_s: the longest a step may compute.
        canary_s: an idle group draws a token so often, to see that it still can.
    """

    period_s: Seconds = 1
    timeout_s: Seconds = 5
    silence_s: Seconds = 3
    hang_s: Seconds = 4
    step_s: Seconds = 600
    canary_s: Seconds = 5
    start_timeout_s: Seconds = 600
    drain_s: Seconds = 10

    def limits(self) -> HealthLimits:
        """As a group takes them."""
        return HealthLimits(silence_s=self.silence_s, hang_s=self.hang_s, step_s=self.step_s)


class AdminTlsSpec(_Part):
    """PEM files of Admin, on the nodes where the operator may run: the head before others.

    Attributes:
        certificate: the chain, its own certificate first.
        key: the private key.
        ca: certificates of the authority that signed it. `up` notes them in its state file, and
            the command line believes no other; callers show the token, not a certificate.
        name: that the certificate is for; null: the address that Admin is reached at.
    """

    certificate: Path
    key: Path
    ca: Path
    name: Annotated[str, Field(min_length=1, max_length=253)] | None = None

    def files(self) -> TlsFiles:
        """As a listener takes them."""
        return TlsFiles(certificate=self.certificate, key=self.key)


class AdminSpec(_Part):
    """Where `arriero.v1.Admin` listens, for those who hold the deployment's admin token.

    Attributes:
        host: address it listens on, on the node where the operator runs.
        port: 0 takes any free one.
        tls: null listens in the clear, token included: for loopback and networks of one's own.
    """

    host: str = "127.0.0.1"
    port: Port = 0
    tls: AdminTlsSpec | None = None


class RaySpec(_Part):
    """The Ray cluster.

    Attributes:
        address: of a running cluster; None starts one on this machine.
        node_address: loopback address of the local cluster's node. Not 127.0.0.1, for which Ray
            substitutes the host's own address.
        num_cpus: logical CPUs of the local cluster; None takes the machine's.
        object_store: bytes of the local cluster's object store (streams do not pass through it).
        dashboard: start Ray's dashboard with the local cluster.
    """

    address: str | None = None
    node_address: str = "127.0.0.2"
    num_cpus: Count | None = None
    object_store: Bytes = 200 * 10**6
    dashboard: bool = False

    @model_validator(mode="after")
    def _loopback(self) -> RaySpec:
        if self.node_address == "127.0.0.1":
            raise ValueError("`node_address` 127.0.0.1 is replaced by Ray; use 127.0.0.2")
        if self.object_store < 80 * 10**6:
            raise ValueError("`object_store` is below Ray's own minimum; give 80MB or more")
        return self


class Spec(_Part):
    """A whole deployment: `arriero.yaml`.

    Attributes:
        models, gateway, health, ray: see there.
        link_tls: of the links between gateways and leaders; its certificate must be for the name
            `arriero-link`. Null leaves them in the clear, each opened by its leader's token.
        tracing: spans of requests; null makes none.
        log_level: of what leaders, slices and gateways log; `arriero logs` shows it.
    """

    models: Annotated[tuple[ModelSpec, ...], Field(min_length=1)]
    gateway: GatewaySpec = GatewaySpec()
    link_tls: TlsSpec | None = None
    tracing: TracingSpec | None = None
    health: HealthSpec = HealthSpec()
    admin: AdminSpec = AdminSpec()
    ray: RaySpec = RaySpec()
    log_level: LogLevel = "warning"

    @model_validator(mode="after")
    def _names(self) -> Spec:
        names = [model.name for model in self.models]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"model name `{name}` occurs twice; give each model its own")
        if self.link_tls is not None and self.link_tls.ca is None:
            raise ValueError("`link_tls` needs its `ca`: both ends of a link check each other")
        return self

    @property
    def wake_s(self) -> dict[str, float]:
        """Models that have no group while nobody asks, and how long their first request waits."""
        return {
            model.name: self.health.start_timeout_s
            for model in self.models
            if model.autoscale is not None and model.autoscale.min == 0
        }

    @property
    def num_slices(self) -> int:
        """Slices of all groups, as many as there may be, with the spare ones."""
        return sum(m.most_places * m.mesh.num_slices for m in self.models)
