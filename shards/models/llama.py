"""The dense Llama family: one slice's layers, packed from a checkpoint.

Knows the model's structure and which rows and columns this rank holds; each op comes from `Ops`,
each sum over ranks from `Mesh`. Knows nothing of steps, sequences or sampling.

Shape legend: T tokens, R rows whose logits are wanted, H hidden size, V vocabulary rows held here.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from arriero.kernels.ops import DenseLayer, KVCacheSpec, Linear, Ops, Vocab
from arriero.kernels.quant import QuantizedWeight, quantize_fp8, quantize_int4, quantize_int8
from arriero.shards.checkpoint.llama_names import EMBEDDING, FINAL_NORM, HEAD
from arriero.shards.checkpoint.reader import Checkpoint
from arriero.shards.experts import Loads
from arriero.shards.mesh import Mesh
from arriero.shards.models.config import ModelConfig
from arriero.shards.partition import SlicePart
from arriero.shards.plan import Int32

QUANTIZERS: dict[str, Callable[[Tensor], QuantizedWeight]] = {
    "int8": quantize_int8,
    "int4": quantize_int4,
    "fp8": quantize_fp8,
}
"""How weights are quantized while they load, matrix by matrix."""

Progress = Callable[[int, int], None]
"""Called with (steps done, steps in all) while weights load."""


class LlamaSlice:
    """The weights and KV cache of one rank, and the pass through them."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        part: SlicePart,
        mesh: Mesh,
        ops: Ops,
        *,
        dtype: torch.dtype,
        quantization: str | None = None,
        num_blocks: int,
        block_size: int,
        progress: Progress = lambda done, total: None,
    ) -> None:
        config = checkpoint.config
        assert isinstance(config, ModelConfig), "a checkpoint of a dense Llama"
        self.config, self.ops, self.mesh, self.dtype = config, ops, mesh, dtype
        loader = _Loader(checkpoint, config, part, ops, dtype, quantization)
        steps = part.layers.size + part.first_stage + part.last_stage
        self._layers: list[DenseLayer] = []
        for index in range(part.layers.start, part.layers.stop):
            self._layers.append(loader.layer(index))
            progress(len(self._layers), steps)
        tied = config.tie_word_embeddings
        self.embedding = loader.vocab(EMBEDDING) if part.first_stage else None
        self.head, self.norm_H = None, None
        if part.last_stage:
            shared = self.embedding if tied else None
            self.head = shared or loader.vocab(EMBEDDING if tied else HEAD)
            self.norm_H = loader.norm(FINAL_NORM)
        progress(steps, steps)
        self.kv = ops.kv_cache(
            KVCacheSpec(
                num_layers=part.layers.size,
                num_blocks=num_blocks,
                num_kv_heads=part.kv_heads.size,
                head_dim=config.head_dim,
                block_size=block_size,
                dtype=dtype,
            ),
            mesh.device,
        )
        self.decoder = ops.decoder(self._layers, self.kv, mesh.reduce if mesh.tp > 1 else None)

    @property
    def weights_nbytes(self) -> int:
        """Bytes of all packed weights, a tied table counted once."""
        total = 0
        for layer in self._layers:
            total += sum(w.nbytes for w in (layer.qkv, layer.o, layer.gate_up, layer.down))
            total += layer.attn_norm_H.nbytes + layer.mlp_norm_H.nbytes
        if self.embedding is not None:
            total += self.embedding.nbytes
        if self.head is not None and self.head is not self.embedding:
            total += self.head.nbytes
        return total + (self.norm_H.nbytes if self.norm_H is not None else 0)

    @property
    def kv_nbytes(self) -> int:
        """Bytes of the KV cache."""
        return self.kv.nbytes

    def sit_out(self) -> None:
        """A step without tokens: nothing to do."""

    def place_experts(self, layer: int, expert_S: Int32) -> None:
        """There are no experts."""

    def take_loads(self) -> dict[int, Loads]:
        """There are no experts."""
        return {}

    def embed(self, tokens_T: Tensor) -> Tensor:
        """Token embeddings, [T, H]: on the first stage."""
        assert self.embedding is not None, "only the first stage embeds"
        return self.mesh.reduce(self.ops.embed(tokens_T, self.embedding))

    def logits(self, x_RH: Tensor) -> Tensor:
        """Logits of the vocabulary rows held here, float32 [R, V]: on the last stage."""
        assert self.head is not None and self.norm_H is not None, "only the last stage has a head"
        return self.ops.logits(x_RH, self.norm_H, self.config.rms_norm_eps, self.head)


