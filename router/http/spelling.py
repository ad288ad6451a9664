"""How single tokens are spelled in log-probabilities, and where each one's text begins.

A token may be a part of a character, which has no spelling as text: it is given by its bytes, so
that no two tokens of a position look alike. Knows tokens' bytes; knows nothing of JSON shapes.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from arriero.router.text.detokenizer import Detokenizer, Vocabulary


def token_bytes(vocabulary: Vocabulary, token: int) -> bytes:
    """A token's bytes; none for an id past the tokenizer's (a model's vocabulary may be padded)."""
    pieces = vocabulary.pieces
    return pieces[token] if token < len(pieces) else b""


def spell(vocabulary: Vocabulary, token: int) -> str:
    r"""A token's text; `bytes:\xf0\x9f` where its bytes are not whole characters."""
    piece = token_bytes(vocabulary, token)
    try:
        return piece.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in piece)


def spell_apart(vocabulary: Vocabulary, tokens: Sequence[int]) -> list[str]:
    """The spellings of several tokens, no two alike: `token_id:7` for one spelled as another is."""
    spelled: dict[str, int] = {}
    for token in tokens:
        text = spell(vocabulary, token)
        spelled[f"token_id:{token}" if text in spelled else text] = token
    return list(spelled)


class TextOffsets:
    """Where in the text of a stream each of its tokens begins, in characters.

    A token that goes on with a character begins where that character does. One whose text is left
    out (special tokens) takes no room.

    Args:
        vocabulary: the tokens' bytes.
        skip_special: special tokens are left out of the text.
        begun: characters that go before the first token.
    """

    def __init__(self, vocabulary: Vocabulary, *, skip_special: bool, begun: int = 0) -> None:
        self._vocabulary = vocabulary
        self._detokenizer = Detokenizer(vocabulary, skip_special=skip_special)
        self._skip_special = skip_special
        self._size = begun
        self._pending = b""  # the beginning of a character

    def add(self, token: int) -> int:
        """Where the next token begins."""
        piece = self._vocabulary.join((token,), skip_special=self._skip_special)
        offset = self._size
        if piece and self._pending and not _goes_on(self._pending, piece[:1]):
            offset += 1  # what was begun stays unfinished and is shown as one U+FFFD
        joined = self._pending + piece
        self._pending = joined[codecs.utf_8_decode(joined, "replace", False)[1] :]
        self._size += len(self._detokenizer.add((token,)))
        return offset


def _goes_on(begun: bytes, byte: bytes) -> bool:
    try:
        codecs.utf_8_decode(begun + byte, "strict", False)
    except UnicodeDecodeError:
        return False
    return True
