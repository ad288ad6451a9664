"""What `arriero doctor` looks at on a node, and what it says about it.

`look` gathers facts on the node where it runs; `judge` compares nodes and gives findings, each with
what to do. Knows files, versions and tools; changes nothing.
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

PACKAGES = ("ray", "torch", "grpcio", "pyzmq", "msgpack", "safetensors", "tokenizers")
_MIN_FILES = 65_536
_MIN_SHM_BYTES = 1 << 30
_MIN_DISK_SHARE = 0.05
_MAX_SKEW_S = 0.5
_TOOL_S = 10.0
_REACH_S = 3.0

Grade = Literal["ok", "warn", "fail"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Facts:
    """One node.

    Attributes:
        host: its name.
        python, packages: versions; "" where one is missing.
        clock_s: seconds since 1970 when it looked.
        cores, memory_bytes: of the machine.
        shm_bytes: free in /dev/shm, over which NCCL and Ray share memory.
        files: most open files of a process.
        disks: free and total bytes, by folder.
        models: whether each model folder is there.
        driver: of NVIDIA; "" for none.
        gpus: their names.
        nccl: its version as torch has it; "" for none.
        ports: whether each port of the spec can be bound, or why not.
        peers: by the address of each other node, why it cannot be reached; "" if it can.
        wanted: bytes that the spec wants on disk, by folder.
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
    wanted: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """One line of the report: where, what, how good, and what to do."""

    node: str
    what: str
    grade: Grade
    remedy: str = ""


class ProbeListener:
    """A port on a node, for others to see whether they can reach it."""

    def __init__(self, address: str) -> None:
        self._socket = socket.create_server((address, 0), backlog=1024)

    def port(self) -> int:
        """Its number. Nobody need accept: the kernel does as far as a connection goes."""
        port: int = self._socket.getsockname()[1]
        return port

    def close(self) -> None:
        """Be reached no more."""
        self._socket.close()


@dataclass(frozen=True, kw_only=True, slots=True)
class Questions:
    """What a deployment wants of each node.

    Attributes:
        models: folders that should be here.
        ports: that should be free.
        disks: folders for blocks or weights, and the bytes that they may come to.
        peers: other nodes' ears: address and port.
    """

    models: tuple[str, ...] = ()
    ports: tuple[int, ...] = ()
    disks: Mapping[str, int] = field(default_factory=dict)
    peers: tuple[tuple[str, int], ...] = ()


def look(asked: Questions) -> Facts:
    """The facts of this node."""
    models, ports = asked.models, asked.ports
    shm = Path("/dev/shm")
    driver, gpus = _nvidia()
    wanted = {_there(folder): size for folder, size in asked.disks.items()}
    folders = {"/", "/tmp", *wanted, *(model for model in models if Path(model).is_dir())}
    return Facts(
        host=socket.gethostname(),
        python=platform.python_version(),
        packages={name: _version(name) for name in PACKAGES},
        clock_s=time.time(),
        cores=len(os.sched_getaffinity(0)),
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        shm_bytes=shutil.disk_usage(shm).free if shm.is_dir() else 0,
        files=resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        disks={one: _space(one) for one in sorted(folders)},
        models={model: Path(model, "config.json").is_file() for model in models},
        driver=driver,
        gpus=gpus,
        nccl=_nccl() if gpus else "",
        ports={port: _bindable(port) for port in ports},
        peers={address: _reaches(address, port) for address, port in asked.peers},
        wanted=wanted,
    )


def judge(nodes: Mapping[str, Facts], skews_s: Mapping[str, float]) -> list[Finding]:
    """What to say of the nodes, by name.

    Args:
        nodes: facts by the node's address.
        skews_s: how far each node's clock is from the asker's, as far as could be told.
    """
    findings = []
    for name, facts in nodes.items():
        findings += _judge_one(name, facts)
        skew_s = skews_s.get(name, 0.0)
        grade: Grade = "ok" if abs(skew_s) <= _MAX_SKEW_S else "warn"
        remedy = "" if grade == "ok" else "synchronise it (chrony, systemd-timesyncd)"
        what = f"clock within {abs(skew_s):.1f} s"
        findings.append(Finding(node=name, what=what, grade=grade, remedy=remedy))
    first = next(iter(nodes.values()), None)
    for package in ("python", *PACKAGES):
        versions = {
            (one.python if package == "python" else one.packages[package]): name
            for name, one in nodes.items()
        }
        if len(versions) > 1:
            told = ", ".join(f"{version or 'none'} on {name}" for version, name in versions.items())
            findings.append(
                Finding(
                    node="all",
                    what=f"{package} differs: {told}",
                    grade="fail",
                    remedy="install the same versions everywhere (infra/constraints.txt)",
                )
            )
    drivers = {one.driver for one in nodes.values() if one.driver}
    if first is not None and len(drivers) > 1:
        what = f"NVIDIA drivers differ: {', '.join(sorted(drivers))}"
        remedy = "use one driver, so that NCCL finds the same transports everywhere"
        findings.append(Finding(node="all", what=what, grade="warn", remedy=remedy))
    return findings


