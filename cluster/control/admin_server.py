"""The gRPC server of `arriero.v1.Admin`: answers of the operator and the registry as messages.

Every caller must send the deployment's admin token. Knows messages and gRPC statuses; knows nothing
of the meaning of a change (`changes`).
"""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import os
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import grpc
import grpc.aio
import ray
import yaml
from google.protobuf.message import DecodeError, Message
from pydantic import ValidationError

from arriero.cluster import app
from arriero.cluster.control.api_keys import ApiKeyStore, check_overlap
from arriero.cluster.control.changes import DeploymentChanges
from arriero.cluster.control.deployment_view import DeploymentView
from arriero.cluster.control.kv_admin_client import KV_ACTIONS, ask_kv
from arriero.cluster.control.reconcile import Phase, settled
from arriero.cluster.control.state_store import StateStore
from arriero.cluster.hosts import nodes
from arriero.cluster.hosts.nodes import node_address, reachable
from arriero.cluster.registry.history import Failure
from arriero.cluster.spec.deployment import DeploymentSpec
from arriero.cluster.spec.gateway import TenantSpec
from arriero.cluster.spec.load import explain
from arriero.router.grpc_options import SERVER_OPTIONS
from arriero.router.proto.arriero.v1 import admin_pb2 as pb
from arriero.router.tenants.keys import KeyEntry
from arriero.router.tls import TlsFiles
from arriero.shards.errors import ArrieroError, CheckpointError, InvalidRequest, NotFound, SpecError

if TYPE_CHECKING:
    from ray.actor import ActorHandle

    from arriero.cluster.registry.registry import Registry
    from arriero.cluster.registry.snapshot import GroupEntry, RegistrySnapshot

log = logging.getLogger(__name__)

SERVICE: str = pb.DESCRIPTOR.services_by_name["Admin"].full_name
MAX_LINES = 1000
KEY_ACTIONS = ("list", "add", "rotate", "revoke")

M = TypeVar("M", bound=Message)
Context = grpc.aio.ServicerContext[bytes, bytes]


