"""`arriero scale`, `drain`, `rollout`, `rollback`, `reload` and `node`: change a deployment.

All commands call `arriero.v1.Admin`. Knows Admin's messages; knows nothing of Ray.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from arriero.cluster.commands.operations import AsJson, admin
from arriero.cluster.commands.options import StateDir
from arriero.cluster.commands.terminal import ERR, OUT, spinner
from arriero.shards.errors import GroupFailed, SpecError

if TYPE_CHECKING:
    from arriero.cluster.control.admin_client import AdminClient
    from arriero.router.proto.arriero.v1 import admin_pb2 as pb

Wait = Annotated[bool, typer.Option(help="Wait until the change is done.")]
_POLL_S = 0.3
nodes = typer.Typer(help="Take nodes out of service, and back.", no_args_is_help=True)


def add_to(app: typer.Typer) -> None:
    """Add the commands to `app`."""
    for command in (scale, drain, rollout, rollback, reload):
        app.command(command.__name__)(command)
    app.add_typer(nodes, name="node")


def scale(
    model: Annotated[str, typer.Argument(help="Name of the model.")],
    groups: Annotated[int, typer.Argument(min=0, help="Number of groups; 0 ends all groups.")],
    wait: Wait = True,
    as_json: AsJson = False,
    state_dir: StateDir = None,
) -> None:
    """Set the number of groups of a model."""
    with admin(state_dir) as client:
        _change(client, client.scale(model, groups), wait=wait, as_json=as_json)


def drain(
    name: Annotated[str, typer.Argument(help="Group or seat, as in `arriero status`.")],
    wait: Wait = True,
    as_json: AsJson = False,
    state_dir: StateDir = None,
) -> None:
    """End a group after all streams have ended or moved; a successor takes over."""
    with admin(state_dir) as client:
        _change(client, client.drain(name), wait=wait, as_json=as_json)


def rollout(
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[SPEC | pause MODEL | resume MODEL]",
            help="New spec; without a spec, only weights are compared. Or pause or resume the"
            " rollout of a model.",
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only tell what would change, restart and fit.")
    ] = False,
    force: Annotated[
        bool, typer.Option(help="Replace all groups, also without a difference.")
    ] = False,
    prune: Annotated[
        bool, typer.Option("--prune", help="End the models that the spec lacks.")
    ] = False,
    deadline_s: Annotated[
        float,
        typer.Option(
            "--deadline",
            min=0,
            help="Seconds until a rollout that is not done is taken back; 0: as the spec says.",
        ),
    ] = 0.0,
    wait: Wait = True,
    as_json: AsJson = False,
    state_dir: StateDir = None,
) -> None:
    """Replace the groups with changed settings or weights, one group at a time.

    Models that are new in SPEC start. `rollout pause MODEL` keeps the groups as they are now, and
    `rollout resume MODEL` goes on.
    """
    first, *others = words or [""]
    if first in ("pause", "resume"):
        if len(others) != 1:
            raise SpecError(f"give one model: `arriero rollout {first} MODEL`")
        with admin(state_dir) as client:
            text = client.pause_rollout(others[0], paused=first == "pause")
            _change(client, text, wait=wait and first == "resume", as_json=as_json)
        return
    if others:
        raise SpecError(f"`{' '.join(others)}` after the spec means nothing; give one SPEC")
    from arriero.cluster.spec.load import load
    from arriero.router.proto.arriero.v1 import admin_pb2 as pb

    text = load(Path(first), {}).model_dump_json() if first else ""
    request = pb.RolloutRequest(
        spec=text, force=force, dry_run=dry_run, deadline_s=deadline_s, prune=prune
    )
    with admin(state_dir) as client:
        change = client.change_spec(request)
        if dry_run:
            _print_plan(change, as_json)
            return
        _change(client, change.text, wait=wait, as_json=as_json, rolls_out=True)
        _update_gateway(client, state_dir)


def rollback(
    model: Annotated[str, typer.Argument(help="Name of the model.")],
    wait: Wait = True,
    as_json: AsJson = False,
    state_dir: StateDir = None,
) -> None:
    """Restore the settings of a model from before the last rollout."""
    with admin(state_dir) as client:
        _change(client, client.rollback(model), wait=wait, as_json=as_json)


def reload(
    spec: Annotated[Path, typer.Argument(help="The changed spec.")],
    as_json: AsJson = False,
    state_dir: StateDir = None,
) -> None:
    """Apply changes of a spec that need no restart; refuse all others by name.

    No restart is needed for tenants, queue and lost_s of the gateway; the limits of health;
    autoscale, groups, prefill_groups, spares and rollout_deadline_s of models; log_level. Streams
    continue.
    """
    from arriero.cluster.spec.load import load

    text = load(spec, {}).model_dump_json()
    with admin(state_dir) as client:
        _change(client, client.reload(text), wait=True, as_json=as_json)


@nodes.command("drain")
def drain_node(
    name: Annotated[str, typer.Argument(help="Address, host name or id, as in `arriero status`.")],
    wait: Wait = True,
    as_json: AsJson = False,
    state_dir: StateDir = None,
) -> None:
    """Move the groups of a node to other nodes; no group starts there until `undrain`.

    For a node that will end, such as a spot node. A group for which the other nodes have no room
    serves on.
    """
    with admin(state_dir) as client:
        _change(client, client.drain_node(name), wait=wait, as_json=as_json)


@nodes.command("undrain")
def undrain_node(
    name: Annotated[str, typer.Argument(help="Address, host name or id, as in `arriero status`.")],
    as_json: AsJson = False,
    state_dir: StateDir = None,
) -> None:
    """Let groups start on a node again."""
    with admin(state_dir) as client:
        _change(client, client.drain_node(name, undo=True), wait=False, as_json=as_json)


def _print_plan(change: pb.ChangeResponse, as_json: bool) -> None:
    if as_json:
        print(json.dumps({"change": change.text, "details": list(change.details)}))
        return
    for line in change.details:
        OUT.print(line, markup=False, soft_wrap=True)
    ERR.print(change.text, markup=False)


def _update_gateway(client: AdminClient, state_dir: Path | None) -> None:
    """Write the address of a new gateway to the state file: a rollout may replace gateways."""
    from arriero.cluster import deployment_file as state

    folder = state.state_folder(state_dir)
    deployment, gateways = state.read(folder), client.status().gateways
    if deployment is None or not gateways:
        return
    if deployment.gateway not in {gateway.address for gateway in gateways}:
        first = gateways[0]
        state.write(folder, replace(deployment, gateway=first.address, http=first.http))


def _change(
    client: AdminClient, text: str, *, wait: bool, as_json: bool, rolls_out: bool = False
) -> None:
    """Print the change that Admin has started, and wait for the end of the change."""
    if not as_json:
        ERR.print(text, markup=False, soft_wrap=True)
    if wait:
        with spinner() as show:
            _wait(client, show, rolls_out=rolls_out)
    if as_json:
        print(json.dumps({"change": text, "settled": wait}))
    elif wait:
        OUT.print("done", markup=False)


def _wait(client: AdminClient, show: Callable[[str], None], *, rolls_out: bool) -> None:
    """Wait until all models have the desired state.

    Raises:
        GroupFailed: a group of the new revision cannot start, or the rollout was taken back; the
            other groups serve on.
    """
    while True:
        current = client.status()
        models = {model.model: model for model in current.models}
        ended = [group for group in current.groups if group.model not in models]
        if all(model.settled for model in current.models) and not ended:
            taken_back = [model for model in current.models if model.rolled_back]
            if rolls_out and taken_back:
                texts = "; ".join(f"{model.model}: {model.rolled_back}" for model in taken_back)
                raise GroupFailed(f"the rollout was taken back: {texts}")
            return
        for group in current.groups:
            model = models.get(group.model)
            if model is None or group.phase != "failed" or group.revision != model.revision:
                continue
            if not model.HasField("deadline_left_s"):  # else Admin takes the rollout back
                raise GroupFailed(
                    f"{group.seat} does not start: {group.text}; the other groups serve on"
                    f" (`arriero rollback {group.model}` restores the settings before)"
                )
        show(_progress(current))
        time.sleep(_POLL_S)


def _progress(status: pb.Status) -> str:
    """What the change waits for, in words."""
    words = [f"{model.model}: the rollout is paused" for model in status.models if model.paused]
    for group in status.groups:
        if group.phase != "serving":
            text = f": {group.text}" if group.text else ""
            words.append(f"{group.seat} {group.phase}{text}")
    words += [
        f"{model.model}: {model.deadline_left_s:.0f} s left"
        for model in status.models
        if model.HasField("deadline_left_s") and not model.settled
    ]
    return ", ".join(words) or "waiting"
