"""Token ids to text, step by step, in whole characters.

Each token stands for bytes, computed once from `tokenizer.json`. The text of a stream is its bytes
read as UTF-8, so the cost of a token does not grow with the stream. Knows the two byte encodings
in use (GPT-2's byte alphabet; SentencePiece's U+2581 with <0xNN> tokens) and refuses others; knows
nothing of stop strings or requests.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from arriero.shards.errors import CheckpointError

_SPACE = "\u2581"
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """The bytes of each token.

    Attributes:
        pieces: bytes by token id; b"" for an id without a token.
        special: ids that plain text leaves out.
        strip_space: a space at the beginning of the whole text is dropped, because a SentencePiece
            tokenizer adds a space there.
    """

    pieces: tuple[bytes, ...]
    special: frozenset[int]
    strip_space: bool = False

    @classmethod
    def from_spec(cls, spec: Mapping[str, Any]) -> Vocabulary:
        """Read a parsed `tokenizer.json`.

        Raises:
            CheckpointError: the decoder is neither ByteLevel nor ByteFallback.
        """
        kinds = _decoder_kinds(spec.get("decoder"))
        model = spec["model"]
        vocab: dict[str, int] = model["vocab"]
        added: list[dict[str, Any]] = spec.get("added_tokens") or []
        names = {token["content"]: token["id"] for token in added}
        if "ByteLevel" in kinds:
            alphabet = byte_alphabet()
            table = str.maketrans({char: chr(byte) for char, byte in alphabet.items()})
            letters = frozenset(alphabet)

            def piece(token: str) -> bytes:
                if letters.issuperset(token):
                    return token.translate(table).encode("latin-1")
                return token.encode()
        elif "ByteFallback" in kinds:

            def piece(token: str) -> bytes:
                byte = _BYTE.fullmatch(token)
                if byte:
                    return bytes([int(byte[1], 16)])
                return token.replace(_SPACE, " ").encode()
        else:
            raise CheckpointError(
                f"tokenizer.json: `decoder`={sorted(kinds) or None} is not supported; take a "
                "tokenizer with a ByteLevel or ByteFallback decoder"
            )
        pieces = [b""] * (max([*vocab.values(), *names.values()], default=-1) + 1)
        for token, index in vocab.items():
            pieces[index] = piece(token)
        for token, index in names.items():
            pieces[index] = piece(token)
        special = frozenset(token["id"] for token in added if token["special"])
        return cls(tuple(pieces), special, "Strip" in kinds or "Metaspace" in kinds)

    def join(self, tokens: Iterable[int], *, skip_special: bool) -> bytes:
        """Bytes of `tokens`; an id beyond the vocabulary (of a padded head) has no bytes."""
        pieces, special = self.pieces, self.special
        size = len(pieces)
        return b"".join(
            [
                pieces[token]
                for token in tokens
                if 0 <= token < size and not (skip_special and token in special)
            ]
        )


class Detokenizer:
    """The text of a stream of tokens."""

    __slots__ = ("_first", "_pending", "_skip_special", "_vocabulary")

    def __init__(self, vocabulary: Vocabulary, *, skip_special: bool = True) -> None:
        self._vocabulary = vocabulary
        self._skip_special = skip_special
        self._pending = b""  # bytes of an unfinished character
        self._first = vocabulary.strip_space

    def add(self, tokens: Iterable[int], *, final: bool = False) -> str:
        """The text that `tokens` complete; an unfinished character waits for more bytes.

        Args:
            tokens: the next tokens.
            final: no tokens follow; an unfinished character becomes U+FFFD.
        """
        joined = self._pending + self._vocabulary.join(tokens, skip_special=self._skip_special)
        text, used = codecs.utf_8_decode(joined, "replace", final)
        self._pending = joined[used:]
        if self._first and text:
            self._first = False
            text = text.removeprefix(" ")
        return text


def byte_alphabet() -> dict[str, int]:
    """GPT-2's alphabet, a printable character for each byte (Radford et al., 2019)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {
        chr(256 + number): byte for number, byte in enumerate(others)
    }


def _decoder_kinds(decoder: Mapping[str, Any] | None) -> set[str]:
    if decoder is None:
        return set()
    if decoder["type"] == "Sequence":
        return {kind for inner in decoder["decoders"] for kind in _decoder_kinds(inner)}
    return {decoder["type"]}
