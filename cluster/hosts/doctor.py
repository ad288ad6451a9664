"""The checks of `arriero doctor`.

`collect` gathers facts on the node where the function runs; `judge` compares the nodes and returns
findings, each with a remedy. Knows files, versions and tools; changes nothing.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import resource
import shutil
import socket
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from arriero.cluster.hosts import ray_access
from arriero.cluster.hosts.listeners import beyond_loopback

PACKAGES = ("ray", "torch", "grpcio", "pyzmq", "msgspec", "safetensors", "tokenizers")
_MIN_FILES = 65_536
_MIN_SHM_BYTES = 1 << 30
_MIN_DISK_SHARE = 0.05
_MAX_SKEW_S = 0.5
_TOOL_S = 10.0
_CONNECT_S = 3.0

Grade = Literal["ok", "warn", "fail"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Facts:
    """Facts of one node.

    Attributes:
        host: name of the host.
        python: version of Python.
        packages: version of each package; "" for a missing package.
        clock_s: the node's clock, in seconds since 1970.
        cores: CPU cores that the process may use.
        memory_bytes: memory of the machine.
        shm_bytes: free bytes in /dev/shm, the shared memory of NCCL and Ray.
        files: largest number of open files of a process.
        disks: free and total bytes, by folder.
        models: whether each model folder exists.
        driver: version of the NVIDIA driver; "" for none.
        gpus: names of the GPUs.
        nccl: version of NCCL in torch; "" for none.
        ports: why a port of the spec cannot be bound; "" for a free port.
        peers: why another node cannot be reached, by address; "" for a node that answers.
        disk_needs: bytes that the spec needs on disk, by folder.
        listeners: ports of Ray's processes that other machines reach, by name of the process.
        ray_token: processes of Ray on this node ask callers for a token.
    """

    host: str
    python: str
    packages: dict[str, str]
    clock_s: float
    cores: int
    memory_bytes: int
    shm_bytes: int
    files: int
    disks: dict[str, tuple[int, int]]
    models: dict[str, bool]
    driver: str = ""
    gpus: tuple[str, ...] = ()
    nccl: str = ""
    ports: dict[int, str] = field(default_factory=dict)
    peers: dict[str, str] = field(default_factory=dict)
    disk_needs: dict[str, int] = field(default_factory=dict)
    listeners: dict[str, tuple[int, ...]] = field(default_factory=dict)
    ray_token: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """One line of the report.

    Attributes:
        node: name of the node; "all" for a comparison of nodes.
        text: the fact.
        grade: "ok", "warn" or "fail".
        remedy: advice; "" when the grade is "ok".
    """

    node: str
    text: str
    grade: Grade
    remedy: str = ""

    def to_json(self) -> dict[str, str]:
        """The finding for `arriero doctor --json`."""
        return {
            "node": self.node,
            "what": self.text,
            "grade": self.grade,
            "remedy": self.remedy,
        }


class ProbeListener:
    """A listening port on a node; other nodes connect to learn whether they reach the node."""

    def __init__(self, address: str) -> None:
        self._socket = socket.create_server((address, 0), backlog=1024)

    def port(self) -> int:
        """Port number. No code needs to accept: the kernel completes connections."""
        port: int = self._socket.getsockname()[1]
        return port

    def close(self) -> None:
        """Stop listening."""
        self._socket.close()


@dataclass(frozen=True, kw_only=True, slots=True)
class NodeNeeds:
    """Needs of a deployment on each node.

    Attributes:
        models: folders of models.
        ports: ports that must be free.
        disks: largest number of bytes in each folder for KV blocks or weights.
        peers: address and probe port of each other node.
    """

    models: tuple[str, ...] = ()
    ports: tuple[int, ...] = ()
    disks: Mapping[str, int] = field(default_factory=dict)
    peers: tuple[tuple[str, int], ...] = ()


def collect(needs: NodeNeeds) -> Facts:
    """The facts of this node."""
    shm = Path("/dev/shm")
    driver, gpus = _nvidia()
    disk_needs = {_existing_parent(folder): size for folder, size in needs.disks.items()}
    model_folders = (model for model in needs.models if Path(model).is_dir())
    folders = {"/", "/tmp", *disk_needs, *model_folders}
    return Facts(
        host=socket.gethostname(),
        python=platform.python_version(),
        packages={name: _version(name) for name in PACKAGES},
        clock_s=time.time(),
        cores=len(os.sched_getaffinity(0)),
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        shm_bytes=shutil.disk_usage(shm).free if shm.is_dir() else 0,
        files=resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        disks={folder: _space(folder) for folder in sorted(folders)},
        models={model: Path(model, "config.json").is_file() for model in needs.models},
        driver=driver,
        gpus=gpus,
        nccl=_nccl() if gpus else "",
        ports={port: _bind_error(port) for port in needs.ports},
        peers={address: _connect_error(address, port) for address, port in needs.peers},
        disk_needs=disk_needs,
        listeners=beyond_loopback(),
        ray_token=os.environ.get(ray_access.MODE) == "token",
    )


def judge(nodes: Mapping[str, Facts], skews_s: Mapping[str, float]) -> list[Finding]:
    """The findings of all nodes.

    Args:
        nodes: facts by name of the node.
        skews_s: seconds between each node's clock and the caller's clock, as far as measured.
    """
    findings = []
    for name, facts in nodes.items():
        findings += _judge_node(name, facts)
        skew_s = abs(skews_s.get(name, 0.0))
        text = f"clock within {skew_s:.1f} s"
        remedy = "synchronise the clock (chrony, systemd-timesyncd)"
        findings.append(_finding(name, skew_s <= _MAX_SKEW_S, text, remedy, "warn"))
    return findings + _compare(nodes)


def _compare(nodes: Mapping[str, Facts]) -> list[Finding]:
    """Findings about differences between nodes."""
    findings = []
    for package in ("python", *PACKAGES):
        versions = {
            (facts.python if package == "python" else facts.packages[package]): name
            for name, facts in nodes.items()
        }
        if len(versions) > 1:
            places = ", ".join(
                f"{version or 'none'} on {name}" for version, name in versions.items()
            )
            remedy = "install the same versions everywhere (infra/constraints.txt)"
            findings.append(_finding("all", False, f"{package} differs: {places}", remedy))
    drivers = {facts.driver for facts in nodes.values() if facts.driver}
    if len(drivers) > 1:
        text = f"NVIDIA drivers differ: {', '.join(sorted(drivers))}"
        remedy = "use one driver, so that NCCL finds the same transports everywhere"
        findings.append(_finding("all", False, text, remedy, "warn"))
    return findings


def _finding(node: str, good: bool, text: str, remedy: str, bad: Grade = "fail") -> Finding:
    return Finding(node=node, text=text, grade="ok" if good else bad, remedy="" if good else remedy)


def _judge_node(name: str, facts: Facts) -> list[Finding]:
    return [
        *_judge_machine(name, facts),
        *_judge_files(name, facts),
        *_judge_network(name, facts),
        *_judge_gpus(name, facts),
    ]


def _judge_machine(name: str, facts: Facts) -> list[Finding]:
    versions = ", ".join(f"{package} {version}" for package, version in facts.packages.items())
    missing = [package for package, version in facts.packages.items() if not version]
    return [
        _finding(
            name,
            not missing,
            f"python {facts.python}, {versions}",
            f"install {', '.join(missing)}",
        ),
        _finding(
            name,
            facts.files >= _MIN_FILES,
            f"{facts.files} open files",
            f"raise the limit to {_MIN_FILES} (ulimit -n, LimitNOFILE)",
            "warn",
        ),
        _finding(
            name,
            facts.shm_bytes >= _MIN_SHM_BYTES,
            f"{facts.shm_bytes / 2**30:.1f} GiB free in /dev/shm",
            "give 1 GiB or more (in containers: --shm-size, or an emptyDir of medium Memory)",
            "warn",
        ),
    ]


def _judge_files(name: str, facts: Facts) -> list[Finding]:
    findings = []
    for folder, (free, total) in facts.disks.items():
        text = f"{free / 2**30:.1f} of {total / 2**30:.1f} GiB free in {folder}"
        good = free >= _MIN_DISK_SHARE * total
        remedy = "free space: Ray places nothing more on a disk that is 95 % full"
        findings.append(_finding(name, good, text, remedy, "warn"))
        if (size := facts.disk_needs.get(folder, 0)) > free:
            text = f"{folder} may need {size / 2**30:.1f} GiB, of which {free / 2**30:.1f} are free"
            remedy = "free space, or lower `kv.disk.size`"
            findings.append(_finding(name, False, text, remedy, "warn"))
    for model, exists in facts.models.items():
        remedy = "copy or mount the folder: each node reads its own files"
        findings.append(_finding(name, exists, f"model {model}", remedy))
    return findings


def _judge_network(name: str, facts: Facts) -> list[Finding]:
    findings = []
    for port, error in facts.ports.items():
        text = f"port {port} {error or 'free'}"
        findings.append(_finding(name, not error, text, "choose another port", "warn"))
    for peer, error in facts.peers.items():
        text = f"reaches {peer}" if not error else f"cannot reach {peer}: {error}"
        remedy = "open the network between nodes: slices and links use any free port"
        findings.append(_finding(name, not error, text, remedy))
    return [*findings, _judge_listeners(name, facts)]


def _judge_listeners(name: str, facts: Facts) -> Finding:
    """What other machines reach; without a token, whoever reaches Ray runs code."""
    ports = ", ".join(
        f"{process} {' '.join(map(str, ports))}" for process, ports in facts.listeners.items()
    )
    if not ports:
        return _finding(name, True, "Ray listens on loopback alone", "")
    text = (
        f"Ray listens beyond loopback, {'with' if facts.ray_token else 'without'} a token: {ports}"
    )
    remedy = (
        "whoever reaches these ports runs code here: start the cluster with RAY_AUTH_MODE=token"
        " (infra/metal does), or close the network"
    )
    return _finding(name, facts.ray_token, text, remedy, "warn")


def _judge_gpus(name: str, facts: Facts) -> list[Finding]:
    if not facts.gpus:
        text = f"no GPU; {facts.cores} cores, {facts.memory_bytes / 2**30:.1f} GiB"
        return [_finding(name, True, text, "")]
    text = f"driver {facts.driver}, {len(facts.gpus)} of {facts.gpus[0]}"
    same = len(set(facts.gpus)) == 1
    nccl = f"NCCL {facts.nccl or 'is missing'}"
    return [
        _finding(name, same, text, "give unequal GPUs unequal shares", "warn"),
        _finding(name, bool(facts.nccl), nccl, "install a CUDA build of torch"),
    ]


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _existing_parent(folder: str) -> str:
    """The folder, or its nearest parent that exists."""
    path = Path(folder)
    while not path.is_dir():
        path = path.parent
    return str(path)


def _connect_error(address: str, port: int) -> str:
    """Why the address cannot be reached; "" when a connection succeeds."""
    try:
        socket.create_connection((address, port), _CONNECT_S).close()
    except OSError as error:
        return error.strerror or str(error)
    return ""


def _space(folder: str) -> tuple[int, int]:
    usage = shutil.disk_usage(folder)
    return usage.free, usage.total


def _nvidia() -> tuple[str, tuple[str, ...]]:
    command = ["nvidia-smi", "--query-gpu=driver_version,name", "--format=csv,noheader"]
    try:
        output = subprocess.run(
            command, capture_output=True, text=True, timeout=_TOOL_S, check=True
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return "", ()
    rows = [line.split(", ", 1) for line in output.strip().splitlines()]
    return rows[0][0], tuple(row[-1] for row in rows)


def _nccl() -> str:
    import torch

    if not torch.cuda.is_available():
        return ""
    return ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[no-untyped-call]


def _bind_error(port: int) -> str:
    """Why the port cannot be bound; "" for a free port."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            return f"cannot be bound: {error.strerror}"
    return ""
