"""The vision tower against transformers', on tensors."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from arriero.shards.checkpoint.tensor_folder import TensorFolder
from arriero.shards.models.llama4.config import VisionConfig
from arriero.shards.models.llama4.vision import VisionTower
from support.models import write_safetensors

SIZES = {
    "small": {"image": 56, "patch": 14, "hidden": 64, "heads": 4, "layers": 3, "columns": 256},
    "the release's heads, two layers": {
        "image": 336,
        "patch": 14,
        "hidden": 1408,
        "heads": 16,
        "layers": 2,
        "columns": 5632,
    },
}


@pytest.mark.parametrize("name", SIZES)
def test_tower(name: str, tmp_path: Path) -> None:
    import transformers
    from transformers.models.llama4 import modeling_llama4

    torch.manual_seed(0)
    size = SIZES[name]
    theirs = transformers.Llama4VisionConfig(
        hidden_size=size["hidden"],
        num_hidden_layers=size["layers"],
        num_attention_heads=size["heads"],
        intermediate_size=size["columns"],
        image_size=size["image"],
        patch_size=size["patch"],
        vision_output_dim=96,
        projector_input_dim=96,
        projector_output_dim=96,
        attn_implementation="eager",
    )
    model = modeling_llama4.Llama4VisionModel(theirs).eval()
    with torch.no_grad():
        for one in model.parameters():
            one.copy_(torch.randn_like(one) * (0.5 / one.shape[-1] ** 0.5 if one.ndim > 1 else 0.1))
        for key, one in model.named_parameters():
            if "norm" in key and key.endswith("weight"):
                one.add_(1.0)
    weights = {f"vision_model.{k}": v.detach() for k, v in model.named_parameters()}
    projection = torch.randn(48, 96) / 10
    weights["multi_modal_projector.linear_1.weight"] = projection
    write_safetensors(tmp_path / "model.safetensors", weights)
    config = VisionConfig(
        hidden_size=size["hidden"],
        num_layers=size["layers"],
        num_heads=size["heads"],
        intermediate_size=size["columns"],
        image_size=size["image"],
        patch_size=size["patch"],
        num_channels=3,
        pixel_shuffle_ratio=0.5,
        projector_input_dim=96,
        projector_output_dim=96,
        output_dim=96,
        norm_eps=1e-5,
        rope_theta=10000.0,
    )
    tower = VisionTower(TensorFolder.of(tmp_path), config, torch.device("cpu"), torch.float32)
    tiles = torch.randn(5, 3, size["image"], size["image"])
    with torch.inference_mode():
        expected = model(pixel_values=tiles).last_hidden_state
        got = tower.tower(tiles)
        features = tower(tiles)
    assert got.shape == expected.shape == (5, tower.features_per_tile, 96)
    assert float((got - expected).abs().max()) < 1e-4
    assert float((features - expected @ projection.T).abs().max()) < 1e-4
    assert tower.nbytes == sum(one.nbytes for one in weights.values())
