"""What the backend refuses: indices out of bounds, shapes that do not fit, no library."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from arriero.kernels import select
from arriero.kernels.cpu import library
from arriero.kernels.flat_batch import FlatBatch
from arriero.kernels.kv_cache import KVCacheSpec
from arriero.kernels.select import ops_for

from .small import CPU, HIDDEN, VARIANTS, Small, batch, cpu, tokens

built = pytest.mark.skipif(not VARIANTS, reason="the CPU kernels are not built")


def changed(name: str, index: int, value: int) -> Callable[[FlatBatch], FlatBatch]:
    def change(of: FlatBatch) -> FlatBatch:
        tensor = getattr(of, name).clone()
        tensor.view(-1)[index] = value
        return replace(of, **{name: tensor})

    return change


@built
@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("slots", changed("slots_T", 3, 1 << 30)),
        ("slots", changed("slots_T", 0, -1)),
        ("block_table", changed("block_table_SB", 0, 1 << 30)),
        ("block_table", changed("block_table_SB", 1, -5)),
        ("query_start", changed("query_start_S1", 1, 30)),
        ("query_start", changed("query_start_S1", 0, 1)),
        ("query_start", changed("query_start_S1", 2, 3)),
        ("context", changed("context_S", 0, 1 << 30)),
        ("context", changed("context_S", 0, 2)),
        ("positions", changed("positions_T", 5, 7)),
        ("positions", changed("positions_T", 5, -1)),
        ("slots_T", lambda of: replace(of, slots_T=of.slots_T.long())),
        ("positions_T", lambda of: replace(of, positions_T=of.positions_T[:-1])),
        ("cos_TD", lambda of: replace(of, cos_TD=of.cos_TD[:, ::2])),
    ],
)
def test_batches(field: str, change: Callable[[FlatBatch], FlatBatch]) -> None:
    model = Small(cpu(1), torch.bfloat16)
    good = batch([(0, 10, tokens(20, 0)), (1, 0, tokens(1, 0))])
    with pytest.raises(ValueError, match=field):
        model.decoder(torch.zeros(21, HIDDEN), change(good))


@built
def test_nothing_to_do() -> None:
    model = Small(cpu(2), torch.bfloat16)
    none = tokens(0, 0)
    assert model.ops.embed(none, model.vocab).shape == (0, HIDDEN)
    assert model.ops.linear(torch.zeros(0, HIDDEN), model.layers[0].qkv).shape[0] == 0
    assert model.step([(0, 0, none)])[0].shape[0] == 0


@built
def test_sizes() -> None:
    ops = cpu(1)
    with pytest.raises(ValueError, match="dtype=float64"):
        ops.pack_linear([torch.zeros(4, 4)], None, torch.float64)
    with pytest.raises(ValueError, match="do not stack"):
        ops.pack_linear([torch.zeros(4, 4), torch.zeros(4, 5)], None, torch.float32)
    with pytest.raises(ValueError, match="bias"):
        ops.pack_linear([torch.zeros(4, 4)], torch.zeros(5), torch.float32)
    linear = ops.pack_linear([torch.zeros(4, 4)], None, torch.float32)
    with pytest.raises(ValueError, match="rows of shape"):
        ops.linear(torch.zeros(2, 5), linear)
    spec = KVCacheSpec(
        num_layers=1, num_blocks=2, num_kv_heads=1, head_dim=8, block_size=16, dtype=torch.float32
    )
    with pytest.raises(ValueError, match="odd"):
        ops.kv_cache(replace(spec, head_dim=7), CPU)
    with pytest.raises(ValueError, match="num_blocks"):
        ops.kv_cache(replace(spec, num_blocks=0), CPU)
    kv = ops.kv_cache(spec, CPU)
    with pytest.raises(ValueError, match="blocks"):
        kv.read(0, [2])
    with pytest.raises(ValueError, match="layer"):
        kv.read(1, [0])
    with pytest.raises(ValueError, match="shape"):
        kv.write(0, [0], torch.zeros(1, 2, 1, 16, 9))


@pytest.fixture
def no_library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    def find(variant: str) -> Path | None:
        path = tmp_path / f"{variant}.so"
        path.write_bytes(b"not a library")
        return path if variant == "portable" else None

    monkeypatch.setattr(library, "find", find)
    library.load.cache_clear()
    select._warn_once.cache_clear()
    yield
    library.load.cache_clear()
    select._warn_once.cache_clear()


def test_without_a_library(no_library: None, caplog: pytest.LogCaptureFixture) -> None:
    """By name it is an error with a remedy; otherwise the reference runs, and the log says why."""
    with pytest.raises(RuntimeError, match="C\\+\\+20 compiler"):
        ops_for(CPU, "cpu")
    with caplog.at_level(logging.WARNING):
        assert [ops_for(CPU).name for _ in range(2)] == ["reference"] * 2
    assert sum("reference kernels" in record.message for record in caplog.records) == 1


def test_unknown_variant() -> None:
    with pytest.raises(RuntimeError, match="does not run on this CPU"):
        library.load("mmx")
