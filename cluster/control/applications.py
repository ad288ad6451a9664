"""The Ray Serve applications of a deployment: one of the gateways, and one of each group.

Each group is an application of its own, so that one group starts and drains by name; Serve replaces
a group that dies. Knows Serve's applications by name; knows nothing of the desired state.
"""

from __future__ import annotations

import asyncio

from ray import serve

from arriero.cluster import app
from arriero.cluster.hosts import ray_private
from arriero.cluster.spec.deployment import DeploymentSpec

PREFIX = f"{app.NAME}-"
"""Name of a group's application: this prefix, then the seat."""


class Applications:
    """Starts, stops and reads the applications.

    Attributes:
        failed: seats whose application Serve could not deploy, with Serve's message.
        replacing_gateways: gateways with an earlier spec may still run.
    """

    def __init__(self) -> None:
        self.failed: dict[str, str] = {}
        self.replacing_gateways = False

    async def deploy_gateways(self, spec: DeploymentSpec) -> None:
        """Deploy the gateways, or replace them by gateways of another spec."""
        await asyncio.to_thread(_run, app.NAME, app.gateways(spec))

    async def start_group(self, seat: str, built: serve.Application) -> None:
        """Deploy the group of a seat."""
        await asyncio.to_thread(_run, PREFIX + seat, built)

    async def stop_group(self, seat: str) -> None:
        """Drain the group of a seat, without waiting for the end."""
        await asyncio.to_thread(ray_private.delete_application, PREFIX + seat)

    async def read(self) -> frozenset[str]:
        """Read the status of all applications; returns the seats that have an application."""
        statuses = (await asyncio.to_thread(serve.status)).applications
        if app.NAME in statuses and statuses[app.NAME].status == "RUNNING":
            self.replacing_gateways = False
        groups = {
            name.removeprefix(PREFIX): status
            for name, status in statuses.items()
            if name.startswith(PREFIX)
        }
        self.failed = {
            seat: status.message.strip()
            for seat, status in groups.items()
            if status.status == "DEPLOY_FAILED"
        }
        return frozenset(groups)


def is_ours(name: str) -> bool:
    """Whether a Serve application belongs to an arriero deployment."""
    return name == app.NAME or name.startswith(PREFIX)


def _run(name: str, built: serve.Application) -> None:
    serve.run_many(
        [serve.RunTarget(target=built, name=name, route_prefix=None)],
        wait_for_ingress_deployment_creation=False,
        wait_for_applications_running=False,
    )
