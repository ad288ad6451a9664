"""Admin's question to a leader about its KV cache, and the answer as a message."""

from __future__ import annotations

from typing import Any

import grpc
import grpc.aio

from arriero.cluster.registry import GroupEntry
from arriero.cluster.spec import TlsSpec
from arriero.router import frames
from arriero.router.link_server import CHANNEL_OPTIONS, KV_METHOD, TOKEN_KEY
from arriero.router.proto.arriero.v1 import admin_pb2 as pb
from arriero.router.tls import LINK_NAME

TIMEOUT_S = 25.0
"""Less than a client of Admin waits; a leader goes on with what takes longer."""


async def ask_kv(entry: GroupEntry, request: pb.KvRequest, tls: TlsSpec | None) -> pb.KvGroup:
    """Ask one leader; what goes wrong is in the answer's `error`.

    Args:
        entry: of its group.
        request: what Admin was asked.
        tls: of the links; None for one in the clear.
    """
    credentials = None if tls is None else tls.files().client("link_tls")
    if credentials is None:
        channel = grpc.aio.insecure_channel(entry.address, options=CHANNEL_OPTIONS)
    else:
        options = [*CHANNEL_OPTIONS, ("grpc.ssl_target_name_override", LINK_NAME)]
        channel = grpc.aio.secure_channel(entry.address, credentials, options=options)
    asked = {"texts": list(request.texts), "raw": request.raw, "name": request.pin}
    async with channel:
        unary: Any = channel.unary_unary  # its stubs ask for what is optional
        call = unary(KV_METHOD)
        try:
            raw = await call(
                frames.pack([request.action, asked]),
                metadata=((TOKEN_KEY, entry.link_token),),
                timeout=TIMEOUT_S,
            )
        except grpc.aio.AioRpcError as error:
            return pb.KvGroup(group=entry.group_id, error=error.details() or error.code().name)
    return _message(entry.group_id, frames.unpack(raw))


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
