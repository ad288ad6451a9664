"""The matrices and vectors of a dense Qwen3 checkpoint under Hugging Face names.

Knows the names beside a dense Llama's; knows nothing of files and formats.
"""

from __future__ import annotations

from arriero.shards.checkpoint.formats.modules import Module, norm
from arriero.shards.models.llama.tensors import llama_modules
from arriero.shards.models.qwen3.config import Qwen3Config

HEAD_NORMS = ("q_norm", "k_norm")


def qwen3_modules(config: Qwen3Config) -> list[Module]:
    """Every matrix and vector of the model; each rank holds the whole head norms of its layers."""
    modules = llama_modules(config)
    for layer in range(config.num_layers):
        name = f"model.layers.{layer}.self_attn."
        modules += [norm(f"{name}{head_norm}", config.head_dim, layer) for head_norm in HEAD_NORMS]
    return modules
