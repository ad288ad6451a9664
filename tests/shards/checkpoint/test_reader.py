"""Model folders, whole and damaged."""

from __future__ import annotations

import json
import resource
import shutil
import struct
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from arriero.shards.checkpoint.llama_names import expected_tensors
from arriero.shards.checkpoint.reader import Checkpoint
from arriero.shards.checkpoint.safetensors_header import read_header
from arriero.shards.checkpoint.safetensors_limits import MAX_HEADER_BYTES
from arriero.shards.errors import CheckpointError
from support.models import tiny_llama, tiny_weights, write_safetensors, write_sharded


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_reads_what_was_written(tmp_path: Path, sharded: bool, dtype: str) -> None:
    config = tiny_llama(tmp_path, seed=5, dtype=dtype, sharded=sharded)
    weights = tiny_weights(config, 5)
    found = Checkpoint.open(tmp_path)
    found.check(expected_tensors(config))
    assert found.path == tmp_path
    assert found.config == config
    assert found.names == tuple(sorted(weights))
    assert found.nbytes == sum(one.nbytes for one in weights.values())
    assert len(found.files) == (3 if sharded else 1)
    for name, due in weights.items():
        assert found.shape(name) == tuple(due.shape)
        assert found.dtype(name) == due.dtype
        assert torch.equal(found.tensor(name), due)
    name = "model.layers.1.mlp.down_proj.weight"
    assert torch.equal(found.rows(name, 3, 9), weights[name][3:9])
    assert torch.equal(found.columns(name, 3, 9), weights[name][:, 3:9])
    assert found.rows(name, 4, 4).shape == (0, weights[name].shape[1])


def test_the_safetensors_library_reads_our_files_and_we_read_its(tmp_path: Path) -> None:
    config = tiny_llama(tmp_path, seed=1, dtype="bfloat16")
    weights = tiny_weights(config, 1)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as theirs:
        for name, due in weights.items():
            assert torch.equal(theirs.get_tensor(name), due)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    found = Checkpoint.open(tmp_path)
    for name, due in weights.items():
        assert torch.equal(found.tensor(name), due)


def test_views_share_memory_and_never_write_the_file(tmp_path: Path) -> None:
    config = tiny_llama(tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()
    found = Checkpoint.open(tmp_path)
    name = "lm_head.weight"
    assert found.tensor(name).data_ptr() == found.rows(name, 0, 3).data_ptr()
    assert found.columns(name, 0, 3).data_ptr() == found.tensor(name).data_ptr()
    found.tensor(name).zero_()
    assert (tmp_path / "model.safetensors").read_bytes() == before
    fresh = Checkpoint.open(tmp_path).tensor(name)
    assert torch.equal(fresh, tiny_weights(config, 0)[name])


def test_views_outlive_the_checkpoint_and_serve_many_threads(tmp_path: Path) -> None:
    config = tiny_llama(tmp_path, sharded=True)
    due = tiny_weights(config, 0)
    views: dict[int, dict[str, torch.Tensor]] = {}

    def read(index: int, found: Checkpoint) -> None:
        views[index] = {name: found.tensor(name) for name in found.names}

    opened = Checkpoint.open(tmp_path)
    threads = [threading.Thread(target=read, args=(i, opened)) for i in range(8)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    del opened, threads, one
    for made in views.values():
        assert all(torch.equal(made[name], due[name]) for name in due)


def test_unpadded_headers_are_read(tmp_path: Path) -> None:
    values = torch.arange(6, dtype=torch.float32).view(2, 3)
    entry = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}
    header = json.dumps({"a": entry}).encode()
    header += b" " * ((8 - len(header)) % 8 + 1)
    data = values.numpy().tobytes()
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + data)
    tiny_config(tmp_path)
    assert torch.equal(Checkpoint.open(tmp_path).tensor("a"), values)


def test_empty_and_scalar_tensors(tmp_path: Path) -> None:
    tiny_config(tmp_path)
    made = {"empty": torch.zeros(0, 4), "scalar": torch.tensor(2.5), "last": torch.ones(1)}
    write_safetensors(tmp_path / "model.safetensors", made)
    found = Checkpoint.open(tmp_path)
    for name, due in made.items():
        assert torch.equal(found.tensor(name), due)
    with pytest.raises(CheckpointError, match="no range 0:1"):
        found.rows("scalar", 0, 1)


