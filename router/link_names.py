"""What the two ends of a link call each other's methods and keys by."""

from __future__ import annotations

SERVICE, CONNECT, KV = "arriero.link.v1.Link", "Connect", "Kv"
METHOD = f"/{SERVICE}/{CONNECT}"
KV_METHOD = f"/{SERVICE}/{KV}"
TOKEN_KEY = "arriero-link-token"
CHANNEL_OPTIONS = [
    ("grpc.max_receive_message_length", -1),  # a prompt of ten million tokens is one frame
    ("grpc.max_send_message_length", -1),
    ("grpc.so_reuseport", 0),
]
