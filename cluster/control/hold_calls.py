"""Pauses, sleep and weights that are changed through a gateway, in the words of vLLM.

The same checks of token and role as for Admin's RPCs `Hold`, `Weights` and `Kv`. Knows tokens and
roles; knows nothing of HTTP.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ray.actor import ActorHandle

from arriero.cluster.control.admin_roles import AdminTokens, Role, needed_role, set_caller
from arriero.cluster.control.audit_log import AuditedCall, AuditLog
from arriero.cluster.control.kv_admin_client import ask_all
from arriero.cluster.control.state_store import StateStore
from arriero.cluster.control.trainer_updates import ACTIONS, TrainerUpdates
from arriero.cluster.control.weight_admin import WeightAdmin
from arriero.cluster.registry.registry import Registry
from arriero.router.proto.arriero.v1 import admin_pb2 as pb
from arriero.shards.errors import (
    ArrieroError,
    InvalidRequest,
    PermissionDenied,
    Unauthenticated,
)

PEER = "gateway"
Json = dict[str, Any]


class HoldCalls:
    """Runs calls for holders of an admin token.

    Args:
        store: the desired state, with the valid admin tokens.
        weights: makes the changes.
        registry: of the cluster.
        audit: gets a line for each call.
    """

    def __init__(
        self,
        store: StateStore,
        weights: WeightAdmin,
        registry: ActorHandle[Registry],
        audit: AuditLog,
    ) -> None:
        self._store, self._weights, self._registry, self._audit = store, weights, registry, audit
        self._updates = TrainerUpdates(weights)

    @property
    def _tokens(self) -> AdminTokens:
        return self._store.admin_tokens

    async def call(
        self, authorization: str, action: str, fields: Mapping[str, str | int]
    ) -> tuple[str, Json | str]:
        """Make a change, or read the state.

        Args:
            authorization: value of the header of this name.
            action: "pause", "resume", "sleep", "wake", "status", "push", "flush", or one of
                `trainer_updates.ACTIONS`.
            fields: of the request: `model`, `mode`, `level`, `path`, `info`, `weight_version`.

        Returns:
            Name of the class of an error, or "" after success; and the answer, or a text.
        """
        who, role, raw, rpc = "", "", b"", _rpc(action)
        answer: Json | str
        try:
            token = self._tokens.find(authorization)
            who, role = token.name, Role(token.role).word
            needed = needed_role(rpc, action)
            if token.role < needed:
                raise PermissionDenied(
                    f"the admin token {who!r} has the role {role}; this path needs {needed.word}"
                )
            set_caller(token)
            kind, answer, outcome = "", await self._run(action, fields), "OK"
        except Unauthenticated:
            kind, answer = (
                Unauthenticated.__name__,
                "this path needs an admin token: `Bearer TOKEN`",
            )
            outcome = "UNAUTHENTICATED"
        except ArrieroError as error:
            kind, answer = type(error).__name__, str(error)
            denied = isinstance(error, PermissionDenied)
            outcome = "PERMISSION_DENIED" if denied else "INVALID_ARGUMENT"
        call = AuditedCall(who=who, role=role, peer=PEER, rpc=rpc, raw=raw)
        self._audit.write(call, outcome, str(answer) if kind else "")
        return kind, answer

    async def _run(self, action: str, fields: Mapping[str, str | int]) -> Json:
        model = str(fields.get("model", ""))
        if action == "status":
            return _state(await self._weights.weights(_request(action, model)))
        if action == "push":
            request = _request(action, model)
            request.path = str(fields.get("path", ""))
            return {"text": (await self._weights.weights(request)).text}
        if action in ACTIONS:
            return {"text": await self._updates.run(action, fields)}
        if action == "flush":
            snapshot = await self._registry.snapshot.remote()
            entries = [e for e in snapshot.groups if model in ("", e.model)]
            kv = pb.KvRequest(action="flush", name=model)
            await ask_all(entries, kv, self._store.spec.link_tls)
            return {}
        hold = pb.HoldRequest(
            action=action,
            name=model,
            mode=str(fields.get("mode", "")),
            level=int(fields.get("level", 0)),
        )
        response = await self._weights.hold(hold)
        for group in response.groups:
            if group.error:
                raise InvalidRequest("model", f"group {group.group}: {group.error}")
        return _state(response)


def _rpc(action: str) -> str:
    """Admin's RPC of an action."""
    if action in ACTIONS:
        return "Weights"
    return {"status": "Weights", "push": "Weights", "flush": "Kv"}.get(action, "Hold")


def _request(action: str, model: str) -> pb.WeightsRequest:
    return pb.WeightsRequest(action=action, model=model)


def _state(response: pb.WeightsResponse) -> Json:
    """What gateways need of a response."""
    groups = response.groups
    return {
        "asleep": bool(groups) and all(group.sleep_level for group in groups),
        "paused": bool(groups) and all(group.paused for group in groups),
        "num_slices": sum(group.num_slices for group in groups),
        "running": [f"{group.group}: {group.change}" for group in groups if group.change],
        "models": [
            {
                "model": model.model,
                "version": model.version,
                "settled": model.settled,
                "error": model.error,
            }
            for model in response.models
        ],
    }
