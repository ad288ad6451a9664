"""`arriero status`, `scale`, `rollout`, `events`, `why`, …: look at a deployment, and change it.

All commands call `arriero.v1.Admin`. Knows Admin's messages; knows nothing of Ray.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from arriero.cluster.commands import remote_admin
from arriero.cluster.commands.options import StateDir
from arriero.cluster.commands.terminal import ERR, OUT, spinner
from arriero.shards.errors import GroupFailed, NotFound, Unavailable

if TYPE_CHECKING:
    from google.protobuf.message import Message

    from arriero.cluster.control.admin_client import AdminClient

AsJson = Annotated[bool, typer.Option("--json", help="JSON on stdout.")]
Wait = Annotated[bool, typer.Option(help="Wait until the change is done.")]
_POLL_S = 0.3


def add_to(app: typer.Typer) -> None:
    """Add the commands to `app`."""
    for command in (
        *(status, scale, drain, rollout, rollback, reload),
        *(experts, events, why, logs),
    ):
        app.command(command.__name__)(command)


@contextmanager
def admin(state_dir: Path | None) -> Iterator[AdminClient]:
    """A client of the deployment's Admin.

    Raises:
        Unavailable: nothing is up.
    """
    from arriero.cluster import deployment_file as state
    from arriero.cluster.control.admin_client import AdminClient

    deployment = remote_admin.chosen() or state.read(state.state_folder(state_dir))
    if deployment is None:
        raise Unavailable(
            "nothing is up; deploy with `arriero up`, or give --admin before the command"
        )
    with AdminClient.of(deployment) as client:
        yield client


def status(
    as_json: AsJson = False,
    watch: Annotated[bool, typer.Option(help="Show the status every second until Ctrl-C.")] = False,
    state_dir: StateDir = None,
) -> None:
    """Show gateways, models and groups: the current state and the desired state."""
    from arriero.cluster.commands.views import status_view

    with admin(state_dir) as client:
        if not watch:
            current = client.status()
            if as_json:
                print(json.dumps(plain(current)))
            else:
                OUT.print(status_view(current))
            return
        if as_json:
            while True:
                print(json.dumps(plain(client.status())), flush=True)
                time.sleep(1)
        from rich.live import Live

        with Live(console=OUT, auto_refresh=False) as live:
            while True:
                live.update(status_view(client.status()), refresh=True)
                time.sleep(1)


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
    spec: Annotated[
        Path | None, typer.Argument(help="New spec; without a spec, only weights are compared.")
    ] = None,
    force: Annotated[
        bool, typer.Option(help="Replace all groups, also without a difference.")
    ] = False,
    wait: Wait = True,
    as_json: AsJson = False,
    state_dir: StateDir = None,
) -> None:
    """Replace the groups with changed settings or weights, one group at a time."""
    from arriero.cluster.spec.load import load

    text = "" if spec is None else load(spec, {}).model_dump_json()
    with admin(state_dir) as client:
        _change(client, client.rollout(text, force=force), wait=wait, as_json=as_json)
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
    autoscale, groups, prefill_groups and spares of models; log_level. Streams continue.
    """
    from arriero.cluster.spec.load import load

    text = load(spec, {}).model_dump_json()
    with admin(state_dir) as client:
        _change(client, client.reload(text), wait=True, as_json=as_json)


def experts(
    group: Annotated[str, typer.Argument(help="Group, seat or model; by default all.")] = "",
    as_json: AsJson = False,
    state_dir: StateDir = None,
) -> None:
    """Show the load of the experts and slices in mixtures of experts."""
    from arriero.cluster.commands.views import experts_view

    with admin(state_dir) as client:
        groups = [
            entry
            for entry in client.status().groups
            if group in ("", entry.id, entry.seat, entry.model) and entry.expert_loads
        ]
    if not groups:
        raise NotFound(
            f"no group{f' of {group!r}' if group else ''} reports expert loads; only groups of a"
            " mixture of experts with `mesh.dp` above 1 do, after the first tokens"
        )
    if as_json:
        print(json.dumps([plain(entry) for entry in groups]))
        return
    for entry in groups:
        OUT.print(experts_view(entry))


