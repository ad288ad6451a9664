"""`arriero doctor`: is every node fit to serve, and if not, what is to be done."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from arriero.cluster.commands.options import StateDir
from arriero.cluster.commands.terminal import OUT, spinner

if TYPE_CHECKING:
    from arriero.cluster.deployment_file import Deployment
    from arriero.cluster.hosts.doctor import Facts, NodeNeeds
    from arriero.cluster.spec.deployment import DeploymentSpec

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
    """Check versions, drivers, NCCL, clocks, disks, limits, ports and ways; exit 1 if one fails."""
    from arriero.cluster import deployment_file as state
    from arriero.cluster.deployment_file import Deployment
    from arriero.cluster.hosts import doctor as checkup
    from arriero.cluster.spec.load import load

    deployment = state.read(state.state_folder(state_dir))
    needs = checkup.NodeNeeds()
    if spec is not None:
        needs = _node_needs(load(spec, {}), deployment)
    if address is not None and (deployment is None or deployment.ray_address != address):
        deployment = Deployment(ray_address=address)
    with spinner() as say:
        say("looking at this machine" if deployment is None else "looking at the nodes")
        if deployment is None:
            facts, skews_s = {"here": checkup.collect(needs)}, {"here": 0.0}
        else:
            facts, skews_s = _look_everywhere(deployment, needs)
    findings = checkup.judge(facts, skews_s)
    if as_json:
        print(json.dumps([finding.to_json() for finding in findings]))
    else:
        table = Table("node", "", "what", "what to do")
        for finding in findings:
            table.add_row(finding.node, _MARKS[finding.grade], finding.text, finding.remedy)
        OUT.print(table)
    if any(finding.grade == "fail" for finding in findings):
        raise typer.Exit(1)


def _node_needs(spec: DeploymentSpec, deployment: Deployment | None) -> NodeNeeds:
    """What a spec wants of each node; ports that its own deployment has taken are no matter."""
    from arriero.cluster.hosts.doctor import NodeNeeds
    from arriero.shards.checkpoint.remote import is_url

    ours = [] if deployment is None else [deployment.gateway, deployment.http, deployment.admin]
    taken = {at.rpartition(":")[2] for at in ours}
    ports = (spec.gateway.port, spec.gateway.http_port, spec.admin.port)
    disks = {str(m.kv.disk.path): m.kv.disk.size for m in spec.models if m.kv.disk is not None}
    return NodeNeeds(
        models=tuple(one.path for one in spec.models if not is_url(one.path)),
        ports=tuple(one for one in ports if one and str(one) not in taken),
        disks=disks,
    )


def _look_everywhere(
    deployment: Deployment, needs: NodeNeeds
) -> tuple[dict[str, Facts], dict[str, float]]:
    """Facts and clock skews of every node that is alive."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    from arriero.cluster.deploy import connected
    from arriero.cluster.hosts import doctor as checkup

    facts: dict[str, Facts] = {}
    skews_s: dict[str, float] = {}
    with connected(deployment):
        task: Any = ray.remote(checkup.collect)
        ear: Any = ray.remote(checkup.ProbeListener)
        alive = [node for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
        places = {
            node["NodeManagerAddress"]: {
                "num_cpus": 0,
                "scheduling_strategy": NodeAffinitySchedulingStrategy(
                    node_id=node["NodeID"], soft=False
                ),
            }
            for node in alive
        }
        ears = {name: ear.options(**place).remote(name) for name, place in places.items()}
        heard = {name: ray.get(one.port.remote()) for name, one in ears.items()}
        for name, place in places.items():
            placed = task.options(**place)
            peers = tuple((other, port) for other, port in heard.items() if other != name)
            ray.get(placed.remote(needs))  # the worker has started by the second call
            asked_s = time.time()
            found: Facts = ray.get(placed.remote(replace(needs, peers=peers)))
            facts[name] = found
            middle_s = (asked_s + time.time()) / 2
            skews_s[name] = max(0.0, abs(found.clock_s - middle_s) - (time.time() - asked_s) / 2)
    return facts, skews_s
