"""`arriero status`, `events`, `why`, `logs` and `experts`: look at a deployment.

All commands call `arriero.v1.Admin`. Knows Admin's messages; knows nothing of Ray.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from arriero.cluster.commands import last_known, remote_admin
from arriero.cluster.commands.options import StateDir
from arriero.cluster.commands.terminal import OUT
from arriero.shards.errors import NotFound, Unavailable

if TYPE_CHECKING:
    from google.protobuf.message import Message

    from arriero.cluster.control.admin_client import AdminClient
    from arriero.router.proto.arriero.v1 import admin_pb2 as pb

AsJson = Annotated[bool, typer.Option("--json", help="JSON on stdout.")]
_POLL_S = 0.3
_FOLLOW_S = 0.7
FOLLOW_LINES = 200
"""Lines that `logs --follow` asks for; more new lines in 0.7 s are cut."""


def add_to(app: typer.Typer) -> None:
    """Add the commands to `app`."""
    for command in (status, experts, events, why, logs):
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

    last_known.check_head(state_dir)
    with admin(state_dir) as client:
        if not watch:
            try:
                current = client.status()
            except Unavailable as error:
                last_known.add_to(error, state_dir)
                raise
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
                    by = f" (by {event.by})" if event.by else ""
                    line = f"{time_of_day}  {event.kind:<9} {event.who:<24} {event.text}{by}"
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
    follow: Annotated[bool, typer.Option(help="Show new lines until Ctrl-C.")] = False,
    as_json: AsJson = False,
    state_dir: StateDir = None,
) -> None:
    """Show the last log lines of a group's leader and slices, of gateways, or of the operator."""
    with admin(state_dir) as client:
        if not follow:
            _print_logs(client.logs(group, lines), as_json)
            return
        processes = client.logs(group, FOLLOW_LINES)
        shown: dict[tuple[str, int], list[str]] = {}
        while True:
            for process in processes:
                before = shown.get((process.node, process.pid))
                new = lines_after(before or [], process.lines)
                new = new[-lines:] if before is None else new
                shown[process.node, process.pid] = list(process.lines)
                _print_new(process, new, as_json)
            time.sleep(_FOLLOW_S)
            with contextlib.suppress(NotFound):  # between the end of a group and the next start
                processes = client.logs(group, FOLLOW_LINES)


def _print_logs(processes: list[pb.ProcessLog], as_json: bool) -> None:
    if as_json:
        print(json.dumps([plain(process) for process in processes]))
        return
    for process in processes:
        OUT.print(f"{process.who} (pid {process.pid} on {process.node})", markup=False)
        for line in process.lines:
            OUT.print(f"  {line}", markup=False, soft_wrap=True)


def _print_new(process: pb.ProcessLog, lines: Sequence[str], as_json: bool) -> None:
    for line in lines:
        if as_json:
            values = {"who": process.who, "node": process.node, "pid": process.pid, "line": line}
            print(json.dumps(values), flush=True)
        else:
            OUT.print(f"{process.who} ({process.pid}): {line}", markup=False, soft_wrap=True)


def lines_after(before: Sequence[str], now: Sequence[str]) -> list[str]:
    """The lines of `now` behind the end of `before`.

    Args:
        before: the last lines of a log at an earlier time.
        now: the same number of last lines, or all lines of a shorter log.
    """
    for overlap in range(min(len(before), len(now)), 0, -1):
        if list(now[:overlap]) == list(before[-overlap:]):
            return list(now[overlap:])
    return list(now)


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
