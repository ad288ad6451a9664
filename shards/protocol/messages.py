"""Kinds of the messages between a leader and its slices.

A message is two frames: one byte for the kind, and a body. Knows the kinds and their bytes; knows
nothing of bodies or sockets.
"""

from __future__ import annotations

from enum import Enum


class MessageKind(Enum):
    """Kind of a message; the value is the first frame.

    Attributes:
        HELLO, LOADING, READY: slice to leader: process started, bytes loaded so far, slice loaded.
        RESULT: slice to leader: result of a step plan.
        TRANSFER_RESULT: slice to leader: result of a transfer of KV blocks.
        EXPERT_LOADS: slice to leader: tokens per expert since the last message of this kind.
        ERROR: slice to leader: error that ends the slice.
        JOIN: leader to slice: address at which the ranks meet.
        PLAN: leader to slice: step plan to run.
        TRANSFER: leader to slice: KV blocks to transfer.
        STOP: leader to slice: end the loop.
    """

    HELLO = b"H"
    LOADING = b"L"
    READY = b"R"
    RESULT = b"T"
    TRANSFER_RESULT = b"V"
    EXPERT_LOADS = b"C"
    ERROR = b"E"
    JOIN = b"J"
    PLAN = b"P"
    TRANSFER = b"M"
    STOP = b"S"
