"""The matrices and vectors of a Llama 4 checkpoint, by their Hugging Face names.

Knows names, shapes and how each is cut; knows nothing of files or formats.
"""

from __future__ import annotations

from arriero.shards.checkpoint.formats.modules import NORMS, Cut, Module, attention, gated_mlp, norm
from arriero.shards.errors import CheckpointError
from arriero.shards.model_config.llama4 import Llama4Config, VisionConfig

MAX_EXPERTS = 200_000
"""Of all layers, each with tensors of its own: bounds what a hostile config makes us list."""
_VISION_LAYER = "vision_model.model.layers"


def llama4_modules(config: Llama4Config, *, fused: bool = True) -> list[Module]:
    """Every matrix and vector.

    Args:
        config: the model's numbers.
        fused: a layer's experts are two tensors (as in bfloat16), else three of each expert's own
            (as the FP8 release has them).

    Raises:
        CheckpointError: more experts apart than can be listed.
    """
    apart = 0 if fused else config.num_experts * len(config.moe_layers)
    if apart > MAX_EXPERTS:
        raise CheckpointError(
            f"`num_local_experts`={config.num_experts} in {len(config.moe_layers)} layers exceed "
            f"{MAX_EXPERTS} experts that are not fused"
        )
    prefix = "" if config.vision is None else "language_model."
    hidden = config.hidden_size
    table, vocab = (config.vocab_size, hidden), Cut(axis="vocab")
    tied = config.tie_word_embeddings
    found = [
        Module(
            name=f"{prefix}model.embed_tokens",
            kind="embeddings",
            shape=table,
            place="ends" if tied else "first",
            rows=vocab,
        )
    ]
    for layer in range(config.num_layers):
        found += _layer(config, f"{prefix}model.layers.{layer}.", layer, fused)
    found.append(Module(name=f"{prefix}model.norm", kind="norms", shape=(hidden,), place="last"))
    if not tied:
        name = f"{prefix}lm_head"
        found.append(
            Module(name=name, kind="head", shape=table, place="last", rows=vocab, product=True)
        )
    if config.vision is not None:
        found += vision_modules(config.vision, hidden)
    return found


def _layer(config: Llama4Config, name: str, layer: int, fused: bool) -> list[Module]:
    hidden, d = config.hidden_size, config.head_dim
    q, kv = Cut(axis="q_heads", per=d), Cut(axis="kv_heads", per=d)
    found = [norm(f"{name}{one}", hidden, layer) for one in NORMS]
    found += attention(name, layer, hidden, q, kv, config.num_heads, config.num_kv_heads)
    name += "feed_forward."
    if not config.routes(layer):
        inner = Cut(axis="columns")
        return found + gated_mlp(name, "mlp", layer, hidden, config.intermediate_size_mlp, inner)
    mlp = config.intermediate_size
    found.append(
        Module(
            name=f"{name}router",
            kind="router",
            shape=(config.num_experts, hidden),
            product=True,
            layer=layer,
        )
    )
    shared = Cut(axis="shared_columns")
    found += gated_mlp(f"{name}shared_expert.", "shared_expert", layer, hidden, mlp, shared)
    inner = Cut(axis="expert_columns")
    if not fused:
        for expert in range(config.num_experts):
            prefix = f"{name}experts.{expert}."
            found += gated_mlp(prefix, "experts", layer, hidden, mlp, inner, expert)
        return found
    found.append(
        Module(
            name=f"{name}experts.gate_up_proj",
            kind="experts",
            shape=(2 * mlp, hidden),
            product=True,
            layer=layer,
            rows=inner,
            suffix="",
            experts=config.num_experts,
            stacked=2,
        )
    )
    found.append(
        Module(
            name=f"{name}experts.down_proj",
            kind="experts",
            shape=(hidden, mlp),
            product=True,
            layer=layer,
            columns=inner,
            suffix="",
            experts=config.num_experts,
        )
    )
    return found


def vision_modules(vision: VisionConfig, text_hidden_size: int) -> list[Module]:
    """The vision tower, its adapter and the projection into the text model."""
    hidden, mlp = vision.hidden_size, vision.intermediate_size
    heads = Cut(axis="vision_heads", per=hidden // vision.num_heads)
    inner = Cut(axis="vision_columns")

    def plain(name: str, shape: tuple[int, ...], suffix: str = ".weight") -> Module:
        return Module(name=name, kind="vision", shape=shape, place="first", suffix=suffix)

    def product(
        name: str,
        shape: tuple[int, int],
        rows: Cut | None = None,
        columns: Cut | None = None,
        bias: bool = False,
    ) -> Module:
        return Module(
            name=name,
            kind="vision",
            shape=shape,
            product=True,
            place="first",
            rows=rows,
            columns=columns,
            bias=bias,
        )

    def layer_norm(name: str) -> list[Module]:
        return [plain(name, (hidden,)), plain(name, (hidden,), ".bias")]

    found = [
        plain("vision_model.class_embedding", (hidden,), ""),
        plain("vision_model.positional_embedding_vlm", (vision.num_positions, hidden), ""),
        product("vision_model.patch_embedding.linear", (hidden, vision.patch_features)),
        *layer_norm("vision_model.layernorm_pre"),
        *layer_norm("vision_model.layernorm_post"),
    ]
    for layer in range(vision.num_layers):
        name = f"{_VISION_LAYER}.{layer}."
        square = (hidden, hidden)
        found += [
            product(f"{name}self_attn.{one}_proj", square, rows=heads, bias=True) for one in "qkv"
        ]
        found.append(product(f"{name}self_attn.o_proj", square, columns=heads, bias=True))
        found.append(product(f"{name}mlp.fc1", (mlp, hidden), rows=inner, bias=True))
        found.append(product(f"{name}mlp.fc2", (hidden, mlp), columns=inner, bias=True))
        for one in NORMS:
            found += layer_norm(f"{name}{one}")
    adapter = "vision_model.vision_adapter.mlp."
    middle = Cut(axis="adapter_columns")
    wide, out = vision.projector_input_dim, vision.projector_output_dim
    return [
        *found,
        product(f"{adapter}fc1", (wide, mlp), rows=middle),
        product(f"{adapter}fc2", (out, out), columns=middle),
        product("multi_modal_projector.linear_1", (text_hidden_size, vision.output_dim)),
    ]
