"""Output of the commands: results on stdout, progress on stderr.

Progress is a changing line on a terminal, and plain lines elsewhere. Knows the two streams; knows
nothing of deployments.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

ERR = Console(stderr=True, highlight=False)
OUT = Console(highlight=False)
_PERCENT = re.compile(r" ?\d+ ?%.*")  # a percentage and the rest: bytes, rate, time left


@contextmanager
def spinner() -> Iterator[Callable[[str], None]]:
    """Gives `show(text)`, to call with the current step."""
    if not ERR.is_terminal:
        shown: set[str] = set()

        def show_once(text: str) -> None:
            step = _PERCENT.sub("", text)
            if step not in shown:
                shown.add(step)
                ERR.print(step, markup=False, soft_wrap=True)

        yield show_once
        return
    with ERR.status("") as status:
        yield lambda text: status.update(text)


@contextmanager
def bar(title: str) -> Iterator[Callable[[int, int, str], None]]:
    """Gives `advance(done, total, name)`, to call at each step of a progress bar."""
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