def test_digest_follows_content_and_not_place_or_time(tmp_path: Path) -> None:
    tiny_llama(tmp_path / "a", seed=1)
    tiny_llama(tmp_path / "b", seed=2)
    tiny_llama(tmp_path / "c", seed=1, rope_theta=5e5)
    shutil.copytree(tmp_path / "a", tmp_path / "moved")
    text = json.loads((tmp_path / "moved" / "config.json").read_text())
    (tmp_path / "moved" / "config.json").write_text(
        json.dumps(dict(reversed(list(text.items()))), indent=7)
    )
    a, b, c, moved = (Checkpoint.open(tmp_path / n).digest for n in ("a", "b", "c", "moved"))
    assert a == moved
    assert len({a, b, c}) == 3
    assert len(bytes.fromhex(a)) == 16


def tiny_config(path: Path) -> None:
    tiny_llama(path / "source")
    shutil.copy(path / "source" / "config.json", path)


# ----- check ------------------------------------------------------------------------------------


def rewrite(path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> Checkpoint:
    config = Checkpoint.open(path).config
    weights = tiny_weights(config, 0)
    change(weights)
    write_safetensors(path / "model.safetensors", weights)
    return Checkpoint.open(path)


NAME = "model.layers.0.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda w: w.pop(NAME), [NAME, "[96, 64]", "missing"]),
        (
            lambda w: w.update({NAME: torch.zeros(95, 64)}),
            ["model.safetensors", NAME, "[95, 64]", "[96, 64]"],
        ),
        (
            lambda w: w.update({"model.layers.0.mlp.stray": torch.zeros(3)}),
            ["mlp.stray", "[3]", "no part"],
        ),
        (
            lambda w: w.update({NAME: torch.zeros(96, 64, dtype=torch.int8)}),
            [NAME, "torch.int8", "torch.bfloat16"],
        ),
        (lambda w: [w.pop(n) for n in list(w)[:9]], ["and 4 more"]),
    ],
)
def test_check_names_file_tensor_and_shapes(
    tmp_path: Path, change: Callable[[dict[str, torch.Tensor]], object], words: list[str]
) -> None:
    config = tiny_llama(tmp_path)
    found = rewrite(tmp_path, change)
    with pytest.raises(CheckpointError) as caught:
        found.check(expected_tensors(config))
    assert all(word in str(caught.value) for word in words)


def test_check_lets_harmless_tensors_pass(tmp_path: Path) -> None:
    config = tiny_llama(tmp_path, tied=True)

    def add(weights: dict[str, torch.Tensor]) -> None:
        weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(8)
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()

    rewrite(tmp_path, add).check(expected_tensors(config))
    found = rewrite(tmp_path, lambda w: w.update({"lm_head.weight": torch.zeros(5, 64)}))
    with pytest.raises(CheckpointError, match=r"lm_head\.weight"):
        found.check(expected_tensors(config))


# ----- damage -----------------------------------------------------------------------------------


def file_of(header: bytes, data: bytes = b"", length: int | None = None) -> bytes:
    return struct.pack("<Q", len(header) if length is None else length) + header + data


