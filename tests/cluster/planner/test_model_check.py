"""Folders that cannot be served: `up` and `models verify` refuse alike, before anything runs."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from arriero.cluster import cli
from arriero.cluster.hosts import local_cluster as local
from arriero.cluster.planner.model_check import check_checkpoint, check_folder, check_models
from arriero.cluster.spec.model import ModelSpec
from arriero.shards.checkpoint.gguf_import import import_gguf
from arriero.shards.checkpoint.quantize import quantize_checkpoint
from arriero.shards.checkpoint.reader import Checkpoint
from arriero.shards.errors import CheckpointError, SpecError
from support.frontdoor import LLAMA_SPECIALS, make_tokenizer
from support.gguf_files import write_gguf
from support.models import tiny_llama

Change = Callable[[Path], object]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A whole model folder."""
    tokenizer = make_tokenizer(LLAMA_SPECIALS, bos="<|begin_of_text|>")
    tiny_llama(tmp_path / "m", vocab=512, sharded=True, eos=1)
    tokenizer.save(str(tmp_path / "m" / "tokenizer.json"))
    return tmp_path / "m"


@pytest.fixture(autouse=True)
def nothing_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ARRIERO_STATE", str(tmp_path / "state"))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)

    def start(spec: object) -> None:
        raise AssertionError("a cluster was started")

    monkeypatch.setattr(local, "start", start)


def setting(file: str, **changes: Any) -> Change:  # noqa: ANN401
    """Fields of a JSON file, in place of those that are there."""

    def change(folder: Path) -> None:
        path = folder / file
        there = json.loads(path.read_text()) if path.is_file() else {}
        path.write_text(json.dumps(there | changes))

    return change


def writing(file: str, text: str) -> Change:
    return lambda folder: (folder / file).write_text(text)


def without(file: str) -> Change:
    return lambda folder: next(folder.glob(file)).unlink()


def cut(folder: Path) -> None:
    file = next(folder.glob("*.safetensors"))
    os.truncate(file, file.stat().st_size - 100)


def other_shape(folder: Path) -> None:
    """The weights of another model."""
    config = (folder / "config.json").read_text()
    tiny_llama(folder, vocab=512, sharded=True, intermediate=64)
    (folder / "config.json").write_text(config)


BROKEN: list[tuple[str, Change, str]] = [
    ("template", setting("tokenizer_config.json", chat_template="{% if %}"), "template"),
    ("template file", writing("chat_template.jinja", "{{ messages"), "template"),
    ("template number", setting("tokenizer_config.json", chat_template=7), "template"),
    ("no tokenizer", without("tokenizer.json"), "tokenizer.json"),
    ("tokenizer no JSON", writing("tokenizer.json", "{"), "tokenizer.json"),
    ("tokenizer of no kind", writing("tokenizer.json", "{}"), "tokenizer.json"),
    ("tokenizer_config no JSON", writing("tokenizer_config.json", "[1"), "tokenizer_config.json"),
    ("generation_config no JSON", writing("generation_config.json", "{"), "generation_config.json"),
    ("config gone", without("config.json"), "config.json"),
    ("config no JSON", writing("config.json", "{"), "config.json"),
    ("architecture", setting("config.json", architectures=["GPT2LMHeadModel"]), "GPT2LMHeadModel"),
    ("sizes", setting("config.json", hidden_size=-1), "hidden_size"),
    ("a file gone", without("model-*2-of*"), "model-00002-of-00003.safetensors"),
    ("weights gone", without("*.safetensors"), "safetensors"),
    ("weights cut", cut, "truncated"),
    ("other weights", other_shape, "shape"),
    ("adapter", writing("adapter_config.json", "{}"), "adapter"),
]


@pytest.mark.parametrize(
    ("change", "error"), [case[1:] for case in BROKEN], ids=[case[0] for case in BROKEN]
)
def test_up_and_verify_refuse_alike(
    folder: Path, change: Change, error: str, capsys: pytest.CaptureFixture[str]
) -> None:
    change(folder)
    for command in (["models", "verify"], ["up", "--port", "0", "--model"]):
        assert cli.run([*command, str(folder)]) == 5
        last = capsys.readouterr().err.splitlines()[-1]
        assert error in last and str(folder) in last and "Traceback" not in last


def test_a_whole_folder_passes(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["models", "verify", str(folder)]) == 0
    assert "parameters" in capsys.readouterr().out
    check_models([ModelSpec(name="m", path=str(folder))])
    check_models([ModelSpec(name="m", path="s3://nowhere/m")])  # seen where it is fetched


def test_a_tokenizer_that_is_not_read_has_a_remedy(folder: Path) -> None:
    (folder / "tokenizer.json").rename(folder / "tokenizer.model")
    (problem,) = check_folder(folder).problems
    assert "tokenizer.model is not read" in problem and "save_pretrained" in problem


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"mesh": {"tp": 8}}, "tp"),
        ({"mesh": {"pp": 3}}, "pp"),
        ({"mesh": {"dp": 2}}, "dp"),
        ({"limits": {"max_model_len": 10_000}}, "`max_model_len`=10000"),
        ({"kv": {"memory": 16}}, "holds no block"),
        ({"offload": {"layers": 1}, "device": "cuda"}, "`offload_layers`=1"),
        ({"kernels": "fast"}, "'fast' is none of reference, cpu, triton"),
    ],
)
def test_settings_that_do_not_fit(folder: Path, settings: dict[str, Any], error: str) -> None:
    with pytest.raises(SpecError) as caught:
        check_models([ModelSpec(name="m", path=str(folder), **settings)])
    assert error in str(caught.value) and "`m`" in str(caught.value)


def test_what_import_and_quantize_make_passes(folder: Path, tmp_path: Path) -> None:
    quantize_checkpoint(folder, tmp_path / "int8", "int8")
    assert check_folder(tmp_path / "int8").problems == ()
    again = ModelSpec(name="m", path=str(tmp_path / "int8"), quantization="int8")
    with pytest.raises(CheckpointError, match="quantized already"):
        check_models([again])
    config = tiny_llama(tmp_path / "like", vocab=320)
    write_gguf(tmp_path / "m.gguf", config)
    import_gguf(tmp_path / "m.gguf", tmp_path / "imported", "float32")
    assert check_folder(tmp_path / "imported").problems == ()


def test_a_rollout_and_a_url_are_checked_where_the_files_are(folder: Path) -> None:
    model = ModelSpec(name="m", path=f"file://{folder}")
    check_checkpoint(Checkpoint.open(model.path), model)
    setting("tokenizer_config.json", chat_template="{% if %}")(folder)
    with pytest.raises(CheckpointError, match=r"`m`.*template"):
        check_checkpoint(Checkpoint.open(model.path), model)
