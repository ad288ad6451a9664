"""Checkpoints from elsewhere: fsspec URLs, the hub; adapters are recognised."""

from __future__ import annotations

import json
import socket
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import fsspec
import huggingface_hub.constants
import pytest
import torch

from arriero.shards.checkpoint import ranges
from arriero.shards.checkpoint.formats.products import ProductReader
from arriero.shards.checkpoint.formats.stored import bytes_read, tensor_specs
from arriero.shards.checkpoint.pager import ranges_read
from arriero.shards.checkpoint.reader import Checkpoint
from arriero.shards.checkpoint.remote import local_folder, pull_from_hub
from arriero.shards.checkpoint.verify import verify
from arriero.shards.config.group import GroupConfig
from arriero.shards.errors import CheckpointError
from arriero.shards.layout.dense import partition
from arriero.shards.layout.resolve import resolve
from support.hub_server import Hub, hub
from support.models import tiny_llama, tiny_llama4, write_safetensors
from support.processes import spawn_group
from support.quantized_models import quantized_llama
from support.slices import logits_of

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
    """Two processes of a node ask at once, and each piece comes once; the rest does not come."""
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
        asked = [(path, part) for how, path, part in served.asked if how == "GET"]
    # each process asks first, by bytes 8 to 15, whether ranges are served
    pieces = [one for one in asked if one[0].endswith(".safetensors") and one[1] != "bytes=8-15"]
    assert len(pieces) == len(set(pieces)) and all(part for _, part in pieces)


def bytes_of_weights(served: Hub) -> int:
    """Asked for in ranges."""
    parts = [part for how, path, part in served.asked if how == "GET" and "safetensors" in path]
    bounds = [part.removeprefix("bytes=").split("-") for part in parts if part]
    assert len(bounds) == len([part for part in parts if part is not None])
    return sum(int(last) - int(first) + 1 for first, last in bounds)


TOKENS = [3, 99, 14, 15, 92, 65, 35, 89]


@pytest.mark.parametrize("form", ["plain", "gptq-act-order"])
def test_a_stage_fetches_its_own_bytes(
    tmp_path: Path, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its numbers are those of the whole model, and a stage's node fetches that stage."""
    monkeypatch.setattr(ranges, "PIECE_BYTES", 1 << 10)
    folder = tmp_path / "src"
    if form == "plain":
        tiny_llama(folder, layers=4, sharded=True)
    else:
        quantized_llama(folder, form)
    whole = Checkpoint.open(folder)
    config = GroupConfig(model_path="", pp=2)
    part = partition(whole.config, config)[0]
    due = list(tensor_specs(whole.config, whole.scheme))
    own = bytes_read(due, part)
    with hub(NAME, folder) as served:
        url = f"{served.url}/{NAME}/resolve/main"
        checkpoint = Checkpoint.open(url)
        assert checkpoint.ranged is not None
        checkpoint.check_whole()
        assert checkpoint.digest == whole.digest
        headers = bytes_of_weights(served)
        for file, start, stop in ranges_read(checkpoint, due, part):
            checkpoint.need(file, start, stop)
        fetched = bytes_of_weights(served) - headers
        # a piece at each end of each of some ranges, and those near each other are one
        assert own <= fetched < own + 2 * len(due) * ranges.PIECE_BYTES
        assert fetched < 0.75 * whole.nbytes
        want = logits_of(folder, TOKENS, tp=2, pp=2)
        assert torch.equal(logits_of(url, TOKENS, tp=2, pp=2), want)
        (problem,) = verify(checkpoint.path).problems  # its folder is never taken for a whole one
        assert "holds neither" in problem or "which is missing" in problem
        same_files = {name: (folder / name).read_bytes() for name in checkpoint.ranged.files}
        local_folder(url)  # what was begun in ranges is copied whole when that is asked for
        copied = {name: (checkpoint.path / name).read_bytes() for name in same_files}
        assert copied == same_files
        assert Checkpoint.open(url).ranged is None


def test_a_server_without_ranges_is_copied_whole(model: Path) -> None:
    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=model)) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            checkpoint = Checkpoint.open(f"http://127.0.0.1:{server.server_port}")
        finally:
            server.shutdown()
            thread.join()
    assert checkpoint.ranged is None
    same(checkpoint.path, model)


def test_experts_that_move_are_fetched_then(tmp_path: Path) -> None:
    tiny_llama4(tmp_path / "src", experts=4)
    name = "model.layers.1.feed_forward.experts"
    with hub(NAME, tmp_path / "src") as served:
        remote = Checkpoint.open(f"{served.url}/{NAME}/resolve/main")
        local = Checkpoint.open(tmp_path / "src")
        for expert in (3, 0):
            pairs = (
                ProductReader(each.with_own_maps(), None).expert(name, expert)
                for each in (remote, local)
            )
            for ours, theirs in zip(*pairs, strict=True):
                assert torch.equal(ours.dense(), theirs.dense())


def test_a_range_that_breaks_off_is_asked_for_again(model: Path) -> None:
    with hub(NAME, model) as served:
        url = f"{served.url}/{NAME}/resolve/main"
        checkpoint = Checkpoint.open(url)
        file = checkpoint.files[0]
        served.break_after = {file.name: 100}
        for one in checkpoint.names:
            assert torch.equal(checkpoint.tensor(one), Checkpoint.open(model).tensor(one))
        assert not served.break_after


def test_a_server_that_is_not_there() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with pytest.raises(CheckpointError, match="cannot be reached"):
        Checkpoint.open(f"http://127.0.0.1:{port}/model")


def test_a_file_that_changed_meanwhile(model: Path) -> None:
    url = to_memory(model)
    checkpoint = Checkpoint.open(url)
    memory = fsspec.filesystem("memory")
    name = checkpoint.files[0].name
    memory.pipe_file(f"/models/tiny/{name}", b"short")
    with pytest.raises(CheckpointError, match="the file was changed"):
        for one in checkpoint.names:
            checkpoint.tensor(one)
    memory.rm_file(f"/models/tiny/{name}")
    with pytest.raises(CheckpointError, match=r"bytes 0:\d+ cannot be fetched"):
        for one in checkpoint.names:
            checkpoint.tensor(one)


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("nosuch://a/b", "cannot be opened: Protocol not known: nosuch"),
        ("memory://models/none", "config.json: is missing"),
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
