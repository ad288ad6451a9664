"""A Ray cluster on this machine that outlives the command that started the cluster.

All processes of the cluster share one process session, which survives the session's leader: `stop`
thus finds all processes of the cluster, workers and orphans included, and no others. (A signal to
Ray's own supervisor is not enough: the supervisor waits up to 30 s to drain.)

Knows processes; knows nothing of the applications on the cluster.
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

from arriero.cluster.hosts import ray_access, ray_private
from arriero.cluster.spec.deployment import RaySpec
from arriero.shards.errors import Unavailable

START_LIMIT_S = 60.0
_POLL_S = 0.02
_PREFIX = "arriero-ray-"
_started: dict[int, subprocess.Popen[bytes]] = {}
"""Processes of `ray start` that this process started and that may still run, by session."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LocalCluster:
    """A local cluster that is starting or up.

    Attributes:
        session: process session id of all processes of the cluster.
        folder: Ray's temporary folder: sockets, logs, and `start.log` of the start.
        node_address: loopback address of the node.
        token: token that processes and drivers of the cluster must send; "" for none.
    """

    session: int
    folder: Path
    node_address: str
    token: str = field(default="", repr=False)

    @property
    def access(self) -> ray_access.Changes:
        """Environment variables of drivers and of nodes that join."""
        return ray_access.own_cluster(self.token, self.node_address)


def start(spec: RaySpec) -> LocalCluster:
    """Start a cluster without waiting; `wait_address` waits until the cluster is up.

    The cluster has a token of its own, independent of the user's settings and files for Ray. With
    the default `node_address` all processes listen on loopback only; with another address Ray's
    processes listen on every interface, and only the token keeps others out.
    """
    token = secrets.token_hex(32)
    # not in the state folder: Ray's socket paths must stay under 107 characters
    folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir="/tmp"))
    temporary = folder / "tmp"
    temporary.mkdir()
    command = [
        *(sys.executable, "-m", "ray.scripts.scripts", "start", "--head"),
        *("--node-ip-address", spec.node_address, "--port", "0"),
        *("--ray-client-server-port", str(_free_port(spec.node_address))),
        *("--num-cpus", str(spec.num_cpus or len(os.sched_getaffinity(0)))),
        *("--object-store-memory", str(spec.object_store)),
        *("--temp-dir", str(folder)),
        *("--include-dashboard", str(spec.dashboard).lower(), "--dashboard-host", "127.0.0.1"),
        *("--disable-usage-stats", "--no-monitor", "--include-log-monitor", "false"),
    ]
    access = ray_access.own_cluster(token, spec.node_address)
    environment = ray_access.changed(os.environ, access) | {
        "RAY_USAGE_STATS_ENABLED": "0",
        "TMPDIR": str(temporary),  # files of a killed process are removed with the folder
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
    }
    if not spec.dashboard:
        # without the dashboard nobody reads Ray's metrics: the raylet's memory would grow, and the
        # ports of the metrics would answer everybody
        environment.setdefault("RAY_enable_metrics_collection", "0")
        environment.setdefault(ray_private.METRICS_PORT, "-1")
    environment.pop("RAY_ADDRESS", None)
    with (folder / "start.log").open("w") as log:
        process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            cwd=folder,
        )
    _started[process.pid] = process
    return LocalCluster(
        session=process.pid, folder=folder, node_address=spec.node_address, token=token
    )


def wait_address(cluster: LocalCluster) -> str:
    """Wait until the cluster is up; returns the GCS address, host:port.

    Raises:
        Unavailable: the cluster did not start; the text has the last line of `start.log`.
    """
    deadline_s = time.monotonic() + START_LIMIT_S
    address_file = cluster.folder / "ray_current_cluster"
    while time.monotonic() < deadline_s:
        if address_file.exists() and (address := address_file.read_text().strip()):
            return address
        _reap(cluster.session)
        if not members(cluster.session):
            break
        time.sleep(_POLL_S)
    log = (cluster.folder / "start.log").read_text(errors="replace").strip().splitlines()
    raise Unavailable(
        f"the local Ray cluster did not start within {START_LIMIT_S:g} s;"
        f" {cluster.folder / 'start.log'} ends in: {log[-1] if log else '(nothing)'}"
    )


def stop(cluster: LocalCluster, grace_s: float = 1.0, keep_logs: Path | None = None) -> None:
    """End all processes of the cluster and remove the folder; safe after an earlier stop.

    Args:
        cluster: the cluster.
        grace_s: seconds from the request to end until the kill.
        keep_logs: folder that takes the logs of the cluster, in place of its contents; None
            removes the logs too.
    """
    if is_alive(cluster):
        _end_processes(cluster, grace_s)
    if keep_logs is not None:
        _move_logs(cluster.folder, keep_logs)
    shutil.rmtree(cluster.folder, ignore_errors=True)


def _end_processes(cluster: LocalCluster, grace_s: float) -> None:
    for sign, wait_s in ((signal.SIGTERM, grace_s), (signal.SIGKILL, 10.0)):
        deadline_s = time.monotonic() + wait_s
        sent: set[int] = set()
        while (pids := members(cluster.session)) and time.monotonic() < deadline_s:
            for pid in pids:
                if pid not in sent:
                    sent.add(pid)
                    _signal(pid, sign)
            _reap(cluster.session)
            time.sleep(_POLL_S)


def _move_logs(cluster_folder: Path, target: Path) -> None:
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(mode=0o700, parents=True)
    start_log, logs = cluster_folder / "start.log", cluster_folder / "session_latest" / "logs"
    if start_log.exists():
        shutil.move(start_log, target)
    if logs.exists():
        for path in logs.iterdir():
            shutil.move(path, target)


def is_alive(cluster: LocalCluster) -> bool:
    """Whether processes of this cluster run (the system reuses session ids)."""
    folder = os.fsencode(cluster.folder)
    return any(folder in _command(pid) for pid in members(cluster.session))


def has_head(cluster: LocalCluster) -> bool:
    """Whether the processes of the cluster's head run; without them all other processes end."""
    folder = os.fsencode(cluster.folder)
    commands = [_command(pid) for pid in members(cluster.session)]
    programs = [command.partition(b"\0")[0] for command in commands if folder in command]
    return all(
        any(program.endswith(name) for program in programs) for name in ray_private.HEAD_PROCESSES
    )


def members(session: int) -> list[int]:
    """Running processes of a process session; zombies are left out."""
    pids = []
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                # after the command's name, in parentheses: state, parent, group, session
                fields = Path("/proc", entry, "stat").read_bytes().rpartition(b")")[2].split()
            except OSError:
                continue  # the process has ended meanwhile
            if int(fields[3]) == session and fields[0] not in b"ZX":
                pids.append(int(entry))
    return pids


def _command(pid: int) -> bytes:
    try:
        return Path("/proc", str(pid), "cmdline").read_bytes()
    except OSError:
        return b""


def _signal(pid: int, sign: signal.Signals) -> None:
    try:
        os.kill(pid, sign)
    except ProcessLookupError:
        return


def _reap(session: int) -> None:
    process = _started.get(session)  # None when another command started the cluster
    if process is not None and process.poll() is not None:
        del _started[session]


def _free_port(address: str) -> int:
    # Ray's client server needs a port number, although nothing uses the server here
    with socket.socket() as probe:
        probe.bind((address, 0))
        port: int = probe.getsockname()[1]
        return port
