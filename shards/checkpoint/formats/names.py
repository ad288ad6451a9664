"""Lists of modules in a `quantization_config`: names, parts of names, and patterns.

Knows how the tools that write checkpoints mean such lists; knows nothing of models or forms. The
lists are input that anyone may write, so that only patterns that match fast are taken.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

from arriero.shards.model_config.dense import Fields

PATTERN = "re:"
"""What a pattern begins with, among names."""

_Words = tuple[str, ...]
_MAX_LISTED = 100_000
_MAX_PATTERN = 200
_MAX_STARS = 4
_ATOM = r"(?:[\w\-/]|\\[.dw]|\.|\[[\w\-]+\])"
_SIMPLE = re.compile(rf"\^?(?:{_ATOM}[*+?]?|\((?:\?:)?{_ATOM}+(?:\|{_ATOM}+)*\))*\$?")
"""Letters, `.`, `\\.`, `\\d`, sets, each perhaps repeated, and choices, which are not repeated."""


@dataclass(frozen=True)
class ModuleNames:
    """A list of modules.

    Attributes:
        listed: names and parts of names (whole words between dots, so that "mlp" stands for every
            module of every MLP, and "model.layers.1" for all of that layer), and patterns after
            "re:", which match from the start of a name.
    """

    listed: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.listed)

    def match(self, name: str) -> bool:
        """Whether the list has a module, or what it is part of."""
        by_word, patterns = self._sorted
        words = tuple(name.split("."))
        for first, word in enumerate(words):
            for length, listed in by_word.get(word, {}).items():
                if words[first : first + length] in listed:
                    return True
        return any(pattern.match(name) for pattern in patterns)

    @cached_property
    def _sorted(self) -> tuple[dict[str, dict[int, set[_Words]]], tuple[re.Pattern[str], ...]]:
        """The names' words, by the first of them and by how many they are; the patterns."""
        by_word: dict[str, dict[int, set[_Words]]] = {}
        for one in self.listed:
            if not one.startswith(PATTERN):
                words = tuple(one.split("."))
                by_word.setdefault(words[0], {}).setdefault(len(words), set()).add(words)
        patterns = {one[len(PATTERN) :] for one in self.listed if one.startswith(PATTERN)}
        return by_word, tuple(re.compile(one) for one in sorted(patterns))


def read_names(read: Fields, *fields: str) -> tuple[str, ...]:
    """The list in the first of these fields that is there; empty where none is.

    Raises:
        CheckpointError: no list of names, or a pattern that may take long to match.
    """
    field = next((one for one in fields if read.get(one) is not None), fields[0])
    listed = read.get(field)
    if listed is None:
        return ()
    if isinstance(listed, list) and any(isinstance(one, list) for one in listed):
        listed = [name for one in listed for name in (one if isinstance(one, list) else [one])]
    if not isinstance(listed, list) or len(listed) > _MAX_LISTED:
        raise read.wrong(field, listed, f"a list of at most {_MAX_LISTED} names")
    check_names(read, field, listed)
    return tuple(listed)


def check_names(read: Fields, field: str, listed: Iterable[object]) -> None:
    """Refuse what is no name and no pattern that matches fast.

    Raises:
        CheckpointError: names the field and the entry.
    """
    for one in listed:
        if not isinstance(one, str):
            raise read.wrong(field, one, "names")
        if one.startswith(PATTERN) and not _is_simple(one[len(PATTERN) :]):
            raise read.wrong(
                field,
                one,
                "a pattern of at most 200 letters, `.`, `\\.`, `\\d`, sets, choices in brackets "
                "and four of `*` and `+` (others could take long to match); list names instead",
            )


def _is_simple(pattern: str) -> bool:
    stars = sum(pattern.count(one) for one in "*+?") - pattern.count("(?:")
    fits = len(pattern) <= _MAX_PATTERN and stars <= _MAX_STARS
    if not fits or _SIMPLE.fullmatch(pattern) is None:
        return False
    try:
        re.compile(pattern)
    except re.error:
        return False
    return True
