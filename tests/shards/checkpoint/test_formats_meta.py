"""Meta's shards become the folder that they were made from."""

from __future__ import annotations

import base64
import json
import os
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer

from arriero.cluster import cli
from arriero.shards.checkpoint.meta_pth import convert_meta
from arriero.shards.checkpoint.meta_tokenizer import convert_tokenizer, special_tokens
from arriero.shards.checkpoint.reader import Checkpoint
from arriero.shards.errors import CheckpointError
from arriero.shards.model_config.dense import ModelConfig
from support.models import tiny_llama

META = {
    "self_attn.q_proj": ("attention.wq", 0),
    "self_attn.k_proj": ("attention.wk", 0),
    "self_attn.v_proj": ("attention.wv", 0),
    "self_attn.o_proj": ("attention.wo", 1),
    "mlp.gate_proj": ("feed_forward.w1", 0),
    "mlp.up_proj": ("feed_forward.w3", 0),
    "mlp.down_proj": ("feed_forward.w2", 1),
    "input_layernorm": ("attention_norm", None),
    "post_attention_layernorm": ("ffn_norm", None),
}
TOP = {
    "model.embed_tokens.weight": ("tok_embeddings.weight", 0),
    "model.norm.weight": ("norm.weight", None),
    "lm_head.weight": ("output.weight", 0),
}


