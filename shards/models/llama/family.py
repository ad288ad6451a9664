"""The record of the dense Llama family."""

from __future__ import annotations

from typing import Any

from arriero.shards.checkpoint.formats.scheme import QuantScheme
from arriero.shards.families.family import Fp8Release, GgufFamily, ModelFamily
from arriero.shards.layout.dense import partition
from arriero.shards.layout.windows import window_mask
from arriero.shards.model_config.dense import SUPPORTED_ARCHITECTURES, ModelConfig
from arriero.shards.models.llama.tensors import llama_modules

_LAYERS_405B = 126
"""Number of layers of Llama 3.1 405B, the only model with an FP8 checkpoint from Meta."""


def shipped_fp8(model: ModelConfig) -> QuantScheme:
    """The form of Meta's FP8 checkpoint of Llama 3.1 405B: the MLPs, except of both end layers."""
    ends = (0, model.num_layers - 1)
    names = ["lm_head", *(f"model.layers.{layer}.mlp" for layer in ends)]
    names += [f"model.layers.{layer}.self_attn" for layer in range(model.num_layers)]
    return QuantScheme(method="fbgemm_fp8", activation_bound=1200.0, ignored=tuple(names))


_LLAMA31_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def _sizes(
    layers: int,
    hidden: int,
    mlp: int,
    heads: int,
    kv_heads: int,
    head_dim: int = 128,
    **more: Any,  # noqa: ANN401
) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "rope_scaling": _LLAMA31_ROPE,
        "max_position_embeddings": 131072,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "bos_token_id": 128000,
        "eos_token_id": [128001, 128008, 128009],
    } | more


_LLAMA32: dict[str, Any] = {
    "rope_scaling": _LLAMA31_ROPE | {"factor": 32.0},
    "tie_word_embeddings": True,
}
_SMOLLM2: dict[str, Any] = {
    "vocab_size": 49152,
    "rope_theta": 100000.0,
    "rope_scaling": None,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

FAMILY: ModelFamily[ModelConfig] = ModelFamily(
    name="Llama",
    architectures=SUPPORTED_ARCHITECTURES,
    model_types=("llama",),
    read_config=ModelConfig.from_dict,
    partition=partition,
    modules=lambda model, fused: llama_modules(model),
    attention_mask=window_mask,
    slice="arriero.shards.models.llama.slice:LlamaSlice",
    fp8_release=Fp8Release(
        scheme=shipped_fp8, exists=lambda model: bool(model.num_layers == _LAYERS_405B)
    ),
    catalog={
        "llama-3.1-8b": _sizes(32, 4096, 14336, 32, 8),
        "llama-3.1-70b": _sizes(80, 8192, 28672, 64, 8),
        "llama-3.3-70b": _sizes(80, 8192, 28672, 64, 8),
        "llama-3.1-405b": _sizes(126, 16384, 53248, 128, 8),
        "llama-3.2-1b": _sizes(16, 2048, 8192, 32, 8, 64, **_LLAMA32),
        "llama-3.2-3b": _sizes(28, 3072, 8192, 24, 8, **_LLAMA32),
        "smollm2-135m": _sizes(30, 576, 1536, 9, 3, 64, **_SMOLLM2),
    },
    gguf=GgufFamily(
        architecture="llama",
        config={"architectures": ["LlamaForCausalLM"], "model_type": "llama"},
        pairs=True,
    ),
)
