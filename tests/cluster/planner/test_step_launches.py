"""The launches of the account are the launches that the simulated CUDA device counts."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from arriero.cluster.planner.catalog import DEVICES, find_model
from arriero.cluster.planner.demand import KvDemand
from arriero.cluster.planner.memory import plan_group
from arriero.cluster.planner.rank_weights import weights_as
from arriero.cluster.planner.step_model.account import account
from arriero.cluster.planner.step_model.work import StepLoad, launches_by_kernel
from arriero.shards.config.group import GroupConfig
from arriero.shards.config.parallel import ParallelConfig
from arriero.shards.layout.resolve import resolve
from arriero.shards.worker.cuda.runner import CudaRunner
from support import triton_interpreter
from support.fake_cuda import simulated
from support.models import tiny_llama, tiny_llama4
from support.quantized_models import quantized_llama

triton_interpreter.install()  # before anything imports the kernels
pytest.importorskip("triton")

NO_KERNEL = {
    "aten::view", "aten::slice", "aten::select", "aten::unbind", "aten::expand", "aten::detach",
    "aten::t", "aten::transpose", "aten::unsqueeze", "aten::split", "aten::alias", "aten::permute",
    "aten::as_strided", "aten::_unsafe_view", "aten::_reshape_alias", "aten::empty",
    "aten::empty_like", "aten::empty_strided", "aten::new_empty",
}  # fmt: skip
"""Torch's ops that launch nothing: views and allocations."""


def make(path: Path, family: str) -> None:
    if family == "llama":
        tiny_llama(path, seed=3)
    elif family == "llama4":
        tiny_llama4(path, seed=3, layers=4, experts=4, chunk=8)
    else:
        quantized_llama(path, family, layers=2)


def counted(folder: Path) -> list[Counter[str]]:
    """Launches of a captured decode step of a sequence: drawing, and greedy."""
    config = GroupConfig(
        model_path=str(folder),
        dtype="float32",
        device="cuda",
        kernels="triton",
        block_size=4,
        num_blocks=20,
        num_local_blocks=20,
        max_model_len=32,
        max_sequences=1,
        max_batch_tokens=2,
    )
    with simulated() as device:
        runner = CudaRunner(resolve(config, find_model(str(folder)).config), 0)
        for all_greedy in (False, True):
            assert runner._graphs is not None, "a dense step on one rank is captured"
            runner._capture(runner._graphs, 1, all_greedy)
        recordings = device.recordings
        runner.close()
    return [Counter(op for op in ops if op not in NO_KERNEL) for ops in recordings]


def accounted(folder: Path, *, draws: bool) -> Counter[str]:
    model = find_model(str(folder))
    weights = replace(weights_as(model.config, model.scheme, "checkpoint"), base="float32")
    demand = KvDemand(context=32, kv_dtype="float32", max_sequences=1, max_batch_tokens=2)
    device = DEVICES["h200-141g"]
    plan = plan_group(model, weights, ParallelConfig(), demand, device, "triton")
    step = account(plan, StepLoad(sequences=1, context=32, draws=draws), 8)
    return launches_by_kernel(work for work in step.works if work.captured)


@pytest.mark.parametrize("family", ["llama", "llama4", "fbgemm_fp8"])
def test_launches_of_a_decode_step(tmp_path: Path, family: str) -> None:
    make(tmp_path, family)
    drawing, greedy = counted(tmp_path)
    for launches in (drawing, greedy):
        # the interpreter clears the outputs of experts, whose last rows nothing writes
        launches["aten::zeros"] -= launches["_grouped_matmul"]
    assert +greedy == accounted(tmp_path, draws=False)
    expected = accounted(tmp_path, draws=True)
    # the interpreter takes 3 bits in a pass of a filter, in place of 5
    assert drawing.pop("_narrow") == 2 * 16 and expected.pop("_narrow") == 2 * 10
    assert +drawing == expected
