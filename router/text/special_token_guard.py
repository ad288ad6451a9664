"""Marks that keep a caller's text from posing as special tokens in a rendered template.

A chat template joins its own special tokens and the caller's text into a single string. To tell
both apart afterwards, the guard puts a *mark* into the caller's text wherever a special token is,
or could form once more text follows: a private-use character after the first character of the
possible token. Templates trim, join and search as usual, since a mark is neither space nor ASCII.
The rendered text is split at special tokens without a mark; then the marks are removed, so that
the caller's text is exact again.

Knows strings; knows nothing of templates or vocabularies. The guard cannot protect against a
template that removes characters from the middle of a text, nor against a template that writes the
first half of a special token and leaves the second half to the caller; because of the latter, roles
come from a fixed list.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from arriero.shards.errors import InvalidRequest

_CANDIDATES = range(0xE000, 0xF900)
"""The private-use area of Unicode's basic plane; its characters have no fixed meaning."""


class SpecialTokenGuard:
    """Marks a caller's text, so that the text cannot become a special token.

    Args:
        controls: texts of the protected tokens, none empty.
    """

    def __init__(self, controls: Iterable[str]) -> None:
        texts = sorted(set(controls), key=len, reverse=True)
        self._texts = frozenset(texts)
        self._firsts = frozenset(text[0] for text in texts)
        self._starts = {text[:size] for text in texts for size in range(1, len(text))}
        self._longest = max(map(len, texts), default=0)
        either = "|".join(map(re.escape, texts)) or "(?!)"
        # A look-ahead, so that overlapping tokens match at each of their beginnings.
        self._beginning = re.compile(f"(?=(?:{either}))(.)", re.DOTALL)
        self._token = re.compile(either)

    def choose(self, texts: Iterable[str]) -> str:
        """A mark that occurs in none of `texts`.

        Raises:
            InvalidRequest: the texts use all private-use characters.
        """
        used = {char for text in texts if not text.isascii() for char in set(text)}
        for point in _CANDIDATES:
            if chr(point) not in used:
                return chr(point)
        raise InvalidRequest(
            "messages",
            "`messages` uses all 6400 private-use characters (U+E000 to U+F8FF); leave at least "
            "one out",
        )

    def mark(self, text: str, mark: str) -> str:
        """`text` with `mark` in each special token within `text` or beginning at the end."""
        if self._firsts.isdisjoint(text):
            return text
        body = text.rstrip()  # a template may trim the text, then append the rest of a token
        for start in range(len(body) - 1, max(-1, len(body) - self._longest), -1):
            if body[start:] in self._starts:
                text = text[: start + 1] + mark + text[start + 1 :]
        return self._beginning.sub(lambda match: match[1] + mark, text)

    def mark_all(self, value: Any, mark: str) -> Any:  # noqa: ANN401
        """`value` with all strings marked, within lists and mappings too."""
        if isinstance(value, str):
            return self.mark(value, mark)
        if isinstance(value, Mapping):
            return {self.mark(str(k), mark): self.mark_all(v, mark) for k, v in value.items()}
        if isinstance(value, list | tuple):
            return [self.mark_all(v, mark) for v in value]
        return value

    def split(self, rendered: str, mark: str | None) -> Iterator[tuple[str, bool]]:
        """Pieces of a rendered template without marks: text, and whether it is a special token."""
        at = 0
        for match in self._token.finditer(rendered):
            start, end = match.span()
            if mark and end - start == 1 and rendered[end : end + 1] == mark:
                continue  # the mark follows a token of a single character
            if start > at:
                yield _clean(rendered[at:start], mark), False
            yield match[0], True
            at = end
        if at < len(rendered):
            yield _clean(rendered[at:], mark), False


def strings(value: Any) -> Iterator[str]:  # noqa: ANN401
    """All strings within `value`, keys of mappings included."""
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