def entry(**changes: Any) -> dict[str, Any]:  # noqa: ANN401
    return {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | changes


def header_of(**entries: Any) -> bytes:  # noqa: ANN401
    return json.dumps(entries).encode()


OVERLAP = {"a": entry(), "b": entry(data_offsets=[4, 12])}
DAMAGED = {
    "empty": (b"", "0 bytes are too few"),
    "short": (b"1234", "4 bytes are too few"),
    "header of 2 GB": (file_of(b"{}", length=2 * 10**9), "exceeds the limit"),
    "header longer than the file": (file_of(b"{}", length=50), "truncated"),
    "not JSON": (file_of(b"nonsense"), "not valid JSON"),
    "not UTF-8": (file_of(b'{"\xff": 1}'), "not valid JSON"),
    "a list": (file_of(b"[]"), "not an object"),
    "nested without end": (file_of(b'{"a":' * 50_000), "not valid JSON"),
    "tensor twice": (
        file_of(b'{"a":%b,"a":%b}' % ((json.dumps(entry()).encode(),) * 2), bytes(8)),
        "'a' appears twice",
    ),
    "entry not an object": (file_of(header_of(a=3)), "'a': the header entry lacks"),
    "no offsets": (file_of(header_of(a={"dtype": "F32", "shape": []})), "the header entry lacks"),
    "unknown dtype": (file_of(header_of(a=entry(dtype="F33")), bytes(8)), "dtype 'F33'"),
    "dtype not a string": (file_of(header_of(a=entry(dtype=["F32"])), bytes(8)), "is unknown"),
    "shape not a list": (file_of(header_of(a=entry(shape="2")), bytes(8)), "shape 2"),
    "negative size": (file_of(header_of(a=entry(shape=[-2])), bytes(8)), "shape [-2]"),
    "fraction": (file_of(header_of(a=entry(shape=[2.0])), bytes(8)), "shape [2.0]"),
    "true": (file_of(header_of(a=entry(shape=[True])), bytes(8)), "shape [True]"),
    "huge product": (file_of(header_of(a=entry(shape=[2**62] * 16)), bytes(8)), "bytes, but 8"),
    "too many dimensions": (file_of(header_of(a=entry(shape=[1] * 99)), bytes(8)), "shape"),
    "size": (file_of(header_of(a=entry(shape=[3])), bytes(8)), "takes 12 bytes, but 8"),
    "backward": (file_of(header_of(a=entry(data_offsets=[8, 0])), bytes(8)), "not a range"),
    "truncated": (file_of(header_of(a=entry()), bytes(7)), "truncated"),
    "overlap": (file_of(header_of(**OVERLAP), bytes(12)), "'a' and 'b' overlap"),
    "pickle": (b"PK\x03\x04" + bytes(100), "looks like a pickle"),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_damaged_files_give_one_clear_error(tmp_path: Path, kind: str) -> None:
    data, words = DAMAGED[kind]
    tiny_config(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(data)
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(tmp_path)
    assert words in str(caught.value)
    assert str(file) in str(caught.value)


def test_holes_between_tensors_are_let_be(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    file.write_bytes(file_of(header_of(a=entry(), b=entry(data_offsets=[64, 72])), bytes(100)))
    assert len(read_header(file)) == 2


INDEX = "model.safetensors.index.json"
FIRST = "model-00001-of-00003.safetensors"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({NAME: "../outside.safetensors"}, "not a plain file name"),
        ({NAME: "/etc/passwd"}, "not a plain file name"),
        ({NAME: "sub/x.safetensors"}, "not a plain file name"),
        ({NAME: ".."}, "does not end in .safetensors"),
        ({NAME: ""}, "does not end in .safetensors"),
        ({NAME: "a\0.safetensors"}, "not a plain file name"),
        ({NAME: "..\\x.safetensors"}, "not a plain file name"),
        ({NAME: 3}, "not a plain file name"),
        ({NAME: "pytorch_model.bin"}, "a pickle"),
        ({NAME: "weights.json"}, "does not end in .safetensors"),
        ({NAME: "gone.safetensors"}, "'gone.safetensors', which is missing"),
        ({"not.there": FIRST}, "'not.there' in " + FIRST + ", but the tensor is not there"),
        ({"model.norm.weight": FIRST}, "but the tensor is in"),
    ],
)
def test_index_that_cannot_be_is_refused(
    tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    tiny_llama(tmp_path, sharded=True)
    index = json.loads((tmp_path / INDEX).read_text())
    index["weight_map"] |= changes
    (tmp_path / INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(tmp_path)
    assert words in str(caught.value)
    assert INDEX in str(caught.value)


def test_a_tensor_in_two_files_is_refused(tmp_path: Path) -> None:
    config = tiny_llama(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    write_sharded(tmp_path, tiny_weights(config, 0), 3)
    shutil.copy(tmp_path / FIRST, tmp_path / FIRST.replace("00001-", "00002-"))
    with pytest.raises(CheckpointError, match="is in " + FIRST + " too"):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize(
    ("names", "words"),
    [
        ([], "fetch the weights"),
        (["pytorch_model.bin"], "a pickle"),
        (["consolidated.00.pth", "consolidated.01.pth"], "and 1 more: a pickle"),
        (["model.gguf"], "only model.gguf"),
        (["model-00001-of-00002.safetensors"], "only model-00001"),
    ],
)
def test_folders_without_weights(tmp_path: Path, names: list[str], words: str) -> None:
    tiny_config(tmp_path)
    for name in names:
        (tmp_path / name).write_bytes(b"x")
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(tmp_path)
    assert words in str(caught.value)


def test_wrong_names_and_ranges(tmp_path: Path) -> None:
    tiny_llama(tmp_path)
    found = Checkpoint.open(tmp_path)
    with pytest.raises(CheckpointError, match="holds no tensor 'x'"):
        found.tensor("x")
    for start, stop in [(-1, 2), (3, 2), (0, 65)]:
        with pytest.raises(CheckpointError, match=f"no range {start}:{stop}"):
            found.columns(NAME, start, stop)
    with pytest.raises(CheckpointError, match="is not a folder"):
        Checkpoint.open(tmp_path / "config.json")


def test_a_file_cut_after_opening_is_refused(tmp_path: Path) -> None:
    tiny_llama(tmp_path)
    found = Checkpoint.open(tmp_path)
    file = tmp_path / "model.safetensors"
    with file.open("r+b") as stream:
        stream.truncate(file.stat().st_size - 10)
    with pytest.raises(CheckpointError, match="was cut"):
        found.tensor(NAME)


# ----- fuzz -------------------------------------------------------------------------------------

NUMBERS = st.integers(-(2**70), 2**70) | st.integers(0, 64) | st.floats() | st.booleans()
ENTRIES = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "BF16", "I8", "X"]) | NUMBERS,
        "shape": st.lists(NUMBERS, max_size=4) | NUMBERS,
        "data_offsets": st.lists(NUMBERS, max_size=3) | st.none(),
    }
)
HEADERS = st.dictionaries(st.text(max_size=4), ENTRIES | NUMBERS, max_size=4)


def refuses_or_reads(file: Path, data: bytes) -> None:
    file.write_bytes(data)
    try:
        found = read_header(file)
    except CheckpointError:
        return
    for one in found.values():
        assert 0 <= one.start <= one.stop <= len(data)


@settings(
    max_examples=300,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(HEADERS, st.binary(max_size=64), st.none() | st.integers(0, 2**64 - 1))
def test_fuzzed_entries(
    tmp_path: Path, header: dict[str, Any], data: bytes, length: int | None
) -> None:
    refuses_or_reads(tmp_path / "x", file_of(json.dumps(header).encode(), data, length))


@settings(
    max_examples=300,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(st.lists(st.tuples(st.integers(0, 200), st.integers(0, 255)), min_size=1, max_size=8))
def test_fuzzed_bytes(tmp_path: Path, flips: list[tuple[int, int]]) -> None:
    data = bytearray(file_of(header_of(a=entry(), b=entry(data_offsets=[8, 16])), bytes(16)))
    for place, value in flips:
        data[place % len(data)] = value
    refuses_or_reads(tmp_path / "x", bytes(data))


def test_a_header_at_the_limit_takes_bounded_memory(tmp_path: Path) -> None:
    file = tmp_path / "x"
    with file.open("wb") as stream:  # sparse: the header is all zero bytes
        stream.write(struct.pack("<Q", MAX_HEADER_BYTES))
        stream.truncate(8 + MAX_HEADER_BYTES)
    with pytest.raises(CheckpointError, match="not valid JSON"):
        read_header(file)
    with file.open("r+b") as stream:
        stream.write(struct.pack("<Q", MAX_HEADER_BYTES + 1))
        stream.truncate(2**40)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(CheckpointError, match="exceeds the limit"):
        read_header(file)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1024  # KiB
