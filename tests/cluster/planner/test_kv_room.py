"""KV pools of GPU groups without a size in the settings: exactly the memory that is left."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from arriero.cluster.engine_bench import EngineBench
from arriero.cluster.planner.catalog import NamedModel, find_model
from arriero.cluster.planner.kv_room import needs_room, with_kv_blocks
from arriero.shards.config.group import GroupConfig
from arriero.shards.errors import SpecError
from arriero.shards.layout.resolve import resolve
from support import triton_interpreter
from support.fake_cuda import simulated
from support.models import tiny_llama

triton_interpreter.install()  # before anything imports the kernels

H200 = 139 << 30


def on_gpus(**more: object) -> GroupConfig:
    settings: dict[str, object] = {"model_path": "", "device": "cuda", "max_model_len": 32768}
    return GroupConfig(**settings | more)  # type: ignore[arg-type]


def pool(config: GroupConfig, model: NamedModel, free: list[int]) -> GroupConfig:
    assert needs_room(config)
    return resolve(with_kv_blocks(config, model.config, model.scheme, free), model.config)


def test_405b_gets_what_eight_gpus_leave() -> None:
    """Not 2 GiB for all of them, which is 4,161 tokens."""
    model = find_model("llama-3.1-405b")
    got = pool(on_gpus(tp=8, quantization="fp8"), model, [H200] * 8)
    assert got.num_blocks is not None and got.num_local_blocks is None
    weights, reserve = 410e9 / 8, H200 * 0.03
    most = (H200 - weights - reserve) / 8 / (126 * 2 * 16 * 128 * 2)
    assert 0.9 * most * 8 < got.num_blocks < most * 8


def test_both_pools_of_maverick_fit_every_gpu() -> None:
    model = find_model("llama-4-maverick")
    got = pool(on_gpus(tp=8, ep=8, quantization="int4"), model, [H200] * 8)
    assert got.num_blocks is not None and got.num_local_blocks is not None
    kv = got.num_blocks * 12 + got.num_local_blocks * 36
    weights = 213e9 / 8
    assert 0.85 * (H200 - weights) < kv * 16 * 128 * 2 * 2 < H200 - weights


def test_the_fullest_gpu_decides() -> None:
    model = find_model("llama-3.1-8b")
    config = on_gpus(tp=2)
    even = pool(config, model, [40 << 30, 40 << 30])
    small = pool(config, model, [30 << 30, 30 << 30])
    assert even.num_blocks is not None and small.num_blocks is not None
    # Rank 0 samples the tokens, and needs more memory for that.
    assert pool(config, model, [30 << 30, 40 << 30]).num_blocks == small.num_blocks
    other = pool(config, model, [40 << 30, 30 << 30]).num_blocks
    assert other is not None and small.num_blocks < other < even.num_blocks


def test_a_gpu_without_room_is_an_error() -> None:
    model = find_model("llama-3.1-8b")
    with pytest.raises(SpecError, match=r"rank 0: weights of .* leave no KV block"):
        pool(on_gpus(), model, [16 << 30])


def test_a_size_in_the_settings_is_kept() -> None:
    model = find_model("llama-3.1-8b")
    for size in ({"num_blocks": 70}, {"kv_bytes": 1 << 30}):
        assert not needs_room(on_gpus(**size))
    assert resolve(on_gpus(num_blocks=70), model.config).num_blocks == 70
    assert resolve(on_gpus(kv_bytes=1 << 30), model.config).num_blocks == (1 << 30) // (1 << 21)
    assert not needs_room(replace(on_gpus(), device="cpu"))
    with pytest.raises(SpecError, match="GPUs leave was not asked for"):
        resolve(on_gpus(), model.config)


def test_a_group_takes_what_its_gpu_leaves(tmp_path: Path) -> None:
    model = tiny_llama(tmp_path, vocab=512, max_positions=512)
    config = GroupConfig(
        model_path=str(tmp_path), device="cuda", kernels="reference", dtype="float32"
    )
    with simulated() as device:
        device.free_bytes = 256 << 20
        expected = pool(config, NamedModel(name="it", config=model), [device.free_bytes])
        with EngineBench(config) as bench:
            blocks = bench._executor._runner._config.num_blocks  # type: ignore[union-attr]
    assert blocks is not None and blocks == expected.num_blocks
    assert 128 << 20 < blocks * 16 * model.num_layers * 2 * 2 * 16 * 4 < 256 << 20
