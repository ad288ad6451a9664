"""`arriero adapters`: LoRA adapters that come and go while groups serve.

Knows flags, Admin's messages and the table; the checks are Admin's and the groups'.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from arriero.cluster.commands.operations import AsJson, admin, plain
from arriero.cluster.commands.options import StateDir
from arriero.cluster.commands.terminal import OUT

if TYPE_CHECKING:
    from arriero.router.proto.arriero.v1 import admin_pb2 as pb

app = typer.Typer(
    help="List, add and remove LoRA adapters while groups serve.", no_args_is_help=True
)
Name = Annotated[str, typer.Argument(help="Name of the adapter, the model id for clients.")]
Model = Annotated[
    str, typer.Option("--model", help="Base model; by default the only one with adapter slots.")
]


@app.command("list")
def list_(
    model: Annotated[str, typer.Option("--model", help="Base model; by default all.")] = "",
    as_json: AsJson = False,
    state_dir: StateDir = None,
) -> None:
    """List the adapters with the groups that serve each."""
    response = _call(state_dir, action="list", model=model)
    if as_json:
        print(json.dumps([plain(adapter) for adapter in response.adapters]))
        return
    table = Table("adapter", "model", "groups", "in slots", "digest", "path", box=None)
    for adapter in response.adapters:
        table.add_row(
            adapter.name + (" (spec)" if adapter.listed else ""),
            adapter.model,
            str(len(adapter.groups)),
            str(len(adapter.in_slots)),
            adapter.digest[:12] or "-",
            adapter.path,
        )
        for error in adapter.errors:
            table.add_row("", "", "", "", "", error)
    OUT.print(table)


@app.command("add")
def add(
    name: Name,
    path: Annotated[
        Path, typer.Argument(help="Folder of the adapter on every node, in `adapter_root`.")
    ],
    model: Model = "",
    replace: Annotated[
        bool, typer.Option("--replace", help="Read the files again if the name serves already.")
    ] = False,
    as_json: AsJson = False,
    state_dir: StateDir = None,
) -> None:
    """Serve an adapter in every group of a model, without a restart."""
    response = _call(
        state_dir,
        action="add",
        model=model,
        name=name,
        path=str(path.absolute()),
        replace=replace,
    )
    _print_change(response, as_json)


@app.command("remove")
def remove(
    name: Name, model: Model = "", as_json: AsJson = False, state_dir: StateDir = None
) -> None:
    """Accept no more requests for an adapter; running requests end as usual."""
    _print_change(_call(state_dir, action="remove", model=model, name=name), as_json)


def _call(state_dir: Path | None, **fields: str | bool) -> pb.AdaptersResponse:
    from arriero.router.proto.arriero.v1 import admin_pb2 as pb

    with admin(state_dir) as client:
        return client.adapters(pb.AdaptersRequest(**fields))  # type: ignore[arg-type]


def _print_change(response: pb.AdaptersResponse, as_json: bool) -> None:
    if as_json:
        print(json.dumps(plain(response.adapters[0])))
    else:
        OUT.print(response.text, markup=False, soft_wrap=True)
