"""Plans, `up`'s checks and GPU pools count the model that drafts, as the slices allocate it."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from arriero.cluster import cli
from arriero.cluster.planner.catalog import NamedModel, cpu
from arriero.cluster.planner.demand import KvDemand
from arriero.cluster.planner.drafter_bytes import read_drafter
from arriero.cluster.planner.group_memory import group_memory
from arriero.cluster.planner.kv_room import with_kv_blocks
from arriero.cluster.planner.memory import plan_group
from arriero.cluster.planner.model_check import check_models
from arriero.cluster.planner.weight_forms import weights_as
from arriero.cluster.spec.model import ModelSpec
from arriero.shards.checkpoint.formats.describe import describe
from arriero.shards.config.group import GroupConfig
from arriero.shards.config.parallel import ParallelConfig
from arriero.shards.config.speculation import DraftKind, SpeculationConfig
from arriero.shards.errors import CheckpointError, SpecError
from arriero.shards.layout.resolve import resolve
from arriero.shards.worker.runner import Runner
from support.eagle3_heads import head_settings, head_weights, write_head
from support.frontdoor import LLAMA_SPECIALS, make_tokenizer
from support.models import tiny_llama, tiny_llama4

KINDS: tuple[DraftKind, ...] = ("draft", "eagle3")
LAYOUTS = {"one slice": (1, 1), "TP2": (2, 1), "PP2": (1, 2)}


def write_drafter(folder: Path, kind: DraftKind, vocab: int = 128) -> None:
    if kind == "draft":
        tiny_llama(folder, layers=2, hidden=48, intermediate=64, head_dim=16, vocab=vocab)
    else:
        settings = head_settings(vocab=vocab)
        write_head(folder, settings, head_weights(settings))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A target `m`, a smaller model `draft` and a head `eagle3`, without an embedding."""
    tiny_llama(tmp_path / "m", layers=8)
    for kind in KINDS:
        write_drafter(tmp_path / kind, kind)
    return tmp_path


