"""ModelOpt's folders: every tensor is read, named as accepted, or refused by name."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from arriero.shards.checkpoint.formats.stored import tensor_specs
from arriero.shards.checkpoint.reader import Checkpoint
from arriero.shards.checkpoint.tensor_folder import TensorFolder
from arriero.shards.checkpoint.verify import verify
from arriero.shards.errors import CheckpointError
from support.models import write_safetensors
from support.quantized_models import fused_llama4, quantized_llama
from support.slices import logits_of

AT = "model.layers.0.self_attn.q_proj"


def changed(path: Path, change: dict[str, Tensor | None]) -> None:
    """Replace tensors of a folder; None removes a tensor."""
    folder = TensorFolder.of(path)
    tensors: dict[str, Tensor | None] = {name: folder.tensor(name).clone() for name in folder.names}
    tensors |= change
    kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    write_safetensors(path / "model.safetensors", kept)


@pytest.mark.parametrize("form", ["modelopt-fp8", "modelopt-nvfp4", "modelopt-nvfp4-weights"])
def test_a_folder_is_verified(tmp_path: Path, form: str) -> None:
    quantized_llama(tmp_path, form, layers=1)
    report = verify(tmp_path, deep=True)
    assert report.ok, report.problems
    assert report.form == form.removesuffix("-weights")
    assert any("`kv: {dtype: fp8}` does, and takes k_scale" in note for note in report.notes)


def test_what_is_missing_or_unknown_is_named(tmp_path: Path) -> None:
    quantized_llama(tmp_path, "modelopt-nvfp4", layers=1)
    half = torch.zeros(64, 16, dtype=torch.uint8)
    changed(
        tmp_path,
        {
            f"{AT}.input_scale": None,
            f"{AT}.pre_quant_scale": torch.ones(64),
            "model.layers.0.mlp.up_proj.weight": half,
        },
    )
    problems = "\n".join(verify(tmp_path).problems)
    assert f"tensor '{AT}.input_scale' of shape [1] is missing" in problems
    assert "pre_quant_scale' of shape [64] is no part of this model" in problems
    assert "up_proj.weight' has shape [64, 16], but the config requires [96, 32]" in problems


@pytest.mark.parametrize(("value", "problem"), [(0.0, "must be positive"), (torch.inf, "infinite")])
def test_a_scale_of_inputs_is_positive_and_finite(
    tmp_path: Path, value: float, problem: str
) -> None:
    quantized_llama(tmp_path, "modelopt-fp8", layers=1)
    changed(tmp_path, {f"{AT}.input_scale": torch.tensor(value)})
    with pytest.raises(CheckpointError, match=problem):
        logits_of(tmp_path, [1, 2])


@pytest.mark.parametrize("form", ["modelopt-fp8", "modelopt-nvfp4"])
def test_fused_experts_of_llama4(tmp_path: Path, form: str) -> None:
    """Names, shapes and dtypes of the tensors that ModelOpt exports for Llama 4."""
    config = fused_llama4(tmp_path, form)
    checkpoint = Checkpoint.open(tmp_path)
    assert checkpoint.scheme is not None and checkpoint.scheme.fused
    assert checkpoint.misfits() == []
    specs = tensor_specs(config, checkpoint.scheme)
    assert {spec.name for spec in specs} == set(checkpoint.names)
