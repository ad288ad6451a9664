"""The tensors of an EAGLE-3 head under their names in both layouts, and a rank's part of them.

Knows names, shapes and cuts; knows nothing of files and steps. Needs no torch, so that planners
count bytes fast.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields

from arriero.shards.checkpoint.formats.modules import Cut, Module, attention, gated_mlp, norm
from arriero.shards.checkpoint.formats.stored import TensorSpec, plain_specs
from arriero.shards.config.parallel import ParallelConfig
from arriero.shards.layout.dense import SlicePart, Span, partition, split
from arriero.shards.model_config.dense import ModelConfig
from arriero.shards.models.eagle3.config import Eagle3Config

EMBEDDING, FC, NORM, HEAD = "embed_tokens", "fc", "norm", "lm_head"
INPUT_NORM, FC_NORM = "input_norm", "fc_norm"
D2T, T2D = "d2t", "t2d"
LAYERS = ("midlayer.", "layers.0.")
"""Prefix of the layer in the flat layout and in that of `speculators`."""

_COLUMNS = 16
"""Unit of cuts of tap columns and of draft vocabulary rows."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Eagle3Part(SlicePart):
    """The part of a head on a rank of the last stage; `vocab` are the embedding's rows.

    Attributes:
        draft_vocab: rows of the head's `lm_head`.
        taps: columns of `fc`.
    """

    draft_vocab: Span
    taps: Span


def eagle3_parts(config: Eagle3Config, mesh: ParallelConfig) -> list[Eagle3Part]:
    """Cut a head over the tensor-parallel ranks of a stage, in the shares of the target.

    Raises:
        SpecError: the head has too few heads or columns for `tp` ranks.
    """
    alone = ParallelConfig(tp=mesh.tp, tp_shares=mesh.tp_shares)
    parts = partition(config.layer, alone)
    taps = _split(config.tap_columns, mesh.tp)
    rows = _split(config.draft_vocab_size, mesh.tp)
    return [
        Eagle3Part(
            **{field.name: getattr(part, field.name) for field in fields(SlicePart)},
            taps=taps[part.tp_rank],
            draft_vocab=rows[part.tp_rank],
        )
        for part in parts
    ]


def _split(total: int, tp: int) -> list[Span]:
    return split(total, [1.0] * tp, _COLUMNS if total >= _COLUMNS * tp else 1)


@dataclass(frozen=True, kw_only=True, slots=True)
class Eagle3Tensors:
    """What a folder of a head has.

    Attributes:
        prefix: name of the layer, a member of `LAYERS`.
        has_embedding: the head has an embedding of its own; else it uses the target's.
        has_head: the head has an `lm_head` of its own; else it uses the target's.
    """

    prefix: str = LAYERS[0]
    has_embedding: bool = False
    has_head: bool = True

    @classmethod
    def of(cls, names: Mapping[str, object]) -> Eagle3Tensors:
        """What the tensors `names` show."""
        return cls(
            prefix=LAYERS[any(name.startswith(LAYERS[1]) for name in names)],
            has_embedding=f"{EMBEDDING}.weight" in names,
            has_head=f"{HEAD}.weight" in names,
        )


def eagle3_modules(config: Eagle3Config, stored: Eagle3Tensors) -> list[Module]:
    """Every matrix and vector of a head, without the maps between vocabularies."""
    layer, prefix = config.layer, stored.prefix
    hidden, d = layer.hidden_size, layer.head_dim
    q, kv = Cut(axis="q_heads", per=d), Cut(axis="kv_heads", per=d)
    modules = [
        Module(
            name=FC,
            kind="mlp",
            shape=(hidden, config.tap_columns),
            product=True,
            layer=0,
            columns=Cut(axis="taps"),
        ),
        *(
            norm(f"{prefix}{name}", hidden, 0)
            for name in ("input_layernorm", "hidden_norm", "post_attention_layernorm")
        ),
        *_attention(layer, prefix, q, kv),
        *gated_mlp(f"{prefix}mlp.", "mlp", 0, hidden, layer.intermediate_size, Cut(axis="columns")),
        norm(NORM, hidden, 0),
    ]
    if config.norm_before_fc:
        modules.append(norm(INPUT_NORM, config.tap_columns, 0))
    if config.fc_norm:
        modules += [
            norm(f"{FC_NORM}.{i}", config.target_hidden_size, 0) for i in range(config.num_taps)
        ]
    if stored.has_embedding:
        shape = (layer.vocab_size, hidden)
        modules.append(
            Module(name=EMBEDDING, kind="embeddings", shape=shape, layer=0, rows=Cut(axis="vocab"))
        )
    if stored.has_head:
        rows = Cut(axis="draft_vocab")
        shape = (config.draft_vocab_size, hidden)
        modules.append(Module(name=HEAD, kind="head", shape=shape, layer=0, rows=rows))
    return modules


def _attention(layer: ModelConfig, prefix: str, q: Cut, kv: Cut) -> list[Module]:
    """q, k and v read the embedding and the feature side by side: twice the hidden size."""
    wide = attention(prefix, 0, 2 * layer.hidden_size, q, kv, layer.num_heads, layer.num_kv_heads)
    plain = attention(prefix, 0, layer.hidden_size, q, kv, layer.num_heads, layer.num_kv_heads)
    return [*wide[:3], plain[3]]


def eagle3_specs(config: Eagle3Config, stored: Eagle3Tensors) -> list[TensorSpec]:
    """Every tensor of a head, without the maps between vocabularies."""
    return plain_specs(eagle3_modules(config, stored), config.layer.torch_dtype)
