"""The real CUDA runner, engine and kernels on a simulated device, which refuses what a GPU would.

Tokens equal those of the CPU reference; weights are float32, since Triton's interpreter rounds
bfloat16 in another way than a device does.
"""

from __future__ import annotations

import re
import types
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from arriero.kernels.kv_cache import KVCacheSpec
from arriero.shards.adapters.reader import AdapterReader
from arriero.shards.checkpoint.reader import Checkpoint
from arriero.shards.checkpoint.tensor_folder import TensorFolder
from arriero.shards.config.adapters import AdapterSlots
from arriero.shards.config.group import GroupConfig
from arriero.shards.config.kv_tiers import RowType
from arriero.shards.config.sampling_params import SamplingParams
from arriero.shards.config.speculation import DraftKind, SpeculationConfig
from arriero.shards.engine.speculation.draft_length import StepCost
from arriero.shards.errors import SpecError
from arriero.shards.kv.block_shards import BlockForm, BlockShard
from arriero.shards.kv.device_blocks import DeviceBlocks
from arriero.shards.layout.resolve import resolve
from arriero.shards.models.llama4.slice import Llama4Slice
from arriero.shards.worker.cuda.rehearsal import prompt_sizes
from arriero.shards.worker.cuda.runner import CudaRunner
from support import triton_interpreter
from support.adapters import write_adapter
from support.eagle3_heads import head_settings, head_weights, write_head
from support.fake_cuda import DeviceTensor, simulated
from support.groups import running
from support.models import tiny_llama, tiny_llama4
from support.proposers import sometimes
from support.quantized_models import quantized_llama
from support.scaled_fp4 import block_scaled_product

triton_interpreter.install()  # before anything imports the kernels
pytest.importorskip("triton")

from arriero.kernels.triton.kv import TritonKVCache  # noqa: E402

PROMPTS = [[7, 1, 9, 4, 4, 2, 8], [1, 2, 3], [5] * 30]
GREEDY = SamplingParams(max_tokens=3, temperature=0, seed=0)
PARAMS = [
    GREEDY,
    SamplingParams(max_tokens=3, temperature=1.0, seed=4, top_p=0.9),
    SamplingParams(max_tokens=3, temperature=0.8, seed=5, top_k=20),
]


def make(path: Path, family: str) -> None:
    """A tiny folder: of a family ("vision" is a Llama 4 that sees), or of a quantized form."""
    if family == "llama":
        tiny_llama(path, seed=3, attention_bias=True, mlp_bias=True)
    elif family == "llama4":
        tiny_llama4(path, seed=3, layers=4, experts=4, chunk=8)
    elif family == "vision":
        tiny_llama4(path, seed=3, layers=2, experts=4, chunk=8, sees=True)
    else:
        quantized_llama(path, family, layers=2)


def config_of(path: Path, **more: Any) -> GroupConfig:  # noqa: ANN401
    settings: dict[str, Any] = {
        "dtype": "float32",
        "kernels": "reference",
        "block_size": 4,
        "num_blocks": 100,
        "num_local_blocks": 60,
        "max_model_len": 64,
        "max_sequences": 2,
        "max_batch_tokens": 24,
    }
    return GroupConfig(model_path=str(path), **settings | more)


def on_cuda(config: GroupConfig, kernels: str = "triton") -> GroupConfig:
    return replace(config, device="cuda", kernels=kernels)


def tokens(config: GroupConfig, prompts: list[list[int]], params: list[SamplingParams]) -> Any:  # noqa: ANN401
    with running(config) as group:
        answers = group.generate(prompts, params)
    assert [one.error for one in answers] == [None] * len(answers)
    return [one.tokens for one in answers]


@pytest.mark.parametrize("family", ["llama", "llama4"])
def test_tokens_are_the_references(tmp_path: Path, family: str) -> None:
    """Greedy and drawn, prompts in pieces beside decodes, eager steps and replayed ones."""
    make(tmp_path, family)
    config = config_of(tmp_path)
    prompts, params = (PROMPTS, PARAMS) if family == "llama" else (PROMPTS[1:], [GREEDY] * 2)
    expected = tokens(config, prompts, params)
    with simulated() as device, running(on_cuda(config)) as group:
        ready = device.captures
        assert ready == 2 * 2, "batches of 1 and 2, greedy and drawing, before the first request"
        assert device.capture_modes == {"thread_local"}, "tiers' threads use the device meanwhile"
        device.clear()
        answers = group.generate(prompts, params)
        assert [one.error for one in answers] == [None] * len(answers)
        assert [one.tokens for one in answers] == expected
        assert not device.waits, "a step waits for the device"
        assert not device.pageable, "a copy from pageable memory is a wait on a real device"
        assert device.captures == ready, "serving captures nothing"
        assert not device.compiles, "serving compiles nothing"
        assert device.launches["_decode_splits"] > 0


