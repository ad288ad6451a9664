"""What an operator looks at and changes: `arriero status`, `scale`, `rollout`, `events`, `why`, ….

All of them speak to `arriero.v1.Admin`; none needs Ray.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from arriero.cluster.commands.options import StateDir
from arriero.cluster.commands.terminal import ERR, OUT, spinner
from arriero.shards.errors import GroupFailed, NotFound, Unavailable

if TYPE_CHECKING:
    from google.protobuf.message import Message

    from arriero.cluster.control.admin_client import AdminClient

AsJson = Annotated[bool, typer.Option("--json", help="JSON on stdout.")]
Wait = Annotated[bool, typer.Option(help="Return once it is done.")]
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

    deployment = state.read(state.state_folder(state_dir))
    if deployment is None:
        raise Unavailable("nothing is up; `arriero up` deploys")
    with AdminClient.of(deployment) as client:
        yield client


def status(
    as_json: AsJson = False,
    watch: Annotated[bool, typer.Option(help="Show it again and again, until Ctrl-C.")] = False,
    state_dir: StateDir = None,
) -> None:
    """Show what serves and what is wanted."""
    from arriero.cluster.commands.views import status_view

    with admin(state_dir) as client:
        if not watch:
            found = client.status()
            if as_json:
                print(json.dumps(plain(found)))
            else:
                OUT.print(status_view(found))
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
    model: Annotated[str, typer.Argument(help="Its name.")],
    groups: Annotated[int, typer.Argument(min=0, help="Groups to have; 0 keeps none.")],
    wait: Wait = True,
    as_json: AsJson = False,
    state_dir: StateDir = None,
) -> None:
    """Have so many groups of a model."""
    with admin(state_dir) as client:
        _change(client, client.scale(model, groups), wait=wait, as_json=as_json)


def drain(
    name: Annotated[str, typer.Argument(help="A group or its seat, as `status` shows them.")],
    wait: Wait = True,
    as_json: AsJson = False,
    state_dir: StateDir = None,
) -> None:
    """End a group once its streams have ended or moved; a successor takes its place."""
    with admin(state_dir) as client:
        _change(client, client.drain(name), wait=wait, as_json=as_json)


def rollout(
    spec: Annotated[
        Path | None, typer.Argument(help="The new spec; none looks at the weights alone.")
    ] = None,
    force: Annotated[bool, typer.Option(help="Replace the groups in any case.")] = False,
    wait: Wait = True,
    as_json: AsJson = False,
    state_dir: StateDir = None,
) -> None:
    """Replace, one at a time, the groups whose settings or weights have changed."""
    from arriero.cluster.spec.load import load

    text = "" if spec is None else load(spec, {}).model_dump_json()
    with admin(state_dir) as client:
        _change(client, client.rollout(text, force=force), wait=wait, as_json=as_json)
        _note_gateway(client, state_dir)


def rollback(
    model: Annotated[str, typer.Argument(help="Its name.")],
    wait: Wait = True,
    as_json: AsJson = False,
    state_dir: StateDir = None,
) -> None:
    """Go back to a model's settings before its last rollout."""
    with admin(state_dir) as client:
        _change(client, client.rollback(model), wait=wait, as_json=as_json)


def reload(
    spec: Annotated[Path, typer.Argument(help="The spec, changed.")],
    as_json: AsJson = False,
    state_dir: StateDir = None,
) -> None:
    """Take what of a spec can be changed at once, without a restart; refuse the rest by name.

    That is tenants, queue and lost_s of the gateway; the limits of health; autoscale, groups,
    prefill_groups and spares of models; log_level. Streams run on.
    """
    from arriero.cluster.spec.load import load

    text = load(spec, {}).model_dump_json()
    with admin(state_dir) as client:
        _change(client, client.reload(text), wait=True, as_json=as_json)


def experts(
    group: Annotated[str, typer.Argument(help="A group, seat or model; none for all.")] = "",
    as_json: AsJson = False,
    state_dir: StateDir = None,
) -> None:
    """Show how the tokens of mixtures of experts spread over experts and slices."""
    from arriero.cluster.commands.views import experts_view

    with admin(state_dir) as client:
        found = [
            one
            for one in client.status().groups
            if group in ("", one.id, one.seat, one.model) and one.expert_loads
        ]
    if not found:
        which = f"{group!r} is no group" if group else "there is none"
        raise NotFound(f"{which} that exchanges tokens between experts (mesh dp > 1) and has begun")
    if as_json:
        print(json.dumps([plain(one) for one in found]))
        return
    for one in found:
        OUT.print(experts_view(one))


