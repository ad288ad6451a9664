"""A slice of a dense model: its layers, packed from a checkpoint.

Knows the structure of the model and the rows and columns of this rank; `Ops` computes each
operation, `Mesh` each sum over ranks. Knows nothing of steps, sequences and sampling.

Shape legend: T tokens, R rows that need logits, H hidden size, V vocabulary rows of this rank.
"""

from __future__ import annotations

import tempfile
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from arriero.kernels import adapted
from arriero.kernels.kv_cache import KVCache, KVCacheSpec
from arriero.kernels.layers import AttentionStyle, DenseLayer
from arriero.kernels.lora import AdapterRows
from arriero.kernels.ops import Ops
from arriero.shards.adapters.banks import load_banks
from arriero.shards.checkpoint.formats.stored import tensor_specs
from arriero.shards.checkpoint.kv_scales import NO_SCALES
from arriero.shards.checkpoint.reader import Checkpoint
from arriero.shards.collectives.expert_parallel import Loads
from arriero.shards.collectives.mesh import Mesh
from arriero.shards.kv.transfers import Pool
from arriero.shards.layout.dense import SlicePart, Span
from arriero.shards.model_config.dense import ModelConfig
from arriero.shards.models.image_table import ImageTable
from arriero.shards.models.llama.tensors import llama_modules
from arriero.shards.models.loader import Loader
from arriero.shards.models.model_slice import SliceSettings
from arriero.shards.models.taps import Taps
from arriero.shards.protocol.step_plan import Int32

EMBEDDING, NORM, HEAD = "model.embed_tokens", "model.norm", "lm_head"


class LlamaSlice:
    """Weights and KV cache of a rank of a dense Llama, and the forward pass.

    A family with further weights in its layers overrides `_load_layer`.
    """

    _norms_keys = False
    """Whether a norm follows the key projection; its weights then take the scale of keys."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        part: SlicePart,
        mesh: Mesh,
        ops: Ops,
        settings: SliceSettings,
    ) -> None:
        """Load the weights and allocate the KV cache; see `load_slice`."""
        config = checkpoint.config
        assert isinstance(config, ModelConfig), "a checkpoint of a dense Llama"
        self.config, self.part, self.ops, self.mesh = config, part, ops, mesh
        self.dtype = settings.dtype
        self._style = AttentionStyle(mask=settings.visible)
        self._kv_scales = settings.kv_scales
        self.images: ImageTable | None = None  # the family reads only text
        loader = Loader(
            checkpoint,
            checkpoint.scheme,
            tensor_specs(config, checkpoint.scheme),
            part,
            ops,
            dtype=self.dtype,
            quantization=settings.quantization,
            progress=settings.progress,
            packed=settings.packed,
        )
        self.adapters = load_banks(
            llama_modules(config),
            part,
            settings.adapters,
            settings.adapter_slots,
            self.dtype,
            mesh.device,
        )
        folder = settings.offload_folder or Path(tempfile.gettempdir())
        with loader:
            self._load(loader, settings.offload_layers, folder)
        self.kv = ops.kv_cache(
            KVCacheSpec(
                num_layers=part.layers.size,
                num_blocks=settings.num_blocks,
                num_kv_heads=part.kv_heads.size,
                head_dim=config.head_dim,
                block_size=settings.block_size,
                dtype=settings.cache_dtype,
            ),
            mesh.device,
        )
        self.taps = Taps(settings.taps, part.layers, last_stage=part.last_stage)
        self.decoder = ops.decoder(
            self._layers,
            self.kv,
            mesh.reduce if mesh.tp > 1 else None,
            taps=self.taps.hooks,
            reduce_norm=mesh.reduce_norm if mesh.tp > 1 else None,
            half_sums=mesh if mesh.tp > 1 else None,
        )

    def _load(self, loader: Loader, offload_layers: int, folder: Path) -> None:
        config, part = self.config, self.part
        self._layers: list[DenseLayer] = []
        for index in range(part.layers.start, part.layers.stop):
            offloaded = index >= part.layers.stop - offload_layers
            with self.ops.offloading(folder) if offloaded else nullcontext():
                layer = self._load_layer(loader, index)
            lora = None if self.adapters is None else self.adapters.layer(index)
            self._layers.append(replace(layer, lora=lora))
            loader.finished(index)
        tied = config.tie_word_embeddings
        self.embedding = loader.vocab(EMBEDDING, part.vocab) if part.first_stage else None
        self.head, self.norm_H = None, None
        if part.last_stage:
            shared = self.embedding if tied else None
            self.head = shared or loader.vocab(EMBEDDING if tied else HEAD, part.vocab)
            self.norm_H = loader.norm(NORM)
        loader.finished(None)

    def _load_layer(self, loader: Loader, index: int) -> DenseLayer:
        """This rank's part of a decoder layer; `index` is global."""
        config, part = self.config, self.part
        name, d = f"model.layers.{index}.", config.head_dim
        scales = self._kv_scales.get(index, NO_SCALES)
        q = Span(start=part.q_heads.start * d, stop=part.q_heads.stop * d)
        kv = Span(start=part.kv_heads.start * d, stop=part.kv_heads.stop * d)
        attn, mlp = name + "self_attn.", name + "mlp."
        first = part.tp_rank == 0  # only one rank adds the bias of a row-parallel matrix
        return DenseLayer(
            attn_norm_H=loader.norm(name + "input_layernorm"),
            qkv=loader.rows(
                [(attn + "q_proj", q), (attn + "k_proj", kv), (attn + "v_proj", kv)],
                bias=config.attention_bias,
                factors=(1.0, 1.0 if self._norms_keys else 1 / scales.k, 1 / scales.v),
            ),
            o=loader.columns(
                attn + "o_proj", q, bias=config.attention_bias and first, divisor=scales.v
            ),
            mlp_norm_H=loader.norm(name + "post_attention_layernorm"),
            gate_up=loader.rows(
                [(mlp + "gate_proj", part.columns), (mlp + "up_proj", part.columns)],
                bias=config.mlp_bias,
            ),
            down=loader.columns(mlp + "down_proj", part.columns, bias=config.mlp_bias and first),
            num_q_heads=part.q_heads.size,
            num_kv_heads=part.kv_heads.size,
            head_dim=d,
            softmax_scale=d**-0.5 * config.rope.attention_factor**2 * scales.k,
            eps=config.rms_norm_eps,
            style=self._style,
        )

    @property
    def weights_nbytes(self) -> int:
        """Bytes of all packed weights; a tied table counts once."""
        total = 0
        for layer in self._layers:
            total += sum(w.nbytes for w in (layer.qkv, layer.o, layer.gate_up, layer.down))
            total += layer.norms_nbytes
        if self.embedding is not None:
            total += self.embedding.nbytes
        if self.head is not None and self.head is not self.embedding:
            total += self.head.nbytes
        return total + (self.norm_H.nbytes if self.norm_H is not None else 0)

    @property
    def kv_nbytes(self) -> int:
        """Bytes of the KV cache."""
        return self.kv.nbytes

    @property
    def kv_pools(self) -> dict[Pool, KVCache]:
        """The KV cache, as the pool of all tokens."""
        return {Pool.ALL: self.kv}

    def run_dummy_step(self) -> None:
        """Do nothing: without experts, other ranks need no help from this rank."""

    def place_experts(self, layer: int, expert_S: Int32) -> None:
        """Do nothing: a dense model has no experts."""

    def pad_exchange(self, num_tokens: int) -> None:
        """Do nothing: a dense model sends no rows to experts."""

    def take_loads(self) -> dict[int, Loads]:
        """Empty: a dense model has no experts."""
        return {}

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
