"""`arriero kv`: what the groups' KV caches hold, and changing that."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Group, RenderableType
from rich.table import Table

from arriero.cluster.commands.operations import AsJson, admin, plain
from arriero.cluster.commands.options import StateDir
from arriero.cluster.commands.terminal import OUT
from arriero.shards.errors import GroupFailed, InvalidRequest

if TYPE_CHECKING:
    from arriero.cluster.control.admin_client import AdminClient
    from arriero.router.proto.arriero.v1 import admin_pb2 as pb

app = typer.Typer(help="Look into the KV caches, and change what they hold.", no_args_is_help=True)
Name = Annotated[str, typer.Option("--group", help="A group, seat or model; none for all groups.")]
Raw = Annotated[
    bool, typer.Option("--raw", help="Text as prompts begin with it, not a system prompt.")
]
WARM_BATCH = 4
"""Prompts of one call, so that none runs into its time limit."""


@app.command("stats")
def stats(name: Name = "", as_json: AsJson = False, state_dir: StateDir = None) -> None:
    """Show tiers, tenants, pins and copies of each group."""
    with admin(state_dir) as client:
        _show(_ask(client, name, "stats"), as_json)


@app.command("top")
def top(
    name: Name = "",
    period_s: Annotated[float, typer.Option(min=0.2, help="Seconds between two looks.")] = 1.0,
    count: Annotated[int, typer.Option(min=0, help="Looks; 0 goes on until Ctrl-C.")] = 0,
    as_json: AsJson = False,
    state_dir: StateDir = None,
) -> None:
    """Show hits, tiers and copies per second as they change."""
    from rich.live import Live

    if as_json:
        with admin(state_dir) as client:
            for _ in itertools.repeat(None) if not count else range(count):
                groups = [plain(one) for one in _ask(client, name, "stats")]
                print(json.dumps({"at": time.time(), "groups": groups}), flush=True)
                time.sleep(period_s)
        return
    with admin(state_dir) as client, Live(console=OUT, auto_refresh=False) as live:
        before: dict[str, pb.KvGroup] = {}
        looks, then = 0, time.monotonic()
        while True:
            found, now = _ask(client, name, "stats"), time.monotonic()
            live.update(_rates(before, found, now - then), refresh=True)
            before, then, looks = {one.group: one for one in found}, now, looks + 1
            if looks == count:
                return
            time.sleep(period_s)


@app.command("flush")
def flush(name: Name = "", as_json: AsJson = False, state_dir: StateDir = None) -> None:
    """Forget every block that nothing runs on, in every tier but the shared store."""
    with admin(state_dir) as client:
        _changed(_ask(client, name, "flush"), "blocks flushed", as_json)


@app.command("warm")
def warm(
    file: Annotated[
        Path, typer.Argument(help="A prompt a line; a line that is a JSON string is one too.")
    ],
    name: Name = "",
    raw: Raw = False,
    as_json: AsJson = False,
    state_dir: StateDir = None,
) -> None:
    """Compute prompts, so that their blocks are found by the requests to come."""
    prompts = list(_prompts(file))
    found: list[pb.KvGroup] = []
    with admin(state_dir) as client:
        for start in range(0, len(prompts), WARM_BATCH):
            batch = prompts[start : start + WARM_BATCH]
            done = {one.group: one.changed for one in found}
            found = _ask(client, name, "warm", texts=batch, raw=raw)
            for one in found:
                one.changed += done.get(one.group, 0)
    _changed(found, f"tokens of {len(prompts)} prompts warmed", as_json)


@app.command("pin")
def pin(
    text: Annotated[str, typer.Argument(help="A system prompt; @FILE reads it from a file.")],
    pin_name: Annotated[str, typer.Option("--name", help="To unpin it by.")],
    name: Name = "",
    raw: Raw = False,
    as_json: AsJson = False,
    state_dir: StateDir = None,
) -> None:
    """Compute a prefix and keep its full blocks on the device."""
    if text.startswith("@"):
        text = Path(text[1:]).read_text(encoding="utf-8")
    with admin(state_dir) as client:
        found = _ask(client, name, "pin", texts=[text], raw=raw, pin=pin_name)
    _changed(found, f"tokens pinned as {pin_name}", as_json)


@app.command("unpin")
def unpin(
    pin_name: Annotated[str, typer.Argument(help="The name it was pinned by.")],
    name: Name = "",
    as_json: AsJson = False,
    state_dir: StateDir = None,
) -> None:
    """Let go of a pinned prefix."""
    with admin(state_dir) as client:
        _show(_ask(client, name, "unpin", pin=pin_name), as_json)


def _ask(
    client: AdminClient,
    name: str,
    action: str,
    texts: Sequence[str] = (),
    *,
    raw: bool = False,
    pin: str = "",
) -> list[pb.KvGroup]:
    """Ask all the groups that are meant.

    Raises:
        GroupFailed: one of them did not do it; names it and says why.
    """
    from arriero.router.proto.arriero.v1 import admin_pb2 as pb

    request = pb.KvRequest(name=name, action=action, texts=texts, raw=raw, pin=pin)
    found = client.kv(request)
    failed = [f"{one.group}: {one.error}" for one in found if one.error]
    if failed:
        raise GroupFailed("; ".join(failed))
    return found


def _prompts(file: Path) -> Iterator[str]:
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        line = line.strip()
        if not line:
            continue
        if line.startswith('"'):
            try:
                line = json.loads(line)
            except ValueError as error:
                raise InvalidRequest("file", f"{file}:{number}: {error}") from None
        yield line


def _changed(found: list[pb.KvGroup], what: str, as_json: bool) -> None:
    if as_json:
        print(json.dumps([plain(one) for one in found]))
        return
    for one in found:
        OUT.print(f"{one.group}: {one.changed} {what}", markup=False, soft_wrap=True)


def _show(found: list[pb.KvGroup], as_json: bool) -> None:
    if as_json:
        print(json.dumps([plain(one) for one in found]))
    else:
        OUT.print(Group(*(part for one in found for part in _tables(one))))


def _tables(one: pb.KvGroup) -> list[RenderableType]:
    tiers = Table(title=one.group, title_justify="left", box=None)
    for name in ("tier", "blocks", "of"):
        tiers.add_column(name, justify="left" if name == "tier" else "right")
    for tier in one.tiers:
        tiers.add_row(tier.tier, f"{tier.used:,}", f"{tier.total:,}" if tier.total else "-")
    tenants = Table(box=None)
    for name in ("tenant", "prompt tokens", "cached", "host blocks", "disk blocks"):
        tenants.add_column(name, justify="left" if name == "tenant" else "right")
    for who in one.tenants:
        tenants.add_row(
            who.tenant or "-",
            f"{who.prompt_tokens:,}",
            _share(who.cached_tokens, who.prompt_tokens),
            f"{who.host_blocks:,}",
            f"{who.disk_blocks:,}",
        )
    pins = ", ".join(f"{pin.name} ({pin.tokens} tokens)" for pin in one.pins)
    copies = f"copies: {one.loaded:,} up, {one.saved:,} down, {one.failed:,} failed"
    return [tiers, tenants, copies + (f"; pinned: {pins}" if pins else "")]


def _rates(
    before: dict[str, pb.KvGroup], found: list[pb.KvGroup], elapsed_s: float
) -> RenderableType:
    table = Table("group", expand=True)
    for name in ("device", "host", "disk", "cached", "up/s", "down/s"):
        table.add_column(name, justify="right")
    for one in found:
        old = before.get(one.group)
        used = {t.tier: _share(t.used, t.total) for t in one.tiers}
        asked = sum(t.prompt_tokens for t in one.tenants)
        hits = sum(t.cached_tokens for t in one.tenants)
        up, down = (
            (now - then) / elapsed_s if old is not None and elapsed_s else 0.0
            for now, then in (
                (one.loaded, old.loaded if old else 0),
                (one.saved, old.saved if old else 0),
            )
        )
        sizes = [used.get(tier, "-") for tier in ("device", "host", "disk")]
        table.add_row(one.group, *sizes, _share(hits, asked), f"{up:.1f}", f"{down:.1f}")
    return table


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.0%}" if whole else "-"
