"""A rank's slice of an EAGLE-3 head, and its forward pass.

The row at position t reads the target's taps at t beside the embedding of the token at t + 1, and
predicts the token at t + 2; in a chain of drafts the output of a row replaces the taps of the next.
Knows the structure of the head and the rows and columns of this rank; `Ops` computes each
operation, `Mesh` each sum over ranks. Knows nothing of steps, sequences and sampling.

Shape legend: T tokens, H hidden size of the head, G hidden size of the target, R rows that need
logits, V draft vocabulary rows of this rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from arriero.kernels.attention_mask import FULL_ATTENTION, AttentionMaskSpec
from arriero.kernels.flat_batch import FlatBatch
from arriero.kernels.kv_cache import KVCache, KVCacheSpec
from arriero.kernels.layers import AttentionStyle, DenseLayer
from arriero.kernels.ops import Ops
from arriero.kernels.packed_weights import Linear, Vocab
from arriero.shards.checkpoint.tensor_folder import TensorFolder
from arriero.shards.collectives.mesh import Mesh
from arriero.shards.layout.dense import Span
from arriero.shards.models.eagle3.check import check_head, vocabulary_map
from arriero.shards.models.eagle3.config import Eagle3Config
from arriero.shards.models.eagle3.tensors import (
    EMBEDDING,
    FC,
    FC_NORM,
    HEAD,
    INPUT_NORM,
    NORM,
    Eagle3Part,
    Eagle3Tensors,
    eagle3_specs,
)
from arriero.shards.models.loader import Loader


@dataclass(frozen=True, kw_only=True, slots=True)
class Eagle3Settings:
    """How a head is loaded, and what it takes from its target.

    Attributes:
        dtype: dtype of the weights.
        kv_dtype: dtype of the KV cache, the target's.
        num_blocks: KV blocks; the target's, whose block tables the head shares.
        block_size: tokens in a block.
        visible: keys that a token sees; the target's window, whose blocks are freed.
        embedding, lm_head: the target's tables on this rank, for a head without its own; None
            otherwise.
    """

    dtype: torch.dtype
    kv_dtype: torch.dtype
    num_blocks: int
    block_size: int
    visible: AttentionMaskSpec = FULL_ATTENTION
    embedding: Vocab | None = None
    lm_head: Vocab | None = None


class Eagle3Slice:
    """Weights and KV cache of a rank of an EAGLE-3 head, and the forward pass."""

    def __init__(
        self,
        path: Path,
        config: Eagle3Config,
        part: Eagle3Part,
        mesh: Mesh,
        ops: Ops,
        settings: Eagle3Settings,
    ) -> None:
        """Load the weights and allocate the KV cache; `mesh.join` may follow later.

        Raises:
            CheckpointError: the folder is no head of this config; see `check_head`.
        """
        folder = TensorFolder.of(path)
        stored = check_head(folder, config)
        self.config, self.part, self.mesh, self.ops = config, part, mesh, ops
        self.dtype = settings.dtype
        targets = vocabulary_map(folder, config)
        # ids rise with the rows, so that of equal logits the drafts take the target's token
        self._order = None if bool((targets.diff() > 0).all()) else targets.argsort()
        self.targets = (targets if self._order is None else targets[self._order]).int()
        specs = eagle3_specs(config, stored)
        with Loader(folder, None, specs, part, ops, dtype=settings.dtype) as loader:
            self._load(loader, stored, settings)
        self.kv: KVCache = ops.kv_cache(
            KVCacheSpec(
                num_layers=1,
                num_blocks=settings.num_blocks,
                num_kv_heads=part.kv_heads.size,
                head_dim=config.layer.head_dim,
                block_size=settings.block_size,
                dtype=settings.kv_dtype,
            ),
            mesh.device,
        )

    def _load(self, loader: Loader, stored: Eagle3Tensors, settings: Eagle3Settings) -> None:
        config, part, prefix = self.config, self.part, stored.prefix
        layer, d = config.layer, config.layer.head_dim
        q = Span(start=part.q_heads.start * d, stop=part.q_heads.stop * d)
        kv = Span(start=part.kv_heads.start * d, stop=part.kv_heads.stop * d)
        attn, mlp = f"{prefix}self_attn.", f"{prefix}mlp."
        self.fc: Linear = loader.columns(FC, part.taps)
        self.embedding_norm_H = loader.norm(f"{prefix}input_layernorm")
        self.layer = DenseLayer(
            attn_norm_H=loader.norm(f"{prefix}hidden_norm"),
            qkv=loader.rows([(f"{attn}q_proj", q), (f"{attn}k_proj", kv), (f"{attn}v_proj", kv)]),
            o=loader.columns(f"{attn}o_proj", q),
            mlp_norm_H=loader.norm(f"{prefix}post_attention_layernorm"),
            gate_up=loader.rows(
                [(f"{mlp}gate_proj", part.columns), (f"{mlp}up_proj", part.columns)]
            ),
            down=loader.columns(f"{mlp}down_proj", part.columns),
            num_q_heads=part.q_heads.size,
            num_kv_heads=part.kv_heads.size,
            head_dim=d,
            softmax_scale=d**-0.5 * layer.rope.attention_factor**2,
            eps=layer.rms_norm_eps,
            style=AttentionStyle(mask=settings.visible),
        )
        self.norm_H = loader.norm(NORM)
        self.input_norm = loader.norm(INPUT_NORM) if config.norm_before_fc else None
        self.fc_norms: list[Tensor] = []
        if config.fc_norm:
            self.fc_norms = [loader.norm(f"{FC_NORM}.{i}") for i in range(config.num_taps)]
        self._own: list[Vocab] = []
        embedding, head = settings.embedding, settings.lm_head
        if stored.has_embedding:
            embedding = loader.vocab(EMBEDDING, part.vocab)
            self._own.append(embedding)
        if stored.has_head:
            head = loader.vocab(HEAD, part.draft_vocab)
            self._own.append(head)
        assert embedding is not None and head is not None, "the caller gives the target's tables"
        self.embedding, self.head = embedding, head
        loader.finished(0)

    @property
    def weights_nbytes(self) -> int:
        """Bytes of the head's own packed weights; tables of the target do not count."""
        layer = self.layer
        linears = (self.fc, layer.qkv, layer.o, layer.gate_up, layer.down)
        norms = [self.embedding_norm_H, self.norm_H, *self.fc_norms]
        norms += [] if self.input_norm is None else [self.input_norm]
        packed: Sequence[Linear | Vocab] = (*linears, *self._own)
        return sum(each.nbytes for each in packed) + sum(
            norm.nbytes for norm in (*norms, layer.attn_norm_H, layer.mlp_norm_H)
        )

    @property
    def kv_nbytes(self) -> int:
        """Bytes of the KV cache."""
        return self.kv.nbytes

    def fuse(self, taps: Sequence[Tensor]) -> Tensor:
        """Features [T, H] of rows from their taps, each [T, G]."""
        eps = self.config.layer.rms_norm_eps
        if self.fc_norms:
            taps = [
                self.ops.rms_norm(tap, norm, eps)
                for tap, norm in zip(taps, self.fc_norms, strict=True)
            ]
        x_TI = torch.cat(list(taps), dim=1)
        if self.input_norm is not None:
            x_TI = self.ops.rms_norm(x_TI, self.input_norm, eps)
        own = self.part.taps
        return self.mesh.reduce(self.ops.linear(x_TI[:, own.start : own.stop], self.fc))

    def forward(self, tokens_T: Tensor, feature_TH: Tensor, batch: FlatBatch) -> Tensor:
        """Outputs [T, H] before the final norm; writes keys and values of the rows.

        Args:
            tokens_T: int32, for each row the token after the row's position.
            feature_TH: feature at the row's position: of `fuse`, or of `next_feature`.
            batch: places of the rows.
        """
        ops, layer, reduce = self.ops, self.layer, self.mesh.reduce
        x_TH = reduce(ops.embed(tokens_T, self.embedding)).to(feature_TH.dtype)
        e_TH = ops.rms_norm(x_TH, self.embedding_norm_H, layer.eps)
        h_TH = ops.rms_norm(feature_TH, layer.attn_norm_H, layer.eps)
        qkv_TE = ops.linear(torch.cat([e_TH, h_TH], dim=1), layer.qkv)
        q_TND = ops.rope_write_kv(qkv_TE, layer, self.kv, 0, batch)
        out_TE = ops.paged_attention(
            q_TND, layer.softmax_scale, self.kv, 0, batch, layer.style.mask
        )
        residual_TH = h_TH if self.config.norm_before_residual else feature_TH
        y_TH = residual_TH + reduce(ops.linear(out_TE, layer.o))
        return y_TH + reduce(ops.mlp_block(y_TH, layer))

    def next_feature(self, y_TH: Tensor) -> Tensor:
        """The feature of the next row of a chain, from the output of the row before."""
        if not self.config.norm_output:
            return y_TH
        return self.ops.rms_norm(y_TH, self.norm_H, self.config.layer.rms_norm_eps)

    def logits(self, y_RH: Tensor) -> Tensor:
        """Logits of this rank's rows of the draft vocabulary, float32 [R, V]."""
        return self.ops.logits(y_RH, self.norm_H, self.config.layer.rms_norm_eps, self.head)

    def in_order(self, logits_RV: Tensor) -> Tensor:
        """Gathered logits in the order of `targets`, which rises."""
        return logits_RV if self._order is None else logits_RV[:, self._order]
