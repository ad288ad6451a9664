"""Llama 4's text model: one slice's layers, packed from a checkpoint.

Dense and routed layers alternate as the config says; so do layers that rotate and attend within
their chunk, and layers that do neither and see everything. Knows that structure and which heads,
columns and experts this rank holds; each op comes from `Ops`, each sum over ranks from `Mesh`.
Knows nothing of steps, sequences or sampling.

Shape legend: T tokens, R rows whose logits are wanted, H hidden size, V vocabulary rows held here,
E experts, F columns of an expert.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from arriero.kernels.attention_mask import AttentionMaskSpec
from arriero.kernels.expert_rows import Wire
from arriero.kernels.ops import (
    AttentionStyle,
    DenseLayer,
    FlatBatch,
    KVCache,
    KVCacheSpec,
    Linear,
    MoELayer,
    Ops,
)
from arriero.shards.checkpoint.formats.stored import tensor_specs
from arriero.shards.checkpoint.reader import Checkpoint
from arriero.shards.collectives.expert_parallel import ExpertParallel, Loads
from arriero.shards.collectives.mesh import Mesh
from arriero.shards.kv.transfers import Pool
from arriero.shards.layout.dense import Span
from arriero.shards.layout.expert_placement import ExpertPlacement
from arriero.shards.layout.moe import MoEPart
from arriero.shards.model_config.llama4 import Llama4Config
from arriero.shards.models.image_table import ImageTable
from arriero.shards.models.llama import EMBEDDING, HEAD, NORM
from arriero.shards.models.llama4_vision import VisionTower
from arriero.shards.models.loader import Loader, Progress
from arriero.shards.protocol.step_plan import Int32

_EXPERTS = "feed_forward.experts"


class Llama4Slice:
    """The weights and KV cache of one rank, and the pass through them."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        part: MoEPart,
        mesh: Mesh,
        ops: Ops,
        *,
        dtype: torch.dtype,
        quantization: str | None = None,
        num_blocks: int,
        num_local_blocks: int,
        block_size: int,
        offload_layers: int = 0,
        offload_folder: Path | None = None,
        placement: ExpertPlacement | None = None,
        wire: Wire | None = None,
        progress: Progress = lambda done, total: None,
    ) -> None:
        """Load.

        Args:
            checkpoint: open, and checked to hold what its config says.
            part: of this rank.
            mesh: of its group; `join` may come later.
            ops: the kernels.
            dtype: of weights and KV cache.
            quantization: of the weights while they load, or None.
            num_blocks: KV blocks of the layers that see everything.
            num_local_blocks: of those that attend within their chunk.
            block_size: tokens in a block.
            offload_layers: the routed experts of the last so many layers stay mapped from disk.
            offload_folder: where; None is the system's folder for temporary files.
            placement: of the experts over the ranks of a stage; None where each rank serves its
                own by the sum of all ranks' outputs.
            wire: how rows travel to experts on other ranks; None: as the weights are.
            progress: called while weights load.
        """
        config = checkpoint.config
        assert isinstance(config, Llama4Config), "a Llama 4 checkpoint"
        self.config, self.ops, self.mesh, self.dtype = config, ops, mesh, dtype
        scheme = checkpoint.scheme
        later = checkpoint.unmapped()  # the folder itself would keep its files mapped

        first_out = part.layers.stop - offload_layers
        folder = offload_folder or Path(tempfile.gettempdir())

        def held_of(layer: int) -> AbstractContextManager[None]:
            return ops.offloading(folder) if layer >= first_out else nullcontext()

        def expert(layer: int, expert: int) -> tuple[Linear, Linear]:
            loader = Loader(
                later.unmapped(), scheme, (), part, ops, dtype=dtype, quantization=quantization
            )
            with held_of(layer):
                return loader.expert(f"{self._name(layer)}{_EXPERTS}", expert, part.expert_columns)

        self._read_expert = expert
        self._prefix = "" if config.vision is None else "language_model."
        self._first_layer = part.layers.start
        self._held: dict[int, list[int]] = {}
        held = list(range(part.experts.start, part.experts.stop))
        if placement is not None:
            held = placement.on(mesh.stage_rank)
        # each rank that embeds holds the tower whole, so it is no part of what the loader cuts
        due = [one for one in tensor_specs(config, scheme) if one.kind != "vision"]
        self.images: ImageTable | None = None
        if config.vision is not None and part.first_stage:
            on_cpu = mesh.device.type == "cpu"
            tower = VisionTower(
                checkpoint, config.vision, mesh.device, torch.float32 if on_cpu else dtype
            )
            self.images = ImageTable(tower)
        with Loader(
            checkpoint,
            scheme,
            due,
            part,
            ops,
            dtype=dtype,
            quantization=quantization,
            progress=progress,
        ) as loader:
            self._load(loader, part, held, held_of)
        local = sum(layer.style.visible.chunk_size > 0 for layer in self._layers)

        def cache(num_layers: int, num_blocks: int) -> KVCache | None:
            if not num_layers:
                return None
            spec = KVCacheSpec(
                num_layers=num_layers,
                num_blocks=num_blocks,
                num_kv_heads=part.kv_heads.size,
                head_dim=config.head_dim,
                block_size=block_size,
                dtype=dtype,
            )
            return ops.kv_cache(spec, mesh.device)

        self.kv = cache(len(self._layers) - local, num_blocks)
        self.local_kv = cache(local, num_local_blocks)
        self._experts: ExpertParallel | None = None
        if placement is not None:
            self._experts = ExpertParallel(mesh, ops, placement, wire or _wire(dtype))
        self._placement = placement
        self.decoder = self._make_decoder()

    def _load(
        self,
        loader: Loader,
        part: MoEPart,
        experts: Sequence[int],
        held_of: Callable[[int], AbstractContextManager[None]],
    ) -> None:
        config, prefix = self.config, self._prefix
        self._layers: list[DenseLayer] = []
        for index in range(part.layers.start, part.layers.stop):
            layer = _layer(loader, config, part, index, self._name(index))
            if config.routes(index):
                name, columns = self._name(index), part.expert_columns
                with held_of(index):
                    pairs = [loader.expert(f"{name}{_EXPERTS}", one, columns) for one in experts]
                layer = _with_experts(loader, config, part, layer, index, name, pairs)
            self._layers.append(layer)
            loader.finished(index)
        tied, table = config.tie_word_embeddings, f"{prefix}{EMBEDDING}"
        self.embedding = loader.vocab(table, part.vocab) if part.first_stage else None
        self.head, self.norm_H = None, None
        if part.last_stage:
            shared = self.embedding if tied else None
            self.head = shared or loader.vocab(table if tied else f"{prefix}{HEAD}", part.vocab)
            self.norm_H = loader.norm(f"{prefix}{NORM}")
        loader.finished(None)

    def _name(self, layer: int) -> str:
        """What the names of a layer's tensors begin with."""
        return f"{self._prefix}model.layers.{layer}."

    def _make_decoder(self) -> Callable[[Tensor, FlatBatch], Tensor]:
        return self.ops.decoder(
            self._layers,
            self.kv,
            self.mesh.reduce if self.mesh.tp > 1 else None,
            local_kv=self.local_kv,
            experts=self._experts,
        )

    def place_experts(self, layer: int, expert_S: Int32) -> None:
        """Follow another placement in a layer; what this rank lacks is read from the checkpoint.

        Args:
            layer: its global number; ignored where another stage has it.
            expert_S: the expert in each slot of the stage, rank by rank.
        """
        at = layer - self._first_layer
        if self._experts is None or self._placement is None or not 0 <= at < len(self._layers):
            return
        old = self._layers[at]
        assert isinstance(old, MoELayer), "a layer with experts"
        placement = ExpertPlacement(expert_S.copy(), self._placement.start_R1)
        held = self._held.get(layer, self._placement.on(self.mesh.stage_rank))
        wanted = placement.on(self.mesh.stage_rank)
        pairs = dict(
            zip(held, zip(old.experts_gate_up, old.experts_down, strict=True), strict=True)
        )
        for expert in wanted:
            if expert not in pairs:
                pairs[expert] = self._read_expert(layer, expert)
        self._layers[at] = replace(
            old,
            experts_gate_up=tuple(pairs[one][0] for one in wanted),
            experts_down=tuple(pairs[one][1] for one in wanted),
        )
        self.ops.forget_experts(old)  # else what is replaced would stay in memory
        self._held[layer] = wanted
        self._experts.place(layer, placement)
        self.decoder = self._make_decoder()

    def take_loads(self) -> dict[int, Loads]:
        """Tokens that each expert was sent since the last call, by layer; empty on one rank."""
        return {} if self._experts is None else self._experts.take_loads()

    @property
    def weights_nbytes(self) -> int:
        """Bytes of all packed weights, a tied table counted once."""
        total = sum(_layer_nbytes(layer) for layer in self._layers)
        if self.images is not None:
            total += self.images.nbytes
        if self.embedding is not None:
            total += self.embedding.nbytes
        if self.head is not None and self.head is not self.embedding:
            total += self.head.nbytes
        return total + (self.norm_H.nbytes if self.norm_H is not None else 0)

    @property
    def kv_nbytes(self) -> int:
        """Bytes of the KV caches: of layers that see everything, and of those that do not."""
        return sum(one.nbytes for one in self.kv_pools.values())

    @property
    def kv_pools(self) -> dict[Pool, KVCache]:
        """The KV cache, of each pool that has layers here."""
        pools = {Pool.ALL: self.kv, Pool.LOCAL: self.local_kv}
        return {pool: kv for pool, kv in pools.items() if kv is not None}

    def sit_out(self) -> None:
        """A step without tokens: the experts held here serve the other ranks' tokens."""
        if self._experts is not None:
            dtype = torch.float32 if self.mesh.device.type == "cpu" else self.dtype
            x_TH = torch.empty(0, self.config.hidden_size, dtype=dtype, device=self.mesh.device)
            for layer in self._layers:
                if isinstance(layer, MoELayer):
                    self._experts(x_TH, layer)

    def embed(self, tokens_T: Tensor) -> Tensor:
        """Token embeddings, [T, H]: on the first stage."""
        assert self.embedding is not None, "only the first stage embeds"
        return self.mesh.reduce(self.ops.embed(tokens_T, self.embedding))

    def logits(self, x_RH: Tensor) -> Tensor:
        """Logits of the vocabulary rows held here, float32 [R, V]: on the last stage."""
        assert self.head is not None and self.norm_H is not None, "only the last stage has a head"
        return self.ops.logits(x_RH, self.norm_H, self.config.rms_norm_eps, self.head)