class _Loader:
    """Reads this rank's rows and columns and packs them; gone once loading is over.

    With it goes the map of the files, whose pages would count as this process's memory.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        config: ModelConfig,
        part: SlicePart,
        ops: Ops,
        dtype: torch.dtype,
        quantization: str | None,
    ) -> None:
        self._source, self._config = checkpoint, config
        self._part, self._ops, self._dtype = part, ops, dtype
        self._quantize = None if quantization is None else QUANTIZERS[quantization]

    def norm(self, name: str) -> Tensor:
        """A norm's weights, float32."""
        return self._source.tensor(name).float().clone()

    def layer(self, index: int) -> DenseLayer:
        """One decoder layer's part, by its global index."""
        config, part = self._config, self._part
        name = f"model.layers.{index}."
        d = config.head_dim
        q = (part.q_heads.start * d, part.q_heads.stop * d)
        kv = (part.kv_heads.start * d, part.kv_heads.stop * d)
        columns = (part.columns.start, part.columns.stop)
        attn, mlp = name + "self_attn.", name + "mlp."
        return DenseLayer(
            attn_norm_H=self.norm(name + "input_layernorm.weight"),
            qkv=self._rows(
                [(attn + "q_proj", *q), (attn + "k_proj", *kv), (attn + "v_proj", *kv)],
                bias=config.attention_bias,
            ),
            o=self._columns(attn + "o_proj", *q, bias=config.attention_bias),
            mlp_norm_H=self.norm(name + "post_attention_layernorm.weight"),
            gate_up=self._rows(
                [(mlp + "gate_proj", *columns), (mlp + "up_proj", *columns)], bias=config.mlp_bias
            ),
            down=self._columns(mlp + "down_proj", *columns, bias=config.mlp_bias),
            num_q_heads=part.q_heads.size,
            num_kv_heads=part.kv_heads.size,
            head_dim=d,
            softmax_scale=d**-0.5,
            eps=config.rms_norm_eps,
        )

    def _rows(self, parts: list[tuple[str, int, int]], *, bias: bool) -> Linear:
        """A product whose outputs are cut: rows of each named matrix, stacked."""
        weights = [self._source.rows(f"{name}.weight", a, b) for name, a, b in parts]
        joined = None
        if bias:
            pieces = [self._source.rows(f"{name}.bias", a, b) for name, a, b in parts]
            joined = torch.cat(pieces).float()
        return self._pack(weights, joined)

    def _columns(self, name: str, start: int, stop: int, *, bias: bool) -> Linear:
        """A product whose inputs are cut: its bias goes with tp rank 0, so that it counts once."""
        weight = self._source.columns(f"{name}.weight", start, stop)
        own = bias and self._part.tp_rank == 0
        vector = self._source.tensor(f"{name}.bias").float() if own else None
        return self._pack([weight], vector)

    def _pack(self, weights: list[Tensor], bias: Tensor | None) -> Linear:
        if self._quantize is None:
            return self._ops.pack_linear(weights, bias, self._dtype)
        return self._ops.pack_quantized([self._quantize(one) for one in weights], bias)

    def vocab(self, name: str) -> Vocab:
        """This rank's rows of the embedding or of the head."""
        span = self._part.vocab
        rows = self._source.rows(name, span.start, span.stop)
        if self._quantize is None:
            return self._ops.pack_vocab(rows, span.start, self._dtype)
        # the head is where rounding costs most, and four bits would save least
        quantize = quantize_int8 if self._quantize is quantize_int4 else self._quantize
        return self._ops.pack_quantized_vocab(quantize(rows), span.start)
