"""Conversion of Llama 3's `tokenizer.model` (byte strings and ranks) to tokenizer.json.

Knows Llama 3's text split and special tokens; knows nothing of weights.
"""

from __future__ import annotations

import base64
import binascii
import json
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors

from arriero.shards.checkpoint.gguf_tokenizer import LLAMA3_SPLIT
from arriero.shards.errors import CheckpointError
from arriero.shards.files.bad_file import HEAD_BYTES, explain_head

NUM_SPECIAL = 256
_MAX_BYTES = 50_000_000
_MAX_TOKEN = 1024
_NAMED = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|reserved_special_token_0|>",
    "<|reserved_special_token_1|>",
    "<|finetune_right_pad_id|>",
    "<|reserved_special_token_2|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eom_id|>",
    "<|eot_id|>",
    "<|python_tag|>",
)


def special_tokens() -> list[str]:
    """The 256 special tokens of Llama 3.1, in order of id."""
    reserved = [f"<|reserved_special_token_{i}|>" for i in range(3, 3 + NUM_SPECIAL - len(_NAMED))]
    return [*_NAMED, *reserved]


def convert_tokenizer(source: Path, out: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json into the folder `out`.

    Raises:
        CheckpointError: the file is not a list of base64 byte strings with ranks 0, 1, 2 and so on.
    """
    ranks = _ranks(source)
    names = {token: "".join(_BYTES[byte] for byte in token) for token in ranks}
    specials = special_tokens()
    vocab = {names[token]: rank for token, rank in ranks.items()}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=_merges(ranks, names), ignore_merges=True))
    words = pre_tokenizers.Split(Regex(LLAMA3_SPLIT), behavior="isolated", invert=False)
    plain = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, plain])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, normalized=False) for text in specials])
    begin = specials[0]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=[begin, "$A"],
        pair=[begin, "$A", f"{begin}:1", "$B:1"],
        special_tokens=[(begin, len(vocab))],
    )
    tokenizer.save(str(out / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "bos_token": begin,
        "eos_token": "<|eot_id|>",
    }
    (out / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def _ranks(source: Path) -> dict[bytes, int]:
    data = source.read_bytes()
    if len(data) > _MAX_BYTES:
        raise CheckpointError(
            f"{source}: has more than {_MAX_BYTES} bytes; give Llama 3's tokenizer.model"
        )
    reason = explain_head(data[:HEAD_BYTES], len(data))
    if reason is not None:
        raise CheckpointError(f"{source}: {reason}")
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(data.splitlines()):
        encoded, _, rank = line.partition(b" ")
        try:
            token = base64.b64decode(encoded, validate=True)
        except binascii.Error:
            token = b""
        if not 0 < len(token) <= _MAX_TOKEN or rank != str(number).encode() or token in ranks:
            raise CheckpointError(
                f"{source}: line {number + 1}: {line[:60]!r} is not a new token with rank "
                f"{number}; only Llama 3's list of base64 tokens is supported"
            )
        ranks[token] = number
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing:
        raise CheckpointError(f"{source}: lacks a token for byte {missing[0]}; fetch it again")
    return ranks


def _merges(ranks: dict[bytes, int], names: dict[bytes, str]) -> list[tuple[str, str]]:
    """All pairs of tokens that join to a third token, in order of the third token's rank."""
    merges: list[tuple[str, str]] = []
    for token in ranks:
        pairs = [(token[:i], token[i:]) for i in range(1, len(token))]
        known = [(a, b) for a, b in pairs if a in ranks and b in ranks]
        known.sort(key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))
        merges += [(names[a], names[b]) for a, b in known]
    return merges


def _byte_names() -> list[str]:
    """The printable character that byte-level BPE uses for each byte (Radford et al., 2019)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    shifted = iter(range(0x100, 0x200))
    return [chr(byte) if byte in printable else chr(next(shifted)) for byte in range(256)]


_BYTES = _byte_names()
