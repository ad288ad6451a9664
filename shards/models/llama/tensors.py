"""The matrices and vectors of a dense checkpoint under Hugging Face names.

Knows names, shapes and tensor-parallel cuts; knows nothing of files and formats.
"""

from __future__ import annotations

from dataclasses import replace

from arriero.shards.checkpoint.formats.modules import NORMS, Cut, Module, attention, gated_mlp, norm
from arriero.shards.checkpoint.llama_names import EMBEDDING, FINAL_NORM, HEAD
from arriero.shards.model_config.dense import ModelConfig


def llama_modules(config: ModelConfig) -> list[Module]:
    """Every matrix and vector of a dense Llama."""
    hidden, mlp, d = config.hidden_size, config.intermediate_size, config.head_dim
    vocab = Cut(axis="vocab")
    table = (config.vocab_size, hidden)
    tied = config.tie_word_embeddings
    modules = [
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
        modules += [norm(f"{name}{norm_name}", hidden, layer) for norm_name in NORMS]
        modules += attention(name, layer, hidden, q, kv, config.num_heads, config.num_kv_heads)
        modules += gated_mlp(f"{name}mlp.", "mlp", layer, hidden, mlp, inner)
        if config.attention_bias or config.mlp_bias:
            modules = [
                _with_bias(module, config) if module.layer == layer else module
                for module in modules
            ]
    modules.append(
        Module(name=FINAL_NORM.removesuffix(".weight"), kind="norms", shape=(hidden,), place="last")
    )
    if not tied:
        name = HEAD.removesuffix(".weight")
        modules.append(
            Module(name=name, kind="head", shape=table, place="last", rows=vocab, product=True)
        )
    return modules


def _with_bias(module: Module, config: ModelConfig) -> Module:
    has_bias = config.attention_bias if module.kind == "attention" else config.mlp_bias
    return replace(module, bias=module.product and has_bias)
