"""Checkpoints from elsewhere: fsspec URLs, the hub; adapters are recognised."""

from __future__ import annotations

import json
from pathlib import Path

import fsspec
import huggingface_hub.constants
import pytest
import torch

from arriero.shards.checkpoint.reader import Checkpoint
from arriero.shards.checkpoint.remote import local_folder, pull_from_hub
from arriero.shards.checkpoint.verify import verify
from arriero.shards.errors import CheckpointError
from arriero.shards.executor import spawn_group
from arriero.shards.group import GroupConfig
from arriero.shards.resolve import resolve
from support.hub_server import Hub, hub
from support.models import tiny_llama, write_safetensors

NAME = "some-org/Tiny-Llama"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "src" / "tiny"
    tiny_llama(folder, sharded=True)
    (folder / "tokenizer.json").write_text("{}")
    (folder / "pytorch_model.bin").write_bytes(b"never fetched")
    (folder / "original").mkdir()
    (folder / "original" / "consolidated.00.pth").write_bytes(b"never fetched")
    return folder


@pytest.fixture(autouse=True)
def caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ARRIERO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_PROGRESS_BARS", True)


def to_memory(folder: Path) -> str:
    memory = fsspec.filesystem("memory")
    memory.store.clear()
    memory.put(str(folder) + "/", "/models/tiny/", recursive=True)
    return "memory://models/tiny"


def same(copy: Path, model: Path) -> None:
    ours, theirs = Checkpoint.open(copy), Checkpoint.open(model)
    assert verify(copy).ok and ours.digest == theirs.digest
    assert all(torch.equal(ours.tensor(n), theirs.tensor(n)) for n in theirs.names)
    names = {p.name for p in copy.iterdir() if not p.name.startswith(".")}
    assert "tokenizer.json" in names and not {"pytorch_model.bin", "original"} & names


def test_a_url_is_copied_once(model: Path) -> None:
    url = to_memory(model)
    told: list[tuple[int, int, str]] = []
    copy = local_folder(url, lambda *one: told.append(one))
    same(copy, model)
    assert told[-1][0] == told[-1][1]
    again: list[tuple[int, int, str]] = []
    assert local_folder(url, lambda *one: again.append(one)) == copy and not again
    same(Checkpoint.open(url).path, model)


def test_a_broken_copy_goes_on(model: Path) -> None:
    url = to_memory(model)
    memory = fsspec.filesystem("memory")
    last = "/models/tiny/model-00003-of-00003.safetensors"
    held = memory.cat_file(last)
    memory.rm_file(last)
    with pytest.raises(CheckpointError, match="holds no model-00003"):
        local_folder(url)
    memory.pipe_file(last, held)
    told: list[str] = []
    same(local_folder(url, lambda done, total, name: told.append(name)), model)
    assert sorted(told) == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]


def test_a_local_url_is_no_copy(model: Path) -> None:
    assert local_folder(f"file://{model}") == model
    assert local_folder(str(model)) == model


def test_http(model: Path) -> None:
    with hub(NAME, model) as served:
        same(local_folder(f"{served.url}/{NAME}/resolve/main"), model)


def test_without_weights(model: Path) -> None:
    """What a planner and a leader need: the weights come when they are asked for."""
    with hub(NAME, model) as served:
        url = f"{served.url}/{NAME}/resolve/main"
        folder = local_folder(url, weights=False)
        names = {one.name for one in folder.iterdir() if not one.name.startswith(".")}
        assert {"config.json", "tokenizer.json"} < names
        assert not any(name.endswith(".safetensors") for name in names)
        assert not any(path.endswith(".safetensors") for _, path, _ in served.asked)
        same(local_folder(url), model)


def test_slices_load_from_a_url(model: Path) -> None:
    """Two processes of a node ask at once, and the files come once."""
    with hub(NAME, model) as served:
        url = f"{served.url}/{NAME}/resolve/main"
        config = GroupConfig(
            model_path=url, dtype="float32", kernels="reference", tp=2, num_blocks=16, threads=1
        )
        config = resolve(config, Checkpoint.open(model).config)
        executor = spawn_group(config)
        try:
            executor.wait_ready(120)
        finally:
            executor.close()
        bodies = [path for how, path, _ in served.asked if how == "GET"]
    weights = [path for path in bodies if path.endswith(".safetensors")]
    assert len(weights) == len(set(weights)) == 3


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("nosuch://a/b", "cannot be opened: Protocol not known: nosuch"),
        ("memory://models/none", "config.json: missing"),
    ],
)
def test_urls_that_lead_nowhere(url: str, words: str) -> None:
    with pytest.raises(CheckpointError, match=words):
        local_folder(url)


@pytest.fixture
def served(model: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:  # type: ignore[misc]
    with hub(NAME, model) as one:
        monkeypatch.setenv("HF_ENDPOINT", one.url)
        yield one


def test_pull_from_the_hub(served: Hub, model: Path) -> None:
    folder = pull_from_hub(NAME)
    same(folder, model)
    fetched = [path for method, path, _ in served.asked if method == "GET" and "resolve" in path]
    assert len(fetched) == 6  # config, tokenizer, index and three shards, each once
    served.asked.clear()
    assert pull_from_hub(NAME) == folder
    assert not [path for method, path, _ in served.asked if method == "GET" and "resolve" in path]


def test_a_download_that_breaks_off_goes_on(
    served: Hub, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", 1000
    )  # bytes kept at once
    name = "model-00001-of-00003.safetensors"
    served.break_after[name] = 5000
    for _ in range(2):  # the library itself may try again, or the next pull does
        try:
            folder = pull_from_hub(NAME)
            break
        except CheckpointError as error:
            assert "cannot be downloaded" in str(error)
    same(folder, model)
    ranges = [asked for _, path, asked in served.asked if path.endswith(name) and asked]
    assert ranges == ["bytes=5000-"]


def test_what_the_hub_refuses(served: Hub) -> None:
    with pytest.raises(CheckpointError, match="is not on the hub"):
        pull_from_hub("some-org/other")
    served.status = 403
    with pytest.raises(CheckpointError, match="is gated: accept its licence"):
        pull_from_hub(NAME)
    for bad in ("nothing", "a/b/c", "../../etc", "a/b\n"):
        with pytest.raises(CheckpointError, match="ORG/NAME"):
            pull_from_hub(bad)


def test_adapters_are_recognised(tmp_path: Path) -> None:
    """A PEFT folder is refused with a word, also beside a config and as weights."""
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 8}))
    weights = {"base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": torch.zeros(8, 64)}
    write_safetensors(tmp_path / "adapter_model.safetensors", weights)
    for attempt in (Checkpoint.open, lambda path: pytest.fail(verify(path).problems[0])):
        with pytest.raises((CheckpointError, pytest.fail.Exception), match=r"PEFT adapter.*merge"):
            attempt(tmp_path)
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"architectures": ["LlamaForCausalLM"]}))
    with pytest.raises(CheckpointError, match=r"PEFT adapter.*merge"):
        Checkpoint.open(tmp_path)
