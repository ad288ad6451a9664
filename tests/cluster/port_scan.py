"""Which sockets of a deployment answer a stranger, beside the machine and on it.

    ARRIERO_TEST_MODEL=models/SmolLM2-135M-Instruct .venv/bin/python tests/cluster/port_scan.py

`arriero up` runs in a network namespace of its own, with a second interface beside loopback. From
the other end of that interface all 65,535 ports are tried, and each open port with every protocol,
without credentials; then each listening socket is tried from loopback. Once with the defaults, and
once with a spec that opens gateway and Admin to the network. Needs root; takes minutes.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import trustme
import yaml

sys.path.insert(0, str(Path(__file__).parents[1]))

from support.namespace import Listener, Namespace, listeners, namespace, why_not
from support.strangers import Answer, methods, try_port

ROOT = Path(__file__).parents[2]
GRPC_PORT, HTTP_PORT, ADMIN_PORT = 50051, 8000, 50052
"""Ports that `opened_spec` opens."""
CONNECT_S = 3.0
UP_S, DOWN_S, TRY_S = 400, 120, 500
CREDENTIALS = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_ADDRESS")


@dataclass(frozen=True)
class Tried:
    """A port and what its server said.

    Attributes:
        port: number.
        process: name of the process that listens.
        answer: of one protocol.
    """

    port: int
    process: str
    answer: Answer


@dataclass(frozen=True)
class Scan:
    """A scan of one deployment.

    Attributes:
        listeners: all listening sockets.
        outside: what is reachable over the second interface.
        loopback: what is reachable from loopback.
    """

    listeners: list[Listener]
    outside: list[Tried]
    loopback: list[Tried]


def closed_spec(model: str, folder: Path) -> Path:
    """A spec with the defaults: gateway and Admin on loopback, without keys."""
    kv = {"memory": "64MiB", "host": "64MiB", "transfer": "tcp"}
    small = {"name": "demo", "path": model, "mesh": {"pp": 2}, "threads": 1, "kv": kv}
    path = folder / "closed.yaml"
    path.write_text(yaml.safe_dump({"models": [small]}))
    return path


def opened_spec(model: str, folder: Path) -> Path:
    """A spec that opens gateway and Admin to the network, with keys and TLS."""
    authority = trustme.CA()
    authority.cert_pem.write_to_path(folder / "ca.pem")
    pair = authority.issue_cert("server.example")
    pair.private_key_pem.write_to_path(folder / "key.pem")
    (folder / "cert.pem").write_bytes(b"".join(part.bytes() for part in pair.cert_chain_pems))
    (folder / "keys.yaml").write_text("keys: []\n")
    files = {"certificate": "cert.pem", "key": "key.pem"}
    text: dict[str, Any] = yaml.safe_load(closed_spec(model, folder).read_text())
    text["gateway"] = {
        "host": "0.0.0.0", "port": GRPC_PORT, "http": {"host": "0.0.0.0", "port": HTTP_PORT},
        "tls": files, "keys": "keys.yaml", "tenants": [{"name": "acme"}],
    }  # fmt: skip
    text["admin"] = {
        "host": "0.0.0.0", "port": ADMIN_PORT,
        "tls": files | {"ca": "ca.pem", "name": "server.example"},
    }  # fmt: skip
    path = folder / "opened.yaml"
    path.write_text(yaml.safe_dump(text))
    return path


def scan(spec: Path, inside: Namespace, state: Path) -> Scan:
    """Bring a spec up inside, and try every port; takes the deployment down again."""
    arriero = inside.command(sys.executable, "-m", "arriero.cluster.cli")
    environment = os.environ | {"ARRIERO_STATE": str(state), "OMP_NUM_THREADS": "1"}
    try:
        subprocess.run([*arriero, "up", str(spec)], env=environment, check=True, timeout=UP_S)
        found = open_ports(inside.address)
        outside = try_all(inside.address, [(port, "") for port in found])
        done = subprocess.run(
            inside.command(sys.executable, __file__, "--inside"),
            env={name: value for name, value in os.environ.items() if name not in CREDENTIALS},
            check=True, timeout=TRY_S, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
    finally:
        subprocess.run([*arriero, "down"], env=environment, timeout=DOWN_S, check=False)
    answer = json.loads(done.stdout)
    return Scan(
        listeners=[Listener(**entry) for entry in answer["listeners"]],
        outside=outside,
        loopback=[
            Tried(**entry | {"answer": Answer(**entry["answer"])}) for entry in answer["tried"]
        ],
    )


def open_ports(host: str) -> list[int]:
    """The TCP ports of a host that take a connection, of all 65,535."""
    ports = []
    for port in range(1, 65_536):
        with socket.socket() as probe:
            probe.settimeout(CONNECT_S)
            if probe.connect_ex((host, port)) == 0:
                ports.append(port)
    return ports


def try_inside() -> None:
    """Try each listening socket of this namespace from loopback; JSON on stdout."""
    sockets = listeners()
    tcp = sorted({(entry.port, entry.process) for entry in sockets if entry.kind == "tcp"})
    tried = try_all("127.0.0.1", tcp)
    print(json.dumps({
        "listeners": [asdict(entry) for entry in sockets],
        "tried": [asdict(entry) for entry in tried],
    }))  # fmt: skip


def try_all(host: str, ports: Sequence[tuple[int, str]]) -> list[Tried]:
    """The answers of ports, each given with the name of its process."""
    methods()  # imports, which threads would do at the same time
    with ThreadPoolExecutor(len(ports) or 1) as threads:
        answers = threads.map(lambda port: try_port(host, port[0]), ports)
        return [
            Tried(port, process, answer)
            for (port, process), found in zip(ports, answers, strict=True)
            for answer in found
        ]


def report(name: str, result: Scan) -> str:
    """The scan as lines of text."""
    beyond = [one for one in result.listeners if not one.on_loopback]
    lines = [
        f"## {name}: {len(result.listeners)} listening sockets, {len(beyond)} of them beyond"
        f" loopback, {len({one.port for one in result.outside})} ports open from outside"
    ]
    for title, tries in (("from outside", result.outside), ("from loopback", result.loopback)):
        lines += [
            f"{title}: {one.port:5d} {one.answer.protocol or '-':14s} {one.answer.verdict:8s}"
            f" {one.process:28s} {one.answer.detail[:150]}"
            for one in tries
        ]
    return "\n".join(lines)


def main(args: Sequence[str]) -> int:
    """The script; gives its exit status."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default=os.environ.get("ARRIERO_TEST_MODEL", ""))
    parser.add_argument("--inside", action="store_true", help="try the sockets of this namespace")
    given = parser.parse_args(args)
    if given.inside:
        try_inside()
        return 0
    if reason := why_not():
        print(reason, file=sys.stderr)
        return 2
    with namespace() as inside, tempfile.TemporaryDirectory() as folder:
        for make in (closed_spec, opened_spec):
            spec = make(os.path.abspath(given.model), Path(folder))
            print(report(spec.stem, scan(spec, inside, Path(folder, "state"))), flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
