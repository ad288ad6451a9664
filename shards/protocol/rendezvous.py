"""How a slice reaches its leader, and the slice's report after loading.

Knows addresses and keys; knows nothing of plans or weights.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import zmq

from arriero.shards.config.group import GroupConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class LeaderEndpoint:
    """How a slice reaches its leader. Keep an endpoint secret: the group's keys are inside.

    Attributes:
        address: address of the leader's message socket, ipc or TCP.
        heartbeat_address: address of the leader's heartbeat socket.
        config: resolved config of the group.
        server_key, public_key, secret_key: CURVE keys (Z85), None on ipc.
    """

    address: str
    heartbeat_address: str
    config: GroupConfig
    server_key: bytes | None = None
    public_key: bytes | None = None
    secret_key: bytes | None = None

    def secure(self, socket: zmq.Socket[bytes]) -> None:
        """Set the CURVE keys, if any, on a socket that has not connected yet."""
        if self.server_key is not None:
            socket.curve_serverkey = self.server_key
            socket.curve_publickey = self.public_key
            socket.curve_secretkey = self.secret_key


def secured(servers: Iterable[zmq.Socket[bytes]]) -> dict[str, bytes]:
    """Make sockets that are not bound yet CURVE servers; gives the keys of a `LeaderEndpoint`.

    Only a LeaderEndpoint has the server's public key: no handshake begins without.
    """
    server_key, server_secret = zmq.curve_keypair()
    public_key, secret_key = zmq.curve_keypair()
    for server in servers:
        server.curve_server = True
        server.curve_secretkey = server_secret
        server.curve_publickey = server_key
    return {"server_key": server_key, "public_key": public_key, "secret_key": secret_key}


@dataclass(frozen=True, kw_only=True, slots=True)
class SliceReport:
    """State of a slice after loading. Byte counts are those really allocated."""

    rank: int
    host: str
    pid: int
    kernels: str
    threads: int
    weights_bytes: int
    kv_bytes: int
    load_s: float
