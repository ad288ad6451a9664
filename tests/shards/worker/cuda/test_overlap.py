"""Sums beside products, and dispatch beside the shared expert, on simulated devices.

The device refuses a read that no wait puts behind its write, so that these runs hold the waits too.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import HashStore
from torch.testing._internal.distributed.fake_pg import FakeStore

from arriero.shards.collectives.beside import SWITCH, Pending
from arriero.shards.collectives.mesh import Mesh
from arriero.shards.collectives.symmetric_sums import SWITCH as SYMMETRIC_SWITCH
from arriero.shards.config.group import GroupConfig
from arriero.shards.config.parallel import ParallelConfig
from arriero.shards.config.sampling_params import SamplingParams
from support import triton_interpreter
from support.fake_cuda import Ledger, simulated, simulated_slices, small_halves
from support.fake_cuda.streams import UnorderedStreams
from support.groups import running
from support.models import tiny_llama, tiny_llama4

triton_interpreter.install()  # before anything imports the kernels
pytest.importorskip("triton")

from gpu import shapes  # noqa: E402

from arriero.kernels.triton import triton_ops  # noqa: E402

PROMPTS = [[7, 1, 9, 4, 4, 2, 8], [1, 2, 3], [5, 6] * 11]
GREEDY = SamplingParams(max_tokens=3, temperature=0, seed=0)
LAYOUTS: dict[str, dict[str, Any]] = {
    "TP2": {"tp": 2},
    "TP2xPP2": {"tp": 2, "pp": 2},
    "EP2": {"tp": 2, "ep": 2},
    "DP2xEP2": {"dp": 2},
}
SHAPE = shapes.Shape(name="tiny", hidden=32, mlp=48, q_heads=4, kv_heads=1, head_dim=16, layers=2)


def config_of(path: Path) -> GroupConfig:
    return GroupConfig(
        model_path=str(path),
        dtype="float32",
        kernels="reference",
        threads=1,
        block_size=4,
        num_blocks=100,
        num_local_blocks=60,
        max_model_len=64,
        max_sequences=2,
        max_batch_tokens=24,
    )


def tokens(config: GroupConfig) -> list[list[int]]:
    with running(config) as group:
        answers = group.generate(PROMPTS, GREEDY)
    assert [answer.error for answer in answers] == [None] * len(answers)
    return [answer.tokens for answer in answers]


def run_ranks(config: GroupConfig, reports: Path) -> tuple[list[list[int]], list[Any]]:
    """Tokens of a group on simulated devices, and what each rank's device counted."""
    reports.mkdir()
    with simulated_slices(reports, small_halves=True):
        answers = tokens(config)
    return answers, [json.loads(path.read_text()) for path in sorted(reports.iterdir())]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_halves_give_the_tokens_of_the_whole(
    tmp_path: Path, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    mesh = LAYOUTS[layout]
    model = tmp_path / "model"
    model.mkdir()
    if "TP2" in layout:
        tiny_llama(model, seed=3)
    else:
        tiny_llama4(model, seed=3, layers=2, experts=4, chunk=8)
    config = config_of(model)
    expected = tokens(config)
    config = replace(config, device="cuda", kernels="triton", **mesh)
    shared = layout == "TP2xPP2"  # its sums go over symmetric memory
    if not shared:
        monkeypatch.setenv(SYMMETRIC_SWITCH, "0")
    halves, counts = run_ranks(config, tmp_path / "halves")
    assert halves == expected
    monkeypatch.setenv(SWITCH, "0")
    whole, counts_of_whole = run_ranks(config, tmp_path / "whole")
    assert whole == expected
    size = mesh.get("dp", 1) * mesh.get("tp", 1)  # ranks of a stage
    for first in range(0, len(counts), size):
        orders = [shared_messages(rank) for rank in counts[first : first + size]]
        assert all(order == orders[0] for order in orders), "the same collectives in one order"
    for rank, rank_of_whole in zip(counts, counts_of_whole, strict=True):
        assert not rank["compiles"], "serving compiles nothing"
        assert not rank["waits"] or "dp" in mesh, rank["waits"]
        assert rank["captures"] == rank_of_whole["captures"]
        more = Counter(rank["launches"])
        more.subtract(rank_of_whole["launches"])
        if "dp" in mesh:
            assert not any(more.values()), "ranks with other numbers of rows stay whole"
            continue
        steps = more["_rope_write_kv"] // layers_of(mesh)
        assert steps >= 2, "steps with prompts of 8 tokens and more; no decode"
        sums = more["_symmetric_sum"] if shared else num_sums(rank) - num_sums(rank_of_whole)
        assert sums == 2 * layers_of(mesh) * steps


def layers_of(mesh: dict[str, Any]) -> int:
    """Layers of a stage of the tiny models."""
    return 2 // int(mesh.get("pp", 1))


def num_sums(rank: Any) -> int:  # noqa: ANN401
    return sum(name == "all_reduce" for name, _, _ in rank["messages"])


def shared_messages(rank: Any) -> list[Any]:  # noqa: ANN401
    """The collectives of a rank in which all ranks of its stage take part, with equal sizes."""
    alike = ("all_reduce", "broadcast", "all_gather_single", "all_gather_into_tensor")
    return [
        (name, ranks, size if name in alike else None)
        for name, ranks, size in rank["messages"]
        if name not in ("send", "recv", "isend", "irecv")
    ]


@contextmanager
def first_of(tp: int) -> Iterator[tuple[Ledger, Mesh]]:
    """Rank 0 of a group whose other ranks do not exist, with a second stream."""
    with simulated() as device, small_halves():
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=tp)
        part: Any = SimpleNamespace(rank=0, tp_rank=0, first_stage=True, last_stage=True)
        mesh = Mesh(part, ParallelConfig(tp=tp), device=torch.device("cuda"))
        mesh.watchdog.marking = False
        mesh.beside.open(HashStore(), 0, 1)
        yield device, mesh
        mesh.leave()


