"""Sums beside products, and dispatch beside the shared expert, on simulated devices.

The device refuses a read that no wait puts behind its write, so that these runs hold the waits too.
"""

from __future__ import annotations

import json
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

PROMPTS = [[5, 6] * 11, [7, 1, 9, 4, 4, 2, 8]]
GREEDY = SamplingParams(max_tokens=3, temperature=0, seed=0)
LAYOUTS: dict[str, dict[str, Any]] = {
    "TP2": {"tp": 2},
    "TP2xPP2": {"tp": 2, "pp": 2},
    "EP2": {"tp": 2, "ep": 2},
    "DP2xEP2": {"dp": 2},
}
HIDDEN = 64  # of the tiny models
SHAPE = shapes.Shape(name="tiny", hidden=32, mlp=48, q_heads=4, kv_heads=1, head_dim=16, layers=2)


def tokens(config: GroupConfig) -> list[list[int]]:
    with running(config) as group:
        answers = group.generate(PROMPTS, GREEDY)
    assert [answer.error for answer in answers] == [None] * len(answers)
    return [answer.tokens for answer in answers]


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_halves_give_the_references_tokens(
    tmp_path: Path, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps of 16, 6 and 7 rows, then decodes; the first one goes in halves of 8.

    Groups whose steps stay whole give the same tokens: `test_ranks`.
    """
    mesh = LAYOUTS[layout]
    model, reports = tmp_path / "model", tmp_path / "reports"
    reports.mkdir()
    if "TP2" in layout:
        tiny_llama(model, seed=3, hidden=HIDDEN)
    else:
        tiny_llama4(model, seed=3, layers=2, experts=4, chunk=8)
    config = GroupConfig(
        model_path=str(model),
        dtype="float32",
        kernels="reference",
        threads=1,
        block_size=4,
        num_blocks=100,
        num_local_blocks=60,
        max_model_len=64,
        max_sequences=mesh.get("dp", 1),
        max_batch_tokens=16,
    )
    expected = tokens(config)
    monkeypatch.setenv(SWITCH, "1")
    monkeypatch.setenv(SYMMETRIC_SWITCH, "0")  # sums are messages then
    with simulated_slices(reports, small_halves=True):
        assert tokens(replace(config, device="cuda", kernels="triton", **mesh)) == expected
    counts = [json.loads(path.read_text()) for path in sorted(reports.iterdir())]
    size = mesh.get("dp", 1) * mesh.get("tp", 1)  # ranks of a stage
    for first in range(0, len(counts), size):
        orders = [shared_messages(rank) for rank in counts[first : first + size]]
        assert all(order == orders[0] for order in orders), "the same collectives in one order"
    for rank in counts:
        assert not rank["compiles"], "serving compiles nothing"
        assert not rank["waits"] or "dp" in mesh, rank["waits"]
        if "dp" not in mesh:
            check_sums(rank, counts.index(rank) < size, 2 // mesh.get("pp", 1))


def check_sums(rank: Any, embeds: bool, layers: int) -> None:  # noqa: ANN401
    """The sums of eager steps in their order: first the embedding's, then two of each layer."""
    sizes = [size for name, _, size in rank["messages"] if name == "all_reduce"]
    expected: list[int] = []
    for halves in ([8, 8], [6], [7]):
        rows = [sum(halves)] * embeds + halves * 2 * layers
        expected += [HIDDEN * num_rows for num_rows in rows]
    assert sizes == expected


def shared_messages(rank: Any) -> list[Any]:  # noqa: ANN401
    """The collectives of a rank in which all ranks of its stage take part.

    With their sizes, where these are the same on all ranks.
    """
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
