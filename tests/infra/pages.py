"""The commands that README.md, CONTRIBUTING.md, docs/ and infra/ show.

Knows Markdown and shell words; knows nothing of what a command does.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "infra").rglob("*.md")),
]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
ASSIGNMENT = re.compile(r"^[A-Z_]+=")
SEPARATORS = {"|", "&&", "||", ";", "&"}


def blocks(page: Path) -> Iterator[str]:
    """The shell of a page's fenced blocks: `sh` whole, `console` the lines after the prompt."""
    yield from blocks_in(page.read_text())


def blocks_in(page: str) -> Iterator[str]:
    """`blocks` of a page's text."""
    for kind, text in FENCE.findall(page):
        if kind == "sh":
            yield text
        elif kind == "console":
            lines = re.findall(r"^\$ ((?:.*\\\n)*.*)", text, re.MULTILINE)
            yield "\n".join(lines)


def commands(page: Path) -> Iterator[list[str]]:
    """Each command of a page in words: of the blocks, and in backticks in the prose."""
    yield from commands_in(page.read_text())


def commands_in(page: str) -> Iterator[list[str]]:
    """`commands` of a page's text."""
    prose = FENCE.sub("", page)
    inline = [text.replace("\n", " ") for text in re.findall(r"`([^`]+)`", prose)]
    starts = ("arriero ", "make ", "kubectl ", "infra/")
    for text in [*blocks_in(page), *(text for text in inline if text.startswith(starts))]:
        for line in re.sub(r"\\\s*\n\s*", " ", text).splitlines():
            words: list[str] = []
            for word in [*shlex.split(line, comments=True), ";"]:
                if word not in SEPARATORS:
                    words.append(word)
                elif words:
                    yield words
                    words = []


def program(words: list[str]) -> list[str]:
    """A command without the environment before it, and without `kubectl exec … --`."""
    while words and (ASSIGNMENT.match(words[0]) or words[0] in ("env", "sudo")):
        words = words[1:]
    if words[:1] == ["kubectl"] and "--" in words:
        return program(words[words.index("--") + 1 :])
    return words


def of(page: Path, *names: str) -> list[list[str]]:
    """The commands of a page that run one of these programs."""
    found = (program(words) for words in commands(page))
    return [words for words in found if words and words[0] in names]
