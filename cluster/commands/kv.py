"""`arriero kv`: look into the KV caches of the groups, and change the content.

Knows Admin's KV messages and the tables; knows nothing of blocks and tiers themselves.
"""

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

app = typer.Typer(help="Look into the KV caches, and change the content.", no_args_is_help=True)
Name = Annotated[str, typer.Option("--group", help="Group, seat or model; by default all.")]
Raw = Annotated[
    bool, typer.Option("--raw", help="The text is the start of a prompt, not a system prompt.")
]
WARM_BATCH = 4
"""Prompts in a call of Admin; more prompts could exceed the time limit of the call."""


@app.command("stats")
def stats(name: Name = "", as_json: AsJson = False, state_dir: StateDir = None) -> None:
    """Show tiers, tenants, pinned prefixes and copies between tiers of each group."""
    with admin(state_dir) as client:
        _print_groups(_call(client, name, "stats"), as_json)


@app.command("top")
def top(
    name: Name = "",
    period_s: Annotated[float, typer.Option(min=0.2, help="Seconds between two updates.")] = 1.0,
    count: Annotated[int, typer.Option(min=0, help="Number of updates; 0: until Ctrl-C.")] = 0,
    as_json: AsJson = False,
    state_dir: StateDir = None,
) -> None:
    """Show cache hits, tiers and copies per second, live."""
    from rich.live import Live

    if as_json:
        with admin(state_dir) as client:
            for _ in itertools.repeat(None) if not count else range(count):
                groups = [plain(group) for group in _call(client, name, "stats")]
                print(json.dumps({"at": time.time(), "groups": groups}), flush=True)
                time.sleep(period_s)
        return
    with admin(state_dir) as client, Live(console=OUT, auto_refresh=False) as live:
        before: dict[str, pb.KvGroup] = {}
        updates, before_s = 0, time.monotonic()
        while True:
            current, now_s = _call(client, name, "stats"), time.monotonic()
            live.update(_rates(before, current, now_s - before_s), refresh=True)
            before, before_s = {group.group: group for group in current}, now_s
            updates += 1
            if updates == count:
                return
            time.sleep(period_s)


@app.command("flush")
def flush(name: Name = "", as_json: AsJson = False, state_dir: StateDir = None) -> None:
    """Delete all blocks that no running request uses, in all tiers but the shared store."""
    with admin(state_dir) as client:
        _print_changes(_call(client, name, "flush"), "blocks flushed", as_json)


@app.command("warm")
def warm(
    file: Annotated[
        Path, typer.Argument(help="File with a prompt per line, as text or as a JSON string.")
    ],
    name: Name = "",
    raw: Raw = False,
    as_json: AsJson = False,
    state_dir: StateDir = None,
) -> None:
    """Compute prompts now, so that later requests reuse the blocks."""
    prompts = list(_prompts(file))
    groups: list[pb.KvGroup] = []
    with admin(state_dir) as client:
        for start in range(0, len(prompts), WARM_BATCH):
            batch = prompts[start : start + WARM_BATCH]
            num_tokens = {group.group: group.changed for group in groups}
            groups = _call(client, name, "warm", texts=batch, raw=raw)
            for group in groups:
                group.changed += num_tokens.get(group.group, 0)
    _print_changes(groups, f"tokens of {len(prompts)} prompts warmed", as_json)


@app.command("pin")
def pin(
    text: Annotated[str, typer.Argument(help="System prompt; @FILE reads the text from a file.")],
    pin_name: Annotated[str, typer.Option("--name", help="Name of the pin, for `unpin`.")],
    name: Name = "",
    raw: Raw = False,
    as_json: AsJson = False,
    state_dir: StateDir = None,
) -> None:
    """Compute a prefix and keep the full blocks on the device."""
    if text.startswith("@"):
        text = Path(text[1:]).read_text(encoding="utf-8")
    with admin(state_dir) as client:
        groups = _call(client, name, "pin", texts=[text], raw=raw, pin=pin_name)
    _print_changes(groups, f"tokens pinned as {pin_name}", as_json)


