"""Admin's question to a leader about the leader's KV cache, and the answer as a message."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from arriero.cluster.registry.snapshot import GroupEntry
from arriero.cluster.replica.kv_actions import KvArguments, KvReport
from arriero.cluster.spec.gateway import TlsSpec
from arriero.router.link.leader_rpc import ask_leader
from arriero.router.proto.arriero.v1 import admin_pb2 as pb
from arriero.shards.engine.cache_report import TenantUse
from arriero.shards.errors import ArrieroError, InvalidRequest, NotFound

KV_ACTIONS = ("stats", "flush", "warm", "pin", "unpin")
TIMEOUT_S = 25.0
"""Shorter than the timeout of Admin's clients; a leader continues an action that takes longer."""


async def ask_kv(entry: GroupEntry, request: pb.KvRequest, tls: TlsSpec | None) -> pb.KvGroup:
    """Ask one leader.

    Args:
        entry: group of the leader.
        request: request to Admin.
        tls: TLS files of the links; None for links without TLS.

    Raises:
        InvalidRequest: the leader refuses.
        Unavailable: the leader is gone, or did not answer in time.
    """
    context = None if tls is None else tls.files().link_client("link_tls")
    arguments = KvArguments(texts=tuple(request.texts), raw=request.raw, name=request.pin)
    leader = entry.address, entry.link_token
    report = await ask_leader(leader, context, request.action, arguments, KvReport, TIMEOUT_S)
    return _message(entry.group_id, report)


async def ask_all(
    entries: Sequence[GroupEntry], request: pb.KvRequest, tls: TlsSpec | None
) -> list[pb.KvGroup]:
    """Ask the leaders of several groups; the error of a group is in the `error` of its answer.

    Raises:
        NotFound: no group has the pin to release.
        InvalidRequest: all groups refuse the request.
    """
    calls = (ask_kv(entry, request, tls) for entry in entries)
    answers = await asyncio.gather(*calls, return_exceptions=True)
    groups, refusals = [], []
    for entry, answer in zip(entries, answers, strict=True):
        if isinstance(answer, InvalidRequest):
            refusals.append(answer)
        if isinstance(answer, ArrieroError):
            answer = pb.KvGroup(group=entry.group_id, error=str(answer))
        if isinstance(answer, BaseException):
            raise answer
        groups.append(answer)
    if len(refusals) == len(groups):
        if request.action == "unpin":
            raise NotFound(str(refusals[0]))
        raise refusals[0]
    return groups


def check_kv(request: pb.KvRequest) -> None:
    """Refuse what no leader could do.

    Raises:
        InvalidRequest: the action is unknown, or there is no text to pin or to warm.
    """
    if request.action not in KV_ACTIONS:
        known = ", ".join(KV_ACTIONS)
        raise InvalidRequest(
            "action", f"`action`={request.action[:32]!r} is unknown; use one of: {known}"
        )
    if request.action in ("pin", "unpin") and not request.pin.strip():
        raise InvalidRequest("pin", "`--name` is empty; give the pin a name")
    if request.action in ("pin", "warm") and not any(text.strip() for text in request.texts):
        raise InvalidRequest(
            "texts", f"there is no text to {request.action}; give a text of a block or more"
        )


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
