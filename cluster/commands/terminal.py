"""What the commands show while they work: a line that changes on a terminal, else plain lines.

Progress goes to stderr, so that stdout holds results alone.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

ERR = Console(stderr=True, highlight=False)
OUT = Console(highlight=False)
_PERCENT = re.compile(r" ?\d+ ?%.*")  # and what follows it: bytes, rate, time left


@contextmanager
def spinner() -> Iterator[Callable[[str], None]]:
    """Gives `say(text)`, which shows what is waited for."""
    if not ERR.is_terminal:
        said: set[str] = set()

        def say_once(text: str) -> None:
            what = _PERCENT.sub("", text)
            if what not in said:
                said.add(what)
                ERR.print(what, markup=False, soft_wrap=True)

        yield say_once
        return
    with ERR.status("") as status:
        yield lambda text: status.update(text)


@contextmanager
def bar(title: str) -> Iterator[Callable[[int, int, str], None]]:
    """Gives `advance(done, total, name)`, which moves a progress bar."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[item]}"),
    )
    with Progress(*columns, console=ERR, transient=ERR.is_terminal) as progress:
        task = progress.add_task(title, total=None, item="")

        def advance(done: int, total: int, name: str) -> None:
            progress.update(task, completed=done, total=total, item=name)

        yield advance
