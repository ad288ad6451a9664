"""`arriero keys`: the API keys of a gateway, in the file that its spec names."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from arriero.cluster.commands.terminal import ERR, OUT
from arriero.router.tenants.keys import add_key, read_keys, revoke_key
from arriero.shards.errors import SpecError

app = typer.Typer(help="Make, list and revoke API keys.", no_args_is_help=True)
File = Annotated[Path, typer.Option("--file", help="The key file; the spec's `gateway.keys`.")]
_FILE = Path("keys.yaml")


@app.command("add")
def add(
    tenant: Annotated[str, typer.Argument(help="Whose key it is; a tenant of the spec, or not.")],
    file: File = _FILE,
    note: Annotated[str, typer.Option(help="Words for people.")] = "",
) -> None:
    """Make a key and print it, this once: the file holds only its hash."""
    from arriero.cluster.spec import TenantSpec

    try:
        TenantSpec(name=tenant)
    except ValueError:
        raise SpecError(
            f"`tenant`={tenant!r}: use 1 to 128 letters, digits, dots, dashes or underscores"
        ) from None
    key = add_key(file, tenant, note)
    OUT.print(key, markup=False, highlight=False, soft_wrap=True)
    ERR.print(f"added to {file}; gateways take it within a second", markup=False, soft_wrap=True)


@app.command("list")
def list_(
    file: File = _FILE,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """List the keys, by what may be told of them."""
    entries = read_keys(file).values()
    if as_json:
        print(
            json.dumps(
                [
                    {"id": one.id, "tenant": one.tenant, "created": one.created, "note": one.note}
                    for one in entries
                ]
            )
        )
        return
    table = Table("id", "tenant", "created", "note", box=None)
    for one in entries:
        created = time.strftime("%Y-%m-%d %H:%M", time.localtime(one.created))
        table.add_row(one.id, one.tenant, created, one.note)
    OUT.print(table)


@app.command("revoke")
def revoke(
    key_id: Annotated[str, typer.Argument(help="The key's id, the part after `arr-`.")],
    file: File = _FILE,
) -> None:
    """Take a key out; gateways refuse it within a second, and calls it began go on."""
    entry = revoke_key(file, key_id)
    OUT.print(f"{entry.id} of {entry.tenant} is revoked", markup=False, soft_wrap=True)