def run_layers(mesh: Mesh, new: int) -> None:
    """Two layers over a prompt of `new` tokens and a decode."""
    ops, device = triton_ops(torch.device("cuda"), batch_independent=True), torch.device("cuda")
    mesh.use(ops)
    sequences = [(20, 1), (4, new)]
    layers = [shapes.layer(ops, SHAPE, torch.float32, device) for _ in range(2)]
    kv = shapes.cache(ops, SHAPE, sequences, torch.float32, device)
    run = ops.decoder(layers, kv, mesh.reduce, reduce_norm=mesh.reduce_norm, half_sums=mesh)
    for _ in range(2):  # memory of the first step is used again
        run(torch.zeros(1 + new, 32, device="cuda"), shapes.batch(sequences, 16, device))


@pytest.mark.parametrize("tp", [2, 4])
def test_launches_double_from_the_threshold_on(tp: int) -> None:
    norms, gathers = [], []
    for new in (5, 12):
        with first_of(tp) as (device, mesh):
            run_layers(mesh, new)
            norms.append(device.launches["_rms_norm"])
            gathers.append(sum(device.collectives.values()))
    assert norms == [2 * 4, 2 * 8], "four norms a step, or four for each half"
    assert gathers[1] == 2 * gathers[0] == 2 * 2 * 4


def unwaited(self: Pending[Tensor]) -> Tensor:
    assert self._kept is not None
    return self._kept[1]


@pytest.mark.parametrize("tp", [2, 4])
def test_a_sum_that_is_read_without_a_wait_is_an_error(
    tp: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Pending, "wait", unwaited)
    with first_of(tp) as (_, mesh), pytest.raises(UnorderedStreams, match="_rms_norm writes"):
        run_layers(mesh, 12)


def test_a_sum_that_begins_too_early_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the second stream's wait for the product that it sums."""
    monkeypatch.setattr("support.fake_cuda.streams.Stream.wait_stream", lambda self, other: None)
    with first_of(2) as (_, mesh), pytest.raises(UnorderedStreams, match="all_reduce writes"):
        run_layers(mesh, 12)
