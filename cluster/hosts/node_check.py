"""Can this machine hold what a spec names: ports to listen on, folders for KV blocks, a classifier?

Changes nothing on the machine. Knows sockets and folders; knows nothing of Ray and of models.
"""

from __future__ import annotations

import errno
import importlib.util
import os
import shutil
import socket
from pathlib import Path

from arriero.cluster.spec.deployment import DeploymentSpec
from arriero.cluster.spec.model import KvDiskSpec
from arriero.shards.errors import SpecError


def check_listeners(spec: DeploymentSpec) -> None:
    """Refuse fixed ports of gateway and Admin that this machine cannot give.

    Raises:
        SpecError: names field, value and remedy.
    """
    gateway = spec.gateway
    listeners = [("gateway.port", gateway.host, gateway.port)]
    if gateway.http is not None:
        listeners.append(("gateway.http.port", gateway.http.host, gateway.http_port or 0))
    listeners.append(("admin.port", spec.admin.host, spec.admin.port))
    used: dict[int, str] = {}
    for field, host, port in listeners:
        if port and port in used:
            raise SpecError(
                f"`{field}`={port} is the port of `{used[port]}` too; give each its own, or 0 for"
                " any free port"
            )
        used[port] = field
        check_port(field, host, port)


def check_port(field: str, host: str, port: int) -> None:
    """Refuse an address that this machine cannot listen on.

    Raises:
        SpecError: names field, value and remedy.
    """
    name = host.strip("[]")
    try:
        family = socket.getaddrinfo(name, port, type=socket.SOCK_STREAM)[0][0]
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((name, port))
    except socket.gaierror as error:
        where = field.rpartition(".")[0]
        raise SpecError(f"`{where}.host`={host!r} is no address: {error.strerror}") from None
    except OSError as error:
        where = field.rpartition(".")[0]
        if error.errno == errno.EADDRINUSE:
            raise SpecError(
                f"`{field}`={port}: another program listens on {host}:{port} (`ss -ltnp` names the"
                " program); end it, or give another port (0 takes any free port)"
            ) from None
        if error.errno == errno.EADDRNOTAVAIL:
            raise SpecError(
                f"`{where}.host`={host!r} is no address of this machine; give one, or 0.0.0.0 for"
                " every interface"
            ) from None
        raise SpecError(
            f"`{field}`={port}: cannot listen on {host}:{port}: {error.strerror}; give a port of"
            " 1024 or more"
        ) from None


def check_disk(model: str, disk: KvDiskSpec) -> None:
    """Refuse a folder for KV blocks that cannot be made or written, or that is too small.

    Raises:
        SpecError: names model, field, value, limit and remedy.
    """
    field = f"model `{model}`: `kv.disk.path`={str(disk.path)!r}"
    folder: Path = disk.path
    while not os.path.lexists(folder) and folder != folder.parent:
        folder = folder.parent
    if not folder.is_dir():
        raise SpecError(f"{field}: {folder} is no folder; give another path")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise SpecError(
            f"{field}: this user may not write in {folder}; give another folder, or change the"
            " rights"
        )
    try:
        total = shutil.disk_usage(folder).total
    except OSError as error:
        raise SpecError(f"{field}: {folder}: {error.strerror}; give another folder") from None
    if disk.size > total:
        raise SpecError(
            f"model `{model}`: `kv.disk.size`={disk.size} exceeds the {total} bytes of the file"
            f" system of {folder}; lower the size, or give another `kv.disk.path`"
        )


def check_prompt_guard(folder: Path) -> None:
    """Refuse a machine that cannot run the Prompt Guard of a folder.

    Raises:
        SpecError: names field, value and remedy.
    """
    if importlib.util.find_spec("transformers") is None:
        raise SpecError(
            "`gateway.prompt_guard` needs transformers on every node; pip install 'arriero[guard]'"
        )
    if not (folder / "config.json").is_file():
        raise SpecError(
            f"`gateway.prompt_guard.path`={str(folder)!r} has no config.json on this node; copy"
            " the folder to every node"
        )
