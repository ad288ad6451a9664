"""`arriero keys`: the API keys of the gateways, and the token of Admin.

Without `--file` they are changed through Admin, on every node that runs a gateway; with it, in one
file alone, whether or not anything is up.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from arriero.cluster.commands.operations import AsJson, admin
from arriero.cluster.commands.options import StateDir
from arriero.cluster.commands.terminal import ERR, OUT
from arriero.router.tenants.keys import KeyEntry, add_key, read_keys, revoke_key, rotate_key
from arriero.shards.errors import SpecError

app = typer.Typer(
    help="Make, list, rotate and revoke API keys; rotate the admin token.", no_args_is_help=True
)
File = Annotated[
    Path | None,
    typer.Option("--file", help="A key file; by default those of the deployment that is up."),
]
Id = Annotated[str, typer.Argument(help="The key's id, the part after `arr-`.")]
Overlap = Annotated[
    float,
    typer.Option(
        "--overlap", min=0, help="Seconds for which the old one is still taken; 0 cuts it off."
    ),
]
DAY_S = 86_400.0
MINUTE_S = 60.0


@app.command("add")
def add(
    tenant: Annotated[str, typer.Argument(help="Whose key it is; a tenant of the spec, or not.")],
    file: File = None,
    note: Annotated[str, typer.Option(help="Words for people.")] = "",
    as_json: AsJson = False,
    state_dir: StateDir = None,
) -> None:
    """Make a key and print it, this once: the files hold only its hash."""
    from arriero.cluster.spec.gateway import TenantSpec

    try:
        TenantSpec(name=tenant)
    except ValueError:
        raise SpecError(
            f"`tenant`={tenant!r}: use 1 to 128 letters, digits, dots, dashes or underscores"
        ) from None
    if file is not None:
        key = add_key(file, tenant, note)
        _told(key, read_keys(file)[key.split("-")[1]], as_json)
    else:
        key, entries = _ask(state_dir, "add", tenant=tenant, note=note)
        _told(key, entries[0], as_json)


@app.command("list")
def list_(file: File = None, as_json: AsJson = False, state_dir: StateDir = None) -> None:
    """List the keys, by what may be told of them."""
    entries: Iterable[KeyEntry] = read_keys(file).values() if file else _ask(state_dir, "list")[1]
    if as_json:
        print(json.dumps([_plain(one) for one in entries]))
        return
    table = Table("id", "tenant", "created", "until", "note", box=None)
    for one in entries:
        until = _clock(one.expires) if one.expires else ""
        table.add_row(one.id, one.tenant, _clock(one.created), until, one.note)
    OUT.print(table)


@app.command("rotate")
def rotate(
    key_id: Id,
    overlap_s: Overlap = DAY_S,
    file: File = None,
    as_json: AsJson = False,
    state_dir: StateDir = None,
) -> None:
    """Make a key in place of another, print it, and take the old one for a day more."""
    if file is not None:
        _told(*rotate_key(file, key_id, overlap_s), as_json)
    else:
        key, entries = _ask(state_dir, "rotate", id=key_id, overlap_s=overlap_s)
        _told(key, entries[0], as_json)


@app.command("revoke")
def revoke(
    key_id: Id, file: File = None, as_json: AsJson = False, state_dir: StateDir = None
) -> None:
    """Take a key out; gateways refuse it within a second, and calls it began go on."""
    if file is not None:
        entry = revoke_key(file, key_id)
    else:
        entry = _ask(state_dir, "revoke", id=key_id)[1][0]
    if as_json:
        print(json.dumps(_plain(entry)))
    else:
        OUT.print(f"{entry.id} of {entry.tenant} is revoked", markup=False, soft_wrap=True)


@app.command("rotate-admin")
def rotate_admin(
    overlap_s: Overlap = MINUTE_S, as_json: AsJson = False, state_dir: StateDir = None
) -> None:
    """Replace the token of Admin, here and in the state file; the old one is good for a minute."""
    from arriero.cluster import deployment_file as state

    folder = state.state_folder(state_dir)
    with admin(state_dir) as client:
        token = client.rotate_token(overlap_s)
    deployment = state.read(folder)
    assert deployment is not None, "Admin was found by it"
    state.write(folder, replace(deployment, admin_token=token))
    if as_json:
        print(json.dumps({"overlap_s": overlap_s}))
    else:
        OUT.print("Admin asks for a new token, which the state file holds", markup=False)


def _ask(state_dir: Path | None, action: str, **fields: str | float) -> tuple[str, list[KeyEntry]]:
    """Admin's answer: a new key or "", and entries, without their hashes."""
    with admin(state_dir) as client:
        found = client.keys(action, **fields)
    return found.key, [
        KeyEntry(
            id=one.id,
            tenant=one.tenant,
            salt="",
            hash="",
            created=one.created,
            note=one.note,
            expires=one.expires,
        )
        for one in found.keys
    ]


def _told(key: str, entry: KeyEntry, as_json: bool) -> None:
    if as_json:
        print(json.dumps({"key": key, **_plain(entry)}))
        return
    OUT.print(key, markup=False, highlight=False, soft_wrap=True)
    ERR.print("gateways take it within a second", markup=False, soft_wrap=True)


def _plain(entry: KeyEntry) -> dict[str, object]:
    fields = ("id", "tenant", "created", "note", "expires")
    return {name: getattr(entry, name) for name in fields}


def _clock(at_s: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(at_s))
