"""Checkpoints with scales for an fp8 KV cache: measured over a text, or given."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from arriero.shards.checkpoint.index import INDEX_FILE
from arriero.shards.checkpoint.tensor_folder import TensorFolder
from arriero.shards.kv.transfers import Pool
from arriero.shards.models.model_slice import ModelSlice
from support.models import write_safetensors
from support.slices import BLOCK, logits_of

FP8_MAX = 448.0
_WINDOW = 512
"""Tokens of a forward pass of the measurement."""


def with_scales(source: Path, target: Path, scales: Mapping[str, Tensor]) -> None:
    """Write a copy of a checkpoint folder with further tensors; its files are linked."""
    target.mkdir(parents=True)
    for file in source.iterdir():
        if file.name != INDEX_FILE:
            # a file model.safetensors would be taken for the whole checkpoint
            name = f"weights-{file.name}" if file.suffix == ".safetensors" else file.name
            (target / name).symlink_to(file.resolve())
    write_safetensors(target / "kv_scales.safetensors", scales)
    stored = TensorFolder.of(source).stored
    placed = {name: f"weights-{tensor.file.name}" for name, tensor in stored.items()}
    placed |= dict.fromkeys(scales, "kv_scales.safetensors")
    (target / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": placed}))


def greatest(source: Path, tokens: Sequence[int]) -> Tensor:
    """The greatest |key| and |value| of each layer of a dense model over a text, [layers, 2]."""
    most: list[Tensor] = []
    for start in range(0, len(tokens), _WINDOW):
        window = list(tokens[start : start + _WINDOW])
        blocks = list(range(-(-len(window) // BLOCK)))

        def measure(model: ModelSlice, blocks: list[int] = blocks) -> None:
            cache = model.kv_pools[Pool.ALL]
            layers = [cache.read(layer, blocks) for layer in range(cache.spec.num_layers)]
            most.append(torch.stack([x.float().abs().amax((0, 2, 3, 4)) for x in layers]))

        logits_of(source, window, visit=measure)
    return torch.stack(most).amax(0)


def calibrated(source: Path, target: Path, tokens: Sequence[int]) -> None:
    """Write a copy of a dense checkpoint with scales, the greatest magnitudes / 448."""
    scales = {}
    for layer, (key, value) in enumerate(greatest(source, tokens) / FP8_MAX):
        name = f"model.layers.{layer}.self_attn."
        scales |= {f"{name}k_proj.k_scale": key.clone(), f"{name}v_proj.v_scale": value.clone()}
    with_scales(source, target, scales)
