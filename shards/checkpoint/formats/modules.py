"""A model as a list of its matrices and vectors, before any format has a say.

Each says how tensor parallelism cuts it: along which axis of the partition, and how many of its
rows or columns belong to one index of that axis. Formats, load plans and memory plans all follow
from these lists. Needs no torch; knows nothing of files.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from arriero.shards.checkpoint.llama_names import EMBEDDING, FINAL_NORM, HEAD
from arriero.shards.model_config.dense import ModelConfig

Kind = Literal[
    "attention",
    "mlp",
    "experts",
    "shared_expert",
    "router",
    "embeddings",
    "head",
    "norms",
    "vision",
]
Axis = Literal[
    "q_heads",
    "kv_heads",
    "columns",
    "shared_columns",
    "vocab",
    "experts",
    "expert_columns",
    "vision_heads",
    "vision_columns",
    "adapter_columns",
]
"""Names of spans of `SlicePart` and `MoEPart`."""
Place = Literal["layer", "first", "last", "ends"]
"""On the stage of its layer, on the first stage, on the last, or (a tied table) on both ends."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Cut:
    """One dimension's cut: `per` of its entries to each index of `axis`."""

    axis: Axis
    per: int = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Module:
    """A matrix [out, in] with a name, or a vector or table that no format changes.

    Attributes:
        name: the module's, without `.weight`.
        kind: what it counts as.
        shape: [out, in] of a product; any for others.
        product: whether it is a matrix product's weight, which a format may quantize.
        layer: of the decoder; None outside.
        place: which stage holds it.
        rows, columns: cuts of the first and of the last dimension.
        bias: a vector `.bias` of the product's rows comes with it.
        suffix: of the tensor's name.
        experts: how many experts are fused along a leading dimension (then `shape` is of one, as
            [out, in], and the checkpoint stores [experts, in, out]); 0 for none.
        expert: its number, where each expert is a module of its own.
        stacked: parts stacked along the rows, each cut alike (gate and up in one matrix).
    """

    name: str
    kind: Kind
    shape: tuple[int, ...]
    product: bool = False
    layer: int | None = None
    place: Place = "layer"
    rows: Cut | None = None
    columns: Cut | None = None
    bias: bool = False
    suffix: str = ".weight"
    experts: int = 0
    expert: int | None = None
    stacked: int = 1


def llama_modules(config: ModelConfig) -> list[Module]:
    """Every matrix and vector of a dense Llama."""
    hidden, mlp, d = config.hidden_size, config.intermediate_size, config.head_dim
    vocab = Cut(axis="vocab")
    table = (config.vocab_size, hidden)
    tied = config.tie_word_embeddings
    found = [
        Module(
            name=EMBEDDING.removesuffix(".weight"),
            kind="embeddings",
            shape=table,
            place="ends" if tied else "first",
            rows=vocab,
        )
    ]
    q, kv = Cut(axis="q_heads", per=d), Cut(axis="kv_heads", per=d)
    inner = Cut(axis="columns")
    for layer in range(config.num_layers):
        name = f"model.layers.{layer}."
        found += [norm(f"{name}{one}", hidden, layer) for one in NORMS]
        found += attention(name, layer, hidden, q, kv, config.num_heads, config.num_kv_heads)
        found += gated_mlp(f"{name}mlp.", "mlp", layer, hidden, mlp, inner)
        if config.attention_bias or config.mlp_bias:
            found = [_with_bias(one, config) if one.layer == layer else one for one in found]
    found.append(
        Module(name=FINAL_NORM.removesuffix(".weight"), kind="norms", shape=(hidden,), place="last")
    )
    if not tied:
        name = HEAD.removesuffix(".weight")
        found.append(
            Module(name=name, kind="head", shape=table, place="last", rows=vocab, product=True)
        )
    return found


NORMS = ("input_layernorm", "post_attention_layernorm")


def norm(name: str, hidden: int, layer: int | None) -> Module:
    """A layer's norm."""
    return Module(name=name, kind="norms", shape=(hidden,), layer=layer)


def attention(
    prefix: str, layer: int, hidden: int, q: Cut, kv: Cut, num_heads: int, num_kv_heads: int
) -> list[Module]:
    """Its four products."""
    q_size, kv_size = num_heads * q.per, num_kv_heads * kv.per
    shapes: dict[str, tuple[tuple[int, int], Cut | None, Cut | None]] = {
        "q_proj": ((q_size, hidden), q, None),
        "k_proj": ((kv_size, hidden), kv, None),
        "v_proj": ((kv_size, hidden), kv, None),
        "o_proj": ((hidden, q_size), None, q),
    }
    return [
        Module(
            name=f"{prefix}self_attn.{name}",
            kind="attention",
            shape=shape,
            product=True,
            layer=layer,
            rows=rows,
            columns=columns,
        )
        for name, (shape, rows, columns) in shapes.items()
    ]


def gated_mlp(
    prefix: str,
    kind: Kind,
    layer: int,
    hidden: int,
    inner_size: int,
    inner: Cut,
    expert: int | None = None,
) -> list[Module]:
    """Gate, up and down products."""
    up, down = (inner_size, hidden), (hidden, inner_size)
    shapes = {"gate_proj": (up, True), "up_proj": (up, True), "down_proj": (down, False)}
    return [
        Module(
            name=f"{prefix}{name}",
            kind=kind,
            shape=shape,
            product=True,
            layer=layer,
            rows=inner if by_rows else None,
            columns=None if by_rows else inner,
            expert=expert,
        )
        for name, (shape, by_rows) in shapes.items()
    ]


def _with_bias(module: Module, config: ModelConfig) -> Module:
    wanted = config.attention_bias if module.kind == "attention" else config.mlp_bias
    return replace(module, bias=module.product and wanted)
