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
    Recipe(
        3,
        settings={
            "r": 8,
            "lora_alpha": 8,
            "target_modules": [*MLP, "embed_tokens", "lm_head"],
            "use_rslora": True,
        },
    ),
    Recipe(
        4,
        settings={
            "r": 8,
            "lora_alpha": 32,
            "target_modules": ATTENTION,
            "rank_pattern": {"k_proj": 16, "model.layers.1.self_attn.q_proj": 3},
            "alpha_pattern": {"v_proj": 5, "model.layers.0.self_attn.o_proj": 50},
        },
    ),
    Recipe(5, settings={"r": 16, "lora_alpha": 32, "target_modules": r".*\.(up_proj|o_proj)"}),
    Recipe(
        6,
        settings={
            "r": 12,
            "lora_alpha": 24,
            "target_modules": ["down_proj", "embed_tokens"],
            "rank_pattern": {"model.embed_tokens": 24},
        },
    ),
    Recipe(7, settings={"r": 32, "lora_alpha": 64, "target_modules": "all-linear"}),
    Recipe(8, settings={"r": 5, "lora_alpha": 20, "target_modules": ["gate_proj", "lm_head"]}),
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
MIXED = (
    *ROUTED,
    Recipe(
        5,
        settings={
            "r": 6,
            "lora_alpha": 12,
            "target_modules": ["embed_tokens", "lm_head", "k_proj"],
            "rank_pattern": {"lm_head": 16},
        },
    ),
    Recipe(
        6,
        settings={
            "r": 64,
            "lora_alpha": 8,
            "use_rslora": True,
            "target_modules": ["router", "o_proj", "embed_tokens"],
        },
    ),
    Recipe(
        7,
        settings={
            "r": 16,
            "lora_alpha": 16,
            "target_modules": ["up_proj"],
            "target_parameters": EXPERTS[:1],
        },
        spread=0.4,
    ),
    Recipe(8, settings={"r": 32, "lora_alpha": 32, "target_modules": [*MLP, "lm_head"]}),
)
"""Eight adapters of a Llama 4."""


def make(base: torch.nn.Module, recipe: Recipe, folder: Path) -> None:
    """Write an adapter with random matrices, by peft."""
    import peft

    torch.manual_seed(recipe.seed)
    config = peft.LoraConfig(task_type="CAUSAL_LM", **recipe.settings)
    model = peft.get_peft_model(copy.deepcopy(base), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B" in name:
                parameter.normal_(std=recipe.spread)
            elif ".lora_embedding_A" in name:  # peft starts with zeros here, not in B
                parameter.normal_(std=recipe.spread / 20)
    model.save_pretrained(folder)


def merged(base: torch.nn.Module, folder: Path) -> Any:  # noqa: ANN401
    """peft's own merge of an adapter into a copy of `base`.

    A tied head gets a table of its own before: peft computes the adapter of a tied table on one
    side alone, and a merge into the common table would change the other side too.
    """
    import peft

    model = copy.deepcopy(base)
    if model.config.tie_word_embeddings:
        model.config.tie_word_embeddings = False
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    return peft.PeftModel.from_pretrained(model, folder).merge_and_unload()


def write_adapter(folder: Path, seed: int, *, tables: int = 0) -> AdapterFile:
    """An adapter of the down projections of a `tiny_llama`, without peft.

    Args:
        folder: of the adapter.
        seed: of its numbers.
        tables: size of the vocabulary; the adapter changes embedding and head too. 0: it does not.
    """
    folder.mkdir()
    settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 16, "target_modules": ["down_proj"]}
    (folder / CONFIG_FILE).write_text(json.dumps(settings))
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in range(2):
        prefix = f"base_model.model.model.layers.{layer}.mlp.down_proj"
        tensors[f"{prefix}.lora_A.weight"] = torch.randn(4, 96, generator=generator)
        tensors[f"{prefix}.lora_B.weight"] = torch.randn(64, 4, generator=generator)
    if tables:
        prefix = "base_model.model.model.embed_tokens"
        tensors[f"{prefix}.lora_embedding_A"] = torch.randn(4, tables, generator=generator) / 8
        tensors[f"{prefix}.lora_embedding_B"] = torch.randn(64, 4, generator=generator)
        prefix = "base_model.model.lm_head"
        tensors[f"{prefix}.lora_A.weight"] = torch.randn(4, 64, generator=generator) / 8
        tensors[f"{prefix}.lora_B.weight"] = torch.randn(tables, 4, generator=generator) / 8
    write_safetensors(folder / WEIGHTS_FILE, tensors)
    return AdapterFile(name=folder.name, path=str(folder))
