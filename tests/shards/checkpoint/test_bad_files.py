"""Files that are not what their names say: each reader names the same cause and a remedy."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from arriero.shards.checkpoint.gguf_import import import_gguf
from arriero.shards.checkpoint.verify import verify
from arriero.shards.errors import CheckpointError
from arriero.shards.files import bad_file
from support.models import tiny_llama

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:%064d\nsize 269060552\n" % 0
HTML = b"<!DOCTYPE html>\n<html><head><title>401</title></head></html>\n"
CAUSES: dict[str, tuple[bytes, list[str]]] = {
    "a git-lfs pointer": (LFS, ["git-lfs pointer to a file of 269,060,552 bytes", "git lfs pull"]),
    "a git-annex pointer": (b"/annex/objects/SHA256E-s5--ab.bin\n", ["git annex get"]),
    "a web page": (HTML, ["a web page or an error message of a server", "access token"]),
    "an error of a store": (
        b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>',
        ["HTML or XML", "access token"],
    ),
    "nothing": (b"", ["empty (0 bytes)", "fetch the file again"]),
    "zeros": (bytes(4096), ["begins with 1024 zero bytes", "was not finished"]),
}
FILES = ["model.safetensors", "config.json", "tokenizer.json", "generation_config.json"]


def said_of(folder: Path) -> str:
    (problem,) = verify(folder).problems
    return problem


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("cause", CAUSES)
def test_each_file_of_a_folder(tmp_path: Path, cause: str, file: str) -> None:
    data, words = CAUSES[cause]
    tiny_llama(tmp_path)
    (tmp_path / file).write_bytes(data)
    said = said_of(tmp_path)
    assert str(tmp_path / file) in said
    assert all(word in said for word in words), said


@pytest.mark.parametrize("cause", CAUSES)
def test_shards_an_index_and_a_gguf_file(tmp_path: Path, cause: str) -> None:
    data, words = CAUSES[cause]
    tiny_llama(tmp_path, sharded=True)
    shard = "model-00002-of-00003.safetensors"
    whole = (tmp_path / shard).read_bytes()
    for file in (shard, "model.safetensors.index.json"):
        (tmp_path / file).write_bytes(data)
        said = said_of(tmp_path)
        assert str(tmp_path / file) in said
        assert all(word in said for word in words), said
        (tmp_path / shard).write_bytes(whole)
    (tmp_path / "m.gguf").write_bytes(data)
    with pytest.raises(CheckpointError) as caught:
        import_gguf(tmp_path / "m.gguf", tmp_path / "m")
    assert str(tmp_path / "m.gguf") in str(caught.value)
    assert all(word in str(caught.value) for word in words)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"PK\x03\x04" + bytes(100), "convert it to safetensors"),
        (b"\x80\x05" + b"\x95" * 100, "convert it to safetensors"),
        (b"GGUF" + struct.pack("<IQQ", 3, 1, 1), "arriero models import"),
        (b"tjgg" + b"\x03" * 50, "older than GGUF"),
        (b"\x1f\x8b\x08" + b"\x07" * 50, "compressed (gzip): unpack it"),
        (b"Invalid username or password.", "a text of 29 bytes ('Invalid username or password.')"),
        (b'{"error": "Repository not found"}', "Repository not found"),
    ],
)
def test_other_kinds_of_files_as_weights(tmp_path: Path, data: bytes, words: str) -> None:
    tiny_llama(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(data)
    assert words in said_of(tmp_path)


def test_a_download_that_broke_off_says_both_sizes(tmp_path: Path) -> None:
    tiny_llama(tmp_path)
    file = tmp_path / "model.safetensors"
    size = file.stat().st_size
    os.truncate(file, size - 1000)
    said = said_of(tmp_path)
    assert f"{size - 1000:,} bytes" in said and f"{size:,}" in said
    assert "1,000 are missing" in said and "fetch the file again" in said
    (tmp_path / "m.gguf").write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 1, 1))
    with pytest.raises(CheckpointError, match="truncated or damaged; fetch it again"):
        import_gguf(tmp_path / "m.gguf", tmp_path / "m")


def dead_link(file: Path) -> None:
    file.unlink()
    file.symlink_to("../../blobs/0123abcd")


def unfinished(file: Path) -> None:
    file.rename(f"{file}.incomplete")


def folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


def loop(file: Path) -> None:
    file.unlink()
    file.symlink_to(file.name)


@pytest.mark.parametrize("file", ["model-00002-of-00003.safetensors", "config.json"])
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (dead_link, "is a link to ../../blobs/0123abcd, which is missing"),
        (folder, "is a folder, not a file"),
        (loop, "a link to itself"),
    ],
)
def test_what_the_file_system_says(
    tmp_path: Path, file: str, change: Callable[[Path], object], words: str
) -> None:
    tiny_llama(tmp_path, sharded=True)
    change(tmp_path / file)
    said = said_of(tmp_path)
    assert str(tmp_path / file) in said and words in said


@pytest.mark.parametrize("sharded", [False, True])
def test_downloads_that_were_not_finished(tmp_path: Path, sharded: bool) -> None:
    tiny_llama(tmp_path, sharded=sharded)
    name = "model-00002-of-00003.safetensors" if sharded else "model.safetensors"
    unfinished(tmp_path / name)
    said = said_of(tmp_path)
    assert f"{name}.incomplete" in said
    assert "an unfinished download" in said and "models pull" in said


def test_no_right_to_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Root may read everything, so the system's answer is made up."""
    tiny_llama(tmp_path)

    def refuse(file: Path) -> tuple[bytes, int]:
        raise PermissionError(13, "Permission denied", str(file))

    monkeypatch.setattr("arriero.shards.checkpoint.safetensors_header.head_of", refuse)
    said = said_of(tmp_path)
    assert str(tmp_path / "model.safetensors") in said and "chmod a+r" in said
    assert "permission denied" in bad_file.explain_error(tmp_path, PermissionError(13, "x"))


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["pytorch_model.bin"], "convert it to safetensors"),
        (["consolidated.00.pth"], "arriero models convert"),
        (["model.gguf"], "arriero models import"),
        (["consolidated.safetensors"], "rename the file to model.safetensors"),
        (["model.safetensors.part"], "an unfinished download"),
        ([], "arriero models pull"),
    ],
)
def test_folders_without_weights_that_are_read(
    tmp_path: Path, names: list[str], words: str
) -> None:
    tiny_llama(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    for name in names:
        (tmp_path / name).write_bytes(b"x")
    assert words in said_of(tmp_path)
