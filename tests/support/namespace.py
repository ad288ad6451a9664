"""A network namespace with loopback and one more interface, whose other end is here.

Knows `ip`; knows nothing of what runs inside. Needs root and Linux.
"""

from __future__ import annotations

import itertools
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

HERE, INSIDE = "10.87.0.1", "10.87.0.2"
"""Addresses of the two ends of the pair."""

_numbers = itertools.count()


@dataclass(frozen=True)
class Namespace:
    """A namespace that exists.

    Attributes:
        name: of the namespace, for `ip netns exec`.
        address: IPv4 address of its second interface.
    """

    name: str
    address: str = INSIDE

    def command(self, *command: str) -> list[str]:
        """A command that runs inside."""
        return ["ip", "netns", "exec", self.name, *command]


def why_not() -> str:
    """Why this process can make no namespace; "" where it can."""
    if os.geteuid() != 0:
        return "only root makes network namespaces"
    name = f"arriero-try-{os.getpid()}"
    try:
        _ip("netns", "add", name)
    except FileNotFoundError:
        return "no `ip` (Debian: iproute2)"
    except subprocess.CalledProcessError as error:
        return f"no network namespaces: {error.stderr.decode().strip()}"
    try:
        _ip("-n", name, "link", "add", "try0", "type", "veth", "peer", "name", "try1")
    except subprocess.CalledProcessError as error:
        return f"no veth pairs: {error.stderr.decode().strip()}"
    finally:
        _ip("netns", "del", name)
    return ""


@contextmanager
def namespace() -> Iterator[Namespace]:
    """A namespace with loopback and one end of a veth pair; removed at the end."""
    # a name of its own each time: the kernel removes the pair a while after the namespace
    number = next(_numbers)
    name = f"arriero-{os.getpid()}-{number}"
    outer, inner = f"ar{os.getpid()}a{number}", f"ar{os.getpid()}b{number}"
    _ip("netns", "add", name)
    try:
        _ip("link", "add", outer, "type", "veth", "peer", "name", inner)
        _ip("link", "set", inner, "netns", name)
        _ip("addr", "add", f"{HERE}/24", "dev", outer)
        _ip("link", "set", outer, "up")
        _ip("-n", name, "addr", "add", f"{INSIDE}/24", "dev", inner)
        _ip("-n", name, "link", "set", inner, "up")
        _ip("-n", name, "link", "set", "lo", "up")
        yield Namespace(name)
    finally:
        _ip("netns", "del", name)  # the pair ends with it


def _ip(*args: str) -> None:
    subprocess.run(["ip", *args], check=True, capture_output=True)


@dataclass(frozen=True, order=True)
class Listener:
    """A socket that takes connections (TCP), or packets from anybody (UDP).

    Attributes:
        kind: "tcp" or "udp".
        address: as it is bound; "0.0.0.0" and "::" for every interface.
        port: number of the port.
        process: name of the process; "" if it has ended meanwhile.
    """

    kind: str
    address: str
    port: int
    process: str

    @property
    def on_loopback(self) -> bool:
        """Whether only processes of the same namespace can reach the socket."""
        return self.address.startswith("127.") or self.address in ("::1", "::ffff:127.0.0.1")


def listeners() -> list[Listener]:
    """All listening sockets of the namespace in which this process runs."""
    import psutil

    names = {process.pid: _name(process) for process in psutil.process_iter()}
    # UDP sockets have no state; a socket with a peer takes packets of that peer alone
    return sorted(
        {
            Listener("tcp" if entry.type == 1 else "udp", entry.laddr.ip, entry.laddr.port, name)
            for entry in psutil.net_connections("inet")
            if entry.laddr and (entry.status == psutil.CONN_LISTEN or _is_open_udp(entry))
            for name in [names.get(entry.pid or 0, "")]
        }
    )


def _is_open_udp(entry: object) -> bool:
    return entry.type == 2 and not entry.raddr  # type: ignore[attr-defined]


def _name(process: object) -> str:
    import psutil

    try:
        words = process.cmdline()  # type: ignore[attr-defined]
    except (psutil.NoSuchProcess, psutil.ZombieProcess):
        return ""
    if not words:
        return ""
    if words[0].startswith("ray::"):
        return words[0].strip()
    named = [word for word in words[1:] if word.endswith(".py") or "." in word]
    is_python = Path(words[0]).name.startswith("python")
    return Path(named[0]).name if is_python and named else Path(words[0]).name
