"""Layers whose weights are mapped from disk compute the same bits as layers in memory."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from arriero.kernels.cpu import offload
from arriero.kernels.cpu.backend import CpuOps
from arriero.kernels.cpu.structs import packed_of
from arriero.shards.config.group import GroupConfig
from arriero.shards.config.sampling_params import SamplingParams
from arriero.shards.errors import SpecError
from arriero.shards.layout.resolve import resolve
from arriero.shards.model_config.dense import ModelConfig
from support.groups import running
from support.models import tiny_llama, tiny_llama4


@pytest.mark.parametrize("quantization", [None, "int8", "int4"])
def test_same_tokens_and_logprobs(tmp_path: Path, quantization: str | None) -> None:
    tiny_llama(tmp_path / "model", layers=4)
    config = GroupConfig(
        model_path=str(tmp_path / "model"),
        kernels="cpu",
        threads=1,
        num_blocks=32,
        max_model_len=128,
        quantization=quantization,
    )
    (tmp_path / "disk").mkdir()
    prompts = [[1, 2, 3, 4, 5], [9, 8, 7]]
    params = SamplingParams(temperature=0.0, max_tokens=8, logprobs=0, seed=0)
    answers = []
    for layers in (0, 3, 4):
        chosen = replace(config, offload_layers=layers, offload_folder=str(tmp_path / "disk"))
        with running(chosen) as group:
            results = group.generate(prompts, params)
        answers.append([(a.tokens, [entry.logprob for entry in a.logprobs]) for a in results])
        assert not list((tmp_path / "disk").iterdir())  # its files have no names
    assert answers[0] == answers[1] == answers[2]


@pytest.mark.parametrize("quantization", [None, "int8"])
def test_cold_experts_compute_the_same(tmp_path: Path, quantization: str | None) -> None:
    tiny_llama4(tmp_path / "model", moe_step=2, qk_norm=False)
    config = GroupConfig(
        model_path=str(tmp_path / "model"),
        kernels="cpu",
        threads=1,
        num_blocks=32,
        max_model_len=128,
        quantization=quantization,
    )
    (tmp_path / "disk").mkdir()
    params = SamplingParams(temperature=0.0, max_tokens=8, logprobs=0, seed=0)
    answers = []
    for layers in (0, 2, 4):
        chosen = replace(config, offload_layers=layers, offload_folder=str(tmp_path / "disk"))
        with running(chosen) as group:
            results = group.generate([[1, 2, 3, 4, 5], [9, 8, 7]], params)
        answers.append([(a.tokens, [entry.logprob for entry in a.logprobs]) for a in results])
    assert answers[0] == answers[1] == answers[2]


def test_only_experts_with_rows_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ops = CpuOps(torch.device("cpu"), 1)
    with ops.offloading(tmp_path):
        experts = [ops.pack_linear([torch.randn(32, 32)], None, torch.float32) for _ in range(4)]
    read: list[int] = []
    mappings = [packed_of(expert.packed).mapping for expert in experts]
    monkeypatch.setattr(
        offload.MappedBytes, "prefetch", lambda self: read.append(mappings.index(self))
    )
    starts = torch.tensor([0, 2, 2, 3, 3])
    got = ops.grouped_linear(torch.ones(3, 32), experts, starts)
    assert read == [0, 2]
    for row, expert in zip(got, (0, 0, 2), strict=True):
        assert torch.equal(row[None], ops.linear(torch.ones(1, 32), experts[expert]))


def test_mapped_bytes_contain_the_written_data(tmp_path: Path) -> None:
    mapping = offload.MappedBytes(1 << 20, tmp_path)
    assert not mapping.data.any()
    mapping.data[:] = torch.arange(1 << 20).to(torch.uint8)
    mapping.flush()
    mapping.prefetch()
    assert torch.equal(mapping.data, torch.arange(1 << 20).to(torch.uint8))


def test_what_cannot_be_offloaded_is_refused(tmp_path: Path) -> None:
    tiny_llama(tmp_path)
    model = ModelConfig.from_folder(tmp_path)
    for change, words in (
        ({"offload_layers": 9}, "must be 0 to 2"),
        ({"offload_layers": 1, "kernels": "reference"}, "needs `device`=cpu and `kernels`=cpu"),
    ):
        with pytest.raises(SpecError, match=words):
            resolve(replace(GroupConfig(model_path=str(tmp_path)), **change), model)