def _judge_one(name: str, facts: Facts) -> list[Finding]:
    def found(good: bool, what: str, remedy: str, bad: Grade = "fail") -> Finding:
        return Finding(
            node=name, what=what, grade="ok" if good else bad, remedy="" if good else remedy
        )

    versions = ", ".join(f"{package} {version}" for package, version in facts.packages.items())
    missing = [package for package, version in facts.packages.items() if not version]
    findings = [
        found(not missing, f"python {facts.python}, {versions}", f"install {', '.join(missing)}"),
        found(
            facts.files >= _MIN_FILES,
            f"{facts.files} open files",
            f"raise it to {_MIN_FILES} (ulimit -n, LimitNOFILE)",
            "warn",
        ),
        found(
            facts.shm_bytes >= _MIN_SHM_BYTES,
            f"{facts.shm_bytes / 2**30:.1f} GiB free in /dev/shm",
            "give 1 GiB or more (in containers: --shm-size, or an emptyDir of medium Memory)",
            "warn",
        ),
    ]
    for folder, (free, total) in facts.disks.items():
        what = f"{free / 2**30:.1f} of {total / 2**30:.1f} GiB free in {folder}"
        good = free >= _MIN_DISK_SHARE * total
        findings.append(found(good, what, "make room: Ray stops placing at 95 %", "warn"))
        if (size := facts.wanted.get(folder, 0)) > free:
            what = f"{folder} may come to {size / 2**30:.1f} GiB"
            findings.append(found(False, what, "make room, or lower `kv.disk.size`", "warn"))
    for model, there in facts.models.items():
        what = f"model {model}"
        findings.append(found(there, what, "copy it here, or mount it: each node reads its own"))
    for port, why in facts.ports.items():
        findings.append(found(not why, f"port {port} {why or 'free'}", "choose another", "warn"))
    for peer, why in facts.peers.items():
        what = f"reaches {peer}" if not why else f"cannot reach {peer}: {why}"
        remedy = (
            "open the network between nodes: slices and links take ports of the system's choice"
        )
        findings.append(found(not why, what, remedy))
    if facts.gpus:
        what = f"driver {facts.driver}, {len(facts.gpus)} of {facts.gpus[0]}"
        same = len(set(facts.gpus)) == 1
        findings.append(found(same, what, "give unequal GPUs unequal shares", "warn"))
        what = f"NCCL {facts.nccl or 'is missing'}"
        findings.append(found(bool(facts.nccl), what, "install a CUDA build of torch"))
    else:
        cpus = f"no GPU; {facts.cores} cores, {facts.memory_bytes / 2**30:.1f} GiB"
        findings.append(Finding(node=name, what=cpus, grade="ok"))
    return findings


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _there(folder: str) -> str:
    """The folder, or what there is of its path."""
    path = Path(folder)
    while not path.is_dir():
        path = path.parent
    return str(path)


def _reaches(address: str, port: int) -> str:
    try:
        socket.create_connection((address, port), _REACH_S).close()
    except OSError as error:
        return error.strerror or str(error)
    return ""


def _space(folder: str) -> tuple[int, int]:
    usage = shutil.disk_usage(folder)
    return usage.free, usage.total


def _nvidia() -> tuple[str, tuple[str, ...]]:
    command = ["nvidia-smi", "--query-gpu=driver_version,name", "--format=csv,noheader"]
    try:
        told = subprocess.run(
            command, capture_output=True, text=True, timeout=_TOOL_S, check=True
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return "", ()
    rows = [line.split(", ", 1) for line in told.strip().splitlines()]
    return rows[0][0], tuple(row[-1] for row in rows)


def _nccl() -> str:
    import torch

    if not torch.cuda.is_available():
        return ""
    return ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[no-untyped-call]


def _bindable(port: int) -> str:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            return f"cannot be bound: {error.strerror}"
    return ""
