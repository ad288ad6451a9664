"""Actions on the nodes of the cluster: check a node, run a function or kill processes on a node.

Knows Ray's nodes, processes and sockets; knows nothing of groups.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from arriero.cluster.hosts import ray_private
from arriero.shards.errors import ArrieroError, Unavailable

ON_HEAD = {"node:__internal_head__": 0.001}
"""Resources of an actor that must run on the head of the cluster; without the head all is lost.

A node affinity to the head holds only for the first start: of 25 restarts 16 were on other nodes.
"""
ASK_S = 3.0
WORK_S = 20.0
"""Timeout of `run_on`; a node without an idle worker must first start one."""
R = TypeVar("R")
MAX_LINE = 2000
"""Most characters of a line that `log_tail` gives; a line of JSON with a traceback is long."""
_PROBE_S = 1.0


def count_free_bundles(bundle: Mapping[str, float], without: Collection[str] = ()) -> int:
    """Number of bundles with these resources that are free, each on one node.

    Args:
        bundle: resources of a bundle.
        without: ids of nodes that do not count.
    """
    return sum(
        min(int(node.get(name, 0.0) / amount + 1e-6) for name, amount in bundle.items())
        for node_id, node in ray_private.free_resources().items()
        if node_id not in without
    )


def most_free(bundle: Mapping[str, float], without: Collection[str] = ()) -> dict[str, float]:
    """Of each resource of a bundle, the largest amount that is free on one node."""
    nodes = ray_private.free_resources().items()
    free = [resources for node_id, resources in nodes if node_id not in without]
    return {name: max((node.get(name, 0.0) for node in free), default=0.0) for name in bundle}


async def answers(address: str, limit_s: float) -> bool:
    """Whether host:port accepts connections; a process under SIGSTOP still accepts."""
    host, _, port = address.rpartition(":")
    try:
        _, writer = await asyncio.wait_for(asyncio.open_connection(host, int(port)), limit_s)
    except (OSError, TimeoutError):
        return False
    writer.close()
    return True


def is_gone(node_id: str) -> bool:
    """Whether the raylet of a node is gone; true seconds before Ray declares the node dead."""
    raylet = _raylet(node_id)
    if raylet is None:
        return True
    try:
        socket.create_connection(raylet, _PROBE_S).close()
    except OSError:
        return True
    return False


async def until_gone(node_id: str) -> None:
    """Wait until the raylet of a node is gone, which breaks an open connection at once.

    The workers of the node end with the raylet, but only after some seconds.
    """
    while (raylet := await asyncio.to_thread(_raylet, node_id)) is not None:
        try:
            reader, writer = await asyncio.wait_for(asyncio.open_connection(*raylet), _PROBE_S)
        except ConnectionRefusedError:
            return
        except OSError:  # no route at the moment; other checks notice a node that is cut off
            await asyncio.sleep(_PROBE_S)
            continue
        with contextlib.suppress(OSError):
            while await reader.read(1024):
                continue  # the raylet sends its protocol, and later closes such a connection
        writer.close()
        await asyncio.sleep(0.1)


def _raylet(node_id: str) -> tuple[str, int] | None:
    """Host and port of a node's raylet; None when Ray has declared the node dead."""
    for node in ray.nodes():  # type: ignore[no-untyped-call]
        if node["NodeID"] == node_id and node["Alive"]:
            return node["NodeManagerAddress"], node["NodeManagerPort"]
    return None


async def kill_all(processes: Iterable[tuple[str, int]]) -> None:
    """Kill processes, given as node id and pid; stopped processes too; skips those that ended."""
    by_node: dict[str, list[int]] = {}
    for node_id, pid in processes:
        if pid:
            by_node.setdefault(node_id, []).append(pid)
    here = ray.get_runtime_context().get_node_id()
    waiting = []
    for node_id, pids in by_node.items():
        if node_id == here:
            _kill(pids)
        else:
            waiting.append(_submit(node_id, _kill, pids))
    if waiting:
        with contextlib.suppress(TimeoutError, ray.exceptions.RayError):
            await asyncio.wait_for(asyncio.gather(*waiting, return_exceptions=True), ASK_S)


async def log_tail(node_id: str, pid: int, count: int, limit_s: float = ASK_S) -> list[str]:
    """The last lines of a worker process's own log files; empty when the node does not answer."""
    if node_id == ray.get_runtime_context().get_node_id():
        return await asyncio.to_thread(_tail, pid, count)
    with contextlib.suppress(TimeoutError, ray.exceptions.RayError):
        lines: list[str] = await asyncio.wait_for(_submit(node_id, _tail, pid, count), limit_s)
        return lines
    return []


async def run_on(node_id: str, work: Callable[..., R], *args: object) -> R:
    """The result of `work(*args)` on a node.

    Raises:
        ArrieroError: `work` raised the error.
        Unavailable: the node does not answer in time.
    """
    try:
        result: R = await asyncio.wait_for(_submit(node_id, work, *args), WORK_S)
        return result
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, ArrieroError):
            raise error.cause from None
        raise Unavailable(str(error.cause)) from None
    except TimeoutError:
        raise Unavailable(f"the node gave no answer in {WORK_S:g} s") from None
    except ray.exceptions.RayError as error:
        raise Unavailable(f"the node does not answer: {error}") from None


def _submit(node_id: str, work: Callable[..., Any], *args: object) -> asyncio.Future[Any]:
    task: Any = ray.remote(work)
    placed = task.options(
        num_cpus=0,
        max_retries=0,
        scheduling_strategy=NodeAffinitySchedulingStrategy(node_id=node_id, soft=False),
    )
    return asyncio.wrap_future(placed.remote(*args).future())


def _kill(pids: list[int]) -> None:
    for pid in pids:
        with contextlib.suppress(OSError):
            # the system reuses pids: kill only a worker of Ray
            if Path("/proc", str(pid), "cmdline").read_bytes().startswith(b"ray::"):
                os.kill(pid, signal.SIGKILL)


def _tail(pid: int, count: int) -> list[str]:
    lines: list[str] = []
    for path in sorted(log_folder().glob(f"worker-*-{pid}.err")):
        text = path.read_text(errors="replace")
        # Ray marks its own lines with a colon at the start
        lines += [line[:MAX_LINE] for line in text.splitlines() if line.strip() and line[0] != ":"]
    return lines[-count:]


def log_folder() -> Path:
    """The folder of this node's logs; ends with the Ray cluster, if Ray's temporary folder does."""
    context = ray.get_runtime_context()
    return Path(context.get_temp_dir(), context.get_session_name(), "logs")


def node_address() -> str:
    """The address of this node in the Ray cluster."""
    return str(ray.util.get_node_ip_address())  # type: ignore[no-untyped-call]


def reachable(host: str, port: int) -> str:
    """The address for clients: a server on every interface has the address of its node."""
    return f"{node_address() if host in ('0.0.0.0', '[::]') else host}:{port}"
