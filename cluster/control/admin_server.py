"""The gRPC server of `arriero.v1.Admin`: answers of the operator and the registry as messages.

Every caller must send an admin token (`admin_guard`). Knows messages and gRPC statuses; knows
nothing of the meaning of a change (`changes`).
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, TypeVar

import grpc
import grpc.aio
import ray
from google.protobuf.message import DecodeError, Message
from pydantic import ValidationError

from arriero.cluster.control.adapter_admin import AdapterAdmin
from arriero.cluster.control.admin_guard import AdminGuard
from arriero.cluster.control.admin_roles import check_spec
from arriero.cluster.control.admin_rollouts import (
    RolloutAdmin,
    check_deadline,
    fill_rollout,
    node_statuses,
    read_nodes,
)
from arriero.cluster.control.api_keys import check_overlap
from arriero.cluster.control.audit_log import AuditLog
from arriero.cluster.control.changes import DeploymentChanges
from arriero.cluster.control.credentials import Credentials
from arriero.cluster.control.deployment_view import DeploymentView
from arriero.cluster.control.kv_admin_client import ask_all, check_kv
from arriero.cluster.control.prompt_guard_status import fill_prompt_guard
from arriero.cluster.control.reconcile import Phase, settled
from arriero.cluster.control.state_store import StateStore
from arriero.cluster.control.weight_admin import WeightAdmin
from arriero.cluster.hosts import nodes
from arriero.cluster.hosts.nodes import node_address, reachable
from arriero.cluster.registry.history import Failure
from arriero.cluster.spec.deployment import DeploymentSpec
from arriero.cluster.spec.load import explain
from arriero.cluster.spec.yaml_text import parse
from arriero.router.grpc_options import SERVER_OPTIONS
from arriero.router.proto.arriero.v1 import admin_pb2 as pb
from arriero.router.tls import TlsFiles
from arriero.shards.errors import (
    ArrieroError,
    CheckpointError,
    InvalidRequest,
    NotFound,
    PermissionDenied,
    SpecError,
)
from arriero.shards.protocol import wire

if TYPE_CHECKING:
    from ray.actor import ActorHandle

    from arriero.cluster.registry.registry import Registry
    from arriero.cluster.registry.snapshot import GroupEntry, RegistrySnapshot

log = logging.getLogger(__name__)

SERVICE: str = pb.DESCRIPTOR.services_by_name["Admin"].full_name
MAX_LINES = 1000

M = TypeVar("M", bound=Message)
Context = grpc.aio.ServicerContext[bytes, bytes]


class AdminServer:
    """Serves Admin in the event loop of the operator.

    Args:
        store: the desired state, with the valid admin tokens.
        view: desired models and current seats.
        changes: makes the changes.
        registry: of the cluster.
        adapters: changes the adapters that come and go.
        weights: changes the weights, pauses and sleep of groups.
    """

    def __init__(
        self,
        store: StateStore,
        view: DeploymentView,
        changes: DeploymentChanges,
        registry: ActorHandle[Registry],
        adapters: AdapterAdmin,
        weights: WeightAdmin,
    ) -> None:
        self._store, self._view, self._changes = store, view, changes
        self._registry, self._adapters, self._weights = registry, adapters, weights
        self._server: grpc.aio.Server | None = None

    async def start(
        self, host: str, port: int, tls: TlsFiles | None, audit: AuditLog | None = None
    ) -> str:
        """Listen; returns the address for clients.

        Args:
            host: address to bind to.
            port: port to bind to; 0 for any free port.
            tls: certificate and key; None for a server without TLS.
            audit: gets a line for each change and each refusal; None for no log.

        Raises:
            OSError: the address cannot be bound.
            SpecError: a file of `tls` is missing or wrong.
        """
        credentials = None if tls is None else tls.server("admin.tls")
        guard = AdminGuard(self._store.admin_tokens, audit)
        server = self._server = grpc.aio.server(interceptors=(guard,), options=SERVER_OPTIONS)
        keys_and_tokens = Credentials(self._store, self._registry)
        more = RolloutAdmin(self._store, self._changes)
        methods = {
            "GetStatus": self._method(pb.GetStatusRequest, self.status),
            "ListEvents": self._method(pb.ListEventsRequest, self.events),
            "Why": self._method(pb.WhyRequest, self.why),
            "Logs": self._method(pb.LogsRequest, self._logs),
            "Scale": self._method(pb.ScaleRequest, self._scale),
            "Drain": self._method(pb.DrainRequest, self._drain),
            "Rollout": self._method(pb.RolloutRequest, self._rollout),
            "Rollback": self._method(pb.RollbackRequest, self._rollback),
            "Reload": self._method(pb.ReloadRequest, self._reload),
            "Keys": self._method(pb.KeysRequest, keys_and_tokens.keys),
            "Tokens": self._method(pb.TokensRequest, keys_and_tokens.tokens),
            "RotateToken": self._method(pb.RotateTokenRequest, self._rotate_token),
            "Kv": self._method(pb.KvRequest, self.kv),
            "PauseRollout": self._method(pb.PauseRolloutRequest, more.pause_rollout),
            "DrainNode": self._method(pb.DrainNodeRequest, more.drain_node),
            "GetSpec": self._method(pb.GetSpecRequest, more.get_spec),
            "Adapters": self._method(pb.AdaptersRequest, self._adapters.adapters),
            "Weights": self._method(pb.WeightsRequest, self._weights.weights),
            "Hold": self._method(pb.HoldRequest, self._weights.hold),
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
        """A gRPC method: reads the request, turns errors into statuses."""

        async def run(raw: bytes, context: Context) -> bytes:
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
            except PermissionDenied as error:
                code, text = grpc.StatusCode.PERMISSION_DENIED, str(error)
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

    async def status(self, request: pb.GetStatusRequest) -> pb.Status:
        """The current and the desired state."""
        snapshot = await self._registry.snapshot.remote()
        self._view.observe(snapshot)
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
            fill_rollout(status.models[-1], self._store.state.models[name])
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
        drained = self._store.state.drained_nodes
        status.nodes.extend(node_statuses(await read_nodes(), drained, snapshot))
        await fill_prompt_guard(status, self._store.spec)
        return status

    async def events(self, request: pb.ListEventsRequest) -> pb.ListEventsResponse:
        """The latest events, oldest first."""
        events = (await self._registry.events.remote())[-request.limit :]
        return pb.ListEventsResponse(
            events=[pb.Event(at=e.at, kind=e.kind, who=e.who, text=e.text, by=e.by) for e in events]
        )

    async def why(self, request: pb.WhyRequest) -> pb.WhyResponse:
        """The first cause of a failure.

        Raises:
            NotFound: no failure of the name is recorded.
        """
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
        spec = self._read_spec(request.spec) if request.spec else None
        change = await self._changes.rollout(
            spec,
            force=request.force,
            dry_run=request.dry_run,
            deadline_s=check_deadline(request.deadline_s),
            prune=request.prune,
        )
        return pb.ChangeResponse(text=change.text, details=change.details)

    async def _rollback(self, request: pb.RollbackRequest) -> pb.ChangeResponse:
        return pb.ChangeResponse(text=await self._changes.rollback(request.model))

    async def _reload(self, request: pb.ReloadRequest) -> pb.ChangeResponse:
        return pb.ChangeResponse(text=await self._changes.reload(self._read_spec(request.spec)))

    def _read_spec(self, text: str) -> DeploymentSpec:
        """A spec that the caller may apply."""
        spec = _read_spec(text)
        check_spec(self._store.spec, spec)
        return spec

    async def _rotate_token(self, request: pb.RotateTokenRequest) -> pb.RotateTokenResponse:
        token = await self._changes.rotate_token(check_overlap(request.overlap_s))
        return pb.RotateTokenResponse(token=token)

    async def kv(self, request: pb.KvRequest) -> pb.KvResponse:
        """Run an action on the KV caches of groups.

        Raises:
            InvalidRequest, NotFound: as in `check_kv` and `ask_all`, or no such group serves.
        """
        check_kv(request)
        snapshot = await self._registry.snapshot.remote()
        name = request.name
        entries = [e for e in snapshot.groups if name in ("", e.group_id, e.seat, e.model)]
        if not entries:
            serving = ", ".join(entry.seat for entry in snapshot.groups) or "none"
            raise NotFound(f"no group of {name[:128]!r} serves; serving groups: {serving}")
        groups = await ask_all(entries, request, self._store.spec.link_tls)
        return pb.KvResponse(groups=groups)


def _processes(snapshot: RegistrySnapshot, name: str) -> list[tuple[str, str, str, int]]:
    """Processes by the name of a group, seat or gateway, or by "gateways" or "operator".

    Returns:
        Of each process: name for people, address of the node, Ray's id of the node, pid.

    Raises:
        NotFound: nothing of this name serves or starts.
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
    groups = (*snapshot.groups, *snapshot.starting)
    entry = next((e for e in groups if name in (e.group_id, e.seat)), None)
    if entry is None:
        known = ", ".join(
            dict.fromkeys([group.seat for group in groups] + ["gateways", "operator"])
        )
        raise NotFound(f"nothing called {name[:128]!r} serves or starts; choose from: {known}")
    slices = zip(entry.slice_nodes, entry.slice_node_ids, entry.slice_pids, strict=True)
    return [
        ("leader", entry.node, entry.node_id, entry.pid),
        *((f"slice {rank}", *process) for rank, process in enumerate(slices)),
    ]


