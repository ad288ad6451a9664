"""Weights that change, leave and come back while a group runs: answers, refusals, memory."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file

from arriero.shards.checkpoint.content_digest import content_digest
from arriero.shards.checkpoint.overlay import open_weights
from arriero.shards.config.group import GroupConfig
from arriero.shards.config.sampling_params import SamplingParams
from arriero.shards.engine.holds import Change, HoldStatus, Kind, Mode
from arriero.shards.errors import CheckpointError, InvalidRequest
from support.eventually import eventually
from support.groups import Group, running
from support.models import tiny_llama

GREEDY = SamplingParams(max_tokens=12, temperature=0.0, seed=1, ignore_eos=True)
LONG = SamplingParams(max_tokens=200, temperature=0.0, seed=1, ignore_eos=True)
PROMPTS = [[7, 3, 9, 11], [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18], [99]]
SLOW = pytest.mark.slow
LAYOUTS = {"one": {}, "tp2": {"tp": 2}, "pp2": {"pp": 2}}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("weights")
    for seed, name in enumerate(("a", "b")):
        tiny_llama(folder / name, seed=seed)
    weights = load_file(folder / "b" / "model.safetensors")
    names = ("model.embed_tokens.weight", "model.layers.1.mlp.down_proj.weight")
    save_file({name: weights[name] for name in names}, folder / "delta.safetensors")
    mixed = load_file(folder / "a" / "model.safetensors") | {name: weights[name] for name in names}
    tiny_llama(folder / "mixed")
    save_file(mixed, folder / "mixed" / "model.safetensors")
    return folder


def config_of(path: Path, **more: object) -> GroupConfig:
    settings = {"dtype": "float32", "num_blocks": 200, "max_sequences": 8, "block_size": 8}
    return GroupConfig(model_path=str(path), **settings | more)  # type: ignore[arg-type]


@contextmanager
def group_of(path: Path, **more: object) -> Iterator[Group]:
    with running(config_of(path, **more)) as group:
        group.engine.name_weights("first", (), lambda digest: digest.encode())
        yield group


def change(group: Group, kind: Kind, *sources: Path, mode: Mode = "keep") -> HoldStatus:
    names = tuple(map(str, sources))
    wanted = Change(kind=kind, mode=mode, sources=names)
    return group.engine.change(wanted).result(timeout=120)


def begun(group: Group, names: Sequence[str]) -> None:
    """Wait until every request has a token."""
    eventually(lambda: all(name in {key[0] for key in list(group.answers)} for name in names))


def tokens_of(group: Group, params: SamplingParams = GREEDY) -> list[list[int]]:
    return [answer.tokens for answer in group.generate(PROMPTS, params)]


@pytest.fixture(scope="module")
def fresh(folders: Path) -> dict[str, list[list[int]]]:
    """Long answers of fresh groups, by folder; a short answer is their beginning."""
    answers = {}
    for name in ("a", "b", "mixed"):
        with group_of(folders / name) as group:
            answers[name] = tokens_of(group, LONG)
    assert answers["a"] != answers["b"] != answers["mixed"]
    return answers


def short(answers: list[list[int]]) -> list[list[int]]:
    return [answer[: GREEDY.max_tokens] for answer in answers]


@pytest.mark.parametrize(
    "layout", ["one", pytest.param("tp2", marks=SLOW), pytest.param("pp2", marks=SLOW)]
)
def test_every_answer_is_of_one_version(
    folders: Path, fresh: dict[str, list[list[int]]], layout: str
) -> None:
    with group_of(folders / "a", **LAYOUTS[layout]) as group:
        assert tokens_of(group) == short(fresh["a"])
        before = [group.submit(prompt, LONG) for prompt in PROMPTS]
        future = group.engine.change(Change(kind=Kind.PUSH, sources=(str(folders / "b"),)))
        during = []
        while not future.done():  # requests keep coming through all phases
            during.append(group.submit(PROMPTS[len(during) % 3], GREEDY))
            group.wait(during[-6:-5])
        state = future.result()
        assert state.digest == content_digest(open_weights(str(folders / "b"), ()))
        old = [answer.tokens for answer in group.wait(before)]
        assert old == fresh["a"]
        for number, answer in enumerate(group.wait(during)):
            assert answer.tokens in (
                short(fresh["a"])[number % 3],
                short(fresh["b"])[number % 3],
            )
        assert tokens_of(group) == short(fresh["b"])
        # the digest of a delta is that of the merged folder
        state = change(group, Kind.PUSH, folders / "a", folders / "delta.safetensors")
        assert state.digest == content_digest(open_weights(str(folders / "mixed"), ()))
        assert tokens_of(group) == short(fresh["mixed"])


@pytest.mark.parametrize("layout", ["one", pytest.param("tp2", marks=SLOW)])
def test_sleep_and_wake_keep_the_tokens(
    folders: Path, fresh: dict[str, list[list[int]]], layout: str
) -> None:
    with group_of(folders / "a", **LAYOUTS[layout]) as group:
        stopped = [group.submit(prompt, LONG) for prompt in PROMPTS]
        begun(group, stopped)
        state = change(group, Kind.SLEEP, mode="keep")
        assert state.level == 1 and (state.weights_bytes, state.kv_bytes) == (0, 0)
        held = group.submit(PROMPTS[0], GREEDY)
        with pytest.raises(InvalidRequest, match="have begun and are stopped"):
            change(group, Kind.PUSH, folders / "b")
        assert group.engine.holds.held >= 1
        state = change(group, Kind.WAKE)
        assert state.level == 0 and state.weights_bytes > 0 and state.kv_bytes > 0
        assert [answer.tokens for answer in group.wait(stopped)] == fresh["a"]
        assert group.wait([held])[0].tokens == short(fresh["a"])[0]
        change(group, Kind.SLEEP, mode="wait")
        change(group, Kind.PUSH, folders / "b")
        change(group, Kind.WAKE)
        assert tokens_of(group) == short(fresh["b"])


def test_pause_keeps_waits_and_aborts(folders: Path, fresh: dict[str, list[list[int]]]) -> None:
    with group_of(folders / "a") as group:
        names = [group.submit(prompt, LONG) for prompt in PROMPTS]
        assert change(group, Kind.PAUSE, mode="keep").paused
        steps = group.engine.stats().steps
        late = group.submit(PROMPTS[0], GREEDY)
        threading.Event().wait(0.2)
        assert group.engine.stats().steps == steps
        assert not change(group, Kind.RESUME).paused
        assert [answer.tokens for answer in group.wait(names)] == fresh["a"]
        assert group.wait([late])[0].tokens == short(fresh["a"])[0]

        names = [group.submit(prompt, LONG) for prompt in PROMPTS]
        change(group, Kind.PAUSE, mode="wait")
        change(group, Kind.RESUME)
        assert [answer.tokens for answer in group.wait(names)] == fresh["a"]

        names = [group.submit(prompt, LONG) for prompt in PROMPTS]
        begun(group, names)
        change(group, Kind.PAUSE, mode="abort")
        for answer in group.wait(names):
            ended = answer.finish_reason == "length"
            assert ended or (answer.finish_reason == "error" and "paused" in str(answer.error))
        change(group, Kind.RESUME)
        assert tokens_of(group) == short(fresh["a"])


def test_bad_weights_are_refused_by_name(
    folders: Path, fresh: dict[str, list[list[int]]], tmp_path: Path
) -> None:
    weights = load_file(folders / "b" / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    bad = {
        "nan": weights | {name: weights[name].index_fill(0, torch.tensor([3]), float("nan"))},
        "shape": weights | {name: weights[name][:-1].contiguous()},
        "missing": {key: value for key, value in weights.items() if key != name},
    }
    with group_of(folders / "a") as group:
        for kind, tensors in bad.items():
            tiny_llama(tmp_path / kind)
            save_file(tensors, tmp_path / kind / "model.safetensors")
            with pytest.raises(CheckpointError, match=name):
                change(group, Kind.PUSH, tmp_path / kind)
        tiny_llama(tmp_path / "other", rope_theta=500.0)
        with pytest.raises(CheckpointError, match="rope"):
            change(group, Kind.PUSH, tmp_path / "other")
        save_file({"model.layers.9.mlp.up_proj.weight": weights[name]}, tmp_path / "x.safetensors")
        with pytest.raises(CheckpointError, match=r"layers\.9"):
            change(group, Kind.PUSH, tmp_path / "x.safetensors")
        assert group.engine.holds.digest == "first"
        assert tokens_of(group) == short(fresh["a"])


def test_sleep_gives_memory_back(tmp_path: Path) -> None:
    """Resident memory of the process falls by the weights and the KV cache, and comes back."""
    tiny_llama(tmp_path, vocab=32000, hidden=512, intermediate=1024, heads=8, max_positions=2048)
    process = psutil.Process()
    with group_of(tmp_path, num_blocks=2000, block_size=16) as group:
        first = tokens_of(group)
        awake = process.memory_info().rss
        state = change(group, Kind.SLEEP)
        asleep = process.memory_info().rss
        assert state.weights_bytes == 0
        state = change(group, Kind.WAKE)
        back = process.memory_info().rss
        print(f"RSS: {awake >> 20} MiB awake, {asleep >> 20} asleep, {back >> 20} after wake")
        assert state.weights_bytes > 140_000_000
        assert awake - asleep > 0.9 * state.weights_bytes
        assert back - asleep > 0.9 * state.weights_bytes
        assert tokens_of(group) == first
