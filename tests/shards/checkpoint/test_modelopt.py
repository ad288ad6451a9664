"""ModelOpt's folders: every tensor is read, named as accepted, or refused by name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from arriero.shards.checkpoint.formats.stored import tensor_specs
from arriero.shards.checkpoint.reader import Checkpoint
from arriero.shards.checkpoint.tensor_folder import TensorFolder
from arriero.shards.checkpoint.verify import verify
from arriero.shards.errors import CheckpointError
from support.models import tiny_llama4, write_safetensors
from support.quantized_models import modelopt_config, quantized_llama
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
    assert any("k_scale and v_scale are not read" in note for note in report.notes)


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
    config = tiny_llama4(tmp_path, layers=1, experts=2)
    hidden, inner = config.hidden_size, config.intermediate_size
    prefix = "model.layers.0.feed_forward.experts"
    folder = TensorFolder.of(tmp_path)
    tensors = {name: folder.tensor(name).clone() for name in folder.names}
    ignored = [name.removesuffix(".weight") for name in tensors if "experts" not in name]
    for name, columns, rows in (("gate_up_proj", hidden, 2 * inner), ("down_proj", inner, hidden)):
        fused = f"{prefix}.{name}"
        tensors[f"{fused}_input_scale"] = tensors[f"{fused}_weight_scale"] = torch.tensor(0.01)
        if form == "modelopt-fp8":
            tensors[fused] = tensors[fused].to(torch.float8_e4m3fn)
            continue
        tensors[f"{fused}_weight_scale_2"] = torch.tensor(0.01)
        scales = torch.ones(2, columns // 16, rows).to(torch.float8_e4m3fn)
        tensors[f"{fused}_weight_scale"] = scales
        tensors[fused] = torch.ones(2, columns // 2, rows, dtype=torch.uint8)
    write_safetensors(tmp_path / "model.safetensors", tensors)
    described = modelopt_config(form, [*ignored, "model.layers.0.feed_forward.shared_expert*"])
    settings = json.loads((tmp_path / "config.json").read_text())
    if form == "modelopt-nvfp4":
        settings["quantization_config"] = described
        (tmp_path / "config.json").write_text(json.dumps(settings))
    else:
        (tmp_path / "hf_quant_config.json").write_text(json.dumps(described))
    checkpoint = Checkpoint.open(tmp_path)
    assert checkpoint.scheme is not None and checkpoint.scheme.fused
    assert checkpoint.misfits() == []
    assert {spec.name for spec in tensor_specs(config, checkpoint.scheme)} == set(tensors)
