"""Tiny seeded model folders for any test that needs weights. Torch only, no transformers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from arriero.shards.checkpoint.formats.stored import tensor_specs
from arriero.shards.checkpoint.llama_names import EMBEDDING, FINAL_NORM, HEAD
from arriero.shards.checkpoint.safetensors_header import make_header
from arriero.shards.model_config.dense import ModelConfig
from arriero.shards.models.llama4.config import Llama4Config
from arriero.shards.models.qwen3.config import Qwen3Config


def write_safetensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors to one safetensors file."""
    with path.open("wb") as stream:
        stream.write(make_header({k: (v.dtype, tuple(v.shape)) for k, v in tensors.items()}))
        for one in tensors.values():
            stream.write(one.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())


def write_sharded(path: Path, tensors: Mapping[str, Tensor], num_files: int) -> None:
    """Write tensors to several safetensors files and their index."""
    names = list(tensors)
    placed: dict[str, str] = {}
    for i in range(num_files):
        file_name = f"model-{i + 1:05d}-of-{num_files:05d}.safetensors"
        part = names[i * len(names) // num_files : (i + 1) * len(names) // num_files]
        write_safetensors(path / file_name, {name: tensors[name] for name in part})
        placed |= dict.fromkeys(part, file_name)
    total = sum(one.nbytes for one in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": placed}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))


def tiny_weights(config: ModelConfig, seed: int) -> dict[str, Tensor]:
    """Seeded weights whose greedy text varies.

    Products keep the size of what they are given; the final norm is scaled until the logits
    spread over several units, and an untied head keeps a token from predicting itself.
    """
    generator = torch.Generator().manual_seed(seed)
    dtype: torch.dtype = getattr(torch, config.torch_dtype)
    weights: dict[str, Tensor] = {}
    for spec in tensor_specs(config, None):
        name, shape = spec.name, spec.shape
        noise = torch.randn(shape, generator=generator)
        if name.endswith("norm.weight"):
            made = 1.0 + 0.1 * noise
            if name == FINAL_NORM:
                # signs that flip half the channels: a tied head would else repeat its input
                flips = torch.where(torch.rand(shape, generator=generator) < 0.5, -1.0, 1.0)
                made = made * flips * 2.0
        elif name.endswith(".bias"):
            made = 0.1 * noise
        elif name == EMBEDDING:
            made = noise
        else:
            gain = 1.0 if name == HEAD else 1.5
            made = noise * gain / shape[-1] ** 0.5
        weights[name] = made.to(dtype)
    if config.tie_word_embeddings:  # logits of unit rows would grow with the hidden size
        weights[FINAL_NORM] = (weights[FINAL_NORM].float() / config.hidden_size**0.5).to(dtype)
    return weights


def tiny_llama(
    path: Path,
    *,
    seed: int = 0,
    layers: int = 2,
    hidden: int = 64,
    intermediate: int = 96,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int | None = None,
    vocab: int = 128,
    tied: bool = False,
    attention_bias: bool = False,
    mlp_bias: bool = False,
    rope_theta: float = 10000.0,
    rope_scaling: Mapping[str, Any] | None = None,
    max_positions: int = 512,
    eos: int | list[int] | None = None,
    dtype: str = "float32",
    sharded: bool = False,
) -> ModelConfig:
    """Write a folder with config.json and weights (in three files if `sharded`).

    `eos` None leaves the model without an end token, so that texts run to `max_tokens`.
    """
    settings: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim or hidden // heads,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": rope_theta,
        "rope_scaling": dict(rope_scaling) if rope_scaling else None,
        "max_position_embeddings": max_positions,
        "tie_word_embeddings": tied,
        "attention_bias": attention_bias,
        "mlp_bias": mlp_bias,
        "bos_token_id": None,
        "eos_token_id": eos,
        "torch_dtype": dtype,
    }
    config = ModelConfig.from_dict(settings)
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(settings, indent=2))
    weights = tiny_weights(config, seed)
    if sharded:
        write_sharded(path, weights, 3)
    else:
        write_safetensors(path / "model.safetensors", weights)
    return config


def tiny_qwen3(
    path: Path,
    *,
    seed: int = 0,
    layers: int = 2,
    hidden: int = 64,
    intermediate: int = 96,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 24,
    vocab: int = 128,
    tied: bool = False,
    max_positions: int = 512,
    dtype: str = "float32",
    **more: Any,  # noqa: ANN401
) -> Qwen3Config:
    """Write a folder with config.json, in the spelling of Qwen's own, and weights."""
    settings: dict[str, Any] = {
        "architectures": ["Qwen3ForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": None,
        "eos_token_id": None,
        "head_dim": head_dim,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "max_position_embeddings": max_positions,
        "max_window_layers": layers,
        "model_type": "qwen3",
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "num_key_value_heads": kv_heads,
        "rms_norm_eps": 1e-6,
        "rope_scaling": None,
        "rope_theta": 1000000,
        "sliding_window": None,
        "tie_word_embeddings": tied,
        "torch_dtype": dtype,
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": vocab,
    } | more
    config = Qwen3Config.from_dict(settings)
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(settings, indent=2))
    write_safetensors(path / "model.safetensors", tiny_weights(config, seed))
    return config


