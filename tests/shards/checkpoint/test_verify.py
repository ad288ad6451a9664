"""Verifying folders: whole, damaged, and of full size."""

from __future__ import annotations

import hashlib
import math
import shutil
import time
from pathlib import Path

import pytest
import torch

from arriero.shards.checkpoint.verify import verify
from support.checkpoints_sparse import LLAMA_405B, write_sparse
from support.models import tiny_llama, tiny_weights, write_safetensors, write_sharded


@pytest.mark.parametrize("sharded", [False, True])
def test_a_whole_folder_is_well(tmp_path: Path, sharded: bool) -> None:
    config = tiny_llama(tmp_path, dtype="bfloat16", sharded=sharded)
    told: list[tuple[int, int, str]] = []
    report = verify(tmp_path, deep=True, progress=lambda *one: told.append(one))
    assert report.ok
    assert report.num_files == (3 if sharded else 1)
    assert report.num_parameters == config.num_parameters()
    assert report.nbytes == 2 * config.num_parameters()
    assert report.nbytes_by_dtype == {"bfloat16": report.nbytes}
    assert told[-1][0] == told[-1][1]
    for name, digest in report.file_digests.items():
        data = (tmp_path / name).read_bytes()
        assert hashlib.blake2b(data, digest_size=16).hexdigest() == digest
    assert verify(tmp_path).file_digests == {}
    assert verify(tmp_path).digest == report.digest


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_only_a_deep_look_finds_bad_values(tmp_path: Path, value: float, dtype: str) -> None:
    config = tiny_llama(tmp_path, dtype=dtype)
    weights = tiny_weights(config, 0)
    weights["model.layers.1.mlp.up_proj.weight"][3, 5:7] = value
    write_safetensors(tmp_path / "model.safetensors", weights)
    assert verify(tmp_path).ok
    (problem,) = verify(tmp_path, deep=True).problems
    assert "model.layers.1.mlp.up_proj.weight" in problem
    assert "[96, 64] holds 2 values" in problem


def test_one_changed_byte_changes_its_file_s_digest_alone(tmp_path: Path) -> None:
    tiny_llama(tmp_path / "a", sharded=True)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    changed = "model-00002-of-00003.safetensors"
    data = bytearray((tmp_path / "b" / changed).read_bytes())
    data[-3] ^= 1
    (tmp_path / "b" / changed).write_bytes(data)
    a, b = (verify(tmp_path / one, deep=True).file_digests for one in "ab")
    assert {name for name in a if a[name] != b[name]} == {changed}


def test_all_problems_are_listed(tmp_path: Path) -> None:
    config = tiny_llama(tmp_path)
    weights = tiny_weights(config, 0)
    for name in list(weights)[:9]:
        del weights[name]
    weights["model.layers.2.mlp.up_proj.weight"] = torch.zeros(2)
    write_sharded(tmp_path, weights, 2)
    (tmp_path / "model.safetensors").unlink()
    report = verify(tmp_path)
    assert not report.ok
    assert len(report.problems) == 10


def test_what_cannot_be_opened_is_reported(tmp_path: Path) -> None:
    assert "is not a folder" in verify(tmp_path / "gone").problems[0]
    tiny_llama(tmp_path)
    file = tmp_path / "model.safetensors"
    with file.open("r+b") as stream:
        stream.truncate(file.stat().st_size - 1)
    report = verify(tmp_path, deep=True)
    assert "truncated" in report.problems[0]
    assert report.digest == ""


def test_llama_405b_in_full_size(tmp_path: Path) -> None:
    write_sparse(tmp_path, LLAMA_405B)
    assert sum(one.stat().st_blocks * 512 for one in tmp_path.iterdir()) < 20_000_000
    start = time.monotonic()
    report = verify(tmp_path)
    assert time.monotonic() - start < 10
    assert report.ok
    assert report.num_tensors == 126 * 9 + 3
    assert report.nbytes == 811_706_777_600
    broken = tmp_path / "model-00100-of-00189.safetensors"
    victim = broken if broken.exists() else sorted(tmp_path.glob("*.safetensors"))[99]
    with victim.open("r+b") as stream:
        stream.truncate(victim.stat().st_size - 1)
    assert victim.name in verify(tmp_path).problems[0]
