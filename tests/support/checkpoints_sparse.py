"""Full-size checkpoints that take almost no disk: true headers, true sizes, holes for weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from arriero.shards.checkpoint.llama_names import expected_tensors
from arriero.shards.checkpoint.safetensors_header import make_header
from arriero.shards.models.config import ModelConfig

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

Entries = dict[str, tuple[torch.dtype, tuple[int, ...]]]


def write_sparse(path: Path, settings: Mapping[str, Any], shard_bytes: int = 5 * 10**9) -> None:
    """Write a folder in shards of at most `shard_bytes`, as Hugging Face cuts them."""
    config = ModelConfig.from_dict(settings)
    dtype: torch.dtype = getattr(torch, config.torch_dtype)
    shards: list[Entries] = [{}]
    room = shard_bytes
    for name, shape in expected_tensors(config).items():
        nbytes = torch.Size(shape).numel() * dtype.itemsize
        if nbytes > room and shards[-1]:
            shards.append({})
            room = shard_bytes
        shards[-1][name] = (dtype, shape)
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
