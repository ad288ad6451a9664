"""Admin's question to a leader about the leader's KV cache, and the answer as a message."""

from __future__ import annotations

from typing import Any

from arriero.cluster.registry.snapshot import GroupEntry
from arriero.cluster.spec.gateway import TlsSpec
from arriero.router.link.leader_rpc import ask_leader
from arriero.router.proto.arriero.v1 import admin_pb2 as pb
from arriero.shards.errors import ArrieroError

KV_ACTIONS = ("stats", "flush", "warm", "pin", "unpin")
TIMEOUT_S = 25.0
"""Shorter than the timeout of Admin's clients; a leader continues an action that takes longer."""


async def ask_kv(entry: GroupEntry, request: pb.KvRequest, tls: TlsSpec | None) -> pb.KvGroup:
    """Ask one leader; an error is in the `error` field of the answer.

    Args:
        entry: group of the leader.
        request: request to Admin.
        tls: TLS files of the links; None for links without TLS.
    """
    context = None if tls is None else tls.files().link_client("link_tls")
    arguments = {"texts": list(request.texts), "raw": request.raw, "name": request.pin}
    leader = entry.address, entry.link_token
    try:
        report = await ask_leader(leader, context, request.action, arguments, TIMEOUT_S)
    except ArrieroError as error:
        return pb.KvGroup(group=entry.group_id, error=str(error))
    return _message(entry.group_id, report)


def _message(group: str, report: dict[str, Any]) -> pb.KvGroup:
    """The report of `KvAdminHandler.answer` as a message."""
    blocks = report["tenant_blocks"]
    tenants = dict.fromkeys(
        [*report["tenants"], *(name for tier in blocks.values() for name in tier)]
    )
    return pb.KvGroup(
        group=group,
        tiers=[
            pb.KvTier(tier=tier, used=use["used"], total=use["total"])
            for tier, use in report["tiers"].items()
        ],
        tenants=[
            pb.KvTenant(
                tenant=name,
                host_blocks=blocks.get("host", {}).get(name, 0),
                disk_blocks=blocks.get("disk", {}).get(name, 0),
                **report["tenants"].get(name, {}),
            )
            for name in tenants
        ],
        pins=[pb.KvPin(name=name, tokens=count) for name, count in report["pins"].items()],
        changed=report["changed"],
        **report["copies"],
    )