def events(
    limit: Annotated[int, typer.Option(min=1, help="The latest so many.")] = 50,
    follow: Annotated[bool, typer.Option(help="Go on until Ctrl-C.")] = False,
    as_json: AsJson = False,
    state_dir: StateDir = None,
) -> None:
    """Show what happened."""
    with admin(state_dir) as client:
        shown = 0.0
        while True:
            for one in client.events(limit):
                if one.at <= shown:
                    continue
                shown = one.at
                if as_json:
                    print(json.dumps(plain(one)), flush=True)
                else:
                    at = datetime.fromtimestamp(one.at).strftime("%H:%M:%S.%f")[:-3]
                    line = f"{at}  {one.kind:<9} {one.who:<24} {one.text}"
                    OUT.print(line, markup=False, soft_wrap=True)
            if not follow:
                return
            time.sleep(_POLL_S)


def why(
    group: Annotated[
        str, typer.Argument(help="A group, seat or model; none for the latest failure.")
    ] = "",
    as_json: AsJson = False,
    state_dir: StateDir = None,
) -> None:
    """Say in words why a group was lost: the first cause, and what followed from it."""
    with admin(state_dir) as client:
        found = client.why(group)
    if as_json:
        told = plain(found.failure)
        told["record"] = json.loads(found.failure.record or "null")
        print(json.dumps(told))
        return
    for line in found.lines:
        OUT.print(line, markup=False, soft_wrap=True)


def logs(
    group: Annotated[
        str, typer.Argument(help="A group or its seat; `gateways`, or one's id; `operator`.")
    ],
    lines: Annotated[int, typer.Option(min=1, max=1000, help="Of each process.")] = 20,
    as_json: AsJson = False,
    state_dir: StateDir = None,
) -> None:
    """Show the last lines that a group's leader and slices wrote, or gateways, or the operator."""
    with admin(state_dir) as client:
        found = client.logs(group, lines)
    if as_json:
        print(json.dumps([plain(one) for one in found]))
        return
    for one in found:
        OUT.print(f"{one.who} (pid {one.pid} on {one.node})", markup=False)
        for line in one.lines:
            OUT.print(f"  {line}", markup=False, soft_wrap=True)


def _note_gateway(client: AdminClient, state_dir: Path | None) -> None:
    """Gateways that were replaced may listen elsewhere."""
    from arriero.cluster import deployment_file as state

    folder = state.state_folder(state_dir)
    deployment, gateways = state.read(folder), client.status().gateways
    if deployment is None or not gateways:
        return
    if deployment.gateway not in {one.address for one in gateways}:
        first = gateways[0]
        state.write(folder, replace(deployment, gateway=first.address, http=first.http))


def _change(client: AdminClient, text: str, *, wait: bool, as_json: bool) -> None:
    """Say what was begun, and wait for its end."""
    if not as_json:
        ERR.print(text, markup=False, soft_wrap=True)
    if wait:
        with spinner() as say:
            _wait(client, say)
    if as_json:
        print(json.dumps({"change": text, "settled": wait}))
    elif wait:
        OUT.print("done", markup=False)


def _wait(client: AdminClient, say: object) -> None:
    """Wait until all is as wanted.

    Raises:
        GroupFailed: a group of the wanted revision cannot start; the others serve on.
    """
    assert callable(say)
    while True:
        found = client.status()
        if all(model.settled for model in found.models):
            return
        wanted = {model.model: model.revision for model in found.models}
        for group in found.groups:
            if group.phase == "failed" and group.revision == wanted.get(group.model):
                raise GroupFailed(
                    f"{group.seat} does not start: {group.text}; the others serve on"
                    f" (`arriero rollback {group.model}` goes back)"
                )
        moving = [one for one in found.groups if one.phase != "serving"]
        say(", ".join(f"{one.seat} {one.phase}" for one in moving) or "waiting")
        time.sleep(_POLL_S)


def plain(
    message: Message,
) -> dict[str, object]:
    """A message as JSON can carry it, with every field and numbers as numbers."""
    found: dict[str, object] = {}
    for one in message.DESCRIPTOR.fields:
        value = getattr(message, one.name)
        if one.is_repeated:
            value = [plain(item) if one.message_type else item for item in value]
        elif one.has_presence and not message.HasField(one.name):
            value = None
        found[one.name] = value
    return found