def events(
    limit: Annotated[int, typer.Option(min=1, help="Number of events.")] = 50,
    follow: Annotated[bool, typer.Option(help="Show new events until Ctrl-C.")] = False,
    as_json: AsJson = False,
    state_dir: StateDir = None,
) -> None:
    """Show the latest events of the deployment."""
    with admin(state_dir) as client:
        last_at = 0.0
        while True:
            for event in client.events(limit):
                if event.at <= last_at:
                    continue
                last_at = event.at
                if as_json:
                    print(json.dumps(plain(event)), flush=True)
                else:
                    time_of_day = datetime.fromtimestamp(event.at).strftime("%H:%M:%S.%f")[:-3]
                    line = f"{time_of_day}  {event.kind:<9} {event.who:<24} {event.text}"
                    OUT.print(line, markup=False, soft_wrap=True)
            if not follow:
                return
            time.sleep(_POLL_S)


def why(
    group: Annotated[
        str, typer.Argument(help="Group, seat or model; by default the latest failure of all.")
    ] = "",
    as_json: AsJson = False,
    state_dir: StateDir = None,
) -> None:
    """Explain why a group failed: the first cause, and the failures that followed."""
    with admin(state_dir) as client:
        try:
            response = client.why(group)
        except NotFound:
            if group:
                raise
            raise NotFound("no group or gateway of this deployment has failed") from None
    if as_json:
        failure = plain(response.failure)
        failure["record"] = json.loads(response.failure.record or "null")
        print(json.dumps(failure))
        return
    for line in response.lines:
        OUT.print(line, markup=False, soft_wrap=True)


def logs(
    group: Annotated[
        str, typer.Argument(help="Group, seat or gateway id; or `gateways`, or `operator`.")
    ],
    lines: Annotated[
        int, typer.Option(min=1, max=1000, help="Number of lines of each process.")
    ] = 20,
    as_json: AsJson = False,
    state_dir: StateDir = None,
) -> None:
    """Show the last log lines of a group's leader and slices, of gateways, or of the operator."""
    with admin(state_dir) as client:
        processes = client.logs(group, lines)
    if as_json:
        print(json.dumps([plain(process) for process in processes]))
        return
    for process in processes:
        OUT.print(f"{process.who} (pid {process.pid} on {process.node})", markup=False)
        for line in process.lines:
            OUT.print(f"  {line}", markup=False, soft_wrap=True)


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


def _change(client: AdminClient, text: str, *, wait: bool, as_json: bool) -> None:
    """Print the change that Admin has started, and wait for the end of the change."""
    if not as_json:
        ERR.print(text, markup=False, soft_wrap=True)
    if wait:
        with spinner() as show:
            _wait(client, show)
    if as_json:
        print(json.dumps({"change": text, "settled": wait}))
    elif wait:
        OUT.print("done", markup=False)


def _wait(client: AdminClient, show: Callable[[str], None]) -> None:
    """Wait until all models have the desired state.

    Raises:
        GroupFailed: a group of the new revision cannot start; the other groups serve on.
    """
    while True:
        current = client.status()
        if all(model.settled for model in current.models):
            return
        revisions = {model.model: model.revision for model in current.models}
        for group in current.groups:
            if group.phase == "failed" and group.revision == revisions.get(group.model):
                raise GroupFailed(
                    f"{group.seat} does not start: {group.text}; the other groups serve on"
                    f" (`arriero rollback {group.model}` restores the settings before)"
                )
        changing = [group for group in current.groups if group.phase != "serving"]
        show(", ".join(f"{group.seat} {group.phase}" for group in changing) or "waiting")
        time.sleep(_POLL_S)


def plain(message: Message) -> dict[str, object]:
    """A protobuf message as JSON values: every field, numbers as numbers."""
    values: dict[str, object] = {}
    for field in message.DESCRIPTOR.fields:
        value = getattr(message, field.name)
        if field.is_repeated:
            value = [plain(item) if field.message_type else item for item in value]
        elif field.has_presence and not message.HasField(field.name):
            value = None
        values[field.name] = value
    return values
