"""The tensors of a dense Llama checkpoint under Hugging Face names.

Knows names and shapes; knows nothing of files.
"""

from __future__ import annotations

from arriero.shards.model_config.dense import ModelConfig

EMBEDDING = "model.embed_tokens.weight"
FINAL_NORM = "model.norm.weight"
HEAD = "lm_head.weight"


def layer_tensors(config: ModelConfig, layer: int) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors of a layer; matrices as [out, in]."""
    hidden, mlp = config.hidden_size, config.intermediate_size
    products = {
        "self_attn.q_proj": (config.q_size, hidden),
        "self_attn.k_proj": (config.kv_size, hidden),
        "self_attn.v_proj": (config.kv_size, hidden),
        "self_attn.o_proj": (hidden, config.q_size),
        "mlp.gate_proj": (mlp, hidden),
        "mlp.up_proj": (mlp, hidden),
        "mlp.down_proj": (hidden, mlp),
    }
    prefix = f"model.layers.{layer}."
    shapes: dict[str, tuple[int, ...]] = {
        f"{prefix}input_layernorm.weight": (hidden,),
        f"{prefix}post_attention_layernorm.weight": (hidden,),
    }
    for name, shape in products.items():
        shapes[f"{prefix}{name}.weight"] = shape
        if config.attention_bias if name.startswith("self_attn") else config.mlp_bias:
            shapes[f"{prefix}{name}.bias"] = shape[:1]
    return shapes


def expected_tensors(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of all tensors that the config requires; without a head if tied to the embedding."""
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (config.vocab_size, config.hidden_size)}
    for layer in range(config.num_layers):
        shapes |= layer_tensors(config, layer)
    shapes[FINAL_NORM] = (config.hidden_size,)
    if not config.tie_word_embeddings:
        shapes[HEAD] = (config.vocab_size, config.hidden_size)
    return shapes