def _read_spec(text: str) -> DeploymentSpec:
    try:
        return DeploymentSpec.model_validate(parse(text, "spec")[0])
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
    stats = entry.stats
    group.id, group.layout, group.digest = entry.group_id, entry.layout, entry.digest
    group.node, group.pid = entry.node, entry.pid
    group.slice_pids.extend(entry.slice_pids)
    group.slice_nodes.extend(entry.slice_nodes)
    group.running, group.waiting = stats.num_running, stats.num_waiting
    for name in (
        "blocks_used", "blocks_cached", "blocks_total", "output_tokens", "prompt_tokens",
        "cached_tokens", "steps", "preemptions",
    ):  # fmt: skip
        setattr(group, name, getattr(stats, name))
    drafts = stats.speculation
    group.drafts, group.drafted_tokens = drafts.drafts, drafts.drafted
    group.accepted_tokens = drafts.accepted
    if stats.expert_loads:
        group.expert_imbalance, group.expert_moves = stats.expert_imbalance, stats.expert_moves
        group.expert_loads.extend(
            pb.ExpertLoads(layer=int(layer), tokens=tokens)
            for layer, tokens in stats.expert_loads.items()
        )


def _failure(failure: Failure) -> pb.Failure:
    return pb.Failure(
        who=failure.who,
        seat=failure.seat,
        at=failure.at,
        cause=failure.cause,
        record=json.dumps(wire.to_builtins(failure.record)) if failure.record else "",
        recovered_s=failure.recovered_s,
    )
