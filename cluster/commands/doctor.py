"""`arriero doctor`: is every node fit to serve, and if not, what is to be done."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from arriero.cluster.commands.deployment import StateDir
from arriero.cluster.commands.terminal import OUT, spinner

if TYPE_CHECKING:
    from arriero.cluster.checkup import Facts

_MARKS = {"ok": "[green]ok[/]", "warn": "[yellow]warn[/]", "fail": "[red]fail[/]"}


def add_to(app: typer.Typer) -> None:
    """Add the command to `app`."""
    app.command("doctor")(doctor)


def doctor(
    spec: Annotated[
        Path | None, typer.Argument(help="Its models must be there, and its ports free.")
    ] = None,
    address: Annotated[
        str | None,
        typer.Option(help="Ray cluster to look at; else the deployment's, else this machine."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="JSON on stdout.")] = False,
    state_dir: StateDir = None,
) -> None:
    """Check versions, drivers, NCCL, clocks, disks, limits and ports; exit 1 if one fails."""
    from arriero.cluster import checkup, state
    from arriero.cluster.spec_file import load
    from arriero.cluster.state import Deployment
    from arriero.shards.checkpoint.remote import is_url

    models, ports = [], []
    if spec is not None:
        wanted = load(spec, {})
        models = [one.path for one in wanted.models if not is_url(one.path)]
        ports = [one for one in (wanted.gateway.port, wanted.gateway.http_port) if one]
    deployment = state.read(state.state_folder(state_dir))
    if address is not None:
        deployment = Deployment(ray_address=address)
    with spinner() as say:
        say("looking at this machine" if deployment is None else "looking at the nodes")
        if deployment is None:
            facts, skews_s = {"here": checkup.look(models, ports)}, {"here": 0.0}
        else:
            facts, skews_s = _look_everywhere(deployment, models, ports)
    findings = checkup.judge(facts, skews_s)
    if as_json:
        print(json.dumps([asdict(one) for one in findings]))
    else:
        table = Table("node", "", "what", "what to do")
        for one in findings:
            table.add_row(one.node, _MARKS[one.grade], one.what, one.remedy)
        OUT.print(table)
    if any(one.grade == "fail" for one in findings):
        raise typer.Exit(1)


def _look_everywhere(
    deployment: Any,  # noqa: ANN401
    models: list[str],
    ports: list[int],
) -> tuple[dict[str, Facts], dict[str, float]]:
    """Facts and clock skews of every node that is alive."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    from arriero.cluster import checkup
    from arriero.cluster.deploy import connected

    facts: dict[str, Facts] = {}
    skews_s: dict[str, float] = {}
    with connected(deployment):
        task: Any = ray.remote(checkup.look)
        for node in ray.nodes():  # type: ignore[no-untyped-call]
            if not node["Alive"]:
                continue
            at = NodeAffinitySchedulingStrategy(node_id=node["NodeID"], soft=False)
            placed = task.options(num_cpus=0, scheduling_strategy=at)
            ray.get(placed.remote(models, ports))  # the worker has started by the second call
            asked_s = time.time()
            found: Facts = ray.get(placed.remote(models, ports))
            name = node["NodeManagerAddress"]
            facts[name] = found
            middle_s = (asked_s + time.time()) / 2
            skews_s[name] = max(0.0, abs(found.clock_s - middle_s) - (time.time() - asked_s) / 2)
    return facts, skews_s
