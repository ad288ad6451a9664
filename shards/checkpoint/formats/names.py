"""Lists of modules in a `quantization_config`: names, parts of names, and patterns.

Knows the meaning that checkpoint tools give to the lists; knows nothing of models and forms. The
lists are untrusted input, so only patterns that match fast are accepted.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

from arriero.shards.model_config.fields import Fields

PATTERN = "re:"
"""Prefix of a pattern in a list of names."""

_Words = tuple[str, ...]
_MAX_LISTED = 100_000
_MAX_PATTERN = 200
_MAX_STARS = 4
_ATOM = r"(?:[\w\-/]|\\[.dw]|\.|\[[\w\-]+\])"
_SIMPLE = re.compile(rf"\^?(?:{_ATOM}[*+?]?|\((?:\?:)?{_ATOM}+(?:\|{_ATOM}+)*\))*\$?")
"""Letters, `.`, `\\.`, `\\d`, sets, all with optional repetition; choices without repetition."""


@dataclass(frozen=True)
class ModuleNames:
    """A list of modules.

    Attributes:
        listed: names, parts of names, and patterns. A part consists of whole words between dots:
            "mlp" matches each module of each MLP, "model.layers.1" each module of layer 1. A
            pattern follows "re:" and matches from the start of a name.
    """

    listed: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.listed)

    def match(self, name: str) -> bool:
        """Whether the list contains a module or a parent of the module."""
        by_word, patterns = self._sorted
        words = tuple(name.split("."))
        for first, word in enumerate(words):
            for length, listed in by_word.get(word, {}).items():
                if words[first : first + length] in listed:
                    return True
        return any(pattern.match(name) for pattern in patterns)

    @cached_property
    def _sorted(self) -> tuple[dict[str, dict[int, set[_Words]]], tuple[re.Pattern[str], ...]]:
        """Names as words, by first word and by number of words; and the compiled patterns."""
        by_word: dict[str, dict[int, set[_Words]]] = {}
        for entry in self.listed:
            if not entry.startswith(PATTERN):
                words = tuple(entry.split("."))
                by_word.setdefault(words[0], {}).setdefault(len(words), set()).add(words)
        patterns = {entry[len(PATTERN) :] for entry in self.listed if entry.startswith(PATTERN)}
        return by_word, tuple(re.compile(pattern) for pattern in sorted(patterns))


def read_names(read: Fields, *fields: str) -> tuple[str, ...]:
    """The list in the first of the fields that is set; empty if no field is set.

    Raises:
        CheckpointError: not a list of names, or a pattern that may take long to match.
    """
    field = next((name for name in fields if read.get(name) is not None), fields[0])
    listed = read.get(field)
    if listed is None:
        return ()
    if isinstance(listed, list) and any(isinstance(entry, list) for entry in listed):
        listed = [
            name for entry in listed for name in (entry if isinstance(entry, list) else [entry])
        ]
    if not isinstance(listed, list) or len(listed) > _MAX_LISTED:
        raise read.wrong(field, listed, f"a list of at most {_MAX_LISTED} names")
    check_names(read, field, listed)
    return tuple(listed)


def check_names(read: Fields, field: str, listed: Iterable[object]) -> None:
    """Refuse an entry that is neither a name nor a pattern that matches fast.

    Raises:
        CheckpointError: the message names the field and the entry.
    """
    for entry in listed:
        if not isinstance(entry, str):
            raise read.wrong(field, entry, "a list of names")
        if entry.startswith(PATTERN) and not _is_simple(entry[len(PATTERN) :]):
            raise read.wrong(
                field,
                entry,
                "a pattern of at most 200 letters, `.`, `\\.`, `\\d`, sets, choices in brackets, "
                "and at most four `*` and `+` (a longer one could take long to match); list the "
                "names instead",
            )


def _is_simple(pattern: str) -> bool:
    stars = sum(pattern.count(sign) for sign in "*+?") - pattern.count("(?:")
    fits = len(pattern) <= _MAX_PATTERN and stars <= _MAX_STARS
    if not fits or _SIMPLE.fullmatch(pattern) is None:
        return False
    try:
        re.compile(pattern)
    except re.error:
        return False
    return True
