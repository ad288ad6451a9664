"""The account of a step: bytes of the planner, launches of the layers, floors and estimates."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from arriero.cluster.planner.catalog import DEVICES, find_model
from arriero.cluster.planner.demand import KvDemand
from arriero.cluster.planner.memory import plan_group
from arriero.cluster.planner.step_model import __main__ as command
from arriero.cluster.planner.step_model.account import Account, account
from arriero.cluster.planner.step_model.constants import (
    CONSTANTS,
    MEASURED,
    SLICE_LAUNCHES,
    SLICES,
    with_bench,
)
from arriero.cluster.planner.step_model.ends import FILTER_PASSES
from arriero.cluster.planner.step_model.estimate import estimate, overlap_s
from arriero.cluster.planner.step_model.layers import PROMPT_TILE_ROWS, SPLIT_TOKENS
from arriero.cluster.planner.step_model.speed import speed
from arriero.cluster.planner.step_model.work import Item, StepLoad, Work, launches_by_kernel
from arriero.cluster.planner.weight_forms import Dtype, weights_as
from arriero.kernels.registry import Kernels
from arriero.shards.collectives import half_steps
from arriero.shards.config.parallel import ParallelConfig
from arriero.shards.errors import SpecError

ROOT = Path(__file__).parents[3]
H200 = DEVICES["h200-141g"]


def step_of(
    name: str,
    dtype: Dtype,
    layout: ParallelConfig,
    load: StepLoad,
    kernels: Kernels = "triton",
    per_node: int = 8,
) -> Account:
    model = find_model(name)
    demand = KvDemand(context=max(load.context, 1024))
    weights = weights_as(model.config, model.scheme, dtype)
    return account(plan_group(model, weights, layout, demand, H200, kernels), load, per_node)


def bytes_of(step: Account, *items: Item) -> float:
    return sum(work.nbytes for work in step.works if work.item in items)


DECODE = StepLoad(sequences=1, context=1)


@pytest.mark.parametrize("dtype", ["bfloat16", "fp8-onload", "int4"])
@pytest.mark.parametrize("layout", [ParallelConfig(), ParallelConfig(tp=2, pp=2)])
def test_a_dense_step_reads_the_planner_s_weights(dtype: Dtype, layout: ParallelConfig) -> None:
    """The products of a single token read each matrix once; rows add less than a percent."""
    step = step_of("llama-3.1-8b", dtype, layout, DECODE)
    plan = step.plan
    firsts = [rank for rank in plan.ranks if rank.part.tp_rank == 0]
    weights = sum(rank.weights.total - rank.weights.by_kind.get("embeddings", 0) for rank in firsts)
    products = ("q, k, v product", "o product", "MLP", "vocabulary product")
    assert bytes_of(step, *products) == pytest.approx(weights, rel=0.01)


def test_a_routed_step_reads_an_expert_of_each_layer() -> None:
    step = step_of("llama-4-maverick", "bfloat16", ParallelConfig(tp=8, ep=8), DECODE)
    rank = step.plan.ranks[0].weights
    assert bytes_of(step, "experts") == pytest.approx(rank.expert_bytes, rel=0.01)
    shared = rank.by_kind["shared_expert"]
    assert bytes_of(step, "shared expert") == pytest.approx(shared, rel=0.01)


def test_a_large_batch_reads_all_experts() -> None:
    """The rows of 256 tokens add three percent."""
    load = StepLoad(sequences=256, context=1024)
    step = step_of("llama-4-scout", "bfloat16", ParallelConfig(tp=8, ep=8), load)
    rank = step.plan.ranks[0].weights
    assert bytes_of(step, "experts") == pytest.approx(rank.by_kind["experts"], rel=0.05)


def test_attention_reads_the_planner_s_blocks() -> None:
    step = step_of(
        "llama-3.1-8b", "bfloat16", ParallelConfig(), StepLoad(sequences=4, context=8192)
    )
    sequence = step.plan.sequence_bytes(step.plan.ranks[0], 8192)
    assert bytes_of(step, "attention") == pytest.approx(4 * sequence, rel=0.1)


def test_chunked_layers_read_their_chunk() -> None:
    """Half way into the second chunk of Scout's 36 local layers of 48."""
    short, long = (
        bytes_of(
            step_of(
                "llama-4-scout",
                "bfloat16",
                ParallelConfig(tp=8, ep=8),
                StepLoad(sequences=1, context=context),
            ),
            "attention",
        )
        for context in (4096, 8192 + 4096)
    )
    # 12 layers read three times as many keys; in the splits too
    assert long / short == pytest.approx((36 + 3 * 12) / 48, rel=0.05)


