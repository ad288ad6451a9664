"""`arriero top`: groups, rates, KV blocks and queues, live.

Knows Admin's status and the table; knows nothing of the groups' engines.
"""

from __future__ import annotations

import itertools
import json
import time
from typing import TYPE_CHECKING

import typer
from rich.box import HEAVY_HEAD
from rich.console import Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from arriero.cluster.commands.operations import AsJson, admin, plain
from arriero.cluster.commands.options import StateDir
from arriero.cluster.commands.terminal import OUT
from arriero.cluster.commands.views import accepted_length, queue

if TYPE_CHECKING:
    from arriero.cluster.control.admin_client import AdminClient
    from arriero.router.proto.arriero.v1 import admin_pb2 as pb

_WIDE = 100
"""Columns of a terminal from which the table has layouts and bars."""


def add_to(app: typer.Typer) -> None:
    """Add the command to `app`."""
    app.command("top")(top)


def top(
    period_s: float = typer.Option(1.0, min=0.2, help="Seconds between two updates."),
    count: int = typer.Option(0, min=0, help="Number of updates; 0 for no end (Ctrl-C)."),
    as_json: AsJson = False,
    state_dir: StateDir = None,
) -> None:
    """Show groups, slices, tokens per second, KV blocks and queues, live."""
    with admin(state_dir) as client:
        if as_json:
            for _ in itertools.repeat(None) if not count else range(count):
                print(json.dumps({"at": time.time(), **plain(client.status())}), flush=True)
                time.sleep(period_s)
            return
        _show(client, period_s, count)


def _show(client: AdminClient, period_s: float, count: int) -> None:
    with Live(console=OUT, auto_refresh=False) as live:
        before: tuple[float, pb.Status] | None = None
        updates = 0
        while True:
            now = time.monotonic(), client.status()
            live.update(view(before, now, OUT.width), refresh=True)
            before, updates = now, updates + 1
            if updates == count:
                return
            time.sleep(period_s)


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.0%}" if whole else ""


def view(
    before: tuple[float, pb.Status] | None, now: tuple[float, pb.Status], width: int = 120
) -> RenderableType:
    """A table of the groups; rates are differences between two updates.

    Args:
        before: seconds and status of the update before; None for the first update.
        now: seconds and status of this update.
        width: columns of the terminal; below 100 the table leaves out layouts and bars.
    """
    elapsed_s = 0.0 if before is None else now[0] - before[0]
    old = {} if before is None else {group.id: group for group in before[1].groups}
    table = Table(box=None if width < _WIDE else HEAVY_HEAD, expand=width >= _WIDE, padding=(0, 1))
    table.add_column("group", overflow="fold")
    table.add_column("phase", no_wrap=True)
    if width >= _WIDE:
        table.add_column("slices")
    drafting = any(group.drafts for group in now[1].groups)
    drafts = ("drafts",) if drafting else ()
    for name in ("run", "wait", "KV", "steps/s", "tok/s", "prompt/s", "cached", *drafts):
        table.add_column(name, justify="right", no_wrap=True)
    total = 0.0
    for group in now[1].groups:
        last = old.get(group.id)

        def rate(name: str, group: pb.GroupStatus = group, last: object = last) -> float:
            if last is None or not elapsed_s:
                return 0.0
            return float(getattr(group, name) - getattr(last, name)) / elapsed_s

        total += rate("output_tokens")
        cached = group.cached_tokens / group.prompt_tokens if group.prompt_tokens else 0.0
        bar = ProgressBar(total=max(group.blocks_total, 1), completed=group.blocks_used, width=12)
        table.add_row(
            group.id or group.seat,
            group.phase,
            *([f"{len(group.slice_pids)} ({group.layout})"] if width >= _WIDE else []),
            str(group.running),
            str(group.waiting),
            bar if width >= _WIDE else _share(group.blocks_used, group.blocks_total),
            f"{rate('steps'):.1f}",
            f"{rate('output_tokens'):.1f}",
            f"{rate('prompt_tokens'):.1f}",
            f"{cached:.0%}",
            *([accepted_length(group)] if drafting else ()),
        )
    waiting = sum(group.waiting for group in now[1].groups)
    running = sum(group.running for group in now[1].groups)
    head = f"{total:.1f} tokens/s, {running} running, {waiting} waiting"
    head += "".join(
        f"; {model.model}: {queue(model)[2:]}" for model in now[1].models if model.queued
    )
    return Group(Text(head, style="bold"), table)
