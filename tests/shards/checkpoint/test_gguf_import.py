"""GGUF files to folders: weights, config and tokenizer, from whole files and damaged ones."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from arriero.shards.checkpoint.gguf_header import read_gguf
from arriero.shards.checkpoint.gguf_import import import_gguf
from arriero.shards.checkpoint.reader import Checkpoint
from arriero.shards.errors import CheckpointError
from arriero.shards.model_config.dense import ModelConfig
from arriero.shards.models.qwen3.config import Qwen3Config
from support.gguf_files import write_gguf

Type = gguf.GGMLQuantizationType
SETTINGS: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "max_position_embeddings": 512,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def tiny(**changes: Any) -> ModelConfig:  # noqa: ANN401
    return ModelConfig.from_dict(SETTINGS | changes)


@pytest.mark.parametrize("type_", [Type.F32, Type.F16, Type.BF16, Type.Q4_0, Type.Q4_1, Type.Q8_0])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_are_those_of_the_file(tmp_path: Path, type_: Type, dtype: str) -> None:
    due = write_gguf(tmp_path / "m.gguf", tiny(), seed=4, type_=type_)
    told: list[tuple[int, int, str]] = []
    import_gguf(tmp_path / "m.gguf", tmp_path / "m", dtype, lambda *one: told.append(one))
    found = Checkpoint.open(tmp_path / "m")
    assert set(found.names) == set(due)
    for name, weight in due.items():
        assert torch.equal(found.tensor(name), weight.to(getattr(torch, dtype))), name
    assert told[-1][0] == told[-1][1]
    assert [one[0] for one in told] == sorted(one[0] for one in told)
    assert {one[2] for one in told} == set(due)


@pytest.mark.parametrize("type_", [Type.F32, Type.Q8_0])
def test_a_qwen3_is_imported(tmp_path: Path, type_: Type) -> None:
    settings = SETTINGS | {"architectures": ["Qwen3ForCausalLM"], "head_dim": 32}
    config = Qwen3Config.from_dict(settings)
    due = write_gguf(tmp_path / "m.gguf", config, type_=type_, pre="qwen2", architecture="qwen3")
    import_gguf(tmp_path / "m.gguf", tmp_path / "m", "float32")
    found = Checkpoint.open(tmp_path / "m")
    assert found.config == config
    assert "model.layers.1.self_attn.k_norm.weight" in due
    assert set(found.names) == set(due)
    for name, weight in due.items():
        assert torch.equal(found.tensor(name), weight), name
    tokenizer = Tokenizer.from_file(str(tmp_path / "m" / "tokenizer.json"))
    pieces = tokenizer.pre_tokenizer.pre_tokenize_str("don't 123 ab")
    assert [piece for piece, _ in pieces] == ["don", "'t", "Ġ", "1", "2", "3", "Ġab"]
    assert tokenizer.normalizer.normalize_str("e\u0301") == "\u00e9"


BLOCKS_OF_256 = [
    Type.Q2_K,
    Type.Q3_K,
    Type.Q4_K,
    Type.Q5_K,
    Type.Q6_K,
    Type.IQ1_S,
    Type.IQ1_M,
    Type.IQ2_XXS,
    Type.IQ2_XS,
    Type.IQ2_S,
    Type.IQ3_XXS,
    Type.IQ3_S,
    Type.IQ4_XS,
]


@pytest.mark.parametrize("type_", [*BLOCKS_OF_256, Type.Q5_0, Type.Q5_1, Type.IQ4_NL])
def test_every_type_that_the_package_dequantizes_is_imported(tmp_path: Path, type_: Type) -> None:
    config = tiny(hidden_size=256, head_dim=64, intermediate_size=256, num_hidden_layers=1)
    due = write_gguf(tmp_path / "m.gguf", config, type_=type_)
    import_gguf(tmp_path / "m.gguf", tmp_path / "m", "float32")
    found = Checkpoint.open(tmp_path / "m")
    for name, weight in due.items():
        assert torch.isfinite(weight).all()
        assert torch.equal(found.tensor(name), weight), name


@pytest.mark.parametrize("given", [1, 2, 3])
def test_a_model_in_several_files_is_imported_from_any_of_them(tmp_path: Path, given: int) -> None:
    config = tiny(tie_word_embeddings=True)
    due = write_gguf(tmp_path / "m.gguf", config, max_tensors=7)
    files = [tmp_path / f"m-{i + 1:05d}-of-00003.gguf" for i in range(3)]
    assert sorted(tmp_path.iterdir()) == files
    import_gguf(files[given - 1], tmp_path / "m", "float32")
    found = Checkpoint.open(tmp_path / "m")
    assert found.config == config
    assert all(torch.equal(found.tensor(name), weight) for name, weight in due.items())
    files[1].rename(tmp_path / "gone")
    with pytest.raises(CheckpointError, match=r"m-00002-of-00003\.gguf: No such file"):
        import_gguf(files[0], tmp_path / "n")
    files[0].rename(tmp_path / "renamed.gguf")
    with pytest.raises(CheckpointError, match=r"one part of several \(split\.count=3\)"):
        import_gguf(tmp_path / "renamed.gguf", tmp_path / "n")


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_word_embeddings": True},
        {"num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 32},
        {"rope_scaling": LLAMA3, "head_dim": 64},
        {"rope_scaling": LLAMA3 | {"factor": 32.0}, "head_dim": 64},
        {"rope_scaling": LLAMA3 | {"factor": 16.0, "high_freq_factor": 1.0}, "head_dim": 64},
        {"attention_bias": True, "mlp_bias": True},
    ],
)
def test_config_and_weights_come_back(tmp_path: Path, changes: dict[str, Any]) -> None:
    config = tiny(**changes)
    due = write_gguf(tmp_path / "m.gguf", config)
    import_gguf(tmp_path / "m.gguf", tmp_path / "m", "float32")
    found = Checkpoint.open(tmp_path / "m")
    assert found.config == config
    for name, weight in due.items():
        assert torch.equal(found.tensor(name), weight), name


def test_transformers_reads_the_same_from_the_file_and_the_folder(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    write_gguf(tmp_path / "m.gguf", tiny(), type_=Type.Q4_1)
    import_gguf(tmp_path / "m.gguf", tmp_path / "m", "float32")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    ours = model.state_dict()
    theirs = load_gguf_checkpoint(tmp_path / "m.gguf", return_tensors=True, model_to_load=model)
    assert theirs["tensors"].keys() == ours.keys()
    for name, due in theirs["tensors"].items():
        assert torch.equal(ours[name], torch.as_tensor(due)), name


def test_large_tensors_are_converted_in_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("arriero.shards.checkpoint.gguf_import._PIECE_ELEMENTS", 64 * 16)
    due = write_gguf(tmp_path / "m.gguf", tiny(), type_=Type.Q8_0)
    import_gguf(tmp_path / "m.gguf", tmp_path / "m", "float32")
    found = Checkpoint.open(tmp_path / "m")
    assert all(torch.equal(found.tensor(name), due[name]) for name in due)


# ----- tokenizer --------------------------------------------------------------------------------

TEXTS = [
    "",
    "the quick brown fox",
    "  two  spaces   and\ttabs\n\n\nlines \r\n",
    "def f(x):\n    return x == 10 and x[1:] != 'I''ll'",
    "I'll DON'T we've he'd",
    "1 22 333 4444 55555 3.14159",
    "naïve café Ångström ñandú",
    "日本語 русский العربية हिन्दी",
    "🙂🙃👩‍👩‍👧 e\u0301 \u200b \u00a0",
    "<|begin_of_text|>the<|eot_id|> fox<|end_of_text|>",
    "\x00\x01\x7f",
]


def imported_tokenizer(tmp_path: Path, pre: str | None, **metadata: Any) -> Tokenizer:  # noqa: ANN401
    write_gguf(tmp_path / "m.gguf", tiny(), pre=pre, metadata=metadata)
    import_gguf(tmp_path / "m.gguf", tmp_path / "m")
    return Tokenizer.from_file(str(tmp_path / "m" / "tokenizer.json"))


@pytest.mark.parametrize("pre", [None, "gpt-2", "smollm", "llama-bpe"])
def test_every_text_comes_back(tmp_path: Path, pre: str | None) -> None:
    tokenizer = imported_tokenizer(tmp_path, pre)
    for text in TEXTS:
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        assert tokenizer.decode(ids, skip_special_tokens=False) == text


def test_gpt2_splits_as_transformers(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    ours = imported_tokenizer(tmp_path, "gpt-2")
    theirs = AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf")
    for text in TEXTS:
        assert ours.encode(text).ids == theirs.encode(text)


@pytest.mark.parametrize(
    ("pre", "text", "pieces"),
    [
        ("gpt-2", "a 1234  b", ["a", " 1234", " ", " b"]),
        ("smollm", "a 1234  b", ["a", " ", "1", "2", "3", "4", " ", " b"]),
        ("smollm", "x =   42", ["x", " =", "   ", "4", "2"]),
        ("llama-bpe", "a 1234  b", ["a", " ", "123", "4", " ", " b"]),
        ("llama-bpe", "I'LL go\n\n x", ["I", "'LL", " go", "\n\n", " x"]),
        ("llama-bpe", "(foo) !!\n", ["(foo", ")", " !!\n"]),
        ("llama3", "a 1234  b", ["a", " ", "123", "4", " ", " b"]),
        ("llama-v3", "I'LL go\n\n x", ["I", "'LL", " go", "\n\n", " x"]),
        ("smaug-bpe", "a 1234  b", ["a", " ", "123", "4", " ", " b"]),
        ("dbrx", "I'LL go\n\n x", ["I", "'LL", " go", "\n\n", " x"]),
        ("pixtral", "(foo) !!\n", ["(foo", ")", " !!\n"]),
        ("phi-2", "a 1234  b", ["a", " 1234", " ", " b"]),
        ("llama4", "I'll goThere/ 1234", ["I'll", " go", "There", "/", " ", "123", "4"]),
        ("gpt-4o", "(foo) !!/\n", ["(foo", ")", " !!/\n"]),
    ],
)
def test_each_family_splits_its_way(tmp_path: Path, pre: str, text: str, pieces: list[str]) -> None:
    split = imported_tokenizer(tmp_path, pre).pre_tokenizer.pre_tokenize_str(text)
    assert [text[start:stop] for _, (start, stop) in split] == pieces


def test_special_tokens_are_whole_and_named(tmp_path: Path) -> None:
    tokenizer = imported_tokenizer(tmp_path, "smollm")
    assert tokenizer.encode("<|eot_id|>x<|begin_of_text|>").ids[::2] == [2, 0]
    assert tokenizer.decode([2, 0]) == ""
    made = json.loads((tmp_path / "m" / "tokenizer_config.json").read_text())
    assert made["bos_token"] == "<|begin_of_text|>"
    assert made["eos_token"] == "<|end_of_text|>"
    assert made["chat_template"] == "{{ messages }}"


def test_llama3_begins_with_its_token_and_stops_at_any_end(tmp_path: Path) -> None:
    tokenizer = imported_tokenizer(tmp_path, "llama-bpe")
    assert tokenizer.encode("the").ids[0] == 0
    assert tokenizer.encode("the", add_special_tokens=False).ids[0] != 0
    assert ModelConfig.from_folder(tmp_path / "m").eos_token_ids == (1, 2)


@pytest.mark.parametrize("pre", ["llama3", "llama-v3", "smaug-bpe", "dbrx", "lfm2"])
def test_other_names_of_llama_3_s_split_begin_and_end_alike(tmp_path: Path, pre: str) -> None:
    tokenizer = imported_tokenizer(tmp_path, pre)
    assert tokenizer.encode("the").ids[0] == 0
    assert ModelConfig.from_folder(tmp_path / "m").eos_token_ids == (1, 2)


def test_words_that_are_tokens_are_whole_only_where_the_family_says_so(tmp_path: Path) -> None:
    """llama.cpp looks a word up before it merges for Llama 3's own names, not for Smaug's."""
    for pre, whole in (("llama-v3", True), ("smaug-bpe", False)):
        imported_tokenizer(tmp_path, pre)
        made = json.loads((tmp_path / "m" / "tokenizer.json").read_text())
        assert made["model"]["ignore_merges"] is whole
        for file in (tmp_path / "m").iterdir():
            file.unlink()
        (tmp_path / "m").rmdir()


def test_every_chat_template_is_kept(tmp_path: Path) -> None:
    imported_tokenizer(tmp_path, "llama3", **{"tokenizer.chat_template.tool_use": "{{ tools }}"})
    made = json.loads((tmp_path / "m" / "tokenizer_config.json").read_text())
    assert made["chat_template"] == [
        {"name": "default", "template": "{{ messages }}"},
        {"name": "tool_use", "template": "{{ tools }}"},
    ]


def test_end_tokens_of_a_turn_and_of_a_message_end_texts(tmp_path: Path) -> None:
    ids = {"tokenizer.ggml.eot_token_id": 2, "tokenizer.ggml.eom_token_id": 3}
    imported_tokenizer(tmp_path, "smollm", **ids, **{"tokenizer.ggml.padding_token_id": 2**32 - 1})
    assert ModelConfig.from_folder(tmp_path / "m").eos_token_ids == (1, 2, 3)


def test_the_file_says_whether_to_add_the_begin_and_end(tmp_path: Path) -> None:
    flags = {"tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.add_eos_token": True}
    ids = imported_tokenizer(tmp_path, "gpt-2", **flags).encode("the").ids
    assert (ids[0], ids[-1]) == (0, 1)


# ----- refused ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("metadata", "words"),
    [
        ({"llama.expert_count": 8}, "experts"),
        ({"split.count": 3}, "one part of several"),
        ({"split.count": -1.0}, "split.count=-1.0 is not a number of files"),
        ({"llama.rope.scaling.type": "yarn"}, "'yarn' is not supported"),
        ({"llama.attention.value_length": 8}, "llama.attention.value_length=8"),
        ({"llama.rope.dimension_count": 8}, "llama.rope.dimension_count=8"),
        ({"llama.block_count": 3}, "lacks tensor 'model.layers.2."),
        ({"llama.block_count": 1}, "but the metadata requires no such tensor"),
        ({"llama.embedding_length": 128}, "has shape [300, 64], but the metadata requires"),
        ({"llama.feed_forward_length": "many"}, "llama.feed_forward_length=many"),
        ({"tokenizer.ggml.model": "llama"}, "tokenizer.ggml.model='llama'"),
        ({"tokenizer.ggml.pre": "qwen2"}, "tokenizer.ggml.pre='qwen2'"),
        ({"tokenizer.ggml.pre": "qwen2"}, "supported: llama-bpe, llama3, llama-v3, falcon3"),
        ({"tokenizer.ggml.pre": 7}, "tokenizer.ggml.pre='7'"),
        ({"tokenizer.ggml.bos_token_id": 300}, "must be a token id below 300"),
    ],
)
def test_what_cannot_be_imported_is_refused(
    tmp_path: Path, metadata: dict[str, Any], words: str
) -> None:
    write_gguf(tmp_path / "m.gguf", tiny(), metadata=metadata)
    with pytest.raises(CheckpointError) as caught:
        import_gguf(tmp_path / "m.gguf", tmp_path / "m")
    assert words in str(caught.value)
    assert "m.gguf" in str(caught.value)
    assert [one.name for one in tmp_path.iterdir()] == ["m.gguf"]


def test_a_missing_tensor_a_type_and_a_full_folder_are_refused(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", tiny(), drop="model.norm.weight")
    with pytest.raises(
        CheckpointError, match=r"lacks tensor 'model\.norm\.weight' of shape \[64\]"
    ):
        import_gguf(tmp_path / "m.gguf", tmp_path / "m")
    write_gguf(tmp_path / "n.gguf", tiny(), type_=Type.Q8_1)
    with pytest.raises(CheckpointError, match="Q8_1 is not imported; imported: F32, F16, Q4_0"):
        import_gguf(tmp_path / "n.gguf", tmp_path / "m")
    (tmp_path / "m").mkdir()
    with pytest.raises(CheckpointError, match="exists already"):
        import_gguf(tmp_path / "n.gguf", tmp_path / "m")
    with pytest.raises(CheckpointError, match="dtype='int8'"):
        import_gguf(tmp_path / "n.gguf", tmp_path / "x", "int8")


def test_nothing_stays_when_writing_fails(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", tiny())

    def fail(done: int, total: int, name: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        import_gguf(tmp_path / "m.gguf", tmp_path / "m", progress=fail)
    assert [one.name for one in tmp_path.iterdir()] == ["m.gguf"]


def test_unknown_frequency_factors_are_refused(tmp_path: Path) -> None:
    rule = LLAMA3 | {"low_freq_factor": 2.0}
    write_gguf(tmp_path / "m.gguf", tiny(rope_scaling=rule, head_dim=64))
    with pytest.raises(CheckpointError, match="no known llama3 rule"):
        import_gguf(tmp_path / "m.gguf", tmp_path / "m")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("gguf") / "m.gguf"
    write_gguf(path, tiny(num_hidden_layers=1))
    return path.read_bytes()


def test_every_truncation_is_refused(tmp_path: Path, whole: bytes) -> None:
    path = tmp_path / "m.gguf"
    for length in [*range(0, 200, 7), *range(200, len(whole), 3001), len(whole) - 33]:
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=r"m\.gguf"):
            read_gguf(path)


def test_counts_that_cannot_be_end_at_once(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    array = struct.pack("<Q1sIIQ", 1, b"k", 9, 4, 2**60)
    for body in (array, struct.pack("<Q", 2**63), struct.pack("<Q1sI", 1, b"k", 99)):
        path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 2**60, 2**60) + body)
        with pytest.raises(CheckpointError):
            read_gguf(path)
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 9, 0, 0))
    with pytest.raises(CheckpointError, match="version 9"):
        read_gguf(path)


@settings(
    max_examples=200,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(st.lists(st.tuples(st.integers(0, 12_000), st.integers(0, 255)), min_size=1, max_size=6))
def test_fuzzed_bytes_give_an_import_or_one_clear_error(
    tmp_path: Path, whole: bytes, flips: list[tuple[int, int]]
) -> None:
    data = bytearray(whole)
    for place, value in flips:
        data[place] = value
    path = tmp_path / "m.gguf"
    path.write_bytes(data)
    out = tmp_path / "m"
    try:
        import_gguf(path, out)
    except CheckpointError:
        return
    for one in out.iterdir():
        one.unlink()
    out.rmdir()