@pytest.mark.parametrize(
    ("tokens", "context", "folds"), [(32, 131072, 126), (2048, 131072, 0), (32, 256, 0)]
)
def test_few_tokens_over_a_long_prefix_share_tiles(tokens: int, context: int, folds: int) -> None:
    """Programs share the keys of a tile and write splits, which a second launch folds."""
    load = StepLoad(sequences=1, new_tokens=tokens, context=context)
    step = step_of("llama-3.1-405b", "bfloat16", ParallelConfig(tp=8), load)
    launches = launches_by_kernel(step.works)
    halves = 2 if tokens >= half_steps.LEAST_ROWS else 1
    assert launches["_prefill"] == 126 * halves and launches["_prefill_fold"] == folds


def test_operations_are_two_a_weight_and_token() -> None:
    load = StepLoad(sequences=1, new_tokens=4096, context=4096)
    step = step_of("llama-3.1-8b", "bfloat16", ParallelConfig(), load)
    config = find_model("llama-3.1-8b").config
    matrices = config.num_parameters() - 2 * config.vocab_size * config.hidden_size
    products = sum(
        work.operations
        for work in step.works
        if work.item in ("q, k, v product", "o product", "MLP")
    )
    assert products == pytest.approx(2 * 4096 * matrices, rel=0.001)
    attention = sum(work.operations for work in step.works if work.item == "attention")
    assert attention == 4 * 32 * 128 * 32 * (4096 * 4097 // 2)


def test_tp_sums_gather_the_parts_of_all_ranks() -> None:
    """More than two ranks receive all parts, or parts of many rows, and add them; two reduce."""
    for tp, rows, link_rows, launches in ((2, 64, 64, 1), (8, 32, 7 * 32, 2), (8, 64, 14 * 8, 3)):
        load = StepLoad(sequences=rows, context=1024)
        layout = ParallelConfig(tp=tp)
        step = step_of("llama-3.1-8b", "bfloat16", layout, load, per_node=tp // 2)
        sums = [work for work in step.works if work.item == "TP sums"]
        assert sum(work.link_bytes for work in sums) == 65 * link_rows * 4096 * 2
        assert sum(work.num_launches for work in sums) == 65 * launches
    assert all(work.captured for work in sums)


def test_tp_sums_of_a_machine_are_launches_without_messages() -> None:
    """Ranks read all parts, or the sums of divided rows; two ranks never divide."""
    for tp, rows, link_rows, meetings in ((2, 256, 256, 1), (8, 16, 7 * 16, 1), (8, 64, 14 * 8, 2)):
        load = StepLoad(sequences=rows, context=1024)
        step = step_of("llama-3.1-8b", "bfloat16", ParallelConfig(tp=tp), load)
        sums = [work for work in step.works if work.item == "TP sums"]
        assert sum(work.link_bytes for work in sums) == 65 * link_rows * 4096 * 2
        assert sum(work.num_launches for work in sums) == 65
        assert sum(work.meetings for work in sums) == 65 * meetings
        norms = [work for work in step.works if work.item == "norms, residual"]
        assert sum(work.num_launches for work in norms) == 2, "the first norm, the last sum"
    prompt = StepLoad(sequences=1, new_tokens=8192, context=8192)
    step = step_of("llama-3.1-405b", "bfloat16", ParallelConfig(tp=8), prompt)
    assert sum(work.meetings for work in step.works) == 0, "large sums are NCCL's"


def test_a_prompt_in_halves_does_the_same_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same products and pairs of query and key; weights are read twice, launches double."""
    layout = ParallelConfig(tp=8, pp=2)
    load = StepLoad(sequences=1, new_tokens=8192, context=8192)
    halves = step_of("llama-3.1-405b", "fp8", layout, load)
    monkeypatch.setattr(half_steps, "LEAST_ROWS", 8193)
    whole = step_of("llama-3.1-405b", "fp8", layout, load)
    assert sum(w.operations for w in halves.works) == sum(w.operations for w in whole.works)
    weights = sum(r.weights.by_kind["mlp"] for r in whole.plan.ranks if r.part.tp_rank == 0)
    assert bytes_of(halves, "MLP") - bytes_of(whole, "MLP") == pytest.approx(weights, rel=0.01)
    assert sum(w.beside for w in halves.works) == 4 * 126, "two sums a layer, each in halves"
    assert not any(w.beside for w in whole.works)
    links = [sum(w.link_bytes for w in step.works) for step in (halves, whole)]
    assert links[0] == pytest.approx(links[1])
    for item, extra in (("MLP", 0), ("TP sums", 1)):  # the embedding's sum stays whole
        twice, once = (
            sum(w.num_launches for w in step.works if w.item == item) for step in (halves, whole)
        )
        assert twice - 2 * once == -3 * extra
    times = estimate(halves), estimate(whole)
    assert times[0].estimate_s < 0.8 * times[1].estimate_s
    assert times[0].floor_s < times[1].floor_s
    (sums,) = (item for item in times[0].items if item.item == "TP sums")
    assert 0 <= sums.floor_s < sums.estimate_s < 0.01, "the embedding's, and half a sum a stage"


def test_each_half_sum_has_a_block_beside_it() -> None:
    """Two layers: 8 half sums of 1 s, 4 blocks of attention of 0.5 s, 4 of MLP of 2 s."""
    stage = [
        Work(item="TP sums", nbytes=8, beside=8),
        Work(item="TP sums", nbytes=100),
        Work(item="q, k, v product", nbytes=1),
        Work(item="norms, residual", nbytes=1),
        Work(item="attention", nbytes=0.5),
        Work(item="MLP", nbytes=7.5),
    ]
    assert overlap_s(stage, lambda work: work.nbytes) == 3 * 0.5 + 4 * 1
    assert overlap_s(stage[1:], lambda work: work.nbytes) == 0


@pytest.mark.parametrize(
    ("model", "layout", "load"),
    [
        ("llama-3.1-405b", ParallelConfig(tp=8), StepLoad(sequences=2048, context=4096)),
        ("llama-3.1-405b", ParallelConfig(pp=16), StepLoad(sequences=1, new_tokens=2, context=2)),
        (
            "llama-4-maverick",
            ParallelConfig(tp=2, dp=4, ep=8),
            StepLoad(sequences=1, new_tokens=8192, context=8192),
        ),
    ],
)
def test_decodes_and_exchanges_stay_whole(
    model: str, layout: ParallelConfig, load: StepLoad
) -> None:
    assert not any(work.beside for work in step_of(model, "fp8", layout, load).works)


def test_prompts_with_data_parallel_attention_run_outside_of_graphs() -> None:
    """Their layers with experts wait for numbers of rows; decodes send blocks, and wait not."""
    layout = ParallelConfig(dp=8, ep=8)
    load = StepLoad(sequences=1, new_tokens=1024, context=1024)
    step = step_of("llama-4-maverick", "fp8", layout, load)
    assert not any(work.captured for work in step.works)
    assert sum(work.host_waits for work in step.works) == 24
    time = estimate(step)
    assert time.estimate_s > time.outside * CONSTANTS["launch outside graphs"].value
    for sequences in (8, 256, 257):
        load = StepLoad(sequences=sequences, context=1024)
        step = step_of("llama-4-maverick", "fp8", layout, load)
        waits = sum(work.host_waits for work in step.works)
        assert waits == (0 if sequences <= 256 else 24)
        (exchange,) = (work for work in step.works if work.item == "EP exchange")
        assert exchange.captured == (sequences <= 256)


def test_blocks_have_room_for_all_rows_of_a_rank() -> None:
    """Top-1 of 128 experts over 8 ranks: 8 times the rows, an eighth of which is used."""
    sizes = []
    for sequences in (256, 257):
        load = StepLoad(sequences=sequences, context=1024)
        step = step_of("llama-4-maverick", "bfloat16", ParallelConfig(dp=8, ep=8), load)
        (exchange,) = (work for work in step.works if work.item == "EP exchange")
        counts = 24 * 8 * 128 * 4
        sizes.append((exchange.link_bytes - counts) / sequences)
    assert sizes[0] == pytest.approx(8 * sizes[1])


def test_the_limit_of_blocks_is_the_runners() -> None:
    from arriero.cluster.planner.step_model import account as module
    from arriero.shards.worker.cuda import runner

    assert module.MOST_PADDED == runner.MOST_PADDED


@pytest.mark.parametrize("dtype", ["bfloat16", "fp8", "fp8-shipped", "int4"])
def test_an_estimate_is_above_the_floor(dtype: Dtype) -> None:
    for load in (DECODE, StepLoad(sequences=1, new_tokens=8192, context=8192)):
        step = step_of("llama-4-maverick", dtype, ParallelConfig(tp=8, ep=8, pp=2), load)
        time = estimate(step)
        assert all(item.estimate_s > item.floor_s for item in time.items)
        assert sum(item.estimate_s for item in time.items) == pytest.approx(time.estimate_s)
        assert time.floor_s >= step.plan.ranks[0].weights.active_bytes / 2 / H200.bandwidth


def test_norm_and_swiglu_round_for_the_products() -> None:
    """Only attention's outputs and the rows for routed experts have a launch that rounds them."""
    for name, layout, layers, routed in (
        ("llama-3.1-405b", ParallelConfig(tp=8), 126, 0),
        ("llama-4-maverick", ParallelConfig(tp=8, ep=8), 48, 24),
        ("llama-4-maverick", ParallelConfig(dp=8, ep=8), 48, 24),
    ):
        step = step_of(name, "fp8", layout, StepLoad(sequences=1, context=1024))
        launches = launches_by_kernel(step.works)
        assert launches["_quantize_rows"] == layers + routed
        assert launches["_silu_mul_rounded"] == layers + routed
        assert not launches["_silu_mul"]
        products = launches["aten::_scaled_mm"] + launches["aten::_scaled_grouped_mm"]
        assert products == 4 * layers + 2 * routed


def test_norms_write_the_forms_that_are_read() -> None:
    """Float8 rows for products; unrounded rows too where a router reads them."""
    load = StepLoad(sequences=64, context=1024)
    sizes = {}
    for name, layout in (("llama-3.1-405b", {"tp": 8}), ("llama-4-maverick", {"tp": 8, "ep": 8})):
        plain, rounded = (
            bytes_of(step_of(name, dtype, ParallelConfig(**layout), load), "norms, residual")
            for dtype in ("bfloat16", "fp8")
        )
        sizes[name] = plain - rounded
    assert sizes["llama-3.1-405b"] == 64 * 16384 * 2 * 126
    assert sizes["llama-4-maverick"] == 64 * 5120 * (48 + 24 - 24)


def test_other_backends_have_no_account() -> None:
    with pytest.raises(SpecError, match="triton"):
        step_of("llama-3.1-8b", "bfloat16", ParallelConfig(), DECODE, "reference")
    step = step_of("llama-3.1-8b", "bfloat16", ParallelConfig(), DECODE)
    assert speed(step.plan, 8) is not None
    model = find_model("llama-3.1-8b")
    weights = weights_as(model.config, None, "bfloat16")
    other = plan_group(model, weights, ParallelConfig(), KvDemand(context=1024), H200, "reference")
    assert speed(other, 8) is None


def bench_report(**changes: object) -> dict[str, object]:
    machine = {"bytes_per_s": 4.0e12, "flops_per_s": 7e14}
    benches = {
        "products by kind": {
            "machine": machine,
            "results": {
                "dense, 1 rows": {"ms": 0.1, "share": 0.9},
                "fp8, 4096 rows": {"ms": 0.1, "share": 0.5},
            },
        },
        "sampling": {"skipped": "out of time"},
        SLICES[0]: {"machine": machine, "results": {SLICES[1]: {"eager_ms": 1.78}}},
    }
    return {"dry_run": False, "benches": benches} | changes


def test_a_report_of_the_benches_replaces_constants(tmp_path: Path) -> None:
    file = tmp_path / "gpu-bench.json"
    file.write_text(json.dumps(bench_report()))
    measured = with_bench(CONSTANTS, file, H200)
    assert measured["product, memory"].value == pytest.approx(0.9 * 4.0 / 4.8)
    assert measured["triton product, matrix"].value == pytest.approx(0.5 * 700 / 989)
    assert measured["product, memory"].source == "gpu-bench.json, products by kind: dense, 1 rows"
    changed = {name for name in CONSTANTS if measured[name] != CONSTANTS[name]}
    assert measured["launch outside graphs"].value == pytest.approx(10e-6)
    assert changed == {"product, memory", "triton product, matrix", "launch outside graphs"}
    for text in (json.dumps(bench_report(dry_run=True)), "[]", "nonsense"):
        file.write_text(text)
        with pytest.raises(SpecError, match="make gpu-bench"):
            with_bench(CONSTANTS, file, H200)


def test_measured_constants_exist_in_both_tables() -> None:
    assert set(MEASURED) <= set(CONSTANTS)
    sources = (ROOT / "tests/gpu/benches_formats.py").read_text()
    assert all(f'"{bench}":' in sources for bench, _ in (*MEASURED.values(), SLICES))
    assert SLICES[1].startswith("a Maverick MoE layer at EP8")
    assert 'name="a Maverick MoE layer at EP8"' in (ROOT / "tests/gpu/shapes.py").read_text()


def test_launches_of_the_measured_slice() -> None:
    """Every layer of Scout has experts, as the layers of the bench; its ranks sum by NCCL."""
    layout = ParallelConfig(tp=8, ep=8)
    step = step_of("llama-4-scout", "bfloat16", layout, DECODE, per_node=4)
    ends = ("step inputs", "embedding", "vocabulary product", "logits to rank 0", "sampling")
    launches = sum(work.num_launches for work in step.works if work.item not in ends)
    embedding_sum, last_sum, rows_copy = 2, 1, 1
    each = (launches - embedding_sum - last_sum) / 48
    assert each * 8 + last_sum + rows_copy == SLICE_LAUNCHES


def test_constants_of_the_kernels() -> None:
    pytest.importorskip("triton")
    from arriero.kernels.reference.sampling import FRACTION_BITS

    assert FILTER_PASSES == -(-(FRACTION_BITS + 1) // 5), "5 bits a pass on a GPU"
    tuned = json.loads((ROOT / "kernels/triton/tuned.json").read_text())
    attention = tuned["default"]["attention"]["*"]
    assert attention["split"] == SPLIT_TOKENS
    assert attention["prefill_block_m"] == PROMPT_TILE_ROWS


def test_the_command_prints_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--gpu", "h200", "--json"]) == 0
    steps = json.loads(capsys.readouterr().out)["steps"]
    assert {step["gpu"] for step in steps} == {"h200-141g"}
    for step in steps:
        assert sum(item["floor_s"] for item in step["items"]) == pytest.approx(step["floor_s"])
    assert command.main(["--gpu", "abacus"]) == 2
    assert "abacus" in capsys.readouterr().err


def test_the_document_has_the_table_of_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--constants"]) == 0
    document = (ROOT / "docs/gpu-account.md").read_text()
    for table in capsys.readouterr().out.strip().split("\n\n"):
        assert table in document, "copy the tables of `make gpu-account ACCOUNT=--constants`"