@app.command("unpin")
def unpin(
    pin_name: Annotated[str, typer.Argument(help="Name of the pin.")],
    name: Name = "",
    as_json: AsJson = False,
    state_dir: StateDir = None,
) -> None:
    """Release a pinned prefix."""
    with admin(state_dir) as client:
        _print_groups(_call(client, name, "unpin", pin=pin_name), as_json)


def _call(
    client: AdminClient,
    name: str,
    action: str,
    texts: Sequence[str] = (),
    *,
    raw: bool = False,
    pin: str = "",
) -> list[pb.KvGroup]:
    """Call Admin for the groups of `name`; returns the state of each group.

    Raises:
        GroupFailed: a group failed; the text has each failed group and the cause.
    """
    from arriero.router.proto.arriero.v1 import admin_pb2 as pb

    request = pb.KvRequest(name=name, action=action, texts=texts, raw=raw, pin=pin)
    groups = client.kv(request)
    failed = [f"{group.group}: {group.error}" for group in groups if group.error]
    if failed:
        raise GroupFailed("; ".join(failed))
    return groups


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


def _print_changes(groups: list[pb.KvGroup], change: str, as_json: bool) -> None:
    if as_json:
        print(json.dumps([plain(group) for group in groups]))
        return
    for group in groups:
        OUT.print(f"{group.group}: {group.changed} {change}", markup=False, soft_wrap=True)


def _print_groups(groups: list[pb.KvGroup], as_json: bool) -> None:
    if as_json:
        print(json.dumps([plain(group) for group in groups]))
    else:
        OUT.print(Group(*(table for group in groups for table in _tables(group))))


def _tables(group: pb.KvGroup) -> list[RenderableType]:
    tiers = Table(title=group.group, title_justify="left", box=None)
    for name in ("tier", "blocks", "of"):
        tiers.add_column(name, justify="left" if name == "tier" else "right")
    for tier in group.tiers:
        tiers.add_row(tier.tier, f"{tier.used:,}", f"{tier.total:,}" if tier.total else "-")
    tenants = Table(box=None)
    for name in ("tenant", "prompt tokens", "cached", "host blocks", "disk blocks"):
        tenants.add_column(name, justify="left" if name == "tenant" else "right")
    for tenant in group.tenants:
        tenants.add_row(
            tenant.tenant or "-",
            f"{tenant.prompt_tokens:,}",
            _share(tenant.cached_tokens, tenant.prompt_tokens),
            f"{tenant.host_blocks:,}",
            f"{tenant.disk_blocks:,}",
        )
    pins = ", ".join(f"{pin.name} ({pin.tokens} tokens)" for pin in group.pins)
    copies = f"copies: {group.loaded:,} up, {group.saved:,} down, {group.failed:,} failed"
    return [tiers, tenants, copies + (f"; pinned: {pins}" if pins else "")]


def _rates(
    before: dict[str, pb.KvGroup], current: list[pb.KvGroup], elapsed_s: float
) -> RenderableType:
    table = Table("group", expand=True)
    for name in ("device", "host", "disk", "cached", "up/s", "down/s"):
        table.add_column(name, justify="right")
    for group in current:
        last = before.get(group.group)
        used = {tier.tier: _share(tier.used, tier.total) for tier in group.tiers}
        prompt_tokens = sum(tenant.prompt_tokens for tenant in group.tenants)
        cached_tokens = sum(tenant.cached_tokens for tenant in group.tenants)
        up = down = 0.0
        if last is not None and elapsed_s:
            up = (group.loaded - last.loaded) / elapsed_s
            down = (group.saved - last.saved) / elapsed_s
        sizes = [used.get(tier, "-") for tier in ("device", "host", "disk")]
        hits = _share(cached_tokens, prompt_tokens)
        table.add_row(group.group, *sizes, hits, f"{up:.1f}", f"{down:.1f}")
    return table


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.0%}" if whole else "-"
