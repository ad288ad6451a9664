"""Admin's question to a leader about its KV cache, and the answer as a message."""

from __future__ import annotations

from typing import Any

from arriero.cluster.registry.snapshot import GroupEntry
from arriero.cluster.spec.gateway import TlsSpec
from arriero.router.link.leader_rpc import ask_leader
from arriero.router.proto.arriero.v1 import admin_pb2 as pb
from arriero.shards.errors import ArrieroError

KV_ACTIONS = ("stats", "flush", "warm", "pin", "unpin")
TIMEOUT_S = 25.0
"""Less than a client of Admin waits; a leader goes on with what takes longer."""


async def ask_kv(entry: GroupEntry, request: pb.KvRequest, tls: TlsSpec | None) -> pb.KvGroup:
    """Ask one leader; what goes wrong is in the answer's `error`.

    Args:
        entry: of its group.
        request: what Admin was asked.
        tls: of the links; None for one in the clear.
    """
    context = None if tls is None else tls.files().link_client("link_tls")
    asked = {"texts": list(request.texts), "raw": request.raw, "name": request.pin}
    leader = entry.address, entry.link_token
    try:
        found = await ask_leader(leader, context, request.action, asked, TIMEOUT_S)
    except ArrieroError as error:
        return pb.KvGroup(group=entry.group_id, error=str(error))
    return _message(entry.group_id, found)


def _message(group: str, found: dict[str, Any]) -> pb.KvGroup:
    held = found["held"]
    names = dict.fromkeys([*found["tenants"], *(one for tier in held.values() for one in tier)])
    return pb.KvGroup(
        group=group,
        tiers=[
            pb.KvTier(tier=tier, used=use["used"], total=use["total"])
            for tier, use in found["tiers"].items()
        ],
        tenants=[
            pb.KvTenant(
                tenant=name,
                host_blocks=held.get("host", {}).get(name, 0),
                disk_blocks=held.get("disk", {}).get(name, 0),
                **found["tenants"].get(name, {}),
            )
            for name in names
        ],
        pins=[pb.KvPin(name=name, tokens=count) for name, count in found["pins"].items()],
        changed=found["changed"],
        **found["copies"],
    )
