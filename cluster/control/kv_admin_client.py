"""Admin's question to a leader about the leader's KV cache, and the answer as a message."""

from __future__ import annotations

from arriero.cluster.registry.snapshot import GroupEntry
from arriero.cluster.replica.kv_actions import KvArguments, KvReport
from arriero.cluster.spec.gateway import TlsSpec
from arriero.router.link.leader_rpc import ask_leader
from arriero.router.proto.arriero.v1 import admin_pb2 as pb
from arriero.shards.engine.cache_report import TenantUse
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
    arguments = KvArguments(texts=tuple(request.texts), raw=request.raw, name=request.pin)
    leader = entry.address, entry.link_token
    try:
        report = await ask_leader(leader, context, request.action, arguments, KvReport, TIMEOUT_S)
    except ArrieroError as error:
        return pb.KvGroup(group=entry.group_id, error=str(error))
    return _message(entry.group_id, report)


def _message(group: str, report: KvReport) -> pb.KvGroup:
    """The report of `KvAdminHandler.answer` as a message."""
    blocks, nothing = report.tenant_blocks, TenantUse()
    tenants = dict.fromkeys([*report.tenants, *(name for tier in blocks.values() for name in tier)])
    return pb.KvGroup(
        group=group,
        tiers=[
            pb.KvTier(tier=tier, used=use.used, total=use.total)
            for tier, use in report.tiers.items()
        ],
        tenants=[
            pb.KvTenant(
                tenant=name,
                host_blocks=blocks.get("host", {}).get(name, 0),
                disk_blocks=blocks.get("disk", {}).get(name, 0),
                prompt_tokens=report.tenants.get(name, nothing).prompt_tokens,
                cached_tokens=report.tenants.get(name, nothing).cached_tokens,
            )
            for name in tenants
        ],
        pins=[pb.KvPin(name=name, tokens=count) for name, count in report.pins.items()],
        changed=report.changed,
        loaded=report.copies.loaded,
        saved=report.copies.saved,
        failed=report.copies.failed,
    )
