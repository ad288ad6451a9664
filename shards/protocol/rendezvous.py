"""How a slice finds its leader, and what it reports once it has loaded.

Knows addresses and keys; knows nothing of plans or weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import zmq

from arriero.shards.config.group import GroupConfig

if TYPE_CHECKING:
    pass


@dataclass(frozen=True, kw_only=True, slots=True)
class LeaderEndpoint:
    """What a slice needs to find its leader. Keep it secret: it holds the group's keys.

    Attributes:
        address: of the leader's socket, ipc or TCP.
        pulse_address: of its socket for pulses.
        config: of the group, resolved.
        server_key, public_key, secret_key: CURVE keys (Z85), None on ipc.
    """

    address: str
    pulse_address: str
    config: GroupConfig
    server_key: bytes | None = None
    public_key: bytes | None = None
    secret_key: bytes | None = None

    def secure(self, connecting: zmq.Socket[bytes]) -> None:
        """Give a socket the keys, if there are any; before it connects."""
        if self.server_key is not None:
            connecting.curve_serverkey = self.server_key
            connecting.curve_publickey = self.public_key
            connecting.curve_secretkey = self.secret_key


@dataclass(frozen=True, kw_only=True, slots=True)
class SliceReport:
    """What a slice holds once it is loaded. Bytes are those really allocated."""

    rank: int
    host: str
    pid: int
    kernels: str
    threads: int
    weights_bytes: int
    kv_bytes: int
    load_s: float
