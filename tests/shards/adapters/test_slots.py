"""Adapters that come and go in a serving group: over slots, by digest, and hostile ones."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from arriero.shards.adapters.adapter import WEIGHTS_FILE
from arriero.shards.adapters.peft_config import CONFIG_FILE
from arriero.shards.adapters.reader import AdapterReader
from arriero.shards.checkpoint.reader import Checkpoint
from arriero.shards.config.adapters import AdapterFile, AdapterSlots
from arriero.shards.config.group import GroupConfig
from arriero.shards.config.sampling_params import SamplingParams
from arriero.shards.errors import CheckpointError, InvalidRequest
from support.adapters import write_adapter
from support.groups import Answer, Group, running
from support.models import tiny_llama, write_safetensors

PROMPT = list(range(5, 45))
PARAMS = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True, seed=0)
TINY = Path(__file__).parents[2] / "assets" / "tiny-maverick"
NAMES = ("a", "b", "c", "d")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("slots")
    tiny_llama(folder / "model", vocab=400)
    (folder / "adapters").mkdir()
    for seed, name in enumerate(NAMES, 1):
        tables = 400 if name in "cd" else 0
        write_adapter(folder / "adapters" / name, seed, tables=tables)
    return folder


def config_of(root: Path, *listed: AdapterFile, slots: AdapterSlots | None = None) -> GroupConfig:
    return GroupConfig(
        model_path=str(root / "model"),
        dtype="float32",
        num_blocks=256,
        max_sequences=8,
        threads=1,
        adapters=listed,
        adapter_slots=slots,
    )


def two_slots(root: Path) -> AdapterSlots:
    return AdapterSlots(device=2, host=3, max_rank=8, root=str(root / "adapters"))


@pytest.fixture(scope="module")
def expected(root: Path) -> dict[str, list[int]]:
    """Tokens of each adapter and of the base model, by a group that lists all of them."""
    files = [AdapterFile(name=name, path=str(root / "adapters" / name)) for name in NAMES]
    with running(config_of(root, *files)) as group:
        chosen = dict(zip(NAMES, group.engine.config.adapters, strict=True)) | {"": ""}
        names = [group.submit(PROMPT, PARAMS, adapter=digest) for digest in chosen.values()]
        answers = group.wait(names)
    tokens = {name: answer.tokens for name, answer in zip(chosen, answers, strict=True)}
    assert len({tuple(answer) for answer in tokens.values()}) == len(tokens)
    return tokens


@pytest.fixture
def group(root: Path) -> Iterator[Group]:
    with running(config_of(root, slots=two_slots(root))) as group:
        yield group


def reader(root: Path, slots: AdapterSlots) -> AdapterReader:
    path = str(root / "model")
    return AdapterReader(slots, Checkpoint.open(path).config, (), path)


def add(group: Group, root: Path, folder: Path) -> str:
    """Add an adapter as a leader does; gives the digest."""
    slots = group.engine.config.adapter_slots
    assert slots is not None
    opened = reader(root, slots).open(str(folder))
    error = group.engine.add_adapter(opened.digest, str(folder)).result(60)
    if error:
        raise CheckpointError(error)
    return opened.digest


def ask(group: Group, *digests: str) -> list[Answer]:
    return group.wait([group.submit(PROMPT, PARAMS, adapter=digest) for digest in digests])


def test_four_adapters_over_two_slots_in_any_order(
    root: Path, group: Group, expected: dict[str, list[int]]
) -> None:
    digests = {name: add(group, root, root / "adapters" / name) for name in NAMES} | {"": ""}
    order = ["a", "b", "", "c", "d", "a", "d", "c", "b", "a", ""]
    answers = ask(group, *(digests[name] for name in order))
    for name, answer in zip(order, answers, strict=True):
        assert answer.error is None and answer.tokens == expected[name], name
    stats = group.engine.stats().adapters
    assert stats.entries == 9 and stats.changes >= 4 and len(stats.in_slots) == 2


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [{"tp": 2}, {"pp": 2}], ids=str)
def test_slices_in_processes_of_their_own_load_their_cuts(
    root: Path, expected: dict[str, list[int]], mesh: dict[str, int]
) -> None:
    config = replace(config_of(root, slots=two_slots(root)), **mesh)  # type: ignore[arg-type]
    with running(config) as group:
        digests = {name: add(group, root, root / "adapters" / name) for name in NAMES} | {"": ""}
        order = ["a", "b", "", "c", "d", "a", "d", "c"]
        for name, answer in zip(order, ask(group, *(digests[n] for n in order)), strict=True):
            assert answer.error is None and answer.tokens == expected[name], name
        bad = root / "adapters" / "bad"
        hostile(bad, "not finite")
        with pytest.raises(CheckpointError, match="not finite"):
            add(group, root, bad)
        shutil.rmtree(bad)
        assert ask(group, digests["a"])[0].tokens == expected["a"]


def test_a_removed_adapter_is_refused_and_a_running_request_ends(
    root: Path, group: Group, expected: dict[str, list[int]]
) -> None:
    digest = add(group, root, root / "adapters" / "a")
    running_request = group.submit(PROMPT, PARAMS, adapter=digest)
    group.engine.remove_adapter(digest).result(60)
    (answer,) = group.wait([running_request])
    assert answer.tokens == expected["a"]
    with pytest.raises(InvalidRequest, match="not on this group"):
        group.submit(PROMPT, PARAMS, adapter=digest)
    assert add(group, root, root / "adapters" / "a") == digest
    assert ask(group, digest)[0].tokens == expected["a"]


def test_changed_weights_under_one_name_meet_no_old_blocks(
    root: Path, group: Group, expected: dict[str, list[int]]
) -> None:
    folder = root / "adapters" / "changing"
    shutil.copytree(root / "adapters" / "a", folder)
    first = add(group, root, folder)
    assert ask(group, first)[0].tokens == expected["a"]
    assert ask(group, first)[0].num_cached > 0
    shutil.copy(root / "adapters" / "b" / WEIGHTS_FILE, folder / WEIGHTS_FILE)
    second = add(group, root, folder)
    assert second != first
    (answer,) = ask(group, second)
    assert answer.tokens == expected["b"] and answer.num_cached == 0
    shutil.rmtree(folder)


def test_files_that_changed_since_are_an_error_of_their_requests_alone(
    root: Path, group: Group, expected: dict[str, list[int]]
) -> None:
    folder = root / "adapters" / "lost"
    shutil.copytree(root / "adapters" / "d", folder)
    lost = add(group, root, folder)
    others = [add(group, root, root / "adapters" / name) for name in ("a", "b", "c")]
    for digest in others:  # host memory has three places: `lost` is dropped
        ask(group, digest)
    shutil.rmtree(folder)
    answers = ask(group, others[0], lost, "")
    assert answers[0].tokens == expected["a"] and answers[2].tokens == expected[""]
    assert answers[1].finish_reason == "error" and "lost" in (answers[1].error or "")
    assert group.engine.failure is None


def hostile(folder: Path, kind: str) -> str:
    """Write a hostile adapter; gives a part of the text of the refusal."""
    folder.mkdir()
    settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 16, "target_modules": ["down_proj"]}
    prefix = "base_model.model.model.layers.0.mlp.down_proj"
    a, b = torch.ones(4, 96), torch.ones(64, 4)
    text = "shape"
    if kind == "wrong shape":
        a = torch.ones(4, 97)
    elif kind == "not finite":
        b[3, 1] = float("nan")
        text = "not finite"
    elif kind == "10,000 ranks":
        settings["r"], text = 10_000, "rank"
        a, b = torch.ones(10_000, 96), torch.ones(64, 10_000)
    elif kind == "above the slots":
        settings["r"], text = 16, "`max_adapter_rank`=8"
        a, b = torch.ones(16, 96), torch.ones(64, 16)
    (folder / CONFIG_FILE).write_text(json.dumps(settings))
    if kind == "pickle":
        (folder / "adapter_model.bin").write_bytes(b"\x80\x04")
        return "pickle"
    tensors = {f"{prefix}.lora_A.weight": a, f"{prefix}.lora_B.weight": b}
    prefix = "base_model.model.model.embed_tokens"
    tables = 401 if kind == "another vocabulary" else 400
    if kind in ("another vocabulary", "another base model"):
        tensors[f"{prefix}.lora_embedding_A"] = torch.ones(4, tables)
        tensors[f"{prefix}.lora_embedding_B"] = torch.ones(64, 4)
    if kind == "another base model":
        tensors[f"{prefix}.base_layer.weight"] = torch.ones(400, 64)
        text = "differs from the model's table"
    write_safetensors(folder / WEIGHTS_FILE, tensors)
    return text


def test_hostile_adapters_are_refused_by_name_and_the_group_serves_on(
    root: Path, group: Group, expected: dict[str, list[int]]
) -> None:
    digest = add(group, root, root / "adapters" / "a")
    kinds = ("wrong shape", "not finite", "10,000 ranks", "above the slots", "pickle")
    for kind in (*kinds, "another vocabulary", "another base model"):
        folder = root / "adapters" / f"bad {kind}"
        text = hostile(folder, kind)
        with pytest.raises(CheckpointError, match=text):
            add(group, root, folder)
        shutil.rmtree(folder)
    outside = write_adapter(root / "outside", 9)
    (root / "adapters" / "link").symlink_to(outside.path)
    for path in (outside.path, str(root / "adapters" / "link"), str(root / "adapters" / "..")):
        with pytest.raises(CheckpointError, match="outside of `adapter_root`"):
            add(group, root, Path(path))
    (root / "adapters" / "link").unlink()
    pipe = root / "adapters" / "pipe"
    hostile(pipe, "not finite")
    (pipe / WEIGHTS_FILE).unlink()
    os.mkfifo(pipe / WEIGHTS_FILE)
    with pytest.raises(CheckpointError, match="no regular file"):
        add(group, root, pipe)
    shutil.rmtree(pipe)
    assert ask(group, digest, "")[0].tokens == expected["a"]
    assert group.engine.failure is None


def test_slots_are_counted_to_the_byte(root: Path) -> None:
    from arriero.cluster.planner.adapter_bytes import adapter_bytes
    from arriero.shards.layout.families import parts_of
    from arriero.shards.layout.resolve import resolve
    from arriero.shards.worker.select import runner_for

    listed = AdapterFile(name="a", path=str(root / "adapters" / "a"))
    slotted = config_of(root, slots=two_slots(root))
    experts = replace(slotted, model_path=str(TINY), num_local_blocks=64)
    for config in (config_of(root, listed), slotted, experts):
        model = Checkpoint.open(config.model_path).config
        config = resolve(config, model)
        (part,) = parts_of(model, config)
        runner = runner_for(config, 0)
        banks = runner._model.adapters
        assert banks is not None and banks.nbytes == adapter_bytes(config, model, part)
        runner.close()
