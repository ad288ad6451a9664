"""Llama 4's text model: the layers of a slice, packed from a checkpoint.

Dense layers and layers with experts alternate as the config states; so do layers with RoPE and
chunked attention, and layers with full attention and no RoPE. Knows this structure and the heads,
columns and experts of this rank; `Ops` computes each operation, `Mesh` each sum over ranks. Knows
nothing of steps, sequences and sampling.

Shape legend: T tokens, R rows that need logits, H hidden size, V vocabulary rows of this rank,
E experts, F columns of an expert, S expert slots of a stage.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from arriero.kernels import adapted
from arriero.kernels.attention_mask import AttentionMaskSpec
from arriero.kernels.expert_rows import RowFormat
from arriero.kernels.flat_batch import FlatBatch
from arriero.kernels.kv_cache import KVCache, KVCacheSpec
from arriero.kernels.layers import AttentionStyle, DenseLayer, MoELayer
from arriero.kernels.lora import AdapterRows
from arriero.kernels.ops import Ops
from arriero.kernels.packed_weights import Linear
from arriero.shards.adapters.banks import load_banks
from arriero.shards.checkpoint.formats.stored import tensor_specs
from arriero.shards.checkpoint.kv_scales import NO_SCALES, KvScales
from arriero.shards.checkpoint.reader import Checkpoint
from arriero.shards.collectives.expert_parallel import ExpertParallel, Loads
from arriero.shards.collectives.mesh import Mesh
from arriero.shards.errors import SpecError
from arriero.shards.kv.transfers import Pool
from arriero.shards.layout.dense import Span
from arriero.shards.layout.expert_placement import ExpertPlacement
from arriero.shards.layout.moe import MoEPart
from arriero.shards.models.image_table import ImageTable
from arriero.shards.models.llama.slice import EMBEDDING, HEAD, NORM
from arriero.shards.models.llama4.config import Llama4Config
from arriero.shards.models.llama4.tensors import llama4_modules
from arriero.shards.models.llama4.vision import VisionTower
from arriero.shards.models.loader import Loader
from arriero.shards.models.model_slice import SliceSettings
from arriero.shards.models.taps import Taps
from arriero.shards.protocol.step_plan import Int32

_EXPERTS = "feed_forward.experts"


class Llama4Slice:
    """Weights and KV cache of a rank of a Llama 4, and the forward pass."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        part: MoEPart,
        mesh: Mesh,
        ops: Ops,
        settings: SliceSettings,
    ) -> None:
        """Load the weights and allocate the KV cache; see `load_slice`.

        `mesh.join` may follow later.
        """
        config = checkpoint.config
        assert isinstance(config, Llama4Config), "a Llama 4 checkpoint"
        self.config, self.ops, self.mesh, self.dtype = config, ops, mesh, settings.dtype
        self._prefix = "" if config.vision is None else "language_model."
        self._kv_scales = settings.kv_scales
        self._first_layer = part.layers.start
        placement = settings.placement
        first_offloaded = part.layers.stop - settings.offload_layers
        folder = settings.offload_folder or Path(tempfile.gettempdir())

        def offload_context(layer: int) -> AbstractContextManager[None]:
            return ops.offloading(folder) if layer >= first_offloaded else nullcontext()

        self._read_expert = self._expert_reader(
            checkpoint, part, settings.quantization, offload_context
        )
        self._resident_experts: dict[int, list[int]] = {}
        experts = list(range(part.experts.start, part.experts.stop))
        if placement is not None:
            experts = placement.on(mesh.stage_rank)
        self.images = self._image_table(checkpoint, part)
        self._check_adapters(settings)
        self.adapters = load_banks(
            llama4_modules(config),
            part,
            settings.adapters,
            settings.adapter_slots,
            self.dtype,
            mesh.device,
        )
        # the loader cuts no vision tensors: each rank of the first stage holds the whole tower
        specs = tensor_specs(config, checkpoint.scheme)
        with Loader(
            checkpoint,
            checkpoint.scheme,
            [spec for spec in specs if spec.kind != "vision"],
            part,
            ops,
            dtype=self.dtype,
            quantization=settings.quantization,
            progress=settings.progress,
            packed=settings.packed,
        ) as loader:
            self._load(loader, part, experts, offload_context)
        num_local = sum(layer.style.mask.chunk_size > 0 for layer in self._layers)
        num_full = len(self._layers) - num_local
        self.kv = self._kv_cache(num_full, settings.num_blocks, settings, part)
        self.local_kv = self._kv_cache(num_local, settings.num_local_blocks, settings, part)
        self._experts: ExpertParallel | None = None
        if placement is not None:
            wire = settings.wire or _wire(self.dtype)
            routed = [layer.index for layer in self._layers if isinstance(layer, MoELayer)]
            self._experts = ExpertParallel(mesh, ops, placement, wire, routed)
        self._placement = placement
        self.taps = Taps(settings.taps, part.layers, last_stage=part.last_stage)
        self.decoder = self._make_decoder()

    def _expert_reader(
        self,
        checkpoint: Checkpoint,
        part: MoEPart,
        quantization: str | None,
        offload_context: Callable[[int], AbstractContextManager[None]],
    ) -> Callable[[int, int], tuple[Linear, Linear]]:
        """A function that reads an expert of a layer again, for a new placement."""
        scheme = checkpoint.scheme
        folder = checkpoint.with_own_maps()  # the checkpoint itself would keep its files mapped

        def read(layer: int, expert: int) -> tuple[Linear, Linear]:
            loader = Loader(
                folder.with_own_maps(),
                scheme,
                (),
                part,
                self.ops,
                dtype=self.dtype,
                quantization=quantization,
            )
            with offload_context(layer):
                return loader.expert(f"{self._name(layer)}{_EXPERTS}", expert, part.expert_columns)

        return read

    @staticmethod
    def _check_adapters(settings: SliceSettings) -> None:
        """Raise a `SpecError` for adapters of routed experts where rows travel between ranks."""
        if settings.placement is None:
            return
        for adapter in settings.adapters:
            if any(module.kind == "experts" for module in adapter.modules.values()):
                raise SpecError(
                    f"`adapters`: {adapter.folder.path} changes routed experts, which a group with "
                    "`dp` > 1 cannot serve; use `dp`: 1"
                )

    def _image_table(self, checkpoint: Checkpoint, part: MoEPart) -> ImageTable | None:
        """The vision tower with a table for images; None without vision or beyond stage 0."""
        if self.config.vision is None or not part.first_stage:
            return None
        device = self.mesh.device
        dtype = torch.float32 if device.type == "cpu" else self.dtype
        return ImageTable(VisionTower(checkpoint, self.config.vision, device, dtype))

    def _kv_cache(
        self, num_layers: int, num_blocks: int, settings: SliceSettings, part: MoEPart
    ) -> KVCache | None:
        """The KV cache of `num_layers` layers; None for 0 layers."""
        if not num_layers:
            return None
        spec = KVCacheSpec(
            num_layers=num_layers,
            num_blocks=num_blocks,
            num_kv_heads=part.kv_heads.size,
            head_dim=self.config.head_dim,
            block_size=settings.block_size,
            dtype=settings.cache_dtype,
        )
        return self.ops.kv_cache(spec, self.mesh.device)

    def _load(
        self,
        loader: Loader,
        part: MoEPart,
        experts: Sequence[int],
        offload_context: Callable[[int], AbstractContextManager[None]],
    ) -> None:
        config, prefix = self.config, self._prefix
        self._layers: list[DenseLayer] = []
        for index in range(part.layers.start, part.layers.stop):
            scales = self._kv_scales.get(index, NO_SCALES)
            layer = _layer(loader, config, part, index, self._name(index), scales)
            if config.routes(index):
                name, columns = self._name(index), part.expert_columns
                with offload_context(index):
                    pairs = [
                        loader.expert(f"{name}{_EXPERTS}", expert, columns) for expert in experts
                    ]
                layer = _with_experts(loader, config, part, layer, index, name, pairs)
            lora = None if self.adapters is None else self.adapters.layer(index)
            self._layers.append(replace(layer, lora=lora))
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
        """Prefix of the tensor names of a layer."""
        return f"{self._prefix}model.layers.{layer}."

    def _make_decoder(self) -> Callable[[Tensor, FlatBatch], Tensor]:
        return self.ops.decoder(
            self._layers,
            self.kv,
            self.mesh.reduce if self.mesh.tp > 1 else None,
            local_kv=self.local_kv,
            experts=self._experts,
            taps=self.taps.hooks,
            reduce_norm=self.mesh.reduce_norm if self.mesh.tp > 1 else None,
            half_sums=self.mesh if self.mesh.tp > 1 else None,
        )

    def place_experts(self, layer: int, expert_S: Int32) -> None:
        """Apply a new placement in a layer; missing experts are read from the checkpoint.

        Args:
            layer: global number of the layer; ignored if the layer is on another stage.
            expert_S: expert in each slot of the stage, rank by rank.
        """
        at = layer - self._first_layer
        if self._experts is None or self._placement is None or not 0 <= at < len(self._layers):
            return
        old = self._layers[at]
        assert isinstance(old, MoELayer), "a layer with experts"
        placement = ExpertPlacement(expert_S.copy(), self._placement.start_R1)
        rank = self.mesh.stage_rank
        resident = self._resident_experts.get(layer, self._placement.on(rank))
        wanted = placement.on(rank)
        pairs = dict(
            zip(resident, zip(old.experts_gate_up, old.experts_down, strict=True), strict=True)
        )
        for expert in wanted:
            if expert not in pairs:
                pairs[expert] = self._read_expert(layer, expert)
        new = self._layers[at] = replace(
            old,
            experts_gate_up=tuple(pairs[expert][0] for expert in wanted),
            experts_down=tuple(pairs[expert][1] for expert in wanted),
        )
        self.ops.replace_experts(old, new)  # frees the memory of replaced experts
        self._resident_experts[layer] = wanted
        self._experts.place(layer, placement)
        self.decoder = self._make_decoder()

    def pad_exchange(self, num_tokens: int) -> None:
        """See `ModelSlice.pad_exchange`."""
        if self._experts is not None:
            self._experts.padded_tokens = num_tokens

    def take_loads(self) -> dict[int, Loads]:
        """Tokens routed to each expert since the last call, by layer; empty without exchange."""
        return {} if self._experts is None else self._experts.take_loads()

    @property
    def weights_nbytes(self) -> int:
        """Bytes of all packed weights; a tied table counts once."""
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
        """Bytes of the KV caches for full and chunked attention."""
        return sum(kv.nbytes for kv in self.kv_pools.values())

    @property
    def kv_pools(self) -> dict[Pool, KVCache]:
        """The KV cache of each pool with layers on this rank."""
        pools = {Pool.ALL: self.kv, Pool.LOCAL: self.local_kv}
        return {pool: kv for pool, kv in pools.items() if kv is not None}

    def run_dummy_step(self) -> None:
        """Run a step without own tokens: this rank's experts compute tokens of other ranks."""
        if self._experts is not None:
            dtype = torch.float32 if self.mesh.device.type == "cpu" else self.dtype
            x_TH = torch.empty(0, self.config.hidden_size, dtype=dtype, device=self.mesh.device)
            for layer in self._layers:
                if isinstance(layer, MoELayer):
                    self._experts(x_TH, layer)

    def embed(self, tokens_T: Tensor, rows: AdapterRows | None = None) -> Tensor:
        """Token embeddings [T, H], on the first stage; see `ModelSlice.embed`."""
        assert self.embedding is not None, "only the first stage embeds"
        lora = None if self.adapters is None else self.adapters.embedding
        return self.mesh.reduce(adapted.embed(self.ops, tokens_T, self.embedding, lora, rows))

    def logits(self, x_RH: Tensor, rows: AdapterRows | None = None) -> Tensor:
        """Logits of this rank's vocabulary rows, float32 [R, V]; see `ModelSlice.logits`."""
        assert self.head is not None and self.norm_H is not None, "only the last stage has a head"
        banks = () if self.adapters is None else self.adapters.head
        eps = self.config.rms_norm_eps
        return adapted.logits(self.ops, x_RH, self.norm_H, eps, self.head, banks, rows)


