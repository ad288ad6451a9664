"""The interceptor of Admin: who calls, may the caller do this, and a line in the audit log.

Wraps every RPC that the server has, so that none is open by mistake. Knows tokens, roles and gRPC
calls; knows nothing of the meaning of an RPC.
"""

from __future__ import annotations

import inspect
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import grpc
import grpc.aio

from arriero.cluster.control.admin_roles import AdminTokens, Role, needed_role, set_caller
from arriero.cluster.control.audit_log import AuditedCall, AuditLog, request_message
from arriero.shards.errors import Unauthenticated

Context = grpc.aio.ServicerContext[bytes, bytes]


class AdminGuard(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]  # generic in stubs alone
    """Checks the token and the role of each call.

    Args:
        tokens: the valid tokens.
        audit: gets a line for each call but the permitted calls that only read; None for no log.
    """

    def __init__(self, tokens: AdminTokens, audit: AuditLog | None) -> None:
        self._tokens, self._audit = tokens, audit

    async def intercept_service(
        self,
        continuation: Callable[
            [grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any]]
        ],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any]:
        """The handler of an RPC behind the checks; None for an unknown RPC, as gRPC gives it."""
        given = await continuation(handler_call_details)
        if not given:
            return given
        handler: Any = given  # a method of its kind alone is set
        rpc = handler_call_details.method.rpartition("/")[2]
        assert not handler.request_streaming, "no RPC of Admin takes a stream"
        if handler.response_streaming:
            return grpc.unary_stream_rpc_method_handler(self._stream(rpc, handler.unary_stream))
        return grpc.unary_unary_rpc_method_handler(self._unary(rpc, handler.unary_unary))

    def _unary(
        self, rpc: str, method: Callable[[bytes, Context], Awaitable[bytes]]
    ) -> Callable[[bytes, Context], Awaitable[bytes]]:
        async def run(raw: bytes, context: Context) -> bytes:
            async with self._admitted(rpc, raw, context):
                return await method(raw, context)

        return run

    def _stream(
        self, rpc: str, method: Callable[[bytes, Context], Any]
    ) -> Callable[[bytes, Context], Awaitable[None]]:
        async def run(raw: bytes, context: Context) -> None:
            async with self._admitted(rpc, raw, context):
                answer = method(raw, context)
                if inspect.isawaitable(answer):  # a method that writes by itself
                    await answer
                    return
                async for message in answer:
                    await context.write(message)

        return run

    @asynccontextmanager
    async def _admitted(self, rpc: str, raw: bytes, context: Context) -> AsyncIterator[None]:
        """Run a call that may run; others end here with a status."""
        authorization = str(dict(context.invocation_metadata() or ()).get("authorization", ""))
        peer = context.peer()
        try:
            token = self._tokens.find(authorization)
        except Unauthenticated as error:
            stranger = AuditedCall(who="", role="", peer=peer, rpc=rpc, raw=b"")
            self._write(stranger, grpc.StatusCode.UNAUTHENTICATED)
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, str(error))
        role = Role(token.role)
        call = AuditedCall(who=token.name, role=role.word, peer=peer, rpc=rpc, raw=raw)
        needed = needed_role(rpc, str(getattr(request_message(rpc, raw), "action", "")))
        if role < needed:
            text = (
                f"the admin token {token.name!r} has the role {role.word}; {rpc} needs the role "
                f"{needed.word}"
            )
            self._write(call, grpc.StatusCode.PERMISSION_DENIED, text)
            await context.abort(grpc.StatusCode.PERMISSION_DENIED, text)
        set_caller(token)
        try:
            yield
        except BaseException:
            if needed > Role.VIEW:
                ended = context.code() or grpc.StatusCode.OK
                if ended is grpc.StatusCode.OK:  # no status was set: the caller has gone
                    ended = grpc.StatusCode.CANCELLED
                self._write(call, ended, str(context.details() or ""))
            raise
        if needed > Role.VIEW:
            self._write(call, grpc.StatusCode.OK)

    def _write(self, call: AuditedCall, status: grpc.StatusCode, text: str = "") -> None:
        if self._audit is not None:
            self._audit.write(call, status.name, text)
