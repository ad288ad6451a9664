"""Ports and folders that a changed spec names, checked on the nodes before anything changes.

Knows which fields changed, and the nodes of the cluster; the checks are in `hosts/node_check`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import ray

from arriero.cluster.hosts import node_check, nodes
from arriero.cluster.spec.deployment import DeploymentSpec
from arriero.shards.errors import SpecError, Unavailable


@dataclass(frozen=True, kw_only=True, slots=True)
class NodeCheck:
    """A check that must pass on some nodes.

    Attributes:
        check: raises SpecError where a node fails.
        arguments: of `check`.
        least: number of nodes that must pass; None for all.
    """

    check: Callable[..., None]
    arguments: tuple[object, ...]
    least: int | None = None


def checks_of(old: DeploymentSpec, new: DeploymentSpec) -> list[NodeCheck]:
    """The checks that the difference of two specs calls for."""
    before = {model.name: model.kv.disk for model in old.models}
    checks = [
        NodeCheck(check=node_check.check_disk, arguments=(model.name, model.kv.disk))
        for model in new.models
        if model.kv.disk is not None and model.kv.disk != before.get(model.name)
    ]
    guard = new.gateway.prompt_guard
    if guard is not None and guard != old.gateway.prompt_guard:
        checks.append(NodeCheck(check=node_check.check_prompt_guard, arguments=(guard.path,)))
    addresses = [
        ("gateway.port", new.gateway.host, new.gateway.port, old.gateway.port),
        (
            "gateway.http.port",
            "127.0.0.1" if new.gateway.http is None else new.gateway.http.host,
            new.gateway.http_port,
            old.gateway.http_port,
        ),
    ]
    for field, host, port, port_before in addresses:
        if port and port != port_before:
            arguments = (field, host, port)
            count = new.gateway.count
            checks.append(NodeCheck(check=node_check.check_port, arguments=arguments, least=count))
    return checks


async def check_nodes(checks: Iterable[NodeCheck]) -> None:
    """Run checks on all nodes of the cluster.

    Raises:
        SpecError: a check fails on too many nodes; the text is the first failure.
    """
    checks = list(checks)
    if not checks:
        return
    node_ids = [node["NodeID"] for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
    for entry in checks:
        failures = await asyncio.gather(*(_failure(node_id, entry) for node_id in node_ids))
        errors = [error for error in failures if error is not None]
        least = len(node_ids) if entry.least is None else entry.least
        if errors and len(node_ids) - len(errors) < least:
            raise errors[0]


async def _failure(node_id: str, entry: NodeCheck) -> SpecError | None:
    """The error of a check on a node; None for none, or for a node that does not answer."""
    try:
        if node_id == ray.get_runtime_context().get_node_id():
            await asyncio.to_thread(entry.check, *entry.arguments)
        else:
            await nodes.run_on(node_id, entry.check, *entry.arguments)
    except SpecError as error:
        return error
    except Unavailable:
        return None
    return None
