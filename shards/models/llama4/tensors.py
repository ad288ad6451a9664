"""The matrices and vectors of a Llama 4 checkpoint under Hugging Face names.

Knows names, shapes and tensor-parallel cuts; knows nothing of files and formats.
"""

from __future__ import annotations

from arriero.shards.checkpoint.formats.modules import NORMS, Cut, Module, attention, gated_mlp, norm
from arriero.shards.errors import CheckpointError
from arriero.shards.models.llama4.config import Llama4Config, VisionConfig

MAX_EXPERTS = 200_000
"""Limit of separate experts in all layers; bounds the list that a hostile config can cause."""
_VISION_LAYER = "vision_model.model.layers"


def llama4_modules(config: Llama4Config, fused: bool = True) -> list[Module]:
    """Every matrix and vector of the model.

    Args:
        config: the model.
        fused: the experts of a layer are two tensors (bfloat16 release), else three tensors for
            each expert (FP8 release).

    Raises:
        CheckpointError: more separate experts than `MAX_EXPERTS`.
    """
    separate = 0 if fused else config.num_experts * len(config.moe_layers)
    if separate > MAX_EXPERTS:
        raise CheckpointError(
            f"`num_local_experts`={config.num_experts} in {len(config.moe_layers)} layers exceed "
            f"the limit of {MAX_EXPERTS} experts that are not fused; use a checkpoint with fused "
            "experts"
        )
    prefix = "" if config.vision is None else "language_model."
    hidden = config.hidden_size
    table, vocab = (config.vocab_size, hidden), Cut(axis="vocab")
    tied = config.tie_word_embeddings
    modules = [
        Module(
            name=f"{prefix}model.embed_tokens",
            kind="embeddings",
            shape=table,
            place="ends" if tied else "first",
            rows=vocab,
        )
    ]
    for layer in range(config.num_layers):
        modules += _layer(config, f"{prefix}model.layers.{layer}.", layer, fused)
    modules.append(Module(name=f"{prefix}model.norm", kind="norms", shape=(hidden,), place="last"))
    if not tied:
        name = f"{prefix}lm_head"
        modules.append(
            Module(name=name, kind="head", shape=table, place="last", rows=vocab, product=True)
        )
    if config.vision is not None:
        modules += vision_modules(config.vision, hidden)
    return modules


def _layer(config: Llama4Config, name: str, layer: int, fused: bool) -> list[Module]:
    hidden, d = config.hidden_size, config.head_dim
    q, kv = Cut(axis="q_heads", per=d), Cut(axis="kv_heads", per=d)
    modules = [norm(f"{name}{norm_name}", hidden, layer) for norm_name in NORMS]
    modules += attention(name, layer, hidden, q, kv, config.num_heads, config.num_kv_heads)
    name += "feed_forward."
    if not config.routes(layer):
        inner = Cut(axis="columns")
        return modules + gated_mlp(name, "mlp", layer, hidden, config.intermediate_size_mlp, inner)
    mlp = config.intermediate_size
    modules.append(
        Module(
            name=f"{name}router",
            kind="router",
            shape=(config.num_experts, hidden),
            product=True,
            layer=layer,
        )
    )
    shared = Cut(axis="shared_columns")
    modules += gated_mlp(f"{name}shared_expert.", "shared_expert", layer, hidden, mlp, shared)
    inner = Cut(axis="expert_columns")
    if not fused:
        for expert in range(config.num_experts):
            prefix = f"{name}experts.{expert}."
            modules += gated_mlp(prefix, "experts", layer, hidden, mlp, inner, expert)
        return modules
    modules.append(
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
    modules.append(
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
    return modules


def vision_modules(vision: VisionConfig, text_hidden_size: int) -> list[Module]:
    """Every matrix and vector of the vision tower, the adapter and the projection."""
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

    modules = [
        plain("vision_model.class_embedding", (hidden,), ""),
        plain("vision_model.positional_embedding_vlm", (vision.num_positions, hidden), ""),
        product("vision_model.patch_embedding.linear", (hidden, vision.patch_features)),
        *layer_norm("vision_model.layernorm_pre"),
        *layer_norm("vision_model.layernorm_post"),
    ]
    for layer in range(vision.num_layers):
        name = f"{_VISION_LAYER}.{layer}."
        square = (hidden, hidden)
        modules += [
            product(f"{name}self_attn.{part}_proj", square, rows=heads, bias=True) for part in "qkv"
        ]
        modules.append(product(f"{name}self_attn.o_proj", square, columns=heads, bias=True))
        modules.append(product(f"{name}mlp.fc1", (mlp, hidden), rows=inner, bias=True))
        modules.append(product(f"{name}mlp.fc2", (hidden, mlp), columns=inner, bias=True))
        for norm_name in NORMS:
            modules += layer_norm(f"{name}{norm_name}")
    adapter = "vision_model.vision_adapter.mlp."
    middle = Cut(axis="adapter_columns")
    wide, out = vision.projector_input_dim, vision.projector_output_dim
    return [
        *modules,
        product(f"{adapter}fc1", (wide, mlp), rows=middle),
        product(f"{adapter}fc2", (out, out), columns=middle),
        product("multi_modal_projector.linear_1", (text_hidden_size, vision.output_dim)),
    ]
