"""`arriero admin-token`: the tokens of Admin, each with a name and a role.

Knows flags and tables; the tokens and their roles are in `control/admin_roles.py`.
"""

from __future__ import annotations

import json
from typing import Annotated

import typer
from rich.table import Table

from arriero.cluster.commands.keys import clock
from arriero.cluster.commands.operations import AsJson, admin
from arriero.cluster.commands.options import StateDir
from arriero.cluster.commands.terminal import ERR, OUT
from arriero.router.proto.arriero.v1 import admin_pb2 as pb

app = typer.Typer(help="Make, list and revoke tokens of Admin.", no_args_is_help=True)
Name = Annotated[str, typer.Argument(help="Name; events and the audit log show it.")]
_DAY_S = 86_400.0


@app.command("add")
def add(
    name: Name,
    role: Annotated[
        str, typer.Option(help="view (read), operate (scale, roll out, drain) or own (all).")
    ] = "view",
    days: Annotated[
        float, typer.Option(min=0, help="Days until the token expires; 0 for never.")
    ] = 0.0,
    as_json: AsJson = False,
    state_dir: StateDir = None,
) -> None:
    """Create a token and print the token, this once: Admin stores only the hash."""
    with admin(state_dir) as client:
        response = client.tokens("add", name=name, role=role, lifetime_s=days * _DAY_S)
    if as_json:
        print(json.dumps({"token": response.token, **_plain(response.tokens[0])}))
        return
    OUT.print(response.token, markup=False, highlight=False, soft_wrap=True)
    ERR.print(f"Admin accepts {name} with the role {role}", markup=False, soft_wrap=True)


@app.command("list")
def list_(as_json: AsJson = False, state_dir: StateDir = None) -> None:
    """List the tokens, without secrets."""
    with admin(state_dir) as client:
        tokens = client.tokens("list").tokens
    if as_json:
        print(json.dumps([_plain(token) for token in tokens]))
        return
    table = Table("name", "role", "created", "until", box=None)
    for token in tokens:
        until = clock(token.expires) if token.expires else ""
        table.add_row(token.name, token.role, clock(token.created), until)
    OUT.print(table)


@app.command("revoke")
def revoke(name: Name, as_json: AsJson = False, state_dir: StateDir = None) -> None:
    """Remove a token; the next call with the token is refused."""
    with admin(state_dir) as client:
        token = client.tokens("revoke", name=name).tokens[0]
    if as_json:
        print(json.dumps(_plain(token)))
    else:
        OUT.print(f"{token.name} is revoked", markup=False, soft_wrap=True)


def _plain(token: pb.AdminToken) -> dict[str, object]:
    return {name: getattr(token, name) for name in ("name", "role", "created", "expires")}
