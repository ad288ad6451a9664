"""The answers of Admin about credentials: API keys of tenants, and admin tokens.

Knows messages and the stores of both; knows nothing of connections and of other RPCs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pydantic import ValidationError

from arriero.cluster import app
from arriero.cluster.control.admin_roles import AdminToken, Role, caller_name
from arriero.cluster.control.api_keys import ApiKeyStore, check_overlap
from arriero.cluster.control.state_store import StateStore
from arriero.cluster.spec.gateway import TenantSpec
from arriero.router.proto.arriero.v1 import admin_pb2 as pb
from arriero.router.tenants.keys import KeyEntry
from arriero.shards.errors import InvalidRequest

if TYPE_CHECKING:
    from ray.actor import ActorHandle

    from arriero.cluster.registry.registry import Registry

KEY_ACTIONS = ("list", "add", "rotate", "revoke")
TOKEN_ACTIONS = ("list", "add", "revoke")


class Credentials:
    """Lists and changes API keys and admin tokens.

    Args:
        store: the spec and the admin tokens.
        registry: knows the nodes with key files, and takes the events.
    """

    def __init__(self, store: StateStore, registry: ActorHandle[Registry]) -> None:
        self._store, self._registry = store, registry

    async def keys(self, request: pb.KeysRequest) -> pb.KeysResponse:
        """The answer to `Keys`; see `ApiKeyStore`."""
        snapshot = await self._registry.snapshot.remote()
        store = ApiKeyStore(
            self._store.spec.gateway.keys, [gateway.node_id for gateway in snapshot.gateways]
        )
        if request.action == "list":
            return pb.KeysResponse(keys=map(_api_key, (await store.entries()).values()))
        if request.action == "add":
            _check_tenant(request.tenant)
            change = await store.add(request.tenant, request.note, request.models)
        elif request.action == "rotate":
            change = await store.rotate(request.id, check_overlap(request.overlap_s))
        elif request.action == "revoke":
            change = await store.revoke(request.id)
        else:
            raise unknown_action(request.action, KEY_ACTIONS)
        text = f"key {change.entry.id} of {change.entry.tenant}: {request.action}"
        await self._registry.note.remote("keys", app.NAME, text, caller_name())
        return pb.KeysResponse(keys=[_api_key(change.entry)], key=change.key)

    async def tokens(self, request: pb.TokensRequest) -> pb.TokensResponse:
        """The answer to `Tokens`; see `AdminTokens`."""
        tokens, name = self._store.admin_tokens, request.name
        if request.action == "list":
            return pb.TokensResponse(tokens=map(_admin_token, tokens.entries()))
        if request.action == "add":
            role = Role.read(request.role)
            secret, token = tokens.add(name, role, request.lifetime_s)
            text = f"admin token {name} with the role {role.word}"
        elif request.action == "revoke":
            secret, token = "", tokens.revoke(name)
            text = f"admin token {name} is revoked"
        else:
            raise unknown_action(request.action, TOKEN_ACTIONS)
        await self._registry.note.remote("keys", app.NAME, text, caller_name())
        return pb.TokensResponse(tokens=[_admin_token(token)], token=secret)


def unknown_action(action: str, actions: Sequence[str]) -> InvalidRequest:
    """The error for an action that an RPC does not have."""
    known = ", ".join(actions)
    return InvalidRequest("action", f"`action`={action[:32]!r} is unknown; use one of: {known}")


def _check_tenant(name: str) -> None:
    try:
        TenantSpec(name=name)
    except ValidationError:
        raise InvalidRequest(
            "tenant",
            f"`tenant`={name[:128]!r}: use 1 to 128 letters, digits, dots, dashes or underscores",
        ) from None


def _api_key(entry: KeyEntry) -> pb.ApiKey:
    return pb.ApiKey(
        id=entry.id,
        tenant=entry.tenant,
        created=entry.created,
        note=entry.note,
        expires=entry.expires,
        models=entry.models,
    )


def _admin_token(token: AdminToken) -> pb.AdminToken:
    return pb.AdminToken(
        name=token.name,
        role=Role(token.role).word,
        created=token.created,
        expires=int(token.expires),
    )
