"""`arriero keys`: the API keys of the gateways, and the token of Admin.

Without `--file`, Admin changes the key files on every node that runs a gateway. With `--file`, a
command changes that file only, with or without a deployment. Knows flags and tables; the format of
key files is in `router/tenants/keys.py`.
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

from arriero.cluster.commands import remote_admin
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
    typer.Option("--file", help="Key file; by default the key files of the deployment."),
]
Id = Annotated[str, typer.Argument(help="Id of the key: the part after `arr-`.")]
Overlap = Annotated[
    float,
    typer.Option(
        "--overlap", min=0, help="Seconds for which the old secret stays valid; 0 for none."
    ),
]
DAY_S = 86_400.0
MINUTE_S = 60.0


@app.command("add")
def add(
    tenant: Annotated[str, typer.Argument(help="Tenant of the key, in the spec or not.")],
    file: File = None,
    note: Annotated[str, typer.Option(help="Note for people.")] = "",
    models: Annotated[
        str, typer.Option(help="Models that the key may use, with commas; by default all.")
    ] = "",
    as_json: AsJson = False,
    state_dir: StateDir = None,
) -> None:
    """Create a key and print the key, this once: the key files hold only the hash."""
    from arriero.cluster.spec.gateway import TenantSpec

    try:
        TenantSpec(name=tenant)
    except ValueError:
        raise SpecError(
            f"`tenant`={tenant!r}: use 1 to 128 letters, digits, dots, dashes or underscores"
        ) from None
    names = [name for name in models.split(",") if name]
    if file is not None:
        key = add_key(file, tenant, note, names)
        _print_key(key, read_keys(file)[key.split("-")[1]], as_json)
    else:
        key, entries = _call(state_dir, "add", tenant=tenant, note=note, models=names)
        _print_key(key, entries[0], as_json)


@app.command("list")
def list_(file: File = None, as_json: AsJson = False, state_dir: StateDir = None) -> None:
    """List the keys, without secrets."""
    entries: Iterable[KeyEntry] = read_keys(file).values() if file else _call(state_dir, "list")[1]
    if as_json:
        print(json.dumps([_plain(entry) for entry in entries]))
        return
    table = Table("id", "tenant", "created", "until", "models", "note", box=None)
    for entry in entries:
        until = clock(entry.expires) if entry.expires else ""
        models = ", ".join(entry.models) or "all"
        table.add_row(entry.id, entry.tenant, clock(entry.created), until, models, entry.note)
    OUT.print(table)


@app.command("rotate")
def rotate(
    key_id: Id,
    overlap_s: Overlap = DAY_S,
    file: File = None,
    as_json: AsJson = False,
    state_dir: StateDir = None,
) -> None:
    """Create a key in place of another and print the key; by default the old key lives a day."""
    if file is not None:
        _print_key(*rotate_key(file, key_id, overlap_s), as_json)
    else:
        key, entries = _call(state_dir, "rotate", id=key_id, overlap_s=overlap_s)
        _print_key(key, entries[0], as_json)


@app.command("revoke")
def revoke(
    key_id: Id, file: File = None, as_json: AsJson = False, state_dir: StateDir = None
) -> None:
    """Remove a key; gateways refuse the key within a second, and running calls continue."""
    if file is not None:
        entry = revoke_key(file, key_id)
    else:
        entry = _call(state_dir, "revoke", id=key_id)[1][0]
    if as_json:
        print(json.dumps(_plain(entry)))
    else:
        OUT.print(f"{entry.id} of {entry.tenant} is revoked", markup=False, soft_wrap=True)


@app.command("rotate-admin")
def rotate_admin(
    overlap_s: Overlap = MINUTE_S, as_json: AsJson = False, state_dir: StateDir = None
) -> None:
    """Replace your token of Admin, there and in the state file; the old token lives a minute."""
    from arriero.cluster import deployment_file as state

    folder = state.state_folder(state_dir)
    with admin(state_dir) as client:
        token = client.rotate_token(overlap_s)
    if remote_admin.chosen() is not None:  # the owner of the token's file must store it there
        if as_json:
            print(json.dumps({"overlap_s": overlap_s, "token": token}))
        else:
            OUT.print(token, markup=False, highlight=False, soft_wrap=True)
        return
    deployment = state.read(folder)
    assert deployment is not None, "the address of Admin comes from the state file"
    state.write(folder, replace(deployment, admin_token=token))
    if as_json:
        print(json.dumps({"overlap_s": overlap_s}))
    else:
        OUT.print("Admin has a new token; the state file is up to date", markup=False)


def _call(
    state_dir: Path | None, action: str, **fields: str | float | list[str]
) -> tuple[str, list[KeyEntry]]:
    """The response of Admin: the new key or "", and the entries without hashes."""
    with admin(state_dir) as client:
        response = client.keys(action, **fields)
    return response.key, [
        KeyEntry(
            id=entry.id,
            tenant=entry.tenant,
            salt="",
            hash="",
            created=entry.created,
            note=entry.note,
            expires=entry.expires,
            models=tuple(entry.models),
        )
        for entry in response.keys
    ]


def _print_key(key: str, entry: KeyEntry, as_json: bool) -> None:
    if as_json:
        print(json.dumps({"key": key, **_plain(entry)}))
        return
    OUT.print(key, markup=False, highlight=False, soft_wrap=True)
    ERR.print("gateways accept the key within a second", markup=False, soft_wrap=True)


def _plain(entry: KeyEntry) -> dict[str, object]:
    fields = ("id", "tenant", "created", "note", "expires", "models")
    return {name: getattr(entry, name) for name in fields}


def clock(at_s: float) -> str:
    """A time, in seconds since 1970, for people."""
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(at_s))
