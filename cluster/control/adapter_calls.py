"""Changes of adapters that come through a gateway: the admin token, the role, the audit log.

The same checks as for Admin's RPC `Adapters`. Knows tokens and roles; knows nothing of HTTP.
"""

from __future__ import annotations

from arriero.cluster.control.adapter_admin import AdapterAdmin
from arriero.cluster.control.admin_roles import AdminTokens, Role, needed_role, set_caller
from arriero.cluster.control.audit_log import AuditedCall, AuditLog
from arriero.router.proto.arriero.v1 import admin_pb2 as pb
from arriero.shards.errors import ArrieroError, PermissionDenied, Unauthenticated

RPC = "Adapters"
PEER = "gateway"


class AdapterCalls:
    """Runs changes for holders of an admin token.

    Args:
        tokens: the valid tokens.
        adapters: makes the changes.
        audit: gets a line for each call.
    """

    def __init__(self, tokens: AdminTokens, adapters: AdapterAdmin, audit: AuditLog) -> None:
        self._tokens, self._adapters, self._audit = tokens, adapters, audit

    async def change(self, authorization: str, request: pb.AdaptersRequest) -> tuple[str, str]:
        """Make a change.

        Args:
            authorization: value of the header of this name.
            request: the change.

        Returns:
            Name of the class of an error, or "" after success; and a text.
        """
        who, role, raw = "", "", b""
        try:
            token = self._tokens.find(authorization)
            who, role, raw = token.name, Role(token.role).word, request.SerializeToString()
            needed = needed_role(RPC, request.action)
            if token.role < needed:
                raise PermissionDenied(
                    f"the admin token {who!r} has the role {role}; a change of adapters needs the "
                    f"role {needed.word}"
                )
            set_caller(token)
            text = (await self._adapters.adapters(request)).text
            kind, outcome = "", "OK"
        except Unauthenticated:
            kind, text = Unauthenticated.__name__, "this path needs an admin token: `Bearer TOKEN`"
            outcome = "UNAUTHENTICATED"
        except ArrieroError as error:
            kind, text = type(error).__name__, str(error)
            denied = isinstance(error, PermissionDenied)
            outcome = "PERMISSION_DENIED" if denied else "INVALID_ARGUMENT"
        call = AuditedCall(who=who, role=role, peer=PEER, rpc=RPC, raw=raw)
        self._audit.write(call, outcome, text if kind else "")
        return kind, text
