"""Groups of several ranks on simulated devices, a process each: the tokens of the CPU reference."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from multiprocessing.queues import Queue
from pathlib import Path
from typing import Any

import pytest

from arriero.shards.config.group import GroupConfig
from arriero.shards.config.sampling_params import SamplingParams
from arriero.shards.config.speculation import SpeculationConfig
from arriero.shards.engine.speculation.draft_length import StepCost
from arriero.shards.engine.speculation.proposer import ProposerFactory
from arriero.shards.errors import GroupFailed
from arriero.shards.leader.visible_gpus import device_of
from arriero.shards.worker.cuda.runner import HOST_WAITS
from support.fake_cuda import simulated, simulated_slices
from support.groups import running
from support.models import tiny_llama, tiny_llama4
from support.proposers import sometimes
from support.quantized_models import quantized_llama
from support.ranks import joined, ranks, tell

PROMPTS = [[7, 1, 9, 4, 4, 2, 8], [1, 2, 3]]
PARAMS = [
    SamplingParams(max_tokens=4, temperature=0, seed=0),
    SamplingParams(max_tokens=3, temperature=1.0, seed=4, top_p=0.9),
]
LAYOUTS: dict[str, tuple[str, dict[str, Any]]] = {
    "TP2": ("triton", {"tp": 2}),
    "PP2": ("triton", {"pp": 2}),
    "EP2": ("triton", {"tp": 2, "ep": 2}),
    "TP4": ("reference", {"tp": 4}),
    "TP2xPP2": ("triton", {"tp": 2, "pp": 2}),
    "DP2xEP2": ("triton", {"dp": 2}),
    "PP2 drafts": ("triton", {"pp": 2}),
    "TP2 float8": ("triton", {"tp": 2}),
}
SLOW = ("TP2 float8",)


def tokens(config: GroupConfig, proposers: ProposerFactory | None = None) -> list[list[int]]:
    with running(config, proposers=proposers) as group:
        answers = group.generate(PROMPTS, PARAMS)
    assert [one.error for one in answers] == [None] * len(answers)
    return [one.tokens for one in answers]


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param(layout, marks=pytest.mark.slow) if layout in SLOW else layout
        for layout in LAYOUTS
    ],
)
def test_ranks_give_the_references_tokens(
    tmp_path: Path, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernels, mesh = LAYOUTS[layout]
    if kernels == "triton":
        pytest.importorskip("triton")
    if "dp" in mesh or "ep" in mesh:
        tiny_llama4(tmp_path, seed=3, layers=2, experts=4, chunk=8)
    elif "float8" in layout:
        quantized_llama(tmp_path, "compressed-fp8")
    else:
        tiny_llama(tmp_path, seed=3)
    reports = tmp_path / "reports"
    reports.mkdir()
    config = GroupConfig(
        model_path=str(tmp_path),
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
    expected = tokens(config)
    on_cuda = replace(config, device="cuda", kernels=kernels, **mesh)
    proposers, sizes = None, 2
    if "drafts" in layout:
        monkeypatch.setattr(StepCost, "share", lambda *args: 0.0)  # drafts whatever a row costs
        drafts = SpeculationConfig(kind="ngram", max_tokens=3)
        on_cuda = replace(on_cuda, speculation=drafts, max_batch_tokens=8)
        proposers = sometimes(lambda s: expected[int(s.request_id[1:]) - 1], 100, 5)
        sizes = 4
    with simulated_slices(reports):
        assert tokens(on_cuda, proposers) == expected
    counts = [json.loads(path.read_text()) for path in sorted(reports.iterdir())]
    assert len(counts) == mesh.get("tp", 1) * mesh.get("pp", 1) * mesh.get("dp", 1)
    if kernels == "triton":
        for rank in counts:
            assert not rank["compiles"], "serving compiles nothing"
            graphs = 3 if "dp" in mesh else 2  # layers apart from draws; greedy, drawing
            assert rank["captures"] == graphs * sizes, "all at start"
            assert rank["replays"], "decodes, and the padding of ranks without tokens"
            assert places(rank["waits"]) <= HOST_WAITS.keys(), rank["waits"]
            assert not rank["pageable"] or "dp" in mesh, rank["pageable"]
            if "float8" in layout:
                assert rank["launches"]["_silu_mul_rounded"] and "_silu_mul" not in rank["launches"]
            shared = rank["launches"].get("_symmetric_sum", 0)
            reduced = sum(n for name, n in rank["collectives"] if name == "all_reduce")
            assert not reduced and bool(shared) == ("tp" in mesh), "sums over symmetric memory"
            passes = sum(n for name, n in rank["collectives"] if name.startswith("all_gather"))
            waits = sum(rank["waits"].values())
            assert waits == (passes if "dp" in mesh else 0), "one for each layer with experts"
            assert waits <= 2 * len(PROMPTS), "in the two layers of a prompt's step alone"


def places(waits: dict[str, int]) -> set[str]:
    """File and function of each wait, from "kind @ file:line function"."""
    found = set()
    for wait in waits:
        where, function = wait.rpartition(" @ ")[2].split(" ")
        found.add(f"{where.rpartition(':')[0]}:{function}")
    return found


def test_each_rank_has_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert [device_of(rank) for rank in range(3)] == ["0", "1", "2"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4, GPU-7f")
    assert [device_of(rank) for rank in range(2)] == ["4", "GPU-7f"]
    with pytest.raises(GroupFailed, match="slice 2 has no GPU"):
        device_of(2)


def connected(rank: int, port: int, told: Queue[Any], mesh: dict[str, int]) -> None:
    with simulated() as device:
        made = joined(rank, port, **mesh, device="cuda", timeout_s=60)
        tell(told, dict(device.collectives))
        made.leave()


@pytest.mark.parametrize("mesh", [{"tp": 2}, {"pp": 2}])
def test_every_communicator_is_made_before_a_step(mesh: dict[str, int]) -> None:
    """Of NCCL, which makes each at its first use: a slow start would be judged a hang."""
    with ranks(2, connected, mesh) as told:
        used = sum((Counter(told.get(timeout=120)) for _ in range(2)), Counter())
    assert used["all_reduce", (0, 1)] >= 2
    assert used["send", (0, 1)] == used["recv", (0, 1)] == 1