def group_config(folder: Path, kind: DraftKind, layout: str, **more: Any) -> GroupConfig:  # noqa: ANN401
    tp, pp = LAYOUTS[layout]
    settings: dict[str, Any] = {"num_blocks": 7, "max_model_len": 64, "max_sequences": 2} | more
    return GroupConfig(
        model_path=str(folder / "m"),
        tp=tp,
        pp=pp,
        dtype="float32",
        kernels="reference",
        threads=1,
        speculation=SpeculationConfig(kind=kind, model_path=str(folder / kind)),
        **settings,
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_ranks_report_the_planned_bytes(folder: Path, kind: DraftKind, layout: str) -> None:
    model, scheme = describe(folder / "m")
    config = resolve(group_config(folder, kind, layout), model)
    plan = plan_group(
        NamedModel(name="m", config=model, scheme=scheme),
        weights_as(model, scheme, "float32"),
        config,
        KvDemand(
            context=1,
            kv_dtype="float32",
            num_blocks=config.num_blocks,
            drafter=read_drafter(config, model),
        ),
        cpu(1 << 36, config.world_size),
        "reference",
    )
    runners = [Runner(config, rank) for rank in range(config.world_size)]
    reported = [(runner.weights_nbytes, runner.kv_nbytes) for runner in runners]
    assert reported == [(rank.weights_nbytes, rank.kv_pool_bytes) for rank in plan.ranks]
    for rank in plan.ranks:
        assert bool(rank.drafter.weights) == rank.part.last_stage


@pytest.mark.parametrize("kind", KINDS)
def test_chunked_layers_have_no_drafts(tmp_path: Path, kind: DraftKind) -> None:
    """The drafter's layers have blocks of the pool for all tokens alone."""
    tiny_llama4(tmp_path / "m", layers=8, moe_step=2)
    write_drafter(tmp_path / kind, kind)
    model, scheme = describe(tmp_path / "m")
    config = resolve(group_config(tmp_path, kind, "one slice", num_local_blocks=5), model)
    demand = KvDemand(
        context=64,
        kv_dtype="float32",
        num_blocks=config.num_blocks,
        num_local_blocks=config.num_local_blocks,
        drafter=read_drafter(config, model),
    )
    named = NamedModel(name="m", config=model, scheme=scheme)
    weights = weights_as(model, scheme, "float32")
    plan = plan_group(named, weights, config, demand, cpu(1 << 36, 1), "reference")
    runner = Runner(config, 0)
    (rank,) = plan.ranks
    assert (runner.weights_nbytes, runner.kv_nbytes) == (rank.weights_nbytes, rank.kv_pool_bytes)
    assert plan.drafter_pool_bytes(rank) == 7 * rank.drafter.kv_block > 0


@pytest.mark.parametrize("kind", KINDS)
def test_a_pool_without_a_size_leaves_room_for_the_drafter(folder: Path, kind: DraftKind) -> None:
    model, scheme = describe(folder / "m")
    free = 1 << 30
    config = group_config(folder, kind, "one slice", num_blocks=None, max_model_len=512)
    config = replace(config, device="cuda", kernels="triton")
    with_drafter = with_kv_blocks(config, model, scheme, [free]).num_blocks
    without = with_kv_blocks(
        replace(config, speculation=SpeculationConfig()), model, scheme, [free]
    ).num_blocks
    assert with_drafter is not None and without is not None
    drafter = read_drafter(config, model)
    assert drafter is not None
    named = NamedModel(name="m", config=model, scheme=scheme)
    weights = weights_as(model, scheme, "float32")
    demand = KvDemand(context=64, kv_dtype="float32", drafter=drafter)
    plan = plan_group(named, weights, ParallelConfig(), demand, cpu(free, 1), "triton")
    (rank,) = plan.ranks
    ratio = rank.kv_block / (rank.kv_block - rank.drafter.kv_block)
    assert without > with_drafter
    assert with_drafter * ratio == pytest.approx(without, rel=0.05)


def model_spec(folder: Path, kind: DraftKind | None) -> ModelSpec:
    settings: dict[str, Any] = {
        "name": "m",
        "path": str(folder / "m"),
        "device": "cpu",
        "dtype": "float32",
        "kv": {"blocks": 7},
        "mesh": {"tp": 2},
    }
    if kind is not None:
        settings["speculation"] = {"kind": kind, "model": str(folder / kind)}
    return ModelSpec.model_validate(settings)


@pytest.mark.parametrize("kind", KINDS)
def test_the_least_memory_of_a_group_counts_the_drafter(folder: Path, kind: DraftKind) -> None:
    plain = group_memory(model_spec(folder, None), "cpu")
    drafting = group_memory(model_spec(folder, kind), "cpu")
    assert plain is not None and drafting is not None
    model, _ = describe(folder / "m")
    config = resolve(model_spec(folder, kind).group_config("cpu"), model)
    runners = [Runner(replace(config, kernels="cpu"), rank) for rank in range(2)]
    assert [(runner.weights_nbytes, runner.kv_nbytes) for runner in runners] == [
        (each.weights, each.kv) for each in drafting.slices
    ]
    for small, large in zip(plain.slices, drafting.slices, strict=True):
        assert small.weights < large.weights and small.kv < large.kv
    (folder / kind / "config.json").unlink()
    assert group_memory(model_spec(folder, kind), "cpu") == plain, "a lower bound is left"


@pytest.mark.parametrize("kind", KINDS)
def test_plan_prints_the_kind_and_the_bytes(
    folder: Path, kind: DraftKind, capsys: pytest.CaptureFixture[str]
) -> None:
    """The folder of the drafter is relative to the spec, as the model's is."""
    text = "models:\n- {name: m, path: m, dtype: float32, kv: {blocks: 7}, mesh: {pp: 2}, "
    text += "limits: {max_model_len: 64}, "
    text += f"speculation: {{kind: {kind}, model: {kind}}}}}\n"
    (folder / "arriero.yaml").write_text(text)
    command = ["plan", str(folder / "arriero.yaml"), "--gpu", "cpu", "--memory", "8GiB"]
    assert cli.run([*command, "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    config = group_config(folder, kind, "PP2")
    model, _ = describe(folder / "m")
    last = Runner(replace(resolve(config, model), kernels="cpu"), 1)
    assert plan["drafter"]["kind"] == kind
    first_rank, last_rank = plan["ranks"]
    assert first_rank["drafter_weights_bytes"] == first_rank["drafter_kv_pool_bytes"] == 0
    assert plan["drafter"]["weights_bytes"] == last_rank["drafter_weights_bytes"]
    assert plan["drafter"]["kv_pool_bytes"] == last_rank["drafter_kv_pool_bytes"]
    weights = last_rank["weights_bytes"] + last_rank["drafter_weights_bytes"]
    assert (weights, last_rank["kv_pool_bytes"]) == (last.weights_nbytes, last.kv_nbytes)
    assert cli.run(command) == 0
    assert f"drafter {kind} on the last stage" in capsys.readouterr().out


def test_reading_a_head_needs_no_torch(folder: Path) -> None:
    code = (
        "import sys; from pathlib import Path\n"
        "from arriero.cluster.planner.drafter_bytes import read_drafter\n"
        "from arriero.shards.checkpoint.formats.describe import describe\n"
        "from arriero.shards.config.group import GroupConfig\n"
        "from arriero.shards.config.speculation import SpeculationConfig\n"
        f"speculation = SpeculationConfig(kind='eagle3', model_path={str(folder / 'eagle3')!r})\n"
        f"target, _ = describe({str(folder / 'm')!r})\n"
        "config = GroupConfig(model_path='', speculation=speculation)\n"
        "print(read_drafter(config, target) is not None, 'torch' in sys.modules)"
    )
    got = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert got.stdout.split() == ["True", "False"]


@pytest.fixture
def served(tmp_path: Path) -> Path:
    """A target `m` with a tokenizer, and drafters of its vocabulary."""
    tiny_llama(tmp_path / "m", layers=8, vocab=512, eos=1)
    tokenizer = make_tokenizer(LLAMA_SPECIALS, bos="<|begin_of_text|>")
    tokenizer.save(str(tmp_path / "m" / "tokenizer.json"))
    for kind in KINDS:
        write_drafter(tmp_path / kind, kind, vocab=512)
    return tmp_path


@pytest.mark.parametrize("kind", KINDS)
def test_up_refuses_a_drafter_that_cannot_draft(served: Path, kind: DraftKind) -> None:
    check_models([model_spec(served, kind)])
    write_drafter(served / kind, kind, vocab=256)
    with pytest.raises(CheckpointError, match=r"`vocab_size`=256 .*, but the target has 512"):
        check_models([model_spec(served, kind)])
    (served / kind / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config\.json"):
        check_models([model_spec(served, kind)])


def test_up_refuses_a_drafter_that_the_mesh_cannot_cut(served: Path) -> None:
    spec = model_spec(served, "draft")
    tiny_llama(served / "draft", layers=1, heads=1, kv_heads=1, vocab=512)
    with pytest.raises(SpecError, match="tp"):
        check_models([spec])


def test_up_refuses_a_head_with_another_tensor(served: Path) -> None:
    settings = head_settings(vocab=512)
    weights = head_weights(settings)
    weights["midlayer.other.weight"] = weights["norm.weight"]
    write_head(served / "eagle3", settings, weights)
    with pytest.raises(CheckpointError, match=r"midlayer\.other"):
        check_models([model_spec(served, "eagle3")])
