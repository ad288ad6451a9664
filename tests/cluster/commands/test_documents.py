"""`docs/cli.md` names each command of `arriero`, its flags, and each exit code."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import typer

from arriero.cluster import cli

if TYPE_CHECKING:
    from click import Command

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs" / "cli.md").read_text()


def commands(command: Command, name: str) -> Iterator[tuple[str, Command]]:
    """Each command that can be run, with its whole name."""
    inner: dict[str, Command] = getattr(command, "commands", {})
    if not inner:
        yield name, command
    for word, part in inner.items():
        yield from commands(part, f"{name} {word}")


COMMANDS = dict(commands(typer.main.get_command(cli.app), "arriero"))


def section(name: str) -> str:
    """What the page says below the heading of a command."""
    parts = re.split(r"^### (.+)$", PAGE, flags=re.MULTILINE)
    by_heading = dict(zip(parts[1::2], parts[2::2], strict=True))
    headings = [heading for heading in by_heading if f"`{name}" in heading]
    exact = [text for text in headings if re.search(rf"`{name}(?![\w-]| [a-z-]+\b)", text)]
    assert exact, f"docs/cli.md lacks a heading for `{name}`"
    return by_heading[exact[0]]


@pytest.mark.parametrize("name", COMMANDS)
def test_the_page_has_the_command_and_its_flags(name: str) -> None:
    text = section(name)
    flags = [
        flag
        for parameter in COMMANDS[name].params
        for flag in parameter.opts
        if flag.startswith("--") and flag not in ("--help", "--json", "--state-dir")
    ]
    assert not [flag for flag in flags if not re.search(rf"`{flag}[ `]", text)]


def test_the_page_names_every_exit_code() -> None:
    codes = {code for _, code in cli._EXIT_CODES} | {0, 1, 130}
    assert not [code for code in codes if not re.search(rf"^\| {code} \|", PAGE, re.MULTILINE)]


def examples() -> Iterator[str]:
    """Each `arriero` line of the examples in README, `docs/` and `infra/`."""
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "infra").glob("*.md")]
    for page in pages:
        for text in re.findall(r"^```\w+\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL):
            yield from re.findall(r"^(?:\$ )?(arriero [a-z].*)$", text, re.MULTILINE)


@pytest.mark.parametrize("line", sorted(set(examples())))
def test_the_examples_name_commands_and_flags_that_exist(line: str) -> None:
    words = shlex.split(line, comments=True)
    names = [" ".join(words[:count]) for count in (3, 2)]
    name = next((name for name in names if name in COMMANDS), None)
    assert name is not None, "no such command"
    known = {flag for parameter in COMMANDS[name].params for flag in parameter.opts}
    assert not [word for word in words if word.startswith("--") and word not in known]