def as_meta(model: Checkpoint, out: Path, num_shards: int) -> None:
    """Write a folder of ours the way Meta ships it, key/value heads repeated if need be."""
    config = model.config
    shards: list[dict[str, torch.Tensor]] = [{} for _ in range(num_shards)]
    for name in model.names:
        one = model.tensor(name).clone()
        if name in TOP:
            theirs, dim = TOP[name]
        else:
            layer, part = name.removeprefix("model.layers.").removesuffix(".weight").split(".", 1)
            meta, dim = META[part]
            theirs = f"layers.{layer}.{meta}.weight"
            if part.endswith(("q_proj", "k_proj")):  # halves to interleaved pairs, row by row
                d = config.head_dim
                rows = [
                    h * d + (j % 2) * (d // 2) + j // 2
                    for h in range(one.shape[0] // d)
                    for j in range(d)
                ]
                one = one[rows]
            if part.endswith(("k_proj", "v_proj")) and num_shards > config.num_kv_heads:
                again = num_shards // config.num_kv_heads
                heads = one.view(config.num_kv_heads, config.head_dim, -1)
                one = heads.repeat_interleave(again, 0).flatten(0, 1)
        pieces = [one] * num_shards if dim is None else one.chunk(num_shards, dim)
        for shard, piece in zip(shards, pieces, strict=True):
            shard[theirs] = piece.clone()
    out.mkdir()
    for i, shard in enumerate(shards):
        shard["rope.freqs"] = torch.zeros(4)
        torch.save(shard, out / f"consolidated.{i:02d}.pth")
    params = {
        "dim": config.hidden_size,
        "n_layers": config.num_layers,
        "n_heads": config.num_heads,
        "n_kv_heads": config.num_kv_heads,
        "vocab_size": config.vocab_size,
        "norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope.theta,
        "multiple_of": 32,
        "ffn_dim_multiplier": 1.5,
        "use_scaled_rope": True,
    }
    (out / "params.json").write_text(json.dumps(params))


@pytest.mark.parametrize("num_shards", [1, 2, 4])
@pytest.mark.parametrize("tied", [False, True])
def test_converted_back_to_what_it_was(tmp_path: Path, num_shards: int, tied: bool) -> None:
    tiny_llama(tmp_path / "ours", dtype="bfloat16", tied=tied, rope_theta=500000.0)
    ours = Checkpoint.open(tmp_path / "ours")
    as_meta(ours, tmp_path / "meta", num_shards)
    told: list[int] = []
    convert_meta(tmp_path / "meta", tmp_path / "back", lambda done, total, name: told.append(done))
    back = Checkpoint.open(tmp_path / "back")
    assert back.names == ours.names
    assert told == list(range(1, len(ours.names) + 1))
    for name in ours.names:
        assert torch.equal(back.tensor(name), ours.tensor(name)), name
    assert back.config.rope.scaling == "llama3"
    assert back.config.tie_word_embeddings == tied
    assert not list(tmp_path.glob(".back*"))


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_llama(tmp_path / "ours", dtype="bfloat16")
    as_meta(Checkpoint.open(tmp_path / "ours"), tmp_path / "meta", 2)
    args = ["models", "convert", str(tmp_path / "meta"), str(tmp_path / "back")]
    assert cli.run(args) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "back")
    assert isinstance(ModelConfig.from_folder(tmp_path / "back"), ModelConfig)
    assert cli.run(args) == 5
    assert "exists already" in capsys.readouterr().err


class _Code:
    """What a hostile pickle would hold: a call."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (self.path,)


def test_pickled_code_is_not_run(tmp_path: Path) -> None:
    meta = tmp_path / "meta"
    meta.mkdir()
    torch.save(
        {"tok_embeddings.weight": _Code(str(tmp_path / "ran"))}, meta / "consolidated.00.pth"
    )
    with pytest.raises(CheckpointError, match="not a file of plain tensors"):
        convert_meta(meta, tmp_path / "back")
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "back").exists()


def test_what_cannot_be_converted(tmp_path: Path) -> None:
    tiny_llama(tmp_path / "ours", dtype="bfloat16")
    meta = tmp_path / "meta"
    with pytest.raises(CheckpointError, match="holds no consolidated"):
        convert_meta(tmp_path / "ours", tmp_path / "back")
    as_meta(Checkpoint.open(tmp_path / "ours"), meta, 2)
    shard = torch.load(meta / "consolidated.01.pth", weights_only=True)
    torch.save(
        shard | {"layers.1.attention.wq.weight": torch.zeros(3, 3)}, meta / "consolidated.01.pth"
    )
    with pytest.raises(CheckpointError, match=r"layers\.1\.attention\.wq.* does not make"):
        convert_meta(meta, tmp_path / "back")
    del shard["layers.1.attention.wq.weight"]
    torch.save(shard, meta / "consolidated.01.pth")
    with pytest.raises(CheckpointError, match=r"consolidated\.01\.pth: lacks"):
        convert_meta(meta, tmp_path / "back")
    (meta / "consolidated.01.pth").write_bytes(b"PK\x03\x04 nonsense")
    with pytest.raises(CheckpointError, match="not a file of plain tensors"):
        convert_meta(meta, tmp_path / "back")
    (meta / "consolidated.01.pth").rename(meta / "consolidated.02.pth")
    with pytest.raises(CheckpointError, match="holds 2 shards, but not"):
        convert_meta(meta, tmp_path / "back")
    assert not (tmp_path / "back").exists()


def ranks_file(path: Path, words: list[bytes]) -> Path:
    tokens = [bytes([i]) for i in range(256)]
    for word in words:
        for end in range(2, len(word) + 1):
            if word[:end] not in tokens:
                tokens.append(word[:end])
    lines = (base64.b64encode(one) + b" " + str(i).encode() for i, one in enumerate(tokens))
    path.write_bytes(b"\n".join(lines) + b"\n")
    return path


def test_the_tokenizer_joins_by_rank(tmp_path: Path) -> None:
    source = ranks_file(tmp_path / "tokenizer.model", [b"hello", b" world", "ñandú".encode()])
    convert_tokenizer(source, tmp_path)
    made = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    lines = source.read_text().splitlines()
    rank_of = {base64.b64decode(line.split()[0]): int(line.split()[1]) for line in lines}
    begin = len(rank_of)
    got = made.encode("hello world ñandú 1234<|eot_id|>")
    want = [begin, rank_of[b"hello"], rank_of[b" world"], rank_of[b" "], rank_of["ñandú".encode()]]
    digits = [rank_of[bytes([one])] for one in b"1234"]
    eot = begin + special_tokens().index("<|eot_id|>")
    # no token joins a blank to what follows it here, so that " ñandú" is letters one by one
    assert got.ids[:3] == want[:3]
    assert got.ids[-6:] == [rank_of[b" "], *digits, eot]
    assert made.decode(got.ids) == "hello world ñandú 1234"
    specials = special_tokens()
    assert len(specials) == len(set(specials)) == 256
    assert [specials.index(one) for one in ("<|eot_id|>", "<|python_tag|>")] == [9, 10]
    assert specials[-1] == "<|reserved_special_token_247|>"


@pytest.mark.parametrize(
    "text", [b"\x00\x01", b"aGk= 5\n", b"!!! 0\n", b"aGk= 0\naGk= 1\n", b"aGk= 0\n"]
)
def test_tokenizers_that_are_not_lists_of_ranks(tmp_path: Path, text: bytes) -> None:
    (tmp_path / "tokenizer.model").write_bytes(text)
    with pytest.raises(CheckpointError, match=r"tokenizer\.model"):
        convert_tokenizer(tmp_path / "tokenizer.model", tmp_path)
