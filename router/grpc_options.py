"""Settings of all our gRPC servers and clients: keepalive, and the calls of a shared stream.

A long prompt can take minutes to its first token; load balancers and clients would treat a silent
connection as dead. So clients send pings, and servers accept pings.
"""

from __future__ import annotations

PING_S = 20.0
"""Seconds of silence before our side sends a ping, and seconds to wait for its answer."""
LEAST_PING_S = 0.5
"""Least seconds between pings of the other side; faster pings end its connection. Clients commonly
use 10 s to 60 s."""

MAX_STREAM_CALLS = 1024
"""Most calls at once on a stream of `GenerateMany`."""
MAX_TIMEOUT_S = 31 * 86400.0
"""Longest deadline of a call on such a stream, in seconds."""

SERVER_OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.so_reuseport", 0),
    # A lost client machine sends no reset; pings detect the loss within 40 s.
    ("grpc.keepalive_time_ms", round(PING_S * 1000)),
    ("grpc.keepalive_timeout_ms", round(PING_S * 1000)),
    # The default allows two pings in five minutes, then the server ends the running calls.
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_ping_interval_without_data_ms", round(LEAST_PING_S * 1000)),
    ("grpc.http2.max_pings_without_data", 0),
)

CLIENT_OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.max_receive_message_length", -1),
    # Only during a call: pings detect a lost gateway machine within 40 s.
    ("grpc.keepalive_time_ms", round(PING_S * 1000)),
    ("grpc.keepalive_timeout_ms", round(PING_S * 1000)),
    ("grpc.http2.max_pings_without_data", 0),
)
