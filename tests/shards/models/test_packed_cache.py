"""Packed weights in a file: a second start reads the bytes that the first one packed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from arriero.kernels.cpu.packed_file import CpuPackedFile
from arriero.shards.config.group import GroupConfig
from arriero.shards.config.sampling_params import SamplingParams
from arriero.shards.models import loader
from support.eventually import eventually
from support.groups import running
from support.models import tiny_llama

GREEDY = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True, seed=0)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ARRIERO_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "packed"


def serve(model: Path, **fields: Any) -> list[int]:  # noqa: ANN401
    """Tokens of a group."""
    settings = {"kernels": "cpu", "packed_cache_bytes": 1 << 30, "num_blocks": 8} | fields
    config = GroupConfig(model_path=str(model), threads=1, **settings)
    with running(config) as group:
        return group.generate([[1, 2, 3]], GREEDY)[0].tokens


def files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.packed"))


@pytest.mark.parametrize("quantization", [None, "int8", "int4"])
def test_the_second_start_packs_nothing(
    folder: Path, tmp_path: Path, quantization: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_llama(tmp_path / "model")
    first = serve(tmp_path / "model", quantization=quantization)
    eventually(lambda: len(files(folder)) == 1, 30)
    eventually(lambda: not list(folder.glob("*.unfinished")), 30)

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a matrix was packed again")

    with monkeypatch.context() as patch:
        patch.setattr(loader.Loader, "_packed", refuse)
        patch.setattr(loader.Loader, "_vocab", refuse)
        assert serve(tmp_path / "model", quantization=quantization) == first
    # another form, layout or checkpoint has files of its own
    serve(tmp_path / "model", quantization=quantization, tp=2)
    eventually(lambda: len(files(folder)) == 3, 30)
    tiny_llama(tmp_path / "model", seed=5)
    assert serve(tmp_path / "model", quantization=quantization) != first


def test_damaged_files_are_written_again(folder: Path, tmp_path: Path) -> None:
    tiny_llama(tmp_path / "model")
    first = serve(tmp_path / "model")
    eventually(lambda: len(files(folder)) == 1, 30)
    whole = {path: path.read_bytes() for path in files(folder)}
    for cut in (0, 40, -1):
        for path in files(folder):
            path.write_bytes(whole[path][:cut])
        assert serve(tmp_path / "model") == first
        eventually(lambda: {path: path.read_bytes() for path in files(folder)} == whole, 30)


def test_room_is_made_by_the_last_use(folder: Path, tmp_path: Path) -> None:
    for seed in range(3):
        tiny_llama(tmp_path / f"m{seed}", seed=seed)
    size = (tmp_path / "m0" / "model.safetensors").stat().st_size
    serve(tmp_path / "m0", packed_cache_bytes=size // 2)  # larger than the room: not kept
    assert not files(folder)
    for seed in range(2):
        serve(tmp_path / f"m{seed}")
        eventually(lambda: len(files(folder)) == seed + 1, 30)  # noqa: B023
    oldest = min(files(folder), key=lambda path: path.stat().st_mtime_ns)
    room = sum(path.stat().st_size for path in files(folder)) + size // 2
    serve(tmp_path / "m2", packed_cache_bytes=room)
    eventually(lambda: len(files(folder)) == 2, 30)
    assert oldest not in files(folder)


def test_a_failed_load_keeps_nothing(tmp_path: Path) -> None:
    file = CpuPackedFile(tmp_path / "packed" / "x.packed")
    file.close(whole=False)
    assert file.join(10) and not list((tmp_path / "packed").iterdir())


def test_bytes_and_numbers_return(tmp_path: Path) -> None:
    from arriero.kernels.cpu.backend import CpuOps

    ops = CpuOps(torch.device("cpu"), 1)
    rng = np.random.default_rng(0)
    weight = torch.tensor(rng.standard_normal((70, 48)), dtype=torch.float32)
    bias = torch.tensor(rng.standard_normal(70), dtype=torch.float32)
    x = torch.tensor(rng.standard_normal((3, 48)), dtype=torch.float32)
    path = tmp_path / "x.packed"
    file = CpuPackedFile(path)
    assert not file.complete
    made = file.linear("a", lambda: ops.pack_linear([weight], bias, torch.bfloat16))
    file.close(whole=True)
    assert file.join(10)
    again = CpuPackedFile(path)
    assert again.complete
    read = again.linear("a", lambda: pytest.fail("packed again"))
    assert torch.equal(ops.linear(x, read), ops.linear(x, made)) and read.nbytes == made.nbytes
    again.close(whole=True)