@pytest.mark.parametrize("kind", ["right and wrong", "draft"])
def test_drafts_change_no_token(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of drafted tokens, with penalties whose counts are on the device."""
    make(tmp_path, "llama")
    config = config_of(tmp_path, max_model_len=100)
    params = [
        SamplingParams(max_tokens=12, temperature=0, seed=0, repetition_penalty=1.3),
        SamplingParams(max_tokens=12, temperature=1.0, seed=4, presence_penalty=0.9, logprobs=2),
    ]
    prompts = PROMPTS[:2]
    with running(config) as group:
        expected = group.generate(prompts, params)
    drafts = SpeculationConfig(kind="ngram", max_tokens=4)
    factory = sometimes(lambda s: expected[int(s.request_id[1:]) - 1].tokens, 100, 3)
    if kind == "draft":
        monkeypatch.setattr(StepCost, "share", lambda *args: 0.0)
        drafts = SpeculationConfig(kind="draft", max_tokens=3, model_path=str(tmp_path))
    config = replace(on_cuda(config, "reference"), speculation=drafts)
    with simulated(), running(config, proposers=None if kind == "draft" else factory) as group:
        answers = group.generate(prompts, params)
        counts = group.engine.stats().speculation
    assert [one.error for one in answers] == [None] * len(answers)
    assert [one.tokens for one in answers] == [one.tokens for one in expected]
    assert 0 < counts.accepted < counts.drafted or (kind == "draft" and counts.accepted)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["draft", "eagle3"])
def test_drafts_of_models_compile_nothing(
    tmp_path: Path, kind: DraftKind, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rows of a drafter and its draws, with the ids of a smaller vocabulary in a head."""
    target, drafter = tmp_path / "target", tmp_path / "drafter"
    tiny_llama(target, seed=3)
    if kind == "draft":
        tiny_llama(drafter, seed=4)
    else:
        settings = head_settings(draft_vocab=96, taps=[1])
        write_head(drafter, settings, head_weights(settings))
    config = config_of(target)
    params = [SamplingParams(max_tokens=10, temperature=1.0, seed=4)]
    expected = tokens(config, PROMPTS[1:2], params)
    monkeypatch.setattr(StepCost, "share", lambda *args: 0.0)
    drafts = SpeculationConfig(kind=kind, max_tokens=2, model_path=str(drafter))
    with simulated() as device, running(replace(on_cuda(config), speculation=drafts)) as group:
        device.clear()
        (answer,) = group.generate(PROMPTS[1:2], params)
        assert (answer.error, answer.tokens) == (None, expected[0])
        assert group.engine.stats().speculation.drafted
        assert not device.compiles, "serving compiles nothing"


VARIANTS: dict[str, dict[str, Any]] = {
    "int8": {"quantization": "int8"},
    "int4": {"quantization": "int4"},
    "fp8": {"quantization": "fp8"},
    "fbgemm_fp8": {},
    "modelopt-fp8": {},
    "window": {"sliding_window": 8, "attention_sinks": 2, "changes_answers": True},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_tokens_of_each_format_and_of_windows(tmp_path: Path, variant: str) -> None:
    make(tmp_path, variant if not VARIANTS[variant] else "llama")
    config = config_of(tmp_path, **VARIANTS[variant])
    prompts, params = [PROMPTS[0], PROMPTS[2][:12]], [replace(GREEDY, max_tokens=2)] * 2
    expected = tokens(config, prompts, params)
    with simulated() as device, running(on_cuda(config)) as group:
        device.clear()
        answers = group.generate(prompts, params)
        assert [answer.error for answer in answers] == [None] * 2
        assert [answer.tokens for answer in answers] == expected
        assert not device.waits and not device.compiles and not device.pageable


def test_nvfp4_on_blackwell_is_the_block_scaled_product(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Inputs in one launch to NVFP4, then torch's product, in eager steps and in graphs."""
    quantized_llama(tmp_path, "modelopt-nvfp4", layers=1)
    config = config_of(tmp_path, max_sequences=1, max_batch_tokens=8)
    prompts, params = [PROMPTS[0]], [replace(GREEDY, max_tokens=2)]
    expected = tokens(config, prompts, params)
    monkeypatch.setattr("support.fake_cuda.runtime.CAPABILITY", (10, 0))
    with (
        block_scaled_product(torch._scaled_mm_v2),
        simulated() as device,
        running(on_cuda(config)) as group,
    ):
        products = ("aten::_scaled_mm_v2", "_fp4_rows")
        assert len(device.recordings) == 2, "greedy and drawing"
        for ops in device.recordings:
            assert [ops.count(name) for name in products] == [4, 4], "four products of a layer"
        device.clear()
        answers = group.generate(prompts, params)
        assert [answer.error for answer in answers] == [None]
        assert [answer.tokens for answer in answers] == expected
        assert device.launches["_fp4_rows"] and not device.launches["_matmul"]
        assert not device.waits and not device.compiles and not device.pageable


def test_unusual_requests_compile_nothing(tmp_path: Path) -> None:
    """Penalties, bans, log-probabilities, and prompts of any length beside decodes."""
    make(tmp_path, "llama")
    config = config_of(tmp_path)
    params = [
        SamplingParams(max_tokens=2, temperature=1.0, seed=1, repetition_penalty=1.4),
        SamplingParams(max_tokens=2, temperature=0, seed=0, logprobs=2, logit_bias={5: 3.0}),
        SamplingParams(max_tokens=2, temperature=0, seed=0, allowed_token_ids=(3, 4)),
    ]
    expected = tokens(config, PROMPTS, params)
    with simulated() as device, running(on_cuda(config)) as group:
        device.clear()
        answers = group.generate(PROMPTS, params)
        assert [answer.error for answer in answers] == [None] * len(answers)
        assert [answer.tokens for answer in answers] == expected
        assert not device.compiles and not device.waits


def test_prompts_before_the_first_request_meet_every_block_size() -> None:
    """Products have block sizes for up to 16, 128 and more rows, divided among experts or not."""
    for most in (1, 2, 3, 16, 17, 100, 128, 129, 2048, 8192):
        sizes = prompt_sizes(most)
        assert sizes == sorted(set(sizes)) and sizes[-1] == max(2, most)
        for experts in (1, 8, 16, 128):
            classes = {rows_class(size, experts) for size in sizes}
            assert {rows_class(size, experts) for size in range(1, most + 1)} <= classes


def rows_class(rows: int, experts: int) -> int:
    each = -(-rows // experts)
    return 16 if each <= 16 else 128 if each <= 128 else 129


def test_the_reference_serves_on_a_gpu(tmp_path: Path) -> None:
    """Its ops wait for the device, which no capture allows: its decodes run one by one."""
    make(tmp_path, "llama")
    config = config_of(tmp_path)
    expected = tokens(config, PROMPTS, PARAMS)
    with simulated() as device:
        assert tokens(on_cuda(config, "reference"), PROMPTS, PARAMS) == expected
        assert device.captures == 0


@pytest.mark.parametrize("form", ["llama", "fbgemm_fp8"])
def test_an_older_gpu_refuses_float8_before_a_weight_is_read(
    tmp_path: Path, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(tmp_path, form)
    quantization, text = None, "the checkpoint's format fbgemm_fp8 needs compute capability 8.9"
    if form == "llama":
        quantization = "fp8"
        text = (
            "`quantization`='fp8' needs compute capability 8.9 or newer; this device has 8.0; "
            "use int8"
        )
    monkeypatch.setattr("support.fake_cuda.runtime.CAPABILITY", (8, 0))
    with simulated(), pytest.raises(SpecError, match=re.escape(text)):
        loaded(on_cuda(config_of(tmp_path, quantization=quantization)))


LOADED = [
    *((form, None) for form in ("llama", "llama4", "vision")),
    *((form, None) for form in ("awq", "gptq-act-order", "packed-8", "fbgemm_fp8")),
    *(("llama", form) for form in ("int8", "int4", "fp8")),
    ("llama4", "int8"),
]


@pytest.mark.parametrize(("form", "quantization"), LOADED)
def test_all_that_a_slice_loads_is_on_its_device(
    tmp_path: Path, form: str, quantization: str | None
) -> None:
    """Weights, biases, norms, scales, orders, tables of angles, experts' addresses, vision."""
    make(tmp_path, form)
    config = on_cuda(config_of(tmp_path, quantization=quantization))
    with simulated():
        runner = loaded(config)
        for part in (runner._model, runner._table, runner._inputs):
            strays = [name for name, one in tensors_of(part) if not on_device_or_pinned(one)]
            assert not strays, f"on the host: {', '.join(strays)}"


def loaded(config: GroupConfig, rank: int = 0) -> CudaRunner:
    return CudaRunner(resolve(config, Checkpoint.open(config.model_path).config), rank)


def on_device_or_pinned(one: Tensor) -> bool:
    return isinstance(one, DeviceTensor) or one.is_pinned()


def tensors_of(root: object) -> Iterator[tuple[str, Tensor]]:
    """Every tensor that `root` holds, closures of its functions included, with the way to it."""
    seen: set[int] = set()
    left: list[tuple[str, Any]] = [(type(root).__name__, root)]
    while left:
        name, one = left.pop()
        if id(one) in seen or isinstance(one, (TensorFolder, type)):
            continue
        seen.add(id(one))
        if isinstance(one, Tensor):
            yield name, one
        elif isinstance(one, dict):
            left += [(f"{name}[{key!r}]", value) for key, value in one.items()]
        elif isinstance(one, (list, tuple, set)):
            left += [(f"{name}[{at}]", value) for at, value in enumerate(one)]
        elif isinstance(one, types.FunctionType):
            left += [(f"{name}()", cell.cell_contents) for cell in one.__closure__ or ()]
        elif isinstance(one, types.MethodType):
            left.append((name, one.__self__))
        elif type(one).__module__.startswith("arriero."):
            fields = dict(getattr(one, "__dict__", {}))
            slots = [slot for kind in type(one).__mro__ for slot in getattr(kind, "__slots__", ())]
            fields |= {slot: getattr(one, slot) for slot in slots if hasattr(one, slot)}
            left += [(f"{name}.{field}", value) for field, value in fields.items()]


def test_replaced_experts_leave_memory(tmp_path: Path) -> None:
    """Of a layer whose experts are moved, only those that are held take memory."""
    tiny_llama4(tmp_path, seed=3, layers=2, experts=8, chunk=8)
    with simulated():
        runner = loaded(on_cuda(config_of(tmp_path, dp=2)))
        model = runner._model
        assert isinstance(model, Llama4Slice)
        turned = np.arange(8, dtype=np.int32)
        held = []
        for _ in range(4):
            turned = np.roll(turned, 4)
            for layer in range(2):
                model.place_experts(layer, turned)
            held.append(torch.cuda.memory_allocated())
        assert len(set(held)) == 1, f"bytes after each move: {held}"


def test_released_experts_leave_memory(tmp_path: Path) -> None:
    tiny_llama4(tmp_path, seed=3, layers=2, experts=8, chunk=8)
    with simulated():
        runner = loaded(on_cuda(config_of(tmp_path)))
        held, weights = torch.cuda.memory_allocated(), runner.weights_nbytes
        runner.release()
        assert torch.cuda.memory_allocated() <= held - weights


def test_quantized_activations_have_the_dtype_that_the_next_stage_expects(tmp_path: Path) -> None:
    make(tmp_path, "llama")
    config = config_of(tmp_path, quantization="int8", dtype="float16")
    with simulated():
        runner = loaded(on_cuda(config))
        x_TH = runner._embed(torch.tensor([1, 2], dtype=torch.int32, device="cuda"))
        assert x_TH.dtype == runner._activation_dtype == torch.float16


@pytest.mark.parametrize("row_type", [None, "int8", "fp8"])
def test_tier_copies_go_through_pinned_memory(row_type: RowType | None) -> None:
    """Several layers of several blocks, with no wait but the one at the end of a transfer."""
    spec = KVCacheSpec(
        num_layers=3, num_blocks=6, num_kv_heads=2, head_dim=8, block_size=4, dtype=torch.float32
    )
    shard = BlockShard((0, 3), (0, 2))
    form = BlockForm.of(spec, packed=row_type is not None)
    with simulated() as device:
        kv = TritonKVCache(spec, torch.device("cuda"))
        kv.data.uniform_(-1, 1)  # fp8 rounds a number by at most a sixteenth of it
        before = kv.data.cpu()
        blocks = DeviceBlocks(kv, form, shard, row_type, most=4)
        device.clear()
        data = blocks.read([4, 1, 3])
        assert data.shape == (3, *form.shape(shard))
        blocks.write([0, 5], data[:2])
        assert not device.waits and not device.pageable
        assert sum(device.events.values()) == 2, "a wait for each transfer"
        after = kv.data.cpu()
    near = 0.0 if row_type is None else 0.1
    assert torch.allclose(after[:, [0, 5]], before[:, [4, 1]], atol=near)
    assert torch.equal(after[:, 1:5], before[:, 1:5]), "the other blocks stay"


def test_adapters_beside_the_base_model(tmp_path: Path) -> None:
    """A batch of two adapters and the base model; the steps with an adapter run eagerly."""
    make(tmp_path / "model", "llama")
    files = tuple(write_adapter(tmp_path / n, s, tables=128 * s) for s, n in enumerate("ab"))
    config = config_of(tmp_path / "model", adapters=files, max_sequences=3)

    def answers(config: GroupConfig, ready: Callable[[], None] = lambda: None) -> list[list[int]]:
        with running(config) as group:
            ready()
            chosen = [*group.engine.config.adapters, ""]
            names = [
                group.submit(prompt, GREEDY, adapter=adapter)
                for prompt, adapter in zip(PROMPTS, chosen, strict=True)
            ]
            return [answer.tokens for answer in group.wait(names)]

    expected = answers(config)
    with simulated() as device:
        assert answers(on_cuda(config), device.clear) == expected
        assert device.launches["_lora_shrink"] and device.launches["_lora_expand"]
        assert not device.waits and not device.compiles, "a step waits or compiles"


def test_adapters_that_change_their_slot(tmp_path: Path) -> None:
    """Two adapters over one slot: copies in order, without a wait, an allocation or a compile."""
    make(tmp_path / "model", "llama")
    files = [write_adapter(tmp_path / n, s, tables=128 * s) for s, n in enumerate("ab")]
    folders = [file.path for file in files]
    slots = AdapterSlots(device=1, host=4, max_rank=8)
    config = config_of(tmp_path / "model", adapter_slots=slots, max_sequences=3)
    params = replace(GREEDY, max_tokens=2)

    def answers(config: GroupConfig, ready: Callable[[], None] = lambda: None) -> list[list[int]]:
        reader = AdapterReader(slots, Checkpoint.open(config.model_path).config, ())
        digests = [reader.open(folder).digest for folder in folders]
        with running(config) as group:
            for digest, folder in zip(digests, folders, strict=True):
                assert group.engine.add_adapter(digest, folder).result(60) == ""
            ready()
            names = [group.submit(PROMPTS[0], params, adapter=d) for d in (*digests, digests[0])]
            return [answer.tokens for answer in group.wait(names)]

    expected = answers(config)
    assert expected[0] == expected[2] != expected[1]
    with simulated() as device:
        assert answers(on_cuda(config), device.clear) == expected
        assert not device.waits and not device.compiles and not device.pageable


def test_drafts_through_the_gpus_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of drafted tokens, right and wrong, in graphs and through the kernels of a GPU."""
    make(tmp_path, "llama")
    monkeypatch.setattr(StepCost, "share", lambda *args: 0.0)  # drafts whatever a row costs
    config = config_of(tmp_path, max_batch_tokens=8)
    params = [
        SamplingParams(max_tokens=10, temperature=1.0, seed=4, ignore_eos=True),
        SamplingParams(max_tokens=10, temperature=0, seed=0, ignore_eos=True),
    ]
    prompts = [PROMPTS[1][:3], PROMPTS[1][:2]]
    expected = tokens(config, prompts, params)
    drafts = SpeculationConfig(kind="ngram", max_tokens=3)
    factory = sometimes(lambda s: expected[int(s.request_id[1:]) - 1], 100, 5)
    speculating = replace(on_cuda(config), speculation=drafts)
    with simulated() as device, running(speculating, proposers=factory) as group:
        assert device.captures == 2 * 4, "1, 2, 4 and 8 rows, greedy and drawing"
        device.clear()
        answers = group.generate(prompts, params)
        counts = group.engine.stats().speculation
        assert [one.error for one in answers] == [None] * len(answers)
        assert [one.tokens for one in answers] == expected
        assert 0 < counts.accepted < counts.drafted
        assert device.launches["_prefill"] <= 2 * 2, "the prompts alone run op by op, in two layers"
        assert device.replays < sum(len(one) for one in expected), "a graph draws several tokens"
        assert not device.waits and not device.compiles and device.captures == 2 * 4
