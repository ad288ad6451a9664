"""The audit log of Admin: a line of JSON for each call that changes something or is refused.

Append-only, readable by its owner alone (mode 0600), rotated by size. A line says who, when, from
where, which RPC, with what, and how the call ended; it never holds a secret or a prompt: text
outside of `SHOWN` stands there as a digest. Knows requests and lines; knows nothing of roles.
"""

from __future__ import annotations

import hashlib
import json
import logging
import logging.handlers
import os
import time
from dataclasses import dataclass
from io import TextIOWrapper
from pathlib import Path
from typing import Any

from google.protobuf.message import DecodeError, Message
from google.protobuf.message_factory import GetMessageClass

from arriero.router.proto.arriero.v1 import admin_pb2 as pb

SHOWN = frozenset({"action", "group", "id", "model", "name", "node", "pin", "role", "tenant"})
"""Text fields of requests that are shown as they are; others are shown as a digest."""
_MAX_TEXT = 128
_REFUSED_A_MINUTE = 30
"""Most lines in a minute for callers without a token: a flood must not push out other lines."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AuditedCall:
    """A call of Admin.

    Attributes:
        who: name of the token; "" for a caller without one.
        role: of the token; "" for a caller without one.
        peer: address of the caller, as gRPC names it.
        rpc: name of the RPC.
        raw: the request as bytes.
    """

    who: str
    role: str
    peer: str
    rpc: str
    raw: bytes


class AuditLog:
    """Writes the lines.

    Args:
        path: the file; missing folders are made.
        max_bytes: size at which the file is rotated.
        keep: number of older files, with the names `path.1`, `path.2`, …

    Raises:
        OSError: the file cannot be written.
    """

    def __init__(self, path: Path, *, max_bytes: int, keep: int) -> None:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._handler = _PrivateRotatingHandler(
            path, maxBytes=max_bytes, backupCount=keep, encoding="utf-8"
        )
        self._minute, self._refused = 0, 0

    def write(self, call: AuditedCall, outcome: str, text: str = "") -> None:
        """Write the line of a call.

        Args:
            call: the call.
            outcome: "OK", or the name of a gRPC status.
            text: text of an error.
        """
        now_s = time.time()
        if not call.who and not self._room(now_s):
            return
        line = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(now_s))
            + f"{now_s % 1:.3f}Z"[1:],
            "who": call.who,
            "role": call.role,
            "from": call.peer,
            "rpc": call.rpc,
            "request": summary(call.rpc, call.raw) if call.who else {},
            "outcome": outcome,
        }
        if text:
            line["text"] = text[:_MAX_TEXT]
        record = logging.LogRecord(
            "arriero.audit", logging.INFO, "", 0, json.dumps(line, ensure_ascii=False), None, None
        )
        self._handler.handle(record)

    def close(self) -> None:
        """Close the file."""
        self._handler.close()

    def _room(self, now_s: float) -> bool:
        """Whether another line of a caller without a token may be written in this minute."""
        minute = int(now_s // 60)
        if minute != self._minute:
            self._minute, self._refused = minute, 0
        self._refused += 1
        return self._refused <= _REFUSED_A_MINUTE


def request_message(rpc: str, raw: bytes) -> Message | None:
    """The request of an RPC; None for an unknown RPC or bytes that are no such message."""
    method = pb.DESCRIPTOR.services_by_name["Admin"].methods_by_name.get(rpc)
    if method is None:
        return None
    message = GetMessageClass(method.input_type)()
    try:
        message.ParseFromString(raw)
    except DecodeError:
        return None
    return message


def summary(rpc: str, raw: bytes) -> dict[str, Any]:
    """The fields of a request without secrets and without long text."""
    message = request_message(rpc, raw)
    if message is None:
        return {"malformed_bytes": len(raw)}
    return {field.name: _shown(field.name, value) for field, value in message.ListFields()}


def _shown(name: str, value: Any) -> Any:  # noqa: ANN401
    if isinstance(value, bool | int | float):
        return value
    if isinstance(value, str) and name in SHOWN:
        return value[:_MAX_TEXT]
    if isinstance(value, str):
        text = value
    elif isinstance(value, Message):
        text = str(value)
    else:
        values = list(value)
        if name == "models":
            return [str(model)[:_MAX_TEXT] for model in values[:100]]
        text = json.dumps([str(entry) for entry in values])
    digest = hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()
    return f"sha256:{digest[:16]} of {len(text)} characters"


class _PrivateRotatingHandler(logging.handlers.RotatingFileHandler):
    """Makes its files readable and writable by the owner alone."""

    def _open(self) -> TextIOWrapper:
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT
        descriptor = os.open(self.baseFilename, flags, 0o600)
        os.fchmod(descriptor, 0o600)
        return open(descriptor, "a", encoding=self.encoding)
