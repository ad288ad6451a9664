"""The CUDA runner's logic on CPU, its graphs stubbed, token for token against the plain runner."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from arriero.kernels.reference.backend import ReferenceOps
from arriero.shards.checkpoint.reader import Checkpoint
from arriero.shards.config.group import GroupConfig
from arriero.shards.config.sampling_params import SamplingParams
from arriero.shards.engine.config import engine_config
from arriero.shards.engine.engine import Engine
from arriero.shards.errors import SpecError
from arriero.shards.layout.resolve import resolve
from arriero.shards.protocol import wire
from arriero.shards.protocol.step_plan import StepPlan, StepResult
from arriero.shards.worker import sequence_table as sequences
from arriero.shards.worker.cuda.runner import Copied, CudaRunner
from support import triton_interpreter
from support.groups import Answer, Group, running
from support.models import tiny_llama, tiny_llama4

from .stub import StubDevice, StubEvent

triton_interpreter.install()  # before anything imports the kernels


@pytest.fixture(autouse=True)
def captures_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    """The stub's graphs are functions called again, which the reference's waits do not disturb."""
    monkeypatch.setattr(ReferenceOps, "capturable", True)


class LateExecutor:
    """Results are waited for only when they are asked for: always behind the launches."""

    def __init__(self, runner: CudaRunner) -> None:
        self.runner = runner
        self.pending: deque[Copied] = deque()
        self.most_pending = 0
        self.lock = threading.Lock()

    def submit(self, plan: StepPlan) -> None:
        pending = self.runner.launch(wire.decode(wire.encode(plan), StepPlan))
        assert pending is not None and not pending.done
        with self.lock:
            self.pending.append(pending)
            self.most_pending = max(self.most_pending, len(self.pending))

    def collect(self, timeout_s: float | None = None) -> StepResult | None:
        with self.lock:
            return self.pending.popleft().wait() if self.pending else None

    def close(self) -> None:
        self.pending.clear()


@contextmanager
def on_stub(config: GroupConfig, device: StubDevice) -> Iterator[tuple[Group, LateExecutor]]:
    checkpoint = Checkpoint.open(config.model_path)
    config = resolve(config, checkpoint.config)
    executor = LateExecutor(CudaRunner(config, 0, device=device))
    group: Group | None = None
    limits = engine_config(config, checkpoint.config, checkpoint.digest)
    engine = Engine(limits, executor, lambda outputs: group.take(outputs))
    group = Group(engine)
    engine.start()
    try:
        yield group, executor
    finally:
        engine.stop()


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> GroupConfig:
    path: Path = tmp_path_factory.mktemp("model")
    tiny_llama(path, seed=3)
    return GroupConfig(
        model_path=str(path),
        dtype="float32",
        kernels="reference",
        block_size=4,
        num_blocks=200,
        max_model_len=128,
        max_sequences=12,
        max_batch_tokens=24,
    )


PROMPTS = [[7, 1, 9, 4, 4, 2, 8], [1, 2, 3], [5] * 30, [11, 12], [99, 3, 3, 1, 100]]
PLAIN = [
    SamplingParams(max_tokens=20, temperature=0, seed=0),
    SamplingParams(max_tokens=25, temperature=1.0, seed=4, top_p=0.9),
    SamplingParams(max_tokens=18, temperature=0.8, seed=5, top_k=20, min_p=0.01),
    SamplingParams(max_tokens=30, temperature=0, seed=0),
    SamplingParams(max_tokens=9, temperature=1.3, seed=6),
]
UNUSUAL = [
    SamplingParams(max_tokens=15, temperature=1.0, seed=1, repetition_penalty=1.4),
    SamplingParams(
        max_tokens=20, temperature=0, seed=0, presence_penalty=1.0, frequency_penalty=0.5
    ),
    SamplingParams(max_tokens=12, temperature=0, seed=0, logprobs=3),
    SamplingParams(max_tokens=16, temperature=1.0, seed=2, logit_bias={5: 3.0}),
    SamplingParams(max_tokens=10, temperature=0, seed=0, prompt_logprobs=2),
]


def plainly(config: GroupConfig, params: list[SamplingParams]) -> list[Answer]:
    with running(config) as group:
        return group.generate(PROMPTS, params)


@pytest.mark.parametrize("kind", ["plain", "unusual"])
def test_tokens_are_the_plain_runners(config: GroupConfig, kind: str) -> None:
    params = PLAIN if kind == "plain" else UNUSUAL
    expected = plainly(config, params)
    device = StubDevice()
    with on_stub(config, device) as (group, executor):
        got = group.generate(PROMPTS, params)
    assert [a.tokens for a in got] == [a.tokens for a in expected]
    assert [a.logprobs for a in got] == [a.logprobs for a in expected]
    assert [a.prompt_logprobs for a in got] == [a.prompt_logprobs for a in expected]
    assert executor.most_pending == 2, "a step is launched before the one before is collected"
    if kind == "plain":
        assert sum(graph.replays for graph in device.graphs) > 20


def test_graphs_are_captured_once_and_inputs_stay_where_they_are(config: GroupConfig) -> None:
    device = StubDevice()
    with on_stub(config, device) as (group, executor):
        group.generate(PROMPTS, PLAIN)
        captured = executor.runner._graphs.num_captured
        words = executor.runner._inputs._words.data_ptr()
        group.generate(PROMPTS, PLAIN)
        assert executor.runner._inputs._words.data_ptr() == words
    # batches of 1 .. 5 take buckets 1, 2, 4 and 8, each greedy or drawing
    assert captured <= 8
    assert len(device.graphs) == executor.runner._graphs.num_captured <= 8


def test_a_capture_changes_nothing_that_sequences_see(config: GroupConfig) -> None:
    """Its runs are of padding alone: last tokens and the cache of every other block stay."""
    device = StubDevice()
    runner = CudaRunner(
        resolve(config, Checkpoint.open(config.model_path).config), 0, device=device
    )
    cache = runner._model.kv
    blocks = range(config.num_blocks)
    runner._slots.last_S.fill_(42)
    before = [cache.read(layer, blocks).clone() for layer in range(2)]
    runner._inputs.fill_padding(4)
    device.capture(runner._graph_work(4, False))
    assert all(torch.equal(cache.read(layer, blocks), before[layer]) for layer in range(2))
    assert (runner._slots.last_S[:-1] == 42).all()
    assert cache.read(0, [config.num_blocks]).any(), "padding is written to the scratch block"


def test_memory_beyond_the_plan_is_told(
    config: GroupConfig, caplog: pytest.LogCaptureFixture
) -> None:
    resolved = resolve(config, Checkpoint.open(config.model_path).config)
    CudaRunner(resolved, 0, device=StubDevice())
    assert "bytes" not in caplog.text
    CudaRunner(resolved, 0, device=StubDevice(held=1 << 30))
    assert "1073741824 bytes" in caplog.text


@pytest.mark.parametrize("kernels", ["reference", "triton"])
def test_graphs_hold_the_tables_of_chunk_local_layers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kernels: str
) -> None:
    """Over several chunks and several frames, whose blocks come back and are used again."""
    if kernels == "triton":
        pytest.importorskip("triton")
    monkeypatch.setattr(sequences, "_FRAME", 1)  # frames of a chunk, so that short texts cross them
    tiny_llama4(tmp_path, seed=3, layers=4, experts=4, chunk=8)
    config = GroupConfig(
        model_path=str(tmp_path),
        dtype="float32",
        kernels="reference",
        block_size=4,
        num_blocks=100,
        num_local_blocks=60,
        max_model_len=128,
        max_sequences=12,
        max_batch_tokens=24,
    )
    prompts, params, few = PROMPTS, PLAIN, kernels == "triton"
    if few:  # interpreted, a step is slow
        prompts, params = PROMPTS[:2], [replace(one, max_tokens=4) for one in PLAIN[:2]]
    with running(config) as group:
        expected = group.generate(prompts, params)
    device = StubDevice()
    with on_stub(replace(config, kernels=kernels), device) as (group, _):
        got = group.generate(prompts, params)
    assert [a.tokens for a in got] == [a.tokens for a in expected]
    assert sum(graph.replays for graph in device.graphs) > (1 if few else 20)


def test_graphs_of_triton_kernels(config: GroupConfig) -> None:
    """The whole of it but the GPU: interpreted kernels behind stubbed graphs."""
    pytest.importorskip("triton")
    params = [replace(one, max_tokens=3) for one in PLAIN[:3]]
    prompts = PROMPTS[:3]
    with running(config) as group:
        expected = group.generate(prompts, params)
    with on_stub(replace(config, kernels="triton"), StubDevice()) as (group, executor):
        got = group.generate(prompts, params)
        assert executor.runner.kernels == "triton"
    assert [a.tokens for a in got] == [a.tokens for a in expected]


def test_bits_that_cannot_be_kept_are_refused(config: GroupConfig) -> None:
    model = Checkpoint.open(config.model_path).config
    with pytest.raises(SpecError, match="`batch_independent`=True needs `kernels`=cpu or triton"):
        resolve(replace(config, batch_independent=True), model)
    assert resolve(replace(config, batch_independent=True, kernels="triton"), model)


def test_a_result_keeps_its_lane() -> None:
    """Data-parallel lanes count their steps alike: without it a result is taken for another's."""
    none = np.empty(0, np.int32)
    arrays = ("freed", "block_slots", "block_index", "block_ids", "slots", "starts", "counts")
    plan = StepPlan(
        step=3, dp_rank=1, new=[], **dict.fromkeys((*arrays, "tokens", "samples"), none)
    )
    copied = Copied(plan, None, None, StubEvent([]), 0)
    result = copied.wait()
    assert (result.step, result.dp_rank) == (3, 1)