def _wire(dtype: torch.dtype) -> Wire:
    return "float32" if dtype == torch.float32 else "bfloat16"


def attention_style(config: Llama4Config, layer: int) -> AttentionStyle:
    """What attention does in a layer, by its global index."""
    if config.rope_layers[layer]:
        return AttentionStyle(
            rope="pairs",
            qk_norm=config.use_qk_norm,
            visible=AttentionMaskSpec(chunk_size=config.attention_chunk_size),
        )
    scale = (config.attn_scale, config.floor_scale) if config.attn_temperature else None
    return AttentionStyle(rope="none", query_scale=scale)


def _layer_nbytes(layer: DenseLayer) -> int:
    linears = [layer.qkv, layer.o, layer.gate_up, layer.down]
    if isinstance(layer, MoELayer):
        linears += [layer.router, *layer.experts_gate_up, *layer.experts_down]
    norms = layer.attn_norm_H.nbytes + layer.mlp_norm_H.nbytes
    return sum(one.nbytes for one in linears) + norms


def _layer(
    loader: Loader, config: Llama4Config, part: MoEPart, index: int, name: str
) -> DenseLayer:
    """One decoder layer's part but for its routed experts."""
    d, routed = config.head_dim, config.routes(index)
    q = Span(start=part.q_heads.start * d, stop=part.q_heads.stop * d)
    kv = Span(start=part.kv_heads.start * d, stop=part.kv_heads.stop * d)
    columns = part.shared_columns if routed else part.columns
    attn, mlp = f"{name}self_attn.", f"{name}feed_forward."
    if routed:
        mlp += "shared_expert."
    return DenseLayer(
        attn_norm_H=loader.norm(f"{name}input_layernorm"),
        qkv=loader.rows([(f"{attn}q_proj", q), (f"{attn}k_proj", kv), (f"{attn}v_proj", kv)]),
        o=loader.columns(f"{attn}o_proj", q),
        mlp_norm_H=loader.norm(f"{name}post_attention_layernorm"),
        gate_up=loader.rows([(f"{mlp}gate_proj", columns), (f"{mlp}up_proj", columns)]),
        down=loader.columns(f"{mlp}down_proj", columns),
        num_q_heads=part.q_heads.size,
        num_kv_heads=part.kv_heads.size,
        head_dim=d,
        softmax_scale=d**-0.5,
        eps=config.rms_norm_eps,
        style=attention_style(config, index),
    )


def _with_experts(
    loader: Loader,
    config: Llama4Config,
    part: MoEPart,
    layer: DenseLayer,
    index: int,
    name: str,
    pairs: Sequence[tuple[Linear, Linear]],
) -> MoELayer:
    """The layer with its router, and these of its experts: gate and up, and down."""
    whole = Span(start=0, stop=config.num_experts)
    return MoELayer(
        **{field: getattr(layer, field) for field in DenseLayer.__slots__},
        router=loader.rows([(f"{name}feed_forward.router", whole)], keep=True),
        experts_gate_up=tuple(gate_up for gate_up, _ in pairs),
        experts_down=tuple(down for _, down in pairs),
        first_expert=part.experts.start,
        top_k=config.top_k,
        index=index,
    )