class AdminServer:
    """Serves Admin in the event loop of the operator.

    Args:
        store: the desired state, with the valid admin tokens.
        view: desired models and current seats.
        changes: makes the changes.
        registry: of the cluster.
    """

    def __init__(
        self,
        store: StateStore,
        view: DeploymentView,
        changes: DeploymentChanges,
        registry: ActorHandle[Registry],
    ) -> None:
        self._store, self._view, self._changes = store, view, changes
        self._registry = registry
        self._server: grpc.aio.Server | None = None

    async def start(self, host: str, port: int, tls: TlsFiles | None) -> str:
        """Listen; returns the address for clients.

        Args:
            host: address to bind to.
            port: port to bind to; 0 for any free port.
            tls: certificate and key; None for a server without TLS.

        Raises:
            OSError: the address cannot be bound.
            SpecError: a file of `tls` is missing or wrong.
        """
        credentials = None if tls is None else tls.server("admin.tls")
        server = self._server = grpc.aio.server(options=SERVER_OPTIONS)
        methods = {
            "GetStatus": self._method(pb.GetStatusRequest, self._status),
            "ListEvents": self._method(pb.ListEventsRequest, self._events),
            "Why": self._method(pb.WhyRequest, self._why),
            "Logs": self._method(pb.LogsRequest, self._logs),
            "Scale": self._method(pb.ScaleRequest, self._scale),
            "Drain": self._method(pb.DrainRequest, self._drain),
            "Rollout": self._method(pb.RolloutRequest, self._rollout),
            "Rollback": self._method(pb.RollbackRequest, self._rollback),
            "Reload": self._method(pb.ReloadRequest, self._reload),
            "Keys": self._method(pb.KeysRequest, self._keys),
            "RotateToken": self._method(pb.RotateTokenRequest, self._rotate_token),
            "Kv": self._method(pb.KvRequest, self._kv),
        }
        handlers = {
            name: grpc.unary_unary_rpc_method_handler(method) for name, method in methods.items()
        }
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
        try:
            if credentials is None:
                bound = server.add_insecure_port(f"{host}:{port}")
            else:
                bound = server.add_secure_port(f"{host}:{port}", credentials)
        except RuntimeError as error:
            raise OSError(f"admin cannot listen on {host}:{port}: {error}") from error
        await server.start()
        return reachable(host, bound)

    def _method(
        self, kind: type[M], answer: Callable[[M], Awaitable[Message]]
    ) -> Callable[[bytes, Context], Awaitable[bytes]]:
        """A gRPC method: checks the token, reads the request, turns errors into statuses."""

        async def run(raw: bytes, context: Context) -> bytes:
            given = str(dict(context.invocation_metadata() or ()).get("authorization", ""))
            expected = [f"Bearer {token}".encode() for token in self._store.state.tokens()]
            if not any([hmac.compare_digest(given.encode(), token) for token in expected]):
                await context.abort(
                    grpc.StatusCode.UNAUTHENTICATED,
                    "metadata `authorization: Bearer TOKEN` is not the admin token",
                )
            try:
                request = kind()
                request.ParseFromString(raw)
                return (await answer(request)).SerializeToString()
            except DecodeError:
                code, text = (
                    grpc.StatusCode.INVALID_ARGUMENT,
                    f"the request is no {kind.DESCRIPTOR.name} message",
                )
            except NotFound as error:
                code, text = grpc.StatusCode.NOT_FOUND, str(error)
            except (InvalidRequest, SpecError) as error:
                code, text = grpc.StatusCode.INVALID_ARGUMENT, str(error)
            except CheckpointError as error:
                code, text = grpc.StatusCode.DATA_LOSS, str(error)
            except ArrieroError as error:
                code, text = grpc.StatusCode.FAILED_PRECONDITION, str(error)
            except Exception:
                log.exception("%s failed", kind.DESCRIPTOR.name)
                code, text = grpc.StatusCode.INTERNAL, "internal error; see `arriero logs operator`"
            await context.abort(code, text[:2000])

        return run

    async def _status(self, request: pb.GetStatusRequest) -> pb.Status:
        snapshot = await self._registry.snapshot.remote()
        desired_models, seats = self._view.desired_models(), self._view.seats(snapshot)
        entries: dict[str, GroupEntry] = {entry.seat: entry for entry in snapshot.groups}
        status = pb.Status()
        for name, desired in desired_models.items():
            own = [seat for seat in seats if seat.model == name]
            status.models.add(
                model=name,
                revision=desired.revision,
                groups=desired.count,
                serving=sum(seat.phase is Phase.SERVING for seat in own),
                settled=settled({name: desired}, own) and self._view.gateways_settled,
                path=self._store.settings(name).path,
                spares=desired.spares,
                standing_by=sum(seat.phase is Phase.STANDBY for seat in own),
                queued=snapshot.demand.get(name, (0, 0.0))[0],
                wait_s=snapshot.demand.get(name, (0, 0.0))[1],
            )
        for seat in sorted(seats, key=lambda seat: (seat.spare, seat.name)):
            group = status.groups.add(
                seat=seat.name, model=seat.model, revision=seat.revision, phase=seat.phase.value
            )
            group.text = self._view.start_problem(seat.name) or _progress(snapshot, seat.name)
            if (entry := entries.get(seat.name)) is not None:
                _fill(group, entry)
        for gateway in snapshot.gateways:
            status.gateways.add(
                id=gateway.id, address=gateway.address, http=gateway.http, pid=gateway.pid
            )
        status.failures.extend(map(_failure, snapshot.failures))
        return status

    async def _events(self, request: pb.ListEventsRequest) -> pb.ListEventsResponse:
        events = (await self._registry.events.remote())[-request.limit :]
        return pb.ListEventsResponse(
            events=[pb.Event(at=e.at, kind=e.kind, who=e.who, text=e.text) for e in events]
        )

    async def _why(self, request: pb.WhyRequest) -> pb.WhyResponse:
        failure = await self._registry.why.remote(request.name)
        if failure is None:
            raise NotFound(f"no failure of {request.name[:128]!r} is recorded")
        return pb.WhyResponse(failure=_failure(failure), lines=failure.words())

    async def _logs(self, request: pb.LogsRequest) -> pb.LogsResponse:
        processes = _processes(await self._registry.snapshot.remote(), request.name)
        count = min(request.lines or 20, MAX_LINES)
        tails = await asyncio.gather(
            *(nodes.log_tail(node_id, pid, count) for _, _, node_id, pid in processes)
        )
        return pb.LogsResponse(
            logs=[
                pb.ProcessLog(who=who, node=node, pid=pid, lines=lines)
                for (who, node, _, pid), lines in zip(processes, tails, strict=True)
            ]
        )

    async def _scale(self, request: pb.ScaleRequest) -> pb.ChangeResponse:
        return pb.ChangeResponse(text=await self._changes.scale(request.model, request.groups))

    async def _drain(self, request: pb.DrainRequest) -> pb.ChangeResponse:
        return pb.ChangeResponse(text=await self._changes.drain(request.name))

    async def _rollout(self, request: pb.RolloutRequest) -> pb.ChangeResponse:
        spec = _read_spec(request.spec) if request.spec else None
        return pb.ChangeResponse(text=await self._changes.rollout(spec, force=request.force))

    async def _rollback(self, request: pb.RollbackRequest) -> pb.ChangeResponse:
        return pb.ChangeResponse(text=await self._changes.rollback(request.model))

    async def _reload(self, request: pb.ReloadRequest) -> pb.ChangeResponse:
        return pb.ChangeResponse(text=await self._changes.reload(_read_spec(request.spec)))

    async def _keys(self, request: pb.KeysRequest) -> pb.KeysResponse:
        snapshot = await self._registry.snapshot.remote()
        store = ApiKeyStore(
            self._store.spec.gateway.keys, [gateway.node_id for gateway in snapshot.gateways]
        )
        if request.action == "list":
            return pb.KeysResponse(keys=map(_api_key, (await store.entries()).values()))
        if request.action == "add":
            _check_tenant(request.tenant)
            change = await store.add(request.tenant, request.note)
        elif request.action == "rotate":
            change = await store.rotate(request.id, check_overlap(request.overlap_s))
        elif request.action == "revoke":
            change = await store.revoke(request.id)
        else:
            raise _unknown_action(request.action, KEY_ACTIONS)
        text = f"key {change.entry.id} of {change.entry.tenant}: {request.action}"
        await self._registry.note.remote("keys", app.NAME, text)
        return pb.KeysResponse(keys=[_api_key(change.entry)], key=change.key)

    async def _rotate_token(self, request: pb.RotateTokenRequest) -> pb.RotateTokenResponse:
        token = await self._changes.rotate_token(check_overlap(request.overlap_s))
        return pb.RotateTokenResponse(token=token)

    async def _kv(self, request: pb.KvRequest) -> pb.KvResponse:
        if request.action not in KV_ACTIONS:
            raise _unknown_action(request.action, KV_ACTIONS)
        snapshot = await self._registry.snapshot.remote()
        name = request.name
        entries = [e for e in snapshot.groups if name in ("", e.group_id, e.seat, e.model)]
        if not entries:
            serving = ", ".join(entry.seat for entry in snapshot.groups) or "none"
            raise NotFound(f"no group of {name[:128]!r} serves; serving groups: {serving}")
        tls = self._store.spec.link_tls
        groups = await asyncio.gather(*(ask_kv(entry, request, tls) for entry in entries))
        return pb.KvResponse(groups=groups)


