"""Spellings of single tokens in log-probabilities, and the text offset of each token.

A token may be a part of a character, which has no text; the spelling then shows the bytes, so no
two tokens of a position look alike. Knows the bytes of tokens; knows nothing of streams.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import Any

from arriero.router.proto.arriero.v1 import inference_pb2 as pb
from arriero.router.text.detokenizer import Detokenizer, Vocabulary

Json = dict[str, Any]


def token_bytes(vocabulary: Vocabulary, token: int) -> bytes:
    """Bytes of a token; b"" for an id that pads the model's vocabulary."""
    pieces = vocabulary.pieces
    return pieces[token] if token < len(pieces) else b""


def spell(vocabulary: Vocabulary, token: int) -> str:
    r"""Text of a token; `bytes:\xf0\x9f` for bytes that are no whole characters."""
    piece = token_bytes(vocabulary, token)
    try:
        return piece.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in piece)


def spell_id(token: int) -> str:
    """A token by its id, as vLLM spells it."""
    return f"token_id:{token}"


def logprob_json(vocabulary: Vocabulary, row: pb.PositionLogprobs, *, as_ids: bool = False) -> Json:
    """The log-probabilities of a position in the JSON of the OpenAI APIs.

    Args:
        vocabulary: bytes of the tokens.
        row: of the position.
        as_ids: spell tokens by their ids.
    """
    top = [_entry(vocabulary, entry, as_ids) for entry in row.top]
    return _entry(vocabulary, row.chosen, as_ids) | {"top_logprobs": top}


def _entry(vocabulary: Vocabulary, entry: pb.TokenLogprob, as_ids: bool) -> Json:
    token = entry.token_id
    return {
        "token": spell_id(token) if as_ids else spell(vocabulary, token),
        "logprob": entry.logprob,
        "bytes": list(token_bytes(vocabulary, entry.token_id)),
    }


def spell_unique(vocabulary: Vocabulary, tokens: Sequence[int]) -> list[str]:
    """Unique spellings of tokens; `token_id:7` for a token with the text of an earlier token."""
    spelled: dict[str, int] = {}
    for token in tokens:
        text = spell(vocabulary, token)
        spelled[spell_id(token) if text in spelled else text] = token
    return list(spelled)


class TextOffsets:
    """Offset of each token in the text of a stream, in characters.

    A token that continues a character has the offset of the character. A token without text
    (special tokens) has no length.

    Args:
        vocabulary: bytes of the tokens.
        skip_special: special tokens are left out of the text.
        num_before: characters before the first token.
    """

    def __init__(self, vocabulary: Vocabulary, *, skip_special: bool, num_before: int = 0) -> None:
        self._vocabulary = vocabulary
        self._detokenizer = Detokenizer(vocabulary, skip_special=skip_special)
        self._skip_special = skip_special
        self._size = num_before
        self._pending = b""  # first bytes of an unfinished character

    def add(self, token: int) -> int:
        """Add a token; returns its offset."""
        piece = self._vocabulary.join((token,), skip_special=self._skip_special)
        offset = self._size
        if piece and self._pending and not _continues(self._pending, piece[:1]):
            offset += 1  # the pending character stays unfinished and shows as U+FFFD
        joined = self._pending + piece
        self._pending = joined[codecs.utf_8_decode(joined, "replace", False)[1] :]
        self._size += len(self._detokenizer.add((token,)))
        return offset


def _continues(pending: bytes, byte: bytes) -> bool:
    try:
        codecs.utf_8_decode(pending + byte, "strict", False)
    except UnicodeDecodeError:
        return False
    return True
