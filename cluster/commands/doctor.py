"""`arriero doctor`: a check of every node, with a remedy for each problem.

Knows flags, tables and the nodes of Ray; the checks are in `cluster/hosts/doctor.py`.
"""

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
        Path | None,
        typer.Argument(help="Deployment spec: checks model folders, disk space and ports too."),
    ] = None,
    address: Annotated[
        str | None,
        typer.Option(help="Ray cluster; else the cluster of the deployment, else this machine."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="JSON on stdout.")] = False,
    state_dir: StateDir = None,
) -> None:
    """Check versions, drivers, NCCL, clocks, disks, limits, ports and network of each node.

    The exit code is 1 when a check fails.
    """
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
    with spinner() as show:
        show("checking this machine" if deployment is None else "checking the nodes")
        if deployment is None:
            facts, skews_s = {"here": checkup.collect(needs)}, {"here": 0.0}
        else:
            facts, skews_s = _collect_everywhere(deployment, needs)
    findings = checkup.judge(facts, skews_s)
    if as_json:
        print(json.dumps([finding.to_json() for finding in findings]))
    else:
        table = Table("node", "", "finding", "remedy")
        for finding in findings:
            table.add_row(finding.node, _MARKS[finding.grade], finding.text, finding.remedy)
        OUT.print(table)
    if any(finding.grade == "fail" for finding in findings):
        raise typer.Exit(1)


def _node_needs(spec: DeploymentSpec, deployment: Deployment | None) -> NodeNeeds:
    """The needs of a spec on each node, without the ports that the running deployment uses."""
    from arriero.cluster.hosts.doctor import NodeNeeds
    from arriero.shards.checkpoint.remote import is_url

    addresses = (
        [] if deployment is None else [deployment.gateway, deployment.http, deployment.admin]
    )
    used_ports = {address.rpartition(":")[2] for address in addresses}
    ports = (spec.gateway.port, spec.gateway.http_port, spec.admin.port)
    disks = {str(m.kv.disk.path): m.kv.disk.size for m in spec.models if m.kv.disk is not None}
    return NodeNeeds(
        models=tuple(model.path for model in spec.models if not is_url(model.path)),
        ports=tuple(port for port in ports if port and str(port) not in used_ports),
        disks=disks,
    )


def _collect_everywhere(
    deployment: Deployment, needs: NodeNeeds
) -> tuple[dict[str, Facts], dict[str, float]]:
    """Facts and clock skews (seconds) of every living node, by address."""
    from arriero.cluster.connection import checked_access, connected

    checked_access(deployment)  # before the import of Ray, which takes seconds
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    from arriero.cluster.hosts import doctor as checkup

    facts: dict[str, Facts] = {}
    skews_s: dict[str, float] = {}
    with connected(deployment):
        task: Any = ray.remote(checkup.collect)
        listener: Any = ray.remote(checkup.ProbeListener)
        alive = [node for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
        options = {
            node["NodeManagerAddress"]: {
                "num_cpus": 0,
                "scheduling_strategy": NodeAffinitySchedulingStrategy(
                    node_id=node["NodeID"], soft=False
                ),
            }
            for node in alive
        }
        listeners = {
            address: listener.options(**placement).remote(address)
            for address, placement in options.items()
        }
        probe_ports = {
            address: ray.get(actor.port.remote()) for address, actor in listeners.items()
        }
        for address, placement in options.items():
            placed = task.options(**placement)
            peers = tuple((peer, port) for peer, port in probe_ports.items() if peer != address)
            ray.get(placed.remote(needs))  # starts the worker, so that the next call is quick
            before_s = time.time()
            node_facts: Facts = ray.get(placed.remote(replace(needs, peers=peers)))
            after_s = time.time()
            facts[address] = node_facts
            middle_s = (before_s + after_s) / 2
            half_s = (after_s - before_s) / 2
            skews_s[address] = max(0.0, abs(node_facts.clock_s - middle_s) - half_s)
    return facts, skews_s
