"""What can be done to the nodes of the cluster: see whether one is there, end a process on it.

Knows Ray's nodes, processes and sockets; knows nothing of groups.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import ray

if TYPE_CHECKING:
    pass
import asyncio
import contextlib
import glob
import signal
import socket
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from arriero.shards.errors import ArrieroError, Unavailable

ON_HEAD = {"node:__internal_head__": 0.001}
"""Resources of an actor that is to be on the cluster's head, without which all is lost anyway.

An affinity to that node holds for the first start alone: of 25 restarts 16 were on other nodes.
"""
ASK_S = 3.0
WORK_S = 20.0
"""A node that has no worker to spare starts one for what it is asked."""
R = TypeVar("R")
_PROBE_S = 1.0


def room_for(wanted: Mapping[str, float]) -> int:
    """How many bundles of these resources the nodes have free, each on one node."""
    free = ray._private.state.available_resources_per_node()  # type: ignore[no-untyped-call]
    return sum(
        min(int(node.get(name, 0.0) / amount + 1e-6) for name, amount in wanted.items())
        for node in free.values()
    )


async def answers(address: str, limit_s: float) -> bool:
    """Whether something accepts connections at host:port; a process that is stopped still does."""
    host, _, port = address.rpartition(":")
    try:
        _, writer = await asyncio.wait_for(asyncio.open_connection(host, int(port)), limit_s)
    except (OSError, TimeoutError):
        return False
    writer.close()
    return True


def is_gone(node_id: str) -> bool:
    """Whether a node's raylet no longer answers: seconds before Ray itself gives the node up."""
    where = _raylet(node_id)
    if where is None:
        return True
    try:
        socket.create_connection(where, _PROBE_S).close()
    except OSError:
        return True
    return False


async def until_gone(node_id: str) -> None:
    """Wait until a node's raylet is gone, seen by a connection to it that breaks.

    Its workers, which end with it, take some seconds to notice.
    """
    while (where := await asyncio.to_thread(_raylet, node_id)) is not None:
        try:
            reader, writer = await asyncio.wait_for(asyncio.open_connection(*where), _PROBE_S)
        except ConnectionRefusedError:
            return
        except OSError:  # no way there just now; who is cut off is silent, and found so
            await asyncio.sleep(_PROBE_S)
            continue
        with contextlib.suppress(OSError):
            while await reader.read(1024):
                continue  # it says what it speaks, and after a while ends such a connection
        writer.close()
        await asyncio.sleep(0.1)


def _raylet(node_id: str) -> tuple[str, int] | None:
    """Where a node's raylet listens; None once Ray has given the node up."""
    for node in ray.nodes():  # type: ignore[no-untyped-call]
        if node["NodeID"] == node_id and node["Alive"]:
            return node["NodeManagerAddress"], node["NodeManagerPort"]
    return None


async def kill_all(places: Iterable[tuple[str, int]]) -> None:
    """Kill processes, (node id, pid), also stopped ones; those that are gone are no matter."""
    by_node: dict[str, list[int]] = {}
    for node_id, pid in places:
        if pid:
            by_node.setdefault(node_id, []).append(pid)
    here = ray.get_runtime_context().get_node_id()
    waiting = []
    for node_id, pids in by_node.items():
        if node_id == here:
            _kill(pids)
        else:
            waiting.append(_on(node_id, _kill, pids))
    if waiting:
        with contextlib.suppress(TimeoutError, ray.exceptions.RayError):
            await asyncio.wait_for(asyncio.gather(*waiting, return_exceptions=True), ASK_S)


async def log_tail(node_id: str, pid: int, count: int, limit_s: float = ASK_S) -> list[str]:
    """The last lines that a worker process wrote to its own log files; [] if they are away."""
    if node_id == ray.get_runtime_context().get_node_id():
        return await asyncio.to_thread(_tail, pid, count)
    with contextlib.suppress(TimeoutError, ray.exceptions.RayError):
        lines: list[str] = await asyncio.wait_for(_on(node_id, _tail, pid, count), limit_s)
        return lines
    return []


async def ask(node_id: str, work: Callable[..., R], *args: object) -> R:
    """What `work(*args)` gives on a node.

    Raises:
        ArrieroError: `work` raised it.
        Unavailable: the node does not answer in time.
    """
    try:
        found: R = await asyncio.wait_for(_on(node_id, work, *args), WORK_S)
        return found
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, ArrieroError):
            raise error.cause from None
        raise Unavailable(str(error.cause)) from None
    except (TimeoutError, ray.exceptions.RayError) as error:
        raise Unavailable(f"the node does not answer: {error or 'too late'}") from None


def _on(node_id: str, work: Callable[..., Any], *args: object) -> asyncio.Future[Any]:
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
            # numbers of processes are used again in time: only a worker of Ray's is killed
            if Path("/proc", str(pid), "cmdline").read_bytes().startswith(b"ray::"):
                os.kill(pid, signal.SIGKILL)


def _tail(pid: int, count: int) -> list[str]:
    folder: str = ray._private.worker._global_node.get_logs_dir_path()  # type: ignore[attr-defined]
    lines: list[str] = []
    for name in sorted(glob.glob(f"{glob.escape(folder)}/worker-*-{pid}.err")):
        text = Path(name).read_text(errors="replace")
        # a line that begins with a colon is Ray's own mark
        lines += [one[:300] for one in text.splitlines() if one.strip() and one[0] != ":"]
    return lines[-count:]


def node_address() -> str:
    """This node's address, as Ray knows it."""
    return str(ray.util.get_node_ip_address())  # type: ignore[no-untyped-call]


def reachable(host: str, port: int) -> str:
    """The address that others use; a listener on every interface is reached at its node's."""
    return f"{node_address() if host in ('0.0.0.0', '[::]') else host}:{port}"
