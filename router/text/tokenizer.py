"""Text to token ids; a caller's text cannot become a special token.

`tokenizer.json` is used in two ways: a *plain* tokenizer, to which special tokens are text, encodes
callers' texts; a table gives the ids of special tokens, for chat templates alone (or for a caller
with a trusted prompt). Knows the file format of the `tokenizers` library and byte-level BPE; knows
nothing of requests or templates.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tokenizers import Tokenizer as _Backend

from arriero.router.text.detokenizer import Detokenizer, Vocabulary
from arriero.router.text.special_token_guard import SpecialTokenGuard
from arriero.shards.errors import CheckpointError, InvalidRequest

_MARKUP = re.compile(r"<.*>|\[/?[A-Z_]+\]", re.DOTALL)
"""An added token with such a text steers the model even if the file does not say "special"."""


class Tokenizer:
    """The tokenizer of a model; safe to use from several threads at once.

    Args:
        tokenizer_json: bytes of the file.

    Raises:
        CheckpointError: the file cannot be read, or has a decoder that is not supported.
    """

    def __init__(self, tokenizer_json: bytes) -> None:
        try:
            spec: dict[str, Any] = json.loads(tokenizer_json)
            added = [token for token in spec.get("added_tokens") or [] if token["content"]]
            controls = control_tokens(added)
            names = {token["content"] for token in controls}
            # Truncation and padding are for training; a prompt is never cut silently.
            plain = spec | {"truncation": None, "padding": None}
            # All added tokens stay, since the library would renumber the rest; all control tokens
            # become special, so that `encode_special_tokens` reads them as text.
            plain["added_tokens"] = [t | {"special": t["content"] in names} for t in added]
            self._plain = _Backend.from_str(json.dumps(plain))
            self._plain.encode_special_tokens = True
            self.vocabulary = Vocabulary.from_spec(spec)
        except CheckpointError:
            raise
        except Exception as error:  # the library raises bare `Exception`
            raise CheckpointError(
                f"tokenizer.json cannot be read: {error}; download the file again"
            ) from error
        self.control_ids: dict[str, int] = {t["content"]: t["id"] for t in controls}
        self._forbidden = frozenset(self.control_ids.values())
        self._prefix, self._suffix = _around(self._plain)
        self._strip_left = {t["content"] for t in controls if t.get("lstrip")}
        self._strip_right = {t["content"] for t in controls if t.get("rstrip")}
        self.guard = SpecialTokenGuard(self.control_ids)

    @property
    def size(self) -> int:
        """Highest token id plus 1."""
        return len(self.vocabulary.pieces)

    def token_id(self, text: str) -> int | None:
        """Id of the token with the text `text`; None without such a token."""
        index: int | None = self._plain.token_to_id(text)
        return index

    def encode(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        """Ids of a caller's text; special tokens in the text are plain text.

        Args:
            text: any text.
            add_special_tokens: add the tokenizer's own tokens around the text, such as
                <|begin_of_text|>.

        Raises:
            InvalidRequest: the ids have a special token nevertheless (possible with a vocabulary
                whose merges produce a special token).
        """
        (encoding,) = self._plain.encode_batch_fast([text], add_special_tokens=False)
        ids: list[int] = encoding.ids
        if not self._forbidden.isdisjoint(ids):
            name = self._plain.id_to_token(next(i for i in ids if i in self._forbidden))
            raise InvalidRequest(
                "text", f"the text would become the special token {name!r}; put a space into it"
            )
        return self.add_around(ids) if add_special_tokens else ids

    def add_around(self, ids: Sequence[int]) -> list[int]:
        """`ids` with the tokenizer's own tokens around a text."""
        return [*self._prefix, *ids, *self._suffix]

    def encode_pieces(self, pieces: Iterable[tuple[str, bool]]) -> list[int]:
        """Ids of the pieces from `SpecialTokenGuard.split`."""
        ids: list[int] = []
        strip_left = False
        listed = list(pieces)
        for number, (text, special) in enumerate(listed):
            if special:
                ids.append(self.control_ids[text])
                strip_left = text in self._strip_right
                continue
            # A special token may absorb spaces beside it ("lstrip", "rstrip" in its entry).
            if strip_left:
                text = text.lstrip()
            if number + 1 < len(listed) and listed[number + 1][0] in self._strip_left:
                text = text.rstrip()
            strip_left = False
            if text:
                ids += self.encode(text)
        return ids

    def encode_trusted(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        """Ids of a trusted text; special tokens in the text become special tokens."""
        ids = self.encode_pieces(self.guard.split(text, None))
        return self.add_around(ids) if add_special_tokens else ids

    def decode(self, tokens: Iterable[int], *, skip_special: bool) -> str:
        """Text of `tokens`, with U+FFFD for bytes that are not UTF-8."""
        return Detokenizer(self.vocabulary, skip_special=skip_special).add(tokens, final=True)


def control_tokens(added: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The entries of `added_tokens` that steer the model."""
    return [
        token
        for token in added
        if token["content"] and (token["special"] or _MARKUP.fullmatch(token["content"]))
    ]


def _around(backend: _Backend) -> tuple[list[int], list[int]]:
    """Ids that the post-processor puts before and after a text, from a probe."""
    bare = backend.encode("a", add_special_tokens=False).ids
    full = backend.encode("a", add_special_tokens=True).ids
    for at in range(len(full) - len(bare) + 1):
        if full[at : at + len(bare)] == bare:
            return full[:at], full[at + len(bare) :]
    return [], []
