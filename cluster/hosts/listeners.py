"""The sockets of this machine on which processes of Ray take connections from other machines.

Reads /proc, so that a node needs no tool; knows nothing of what the sockets serve.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import socket
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

_LISTEN = "0A"
_RAY_PROGRAMS = ("gcs_server", "raylet")
_RAY_TITLE = "ray::"
_RAY_MODULES = ("ray.util.client.server", "/ray/dashboard/", "/ray/_private/")
"""Parts of the command lines of Ray's Python processes that have no title."""


def beyond_loopback(proc: Path = Path("/proc")) -> dict[str, tuple[int, ...]]:
    """Ports of Ray's processes that bind to more than loopback, by name of the process.

    Processes of other users are left out, since only root may read their sockets.
    """
    ports_by_inode = dict(_listening(proc))
    found: defaultdict[str, set[int]] = defaultdict(set)
    for folder in proc.iterdir():
        if folder.name.isdigit() and (name := _ray_name(folder)):
            for inode in _socket_inodes(folder):
                if inode in ports_by_inode:
                    found[name].add(ports_by_inode[inode])
    return {name: tuple(sorted(ports)) for name, ports in sorted(found.items())}


def _listening(proc: Path) -> Iterator[tuple[str, int]]:
    """Inode and port of each TCP socket that listens beyond loopback."""
    for name in ("tcp", "tcp6"):
        try:
            lines = (proc / "net" / name).read_text().splitlines()[1:]
        except OSError:  # a kernel without IPv6
            continue
        for line in lines:
            fields = line.split()
            address, _, port = fields[1].partition(":")
            if fields[3] == _LISTEN and not _is_loopback(address):
                yield fields[9], int(port, 16)


def _is_loopback(address: str) -> bool:
    """Whether an address is loopback, given in words of the machine's byte order, as in /proc."""
    words = [int(address[at : at + 8], 16) for at in range(0, len(address), 8)]
    packed = b"".join(socket.htonl(word).to_bytes(4, "big") for word in words)
    parsed = ipaddress.ip_address(packed)
    mapped = parsed.ipv4_mapped if isinstance(parsed, ipaddress.IPv6Address) else None
    return (mapped or parsed).is_loopback


def _ray_name(folder: Path) -> str:
    """Name of a process of Ray; "" for all others."""
    try:
        words = (folder / "cmdline").read_bytes().rstrip(b" \0").split(b"\0")
    except OSError:  # the process has ended meanwhile
        return ""
    program = words[0].decode(errors="replace")
    if program.startswith(_RAY_TITLE):
        return program.partition(".")[0]
    name = os.path.basename(program)
    if name in _RAY_PROGRAMS:
        return name
    for word in words[1:]:
        text = word.decode(errors="replace")
        if any(part in text for part in _RAY_MODULES):
            return os.path.basename(text)
    return ""


def _socket_inodes(folder: Path) -> Iterator[str]:
    with contextlib.suppress(OSError):  # another user's process, or one that has ended
        for descriptor in (folder / "fd").iterdir():
            with contextlib.suppress(OSError):
                target = os.readlink(descriptor)
                if target.startswith("socket:["):
                    yield target[8:-1]
