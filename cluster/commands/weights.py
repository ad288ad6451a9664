"""`arriero weights`, `pause`, `resume`, `sleep` and `wake`: weights of groups that serve.

Knows flags, Admin's messages and the table; the checks are Admin's and the groups'.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from arriero.cluster.commands.operations import AsJson, admin, plain
from arriero.cluster.commands.options import StateDir
from arriero.cluster.commands.terminal import OUT, spinner
from arriero.shards.errors import CheckpointError, GroupFailed, Unavailable

if TYPE_CHECKING:
    from arriero.cluster.control.admin_client import AdminClient
    from arriero.router.proto.arriero.v1 import admin_pb2 as pb

app = typer.Typer(help="Replace the weights of a model while it serves.", no_args_is_help=True)
Model = Annotated[str, typer.Argument(help="The model.")]
Wait = Annotated[bool, typer.Option(help="Wait until every group serves the weights.")]
Name = Annotated[str, typer.Argument(metavar="NAME", help="A group, a seat or a model.")]
Mode = Annotated[
    str,
    typer.Option(
        "--mode", help="Running requests: keep (they go on later), wait (they end first) or abort."
    ),
]
_POLL_S = 0.2


def add_to(root: typer.Typer) -> None:
    """Add the commands to `root`."""
    root.add_typer(app, name="weights")
    for command in (pause, resume, sleep, wake):
        root.command(command.__name__)(command)


@app.command("push")
def push(
    model: Model,
    path: Annotated[
        Path,
        typer.Argument(help="A checkpoint folder, or a folder or file with some of the tensors."),
    ],
    wait: Wait = True,
    as_json: AsJson = False,
    state_dir: StateDir = None,
) -> None:
    """Serve other weights of the same model, group by group; no request is lost."""
    _change(state_dir, "push", model, str(path.absolute()), wait=wait, as_json=as_json)


@app.command("reset")
def reset(
    model: Model, wait: Wait = True, as_json: AsJson = False, state_dir: StateDir = None
) -> None:
    """Serve the weights of the spec's folder again."""
    _change(state_dir, "reset", model, "", wait=wait, as_json=as_json)


@app.command("status")
def status(
    model: Annotated[str, typer.Argument(help="The model; by default all.")] = "",
    as_json: AsJson = False,
    state_dir: StateDir = None,
) -> None:
    """Show which weights serve, and groups that are paused or asleep."""
    with admin(state_dir) as client:
        _show(_ask(client, "status", model), as_json)


def pause(
    name: Name, mode: Mode = "keep", as_json: AsJson = False, state_dir: StateDir = None
) -> None:
    """Compute nothing until `resume`; new requests wait."""
    _hold(state_dir, as_json, action="pause", name=name, mode=mode)


def resume(name: Name, as_json: AsJson = False, state_dir: StateDir = None) -> None:
    """End a pause; requests that waited run."""
    _hold(state_dir, as_json, action="resume", name=name)


def sleep(
    name: Name,
    mode: Mode = "keep",
    level: Annotated[
        int,
        typer.Option(min=1, max=2, help="2 lets the host's page cache forget the weights too."),
    ] = 1,
    as_json: AsJson = False,
    state_dir: StateDir = None,
) -> None:
    """Give the memory of weights and KV cache back until `wake`; new requests wait."""
    _hold(state_dir, as_json, action="sleep", name=name, mode=mode, level=level)


def wake(name: Name, as_json: AsJson = False, state_dir: StateDir = None) -> None:
    """Load the weights again; requests that waited run."""
    _hold(state_dir, as_json, action="wake", name=name)


def _change(
    state_dir: Path | None, action: str, model: str, path: str, *, wait: bool, as_json: bool
) -> None:
    """Push or reset; with `wait` until every group serves the weights.

    Raises:
        CheckpointError: a group refuses the weights; nothing has changed.
        GroupFailed: a group could not take the weights.
    """
    with admin(state_dir) as client:
        response = _ask(client, action, model, path)
        if not wait or "already" in response.text:
            OUT.print(response.text, markup=False, soft_wrap=True)
            return
        with spinner() as show:
            show(response.text)
            now = _ask(client, "status", model)
            while not now.models[0].settled and not now.models[0].error:
                time.sleep(_POLL_S)
                now = _ask(client, "status", model)
        state = now.models[0]
        if state.error and not state.phase:
            raise CheckpointError(state.error)
        if state.error:
            raise GroupFailed(state.error)
        _show(now, as_json)


def _ask(client: AdminClient, action: str, model: str, path: str = "") -> pb.WeightsResponse:
    from arriero.router.proto.arriero.v1 import admin_pb2 as pb

    return client.weights(pb.WeightsRequest(action=action, model=model, path=path))


def _hold(state_dir: Path | None, as_json: bool, **fields: str | int) -> None:
    from arriero.router.proto.arriero.v1 import admin_pb2 as pb

    with admin(state_dir) as client:
        response = client.hold(pb.HoldRequest(**fields))  # type: ignore[arg-type]
        _show(response, as_json)
    errors = [f"{group.group}: {group.error}" for group in response.groups if group.error]
    if errors:
        raise GroupFailed("; ".join(errors))
    late = [f"{group.group} ({group.change})" for group in response.groups if group.change]
    if late:
        raise Unavailable(f"still under way, and goes on: {', '.join(late)}")


def _show(response: pb.WeightsResponse, as_json: bool) -> None:
    if as_json:
        print(json.dumps(plain(response)))
        return
    table = Table("group", "weights", "state", "held", "sources", box=None)
    for group in response.groups:
        table.add_row(
            group.group,
            group.digest[:16] or "-",
            _state(group),
            str(group.held),
            "\n".join(group.sources) or "(spec)",
        )
        for line in (*group.notes, *filter(None, [group.error])):
            table.add_row("", "", line, "", "")
    OUT.print(table)
    for model in response.models:
        if model.error:
            OUT.print(f"{model.model}: {model.error}", markup=False, soft_wrap=True)


def _state(group: pb.GroupWeights) -> str:
    words = []
    if group.paused:
        words.append("paused")
    if group.sleep_level:
        words.append(f"asleep (level {group.sleep_level})")
    return ", ".join([*words, *filter(None, [group.change])]) or "serving"
