"""Adapters made by peft itself, large enough to change the answer, and the merged models."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from arriero.shards.adapters.adapter import WEIGHTS_FILE
from arriero.shards.adapters.peft_config import CONFIG_FILE
from arriero.shards.config.adapters import AdapterFile
from support.models import write_safetensors

ATTENTION, MLP = ["q_proj", "k_proj", "v_proj", "o_proj"], ["gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True)
class Recipe:
    """Settings of an adapter; `spread` is the deviation of B's random numbers."""

    seed: int
    spread: float = 0.3
    settings: dict[str, Any] = field(default_factory=dict)


DENSE = (
    Recipe(1, settings={"r": 4, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"]}),
    Recipe(2, settings={"r": 64, "lora_alpha": 64, "target_modules": ATTENTION + MLP}),
    Recipe(3, settings={"r": 8, "lora_alpha": 8, "target_modules": MLP, "use_rslora": True}),
    Recipe(
        4,
        settings={
            "r": 8,
            "lora_alpha": 32,
            "target_modules": ATTENTION,
            "rank_pattern": {"k_proj": 16, "layers.1.self_attn.q_proj": 3},
            "alpha_pattern": {"v_proj": 5},
        },
    ),
    Recipe(5, settings={"r": 16, "lora_alpha": 32, "target_modules": r".*\.(up_proj|o_proj)"}),
    Recipe(
        6,
        settings={
            "r": 12,
            "lora_alpha": 24,
            "target_modules": ["down_proj"],
            "layers_to_transform": [0, 3],
        },
        spread=0.4,
    ),
    Recipe(7, settings={"r": 32, "lora_alpha": 64, "target_modules": "all-linear"}),
    Recipe(8, settings={"r": 5, "lora_alpha": 20, "target_modules": ["gate_proj", "k_proj"]}),
)
"""Eight adapters of a dense Llama."""

EXPERTS = ["feed_forward.experts.gate_up_proj", "feed_forward.experts.down_proj"]
ROUTED = (
    Recipe(1, settings={"r": 4, "lora_alpha": 16, "target_modules": ATTENTION}),
    Recipe(
        2,
        settings={"r": 2, "lora_alpha": 8, "target_modules": [], "target_parameters": EXPERTS},
        spread=0.4,
    ),
    Recipe(
        3,
        settings={"r": 4, "lora_alpha": 8, "target_modules": ["router", *MLP]},
        spread=0.4,
    ),
    Recipe(
        4,
        settings={
            "r": 3,
            "lora_alpha": 12,
            "target_modules": ["q_proj"],
            "target_parameters": EXPERTS[1:],
        },
        spread=0.4,
    ),
)
"""Four adapters of a Llama 4, of routed experts and router too."""


def make(base: torch.nn.Module, recipe: Recipe, folder: Path) -> Any:  # noqa: ANN401
    """Write an adapter with random matrices; gives peft's own merge of it into a copy of `base`."""
    import peft

    torch.manual_seed(recipe.seed)
    config = peft.LoraConfig(task_type="CAUSAL_LM", **recipe.settings)
    model = peft.get_peft_model(copy.deepcopy(base), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B" in name:
                parameter.normal_(std=recipe.spread)
    model.save_pretrained(folder)
    return model.merge_and_unload()


def write_adapter(folder: Path, seed: int) -> AdapterFile:
    """An adapter of the down projections of a `tiny_llama`, without peft."""
    folder.mkdir()
    settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 16, "target_modules": ["down_proj"]}
    (folder / CONFIG_FILE).write_text(json.dumps(settings))
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in range(2):
        prefix = f"base_model.model.model.layers.{layer}.mlp.down_proj"
        tensors[f"{prefix}.lora_A.weight"] = torch.randn(4, 96, generator=generator)
        tensors[f"{prefix}.lora_B.weight"] = torch.randn(64, 4, generator=generator)
    write_safetensors(folder / WEIGHTS_FILE, tensors)
    return AdapterFile(name=folder.name, path=str(folder))