def llama4_settings(
    *,
    layers: int = 4,
    hidden: int = 64,
    intermediate: int = 64,
    intermediate_mlp: int = 96,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 16,
    experts: int = 8,
    top_k: int = 1,
    moe_step: int = 1,
    chunk: int | None = 16,
    qk_norm: bool = True,
    floor_scale: int = 16,
    rope_scaling: Mapping[str, Any] | None = None,
    vocab: int = 128,
    max_positions: int = 1024,
    dtype: str = "float32",
) -> dict[str, Any]:
    """config.json of a text-only Llama 4: Scout-like; with `moe_step` 2 Maverick-like.

    With `experts` 0 and `moe_step` 0 all layers are dense, as in Llama Guard 4.
    """
    return {
        "architectures": ["Llama4ForCausalLM"],
        "model_type": "llama4_text",
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "intermediate_size_mlp": intermediate_mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "hidden_act": "silu",
        "num_local_experts": experts,
        "num_experts_per_tok": top_k,
        "interleave_moe_layer_step": moe_step,
        "moe_layers": None if moe_step else [],
        "use_qk_norm": qk_norm,
        "no_rope_layers": [int((i + 1) % 4 != 0) for i in range(layers)],
        "attention_chunk_size": chunk,
        "attn_temperature_tuning": True,
        "floor_scale": floor_scale,
        "attn_scale": 0.1,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "rope_scaling": dict(rope_scaling) if rope_scaling else None,
        "max_position_embeddings": max_positions,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
        "torch_dtype": dtype,
    }


IMAGE_TOKEN = 121
"""The placeholder of `seeing_settings`."""


def seeing_settings(*, tile: int = 56, **text: Any) -> dict[str, Any]:  # noqa: ANN401
    """config.json of a Llama 4 that reads images: tiles of 56 pixels have 4 features each."""
    made = llama4_settings(**text)
    return {
        "architectures": ["Llama4ForConditionalGeneration"],
        "model_type": "llama4",
        "text_config": made,
        "vision_config": {
            "model_type": "llama4_vision_model",
            "hidden_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 256,
            "image_size": tile,
            "patch_size": 14,
            "num_channels": 3,
            "pixel_shuffle_ratio": 0.5,
            "projector_input_dim": 96,
            "projector_output_dim": 96,
            "vision_output_dim": 96,
            "norm_eps": 1e-5,
            "rope_theta": 10000.0,
        },
        "image_token_index": IMAGE_TOKEN,
        "boi_token_index": 119,
        "eoi_token_index": 120,
        "tie_word_embeddings": False,
        "torch_dtype": made["torch_dtype"],
    }


def tiny_llama4(path: Path, *, seed: int = 0, **settings: Any) -> Llama4Config:  # noqa: ANN401
    """Write a seeded Llama 4 of `llama4_settings`, or with `sees` of `seeing_settings`."""
    sees = settings.pop("sees", False)
    made = seeing_settings(**settings) if sees else llama4_settings(**settings)
    config = Llama4Config.from_dict(made)
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(made, indent=2))
    write_safetensors(path / "model.safetensors", llama4_weights(config, seed))
    return config


def llama4_weights(config: Llama4Config, seed: int) -> dict[str, Tensor]:
    """Seeded weights; a router's logits spread widely, so that no choice is a near tie."""
    generator = torch.Generator().manual_seed(seed)
    dtype: torch.dtype = getattr(torch, config.torch_dtype)
    weights: dict[str, Tensor] = {}
    for one in tensor_specs(config, None):
        noise = torch.randn(one.shape, generator=generator)
        if one.kind == "norms":
            made = 1.0 + 0.1 * noise
            if one.name.endswith("model.norm.weight"):
                made = 2.0 * made
        elif one.kind == "embeddings":
            made = noise
        elif one.kind == "vision" and len(one.shape) == 1:
            made = 0.1 * noise + ("norm" in one.name and one.name.endswith("weight"))
        else:
            # experts are stored as [experts, in, out], all else as [out, in]
            fan_in = one.shape[1] if one.kind == "experts" else one.shape[-1]
            gain = {"head": 1.0, "router": 4.0}.get(one.kind, 1.5)
            made = noise * gain / fan_in**0.5
        weights[one.name] = made.to(dtype)
    return weights