def _wire(dtype: torch.dtype) -> RowFormat:
    return "float32" if dtype == torch.float32 else "bfloat16"


def attention_style(config: Llama4Config, layer: int) -> AttentionStyle:
    """Attention settings of a layer; `layer` is global."""
    if config.rope_layers[layer]:
        return AttentionStyle(
            rope="pairs",
            qk_norm=config.use_qk_norm,
            mask=AttentionMaskSpec(chunk_size=config.attention_chunk_size),
        )
    scale = (config.attn_scale, config.floor_scale) if config.attn_temperature else None
    return AttentionStyle(rope="none", query_scale=scale)


def _layer_nbytes(layer: DenseLayer) -> int:
    linears = [layer.qkv, layer.o, layer.gate_up, layer.down]
    if isinstance(layer, MoELayer):
        linears += [layer.router, *layer.experts_gate_up, *layer.experts_down]
    return sum(linear.nbytes for linear in linears) + layer.norms_nbytes


def _layer(
    loader: Loader, config: Llama4Config, part: MoEPart, index: int, name: str, scales: KvScales
) -> DenseLayer:
    """This rank's part of a decoder layer, without routed experts."""
    d, routed = config.head_dim, config.routes(index)
    q = Span(start=part.q_heads.start * d, stop=part.q_heads.stop * d)
    kv = Span(start=part.kv_heads.start * d, stop=part.kv_heads.stop * d)
    columns = part.shared_columns if routed else part.columns
    attn, mlp = f"{name}self_attn.", f"{name}feed_forward."
    if routed:
        mlp += "shared_expert."
    style = attention_style(config, index)
    # a norm without weights bounds keys by sqrt(head_dim), and no weight could take the scale
    k_scale = 1.0 if style.qk_norm else scales.k
    return DenseLayer(
        attn_norm_H=loader.norm(f"{name}input_layernorm"),
        qkv=loader.rows(
            [(f"{attn}q_proj", q), (f"{attn}k_proj", kv), (f"{attn}v_proj", kv)],
            factors=(1.0, 1 / k_scale, 1 / scales.v),
        ),
        o=loader.columns(f"{attn}o_proj", q, divisor=scales.v),
        mlp_norm_H=loader.norm(f"{name}post_attention_layernorm"),
        gate_up=loader.rows([(f"{mlp}gate_proj", columns), (f"{mlp}up_proj", columns)]),
        down=loader.columns(f"{mlp}down_proj", columns),
        num_q_heads=part.q_heads.size,
        num_kv_heads=part.kv_heads.size,
        head_dim=d,
        softmax_scale=d**-0.5 * k_scale,
        eps=config.rms_norm_eps,
        style=style,
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
    """The layer with router and experts; `pairs`: gate-up and down matrix of each expert."""
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
