"""The state of the cluster for the console: the admin token, the role, the messages as one JSON.

The same checks as for Admin's RPCs that read. Every open console asks every few seconds, so an
answer serves all of them for a second. Knows tokens, roles and messages; knows nothing of HTTP.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable
from typing import Any, Protocol

from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message

from arriero.cluster.control.admin_roles import AdminTokens, Role, needed_role
from arriero.cluster.control.audit_log import AuditedCall, AuditLog
from arriero.router.proto.arriero.v1 import admin_pb2 as pb
from arriero.shards.errors import ArrieroError, PermissionDenied, Unauthenticated

PEER = "gateway"
RPC = "GetStatus"
"""The call's name in the audit log."""
MAX_EVENTS = 60
FRESH_S = 1.0
"""Seconds for which an answer is given again."""
KV_TIMEOUT_S = 3.0
"""Seconds for the leaders' reports of their KV caches; the console does without a late report."""
NEEDED = max(
    needed_role("GetStatus"),
    needed_role("ListEvents"),
    needed_role("Why"),
    needed_role("Kv", "stats"),
)


class AdminReads(Protocol):
    """The RPCs of Admin that the console needs."""

    async def status(self, request: pb.GetStatusRequest) -> pb.Status:
        """The current and the desired state."""

    async def events(self, request: pb.ListEventsRequest) -> pb.ListEventsResponse:
        """The latest events."""

    async def why(self, request: pb.WhyRequest) -> pb.WhyResponse:
        """The first cause of a failure."""

    async def kv(self, request: pb.KvRequest) -> pb.KvResponse:
        """Reports of KV caches."""


class ConsoleCalls:
    """Reads the state of the cluster for holders of an admin token.

    Args:
        tokens: the valid tokens.
        admin: answers the RPCs.
        audit: gets a line for each refusal.
    """

    def __init__(self, tokens: AdminTokens, admin: AdminReads, audit: AuditLog) -> None:
        self._tokens, self._admin, self._audit = tokens, admin, audit
        self._lock = asyncio.Lock()
        self._answer, self._answer_at = "", float("-inf")

    async def read(self, authorization: str) -> tuple[str, str]:
        """Read the state.

        Args:
            authorization: value of the header of this name.

        Returns:
            Name of the class of an error, or "" after success; and the error's text or JSON with
            `at` (seconds since 1970), `status`, `events`, `kv` and `why` as in Admin's messages.
        """
        who, role = "", ""
        try:
            token = self._tokens.find(authorization)
            who, role = token.name, Role(token.role).word
            if token.role < NEEDED:
                raise PermissionDenied(
                    f"the admin token {who!r} has the role {role}; the console needs the role "
                    f"{NEEDED.word}"
                )
        except Unauthenticated:
            self._write(who, role, "UNAUTHENTICATED")
            return Unauthenticated.__name__, "the cluster's state needs an admin token"
        except PermissionDenied as error:
            self._write(who, role, "PERMISSION_DENIED", str(error))
            return type(error).__name__, str(error)
        async with self._lock:
            if time.monotonic() - self._answer_at >= FRESH_S:
                self._answer = json.dumps(await self._state(), separators=(",", ":"))
                self._answer_at = time.monotonic()
            return "", self._answer

    async def _state(self) -> dict[str, Any]:
        status, events, why, kv = await asyncio.gather(
            self._admin.status(pb.GetStatusRequest()),
            self._admin.events(pb.ListEventsRequest(limit=MAX_EVENTS)),
            _or_none(self._admin.why(pb.WhyRequest())),
            _or_none(self._admin.kv(pb.KvRequest(action="stats"))),
        )
        return {
            "at": time.time(),
            "status": _plain(status),
            "events": _plain(events)["events"],
            "why": None if why is None else _plain(why),
            "kv": [] if kv is None else _plain(kv)["groups"],
        }

    def _write(self, who: str, role: str, outcome: str, text: str = "") -> None:
        call = AuditedCall(who=who, role=role, peer=PEER, rpc=RPC, raw=b"")
        self._audit.write(call, outcome, text)


async def _or_none(answer: Awaitable[Message]) -> Message | None:
    """The answer; None where there is no failure, no serving group, or no answer in time."""
    try:
        return await asyncio.wait_for(answer, KV_TIMEOUT_S)
    except (ArrieroError, TimeoutError):
        return None


def _plain(message: Message) -> dict[str, Any]:
    return MessageToDict(
        message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
    )
