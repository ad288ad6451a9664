"""What `arriero models quantize` writes: its layout, its numbers, and its way back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from arriero.shards.checkpoint.quantize import TO, To, quantize_checkpoint
from arriero.shards.checkpoint.reader import Checkpoint
from arriero.shards.checkpoint.tensor_folder import TensorFolder
from arriero.shards.checkpoint.verify import verify
from arriero.shards.errors import CheckpointError
from support.models import tiny_llama, tiny_qwen3, tiny_weights, write_safetensors
from support.quantized_models import dense_logits, meaning
from support.slices import logits_of

TOKENS = [3, 99, 14, 15, 92, 65, 35, 89, 79, 32, 38, 46]


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("to", TO)
def test_written_as_documented_and_loaded_back(tmp_path: Path, to: To, dtype: str) -> None:
    config = tiny_llama(tmp_path / "a", dtype=dtype)
    (tmp_path / "a" / "tokenizer.json").write_text("{}")
    told: list[tuple[int, int, str]] = []
    quantize_checkpoint(tmp_path / "a", tmp_path / "b", to, progress=lambda *a: told.append(a))
    assert told[-1][0] == told[-1][1] == len(TensorFolder.of(tmp_path / "b").names)
    assert verify(tmp_path / "b", deep=True).problems == ()
    assert (tmp_path / "b" / "tokenizer.json").read_text() == "{}"
    said = json.loads((tmp_path / "b" / "config.json").read_text())["quantization_config"]
    assert said["quant_method"] == "compressed-tensors" and said["ignore"] == ["lm_head"]
    folder = TensorFolder.of(tmp_path / "b")
    means = {name: one.double() for name, one in tiny_weights(config, 0).items()}
    for name in means:
        module = name.removesuffix(".weight")
        if name in folder.stored and f"{module}.weight_scale" not in folder.stored:
            assert torch.equal(folder.tensor(name).double(), means[name])
            continue
        full = meaning(folder, module)
        off = float((full - means[name]).norm() / means[name].norm())
        assert off < {"int8": 0.01, "fp8": 0.04, "int4": 0.11}[to], (name, off)
        means[name] = full
    want = dense_logits(config, means, TOKENS)
    for tp in (1, 2):
        got = logits_of(tmp_path / "b", TOKENS, tp=tp)
        assert float((got - want).abs().max()) <= 1e-5 * float(want.abs().max())


@pytest.mark.parametrize("to", TO)
def test_a_quantized_qwen3_has_the_logits_of_its_numbers(tmp_path: Path, to: To) -> None:
    tiny_qwen3(tmp_path / "a", heads=6, kv_heads=3, head_dim=32)
    quantize_checkpoint(tmp_path / "a", tmp_path / "b", to)
    folder, plain = TensorFolder.of(tmp_path / "b"), TensorFolder.of(tmp_path / "a")
    means = {}
    for name in plain.names:
        module = name.removesuffix(".weight")
        scaled = f"{module}.weight_scale" in folder.stored
        means[name] = meaning(folder, module).float() if scaled else plain.copy(name)
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "config.json").symlink_to(tmp_path / "a" / "config.json")
    write_safetensors(tmp_path / "c" / "model.safetensors", means)
    want = logits_of(tmp_path / "c", TOKENS)
    for tp in (1, 2):
        got = logits_of(tmp_path / "b", TOKENS, tp=tp)
        assert float((got - want).abs().max()) <= 1e-5 * float(want.abs().max())


@pytest.mark.parametrize("to", ["int8", "int4"])
def test_compressed_tensors_reads_the_same(tmp_path: Path, to: To) -> None:
    """Their own unpacking, where the package is installed."""
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    tiny_llama(tmp_path / "a", layers=1)
    quantize_checkpoint(tmp_path / "a", tmp_path / "b", to)
    folder = TensorFolder.of(tmp_path / "b")
    module, bits = "model.layers.0.mlp.down_proj", {"int8": 8, "int4": 4}[to]
    shape = folder.tensor(f"{module}.weight_shape").tolist()
    q = helpers.unpack_from_int32(folder.tensor(f"{module}.weight_packed").clone(), bits, shape)
    scale = folder.tensor(f"{module}.weight_scale")
    zero: Tensor | int = 0
    if to == "int4":
        packed = folder.tensor(f"{module}.weight_zero_point").clone()
        groups = [shape[0], scale.shape[1]]
        zero = helpers.unpack_from_int32(packed, bits, groups, packed_dim=0)
        zero = zero.repeat_interleave(shape[1] // scale.shape[1], 1)
    full = (q.double() - zero) * scale.repeat_interleave(shape[1] // scale.shape[1], 1).double()
    assert torch.equal(full, meaning(folder, module))


def test_refusals(tmp_path: Path) -> None:
    tiny_llama(tmp_path / "a", layers=1, intermediate=90)
    with pytest.raises(
        CheckpointError, match="down_proj: 90 columns are not a multiple of 8 and 32"
    ):
        quantize_checkpoint(tmp_path / "a", tmp_path / "b", "int4")
    assert not (tmp_path / "b").exists() and sorted(p.name for p in tmp_path.iterdir()) == ["a"]
    tiny_llama(tmp_path / "c", layers=1)
    quantize_checkpoint(tmp_path / "c", tmp_path / "d", "int8")
    with pytest.raises(CheckpointError, match="quantized already"):
        quantize_checkpoint(tmp_path / "d", tmp_path / "e", "int8")
    with pytest.raises(CheckpointError, match="exists already"):
        quantize_checkpoint(tmp_path / "c", tmp_path / "d", "int8")
    Checkpoint.open(tmp_path / "d").check_whole()
