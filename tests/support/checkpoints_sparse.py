"""Full-size checkpoints that take almost no disk: true headers, true sizes, holes for weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from arriero.cluster.planner.catalog import MODELS
from arriero.cluster.planner.weight_forms import shipped_fp8
from arriero.shards.checkpoint.formats.describe import read_settings
from arriero.shards.checkpoint.formats.stored import tensor_specs
from arriero.shards.checkpoint.safetensors_header import DTYPES, make_header

LLAMA_405B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 16384,
    "intermediate_size": 53248,
    "num_hidden_layers": 126,
    "num_attention_heads": 128,
    "num_key_value_heads": 8,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "max_position_embeddings": 131072,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009],
    "torch_dtype": "bfloat16",
}

SCOUT = MODELS["llama-4-scout"]
MAVERICK = MODELS["llama-4-maverick"]


def _kept(settings: dict[str, Any]) -> list[str]:
    """Products that Meta's FP8 release of the model leaves in bfloat16."""
    model, _ = read_settings(settings)
    return list(shipped_fp8(model).ignored)


def llama_405b_fp8() -> dict[str, Any]:
    quantization = {
        "quant_method": "fbgemm_fp8",
        "activation_scale_ub": 1200.0,
        "modules_to_not_convert": _kept(LLAMA_405B),
    }
    return LLAMA_405B | {"quantization_config": quantization}


def llama_405b_awq() -> dict[str, Any]:
    quantization = {
        "quant_method": "awq",
        "bits": 4,
        "group_size": 128,
        "version": "gemm",
        "zero_point": True,
        "modules_to_not_convert": None,
    }
    return LLAMA_405B | {"torch_dtype": "float16", "quantization_config": quantization}


def maverick_fp8() -> dict[str, Any]:
    shared: dict[str, Any] = {"num_bits": 8, "type": "float", "symmetric": True}
    quantization = {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "quantization_status": "compressed",
        "kv_cache_scheme": None,
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": shared | {"strategy": "channel", "dynamic": False},
                "input_activations": shared | {"strategy": "token", "dynamic": True},
                "output_activations": None,
            }
        },
        "ignore": _kept(MAVERICK),
    }
    return MAVERICK | {"quantization_config": quantization}


Entries = dict[str, tuple[torch.dtype, tuple[int, ...]]]


def write_sparse(path: Path, settings: Mapping[str, Any], shard_bytes: int = 5 * 10**9) -> None:
    """Write a folder in shards of at most `shard_bytes`, as Hugging Face cuts them."""
    model, scheme = read_settings(settings)
    shards: list[Entries] = [{}]
    room = shard_bytes
    for tensor in tensor_specs(model, scheme):
        dtype, nbytes = DTYPES[tensor.dtypes[0]], tensor.nbytes
        if nbytes > room and shards[-1]:
            shards.append({})
            room = shard_bytes
        shards[-1][tensor.name] = (dtype, tensor.shape)
        room -= nbytes
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(settings, indent=2))
    placed: dict[str, str] = {}
    total = 0
    for i, entries in enumerate(shards):
        file_name = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        placed |= dict.fromkeys(entries, file_name)
        total += _write_holes(path / file_name, entries)
    index = {"metadata": {"total_size": total}, "weight_map": placed}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))


def _write_holes(file: Path, entries: Entries) -> int:
    header = make_header(entries)
    nbytes = sum(torch.Size(shape).numel() * dtype.itemsize for dtype, shape in entries.values())
    with file.open("wb") as stream:
        stream.write(header)
        stream.truncate(len(header) + nbytes)
    return nbytes