def _processes(snapshot: RegistrySnapshot, name: str) -> list[tuple[str, str, str, int]]:
    """Processes by the name of a group, seat or gateway, or by "gateways" or "operator".

    Returns:
        Of each process: name for people, address of the node, Ray's id of the node, pid.

    Raises:
        NotFound: nothing of this name serves.
    """
    if name == "operator":
        return [(name, node_address(), ray.get_runtime_context().get_node_id(), os.getpid())]
    gateways = [gateway for gateway in snapshot.gateways if name in ("gateways", gateway.id)]
    if gateways:
        return [
            (
                f"gateway {gateway.id}",
                gateway.address.rpartition(":")[0],
                gateway.node_id,
                gateway.pid,
            )
            for gateway in gateways
        ]
    entry = next((e for e in snapshot.groups if name in (e.group_id, e.seat)), None)
    if entry is None:
        serving = ", ".join([group.seat for group in snapshot.groups] + ["gateways", "operator"])
        raise NotFound(f"nothing called {name[:128]!r} serves; choose from: {serving}")
    slices = zip(entry.slice_nodes, entry.slice_node_ids, entry.slice_pids, strict=True)
    return [
        ("leader", entry.node, entry.node_id, entry.pid),
        *((f"slice {rank}", *process) for rank, process in enumerate(slices)),
    ]


def _unknown_action(action: str, actions: Sequence[str]) -> InvalidRequest:
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
    )


def _read_spec(text: str) -> DeploymentSpec:
    try:
        return DeploymentSpec.model_validate(yaml.safe_load(text))
    except yaml.YAMLError as error:
        raise SpecError(f"the spec is not YAML: {' '.join(str(error).split())}") from None
    except ValidationError as error:
        raise SpecError(explain(error, "spec", {})) from None


def _progress(snapshot: RegistrySnapshot, seat: str) -> str:
    """Progress of the start of a seat's group; "" when none is recorded."""
    texts = (
        text for group_id, text in snapshot.progress.items() if group_id.rpartition(".")[0] == seat
    )
    return next(texts, "")


def _fill(group: pb.GroupStatus, entry: GroupEntry) -> None:
    """Add the fields of a registry entry to the status of a group."""
    stats: dict[str, Any] = entry.stats
    group.id, group.layout, group.digest = entry.group_id, entry.layout, entry.digest
    group.node, group.pid = entry.node, entry.pid
    group.slice_pids.extend(entry.slice_pids)
    group.slice_nodes.extend(entry.slice_nodes)
    group.running = stats.get("num_running", 0)
    group.waiting = stats.get("num_waiting", 0)
    for name in (
        "blocks_used", "blocks_cached", "blocks_total", "output_tokens", "prompt_tokens",
        "cached_tokens", "steps", "preemptions",
    ):  # fmt: skip
        setattr(group, name, stats.get(name, 0))
    if loads := stats.get("expert_loads", {}):
        group.expert_imbalance = stats["expert_imbalance"]
        group.expert_moves = stats["expert_moves"]
        group.expert_loads.extend(
            pb.ExpertLoads(layer=int(layer), tokens=tokens) for layer, tokens in loads.items()
        )


def _failure(failure: Failure) -> pb.Failure:
    return pb.Failure(
        who=failure.who,
        seat=failure.seat,
        at=failure.at,
        cause=failure.cause,
        record="" if failure.record is None else json.dumps(failure.record),
        recovered_s=failure.recovered_s,
    )
