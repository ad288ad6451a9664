"""Marks that keep a caller's text from posing as special tokens in a rendered template.

A chat template glues its own special tokens and the caller's text into one string. To tell them
apart afterwards, every place in the caller's text where a special token stands, or could come to
stand once more text is glued on, gets a *mark*: one private-use character after the first
character of the would-be token. Templates trim, join and search as before, since a mark is
neither space nor ASCII; what they render is split at unmarked special tokens, and then the marks
are taken out again, which restores the caller's text exactly.

Knows strings; knows nothing of templates or vocabularies. What it cannot see is a template that
takes characters out of the middle of a text, or that writes the first half of a special token
itself and leaves the second half to the caller; for the latter, roles come from a fixed list.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from arriero.shards.errors import InvalidRequest

_CANDIDATES = range(0xE000, 0xF900)
"""The private-use area of Unicode's basic plane, whose characters have no meaning of their own."""


class SpecialTokenGuard:
    """Marks text against a set of special tokens.

    Args:
        controls: texts of the tokens that must not be forged, none empty.
    """

    def __init__(self, controls: Iterable[str]) -> None:
        texts = sorted(set(controls), key=len, reverse=True)
        self._texts = frozenset(texts)
        self._firsts = frozenset(text[0] for text in texts)
        self._starts = {text[:size] for text in texts for size in range(1, len(text))}
        self._longest = max(map(len, texts), default=0)
        either = "|".join(map(re.escape, texts)) or "(?!)"
        # A look-ahead, so that tokens which overlap are found at each of their beginnings.
        self._beginning = re.compile(f"(?=(?:{either}))(.)", re.DOTALL)
        self._token = re.compile(either)

    def choose(self, texts: Iterable[str]) -> str:
        """A mark that occurs in none of `texts`.

        Raises:
            InvalidRequest: every private-use character is taken.
        """
        used = {char for text in texts if not text.isascii() for char in set(text)}
        for point in _CANDIDATES:
            if chr(point) not in used:
                return chr(point)
        raise InvalidRequest(
            "messages", "the text uses all 6400 private-use characters of Unicode; leave one out"
        )

    def mark(self, text: str, mark: str) -> str:
        """`text` with `mark` in every special token that stands in it or may begin at its end."""
        if self._firsts.isdisjoint(text):
            return text
        body = text.rstrip()  # a template may trim, and glue the rest of a token to what is left
        for start in range(len(body) - 1, max(-1, len(body) - self._longest), -1):
            if body[start:] in self._starts:
                text = text[: start + 1] + mark + text[start + 1 :]
        return self._beginning.sub(lambda found: found[1] + mark, text)

    def mark_all(self, value: Any, mark: str) -> Any:  # noqa: ANN401
        """`value` with every string in its lists and mappings marked."""
        if isinstance(value, str):
            return self.mark(value, mark)
        if isinstance(value, Mapping):
            return {self.mark(str(k), mark): self.mark_all(v, mark) for k, v in value.items()}
        if isinstance(value, list | tuple):
            return [self.mark_all(v, mark) for v in value]
        return value

    def split(self, rendered: str, mark: str | None) -> Iterator[tuple[str, bool]]:
        """The pieces of a rendered template, marks taken out: (text, is it a special token)."""
        at = 0
        for found in self._token.finditer(rendered):
            start, end = found.span()
            if mark and end - start == 1 and rendered[end : end + 1] == mark:
                continue  # a token of one character cannot be broken from inside
            if start > at:
                yield _clean(rendered[at:start], mark), False
            yield found[0], True
            at = end
        if at < len(rendered):
            yield _clean(rendered[at:], mark), False


def strings(value: Any) -> Iterator[str]:  # noqa: ANN401
    """Every string within `value`, keys of mappings among them."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield str(key)
            yield from strings(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from strings(item)


def _clean(text: str, mark: str | None) -> str:
    return text.replace(mark, "") if mark else text
