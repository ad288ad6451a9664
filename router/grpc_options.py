"""Settings that every gRPC server and every gRPC client of ours has: how connections are kept.

A prompt may be computed for minutes before its first token, and a connection that says nothing for
so long is taken for dead by balancers and clients. So clients ping, and servers let them.
"""

from __future__ import annotations

PING_S = 20.0
"""How often our own side pings a connection that says nothing, and waits for the answer."""
LEAST_PING_S = 0.5
"""Pings of the other side that come faster than this end its connection; common settings of
clients are 10 s to 60 s."""

SERVER_OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.so_reuseport", 0),
    # A client whose machine is gone sends no reset; these find out within 40 s.
    ("grpc.keepalive_time_ms", round(PING_S * 1000)),
    ("grpc.keepalive_timeout_ms", round(PING_S * 1000)),
    # By default a server takes two pings in five minutes, and then ends the calls that run.
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_ping_interval_without_data_ms", round(LEAST_PING_S * 1000)),
    ("grpc.http2.max_pings_without_data", 0),
)

CLIENT_OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.max_receive_message_length", -1),
    # Only while a call runs: a gateway whose machine is gone is found out within 40 s.
    ("grpc.keepalive_time_ms", round(PING_S * 1000)),
    ("grpc.keepalive_timeout_ms", round(PING_S * 1000)),
    ("grpc.http2.max_pings_without_data", 0),
)
