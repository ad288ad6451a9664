"""The processes of Prompt Guard, as Ray Serve sees them, for the status of a deployment.

Knows the deployment of Prompt Guard in Serve; knows nothing of the classifier and of policies.
"""

from __future__ import annotations

import asyncio

import ray
from ray import serve
from ray.serve.exceptions import RayServeException
from ray.serve.schema import ServeStatus

from arriero.cluster import app
from arriero.cluster.replica import prompt_guard_service
from arriero.cluster.spec.deployment import DeploymentSpec
from arriero.router.proto.arriero.v1 import admin_pb2 as pb

_LIMIT_S = 5.0
"""Seconds to wait for Serve's status; the rest of the deployment's status does not need it."""
_LONGEST = 500
"""Most characters of Serve's message; the message may hold a traceback."""


async def fill_prompt_guard(status: pb.Status, spec: DeploymentSpec) -> None:
    """Set `status.prompt_guard`; leave the field unset for a spec without Prompt Guard."""
    if (guard := spec.gateway.prompt_guard) is None:
        return
    try:
        seen = await asyncio.wait_for(asyncio.to_thread(serve.status), _LIMIT_S)
    except (TimeoutError, ray.exceptions.RayError, RayServeException):
        text = "Ray Serve gives no status now"
        status.prompt_guard.CopyFrom(pb.PromptGuardStatus(replicas=guard.replicas, text=text))
    else:
        status.prompt_guard.CopyFrom(prompt_guard_status(seen, guard.replicas))


def prompt_guard_status(seen: ServeStatus, replicas: int) -> pb.PromptGuardStatus:
    """The processes that run, and why processes are missing.

    Args:
        seen: status of Serve.
        replicas: desired number of processes.
    """
    application = seen.applications.get(app.NAME)
    deployments = {} if application is None else application.deployments
    deployment = deployments.get(prompt_guard_service.NAME)
    status = pb.PromptGuardStatus(replicas=replicas, running=0)
    if deployment is None:
        return status
    states = deployment.replica_states.items()
    status.running = sum(count for state, count in states if state == "RUNNING")
    if status.running < replicas:
        lines = [line.strip() for line in deployment.message.splitlines() if line.strip()]
        # the last line of a traceback has the error
        text = "; ".join(dict.fromkeys([*lines[:1], *lines[-1:]]))
        status.text = text[:_LONGEST]
    return status
