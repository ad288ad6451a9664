"""The operator: one detached actor that brings the deployment to its desired state.

Reads the desired state (`state_store`) and the current state (`deployment_view`), and carries out
the actions of `reconcile`. Serves `arriero.v1.Admin`, whose changes are in `changes`.

Knows when each action is taken; knows nothing of requests or steps.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import ray
from ray.actor import ActorHandle

from arriero.cluster import app
from arriero.cluster.control.adapter_admin import AdapterAdmin
from arriero.cluster.control.adapter_calls import AdapterCalls
from arriero.cluster.control.admin_roles import FIRST, AdminToken, Role
from arriero.cluster.control.applications import Applications
from arriero.cluster.control.audit_log import AuditLog
from arriero.cluster.control.changes import DeploymentChanges
from arriero.cluster.control.console_calls import ConsoleCalls
from arriero.cluster.control.deployment_view import DeploymentView
from arriero.cluster.control.desired_state import ModelState, Revision, SeatState
from arriero.cluster.control.group_counts import GroupCounts
from arriero.cluster.control.hold_calls import HoldCalls
from arriero.cluster.control.placement_tracker import PlacementTracker
from arriero.cluster.control.reconcile import (
    Phase,
    Promote,
    Start,
    Stop,
    reconcile,
    settled,
    spares_settled,
)
from arriero.cluster.control.role_assigner import RoleAssigner
from arriero.cluster.control.state_store import NAME, StateStore
from arriero.cluster.control.weight_admin import WeightAdmin
from arriero.cluster.control.weights_digest import weights_digest
from arriero.cluster.hosts import nodes
from arriero.cluster.hosts.log_level import set_log_level
from arriero.cluster.planner.capacity_check import most_groups
from arriero.cluster.registry import registry
from arriero.cluster.registry.snapshot import RegistrySnapshot
from arriero.cluster.spec.deployment import DeploymentSpec
from arriero.cluster.spec.model import ModelSpec
from arriero.shards.checkpoint.remote import is_url

log = logging.getLogger(__name__)

AUDIT_FILE = "arriero-audit.jsonl"
"""Name of the audit log without a path, in the folder of Ray's logs."""

_BUSY_S = 0.3
_QUIET_S = 2.0


class Operator:
    """The actor behind `connect()`."""

    async def __init__(self, spec: dict[str, Any], shared: bool, token: AdminToken) -> None:  # type: ignore[misc]  # Ray awaits it
        self._store = StateStore(spec, shared, token)
        set_log_level(self._store.spec.log_level, self._store.spec.log_format)
        self._registry = registry.connect()
        self._wake = asyncio.Event()
        self._applications = Applications()
        self._placements = PlacementTracker()
        self._counts = GroupCounts()
        self._roles = RoleAssigner()
        self._adapters = AdapterAdmin(self._store, self._registry)
        self._weights = WeightAdmin(self._store, self._registry)
        self._view = DeploymentView(self._store, self._applications, self._placements)
        self._changes = DeploymentChanges(
            self._store,
            self._applications,
            self._registry,
            on_change=self._wake.set,
            on_count_settings=self._counts.forget,
        )
        self._address = await self._serve_admin()
        self._store.state.admin_port = int(self._address.rpartition(":")[2])
        self._store.save()
        self._running = asyncio.create_task(self._run())

    async def _serve_admin(self) -> str:
        from arriero.cluster.control.admin_server import AdminServer

        self._admin = AdminServer(
            self._store,
            self._view,
            self._changes,
            self._registry,
            self._adapters,
            self._weights,
        )
        admin = self._store.spec.admin
        tls = None if admin.tls is None else admin.tls.files()
        port = admin.port or self._store.state.admin_port
        log_spec = admin.audit_log
        audit = AuditLog(
            log_spec.path or nodes.log_folder() / AUDIT_FILE,
            max_bytes=log_spec.max_bytes,
            keep=log_spec.keep,
        )
        self._hold_calls = HoldCalls(self._store, self._weights, self._registry, audit)
        self._adapter_calls = AdapterCalls(self._store.admin_tokens, self._adapters, audit)
        self._console_calls = ConsoleCalls(self._store.admin_tokens, self._admin, audit)
        try:  # after a restart the port must stay: the command line has stored it
            return await self._admin.start(admin.host, port, tls, audit)
        except OSError:
            return await self._admin.start(admin.host, admin.port, tls, audit)

    async def admin_address(self) -> str:
        """Address of Admin, which answers from now on."""
        return self._address

    async def change_adapter(
        self, authorization: str, action: str, name: str, path: str, replace: bool
    ) -> tuple[str, str]:
        """Change the adapters for a caller of a gateway; see `AdapterCalls.change`."""
        from arriero.router.proto.arriero.v1 import admin_pb2 as pb

        request = pb.AdaptersRequest(action=action, name=name, path=path, replace=replace)
        return await self._adapter_calls.change(authorization, request)

    async def read_cluster(self, authorization: str) -> tuple[str, str]:
        """The state of the cluster for the console of a gateway; see `ConsoleCalls.read`."""
        return await self._console_calls.read(authorization)

    async def develop(
        self, authorization: str, action: str, fields: dict[str, str | int]
    ) -> tuple[str, Any]:
        """Change or read pauses and weights for a caller of a gateway; see `HoldCalls.call`."""
        return await self._hold_calls.call(authorization, action, fields)

    async def deploy(self) -> None:
        """Deploy the gateways, and let the loop start the groups.

        Raises:
            CheckpointError: the weights of a model cannot be read.
            SpecError: the settings of a model do not fit its weights.
        """
        for model in self._store.spec.models:
            if model.name not in self._store.state.models:
                # `up` has checked local folders; a URL is opened here for the first time
                digest = await weights_digest(model, check=is_url(model.path))
                first = Revision(1, model.model_dump(mode="json"), digest)
                self._store.state.models[model.name] = ModelState(model.groups, [first])
        self._store.save()
        self._wake.set()
        await self._applications.deploy_gateways(self._store.spec)

    async def problems(self) -> dict[str, str]:
        """Why groups did not start, or still wait, by seat; without the seats that are well."""
        problems = {seat: self._view.start_problem(seat) for seat in self._store.state.seats}
        return {seat: text for seat, text in problems.items() if text}

    async def _run(self) -> None:
        while True:
            done = False
            try:
                done = await self._step()
            except ray.exceptions.RayError as error:
                log.warning("the state of the deployment is unreadable now: %s", error)
            except Exception:
                log.exception("a step of the operator failed")
            try:
                await asyncio.wait_for(self._wake.wait(), _QUIET_S if done else _BUSY_S)
            except TimeoutError:
                continue
            self._wake.clear()

    async def _step(self) -> bool:
        """Read the state, choose actions, act; True when the desired state is reached."""
        snapshot = await self._registry.snapshot.remote()
        await self._autoscale(snapshot)
        await self._assign_roles(snapshot)
        self._adapters.assign(snapshot)
        self._weights.assign(snapshot)
        self._view.observe(snapshot)
        await self._changes.judge_rollouts(self._view, snapshot)
        desired_models = self._view.desired_models()
        wanted = {name: model.count for name, model in desired_models.items()}
        if snapshot.wanted != wanted:  # a change, or a registry that has started again
            await self._registry.want.remote(wanted)
        seats = self._view.seats(snapshot)
        if (
            settled(desired_models, seats)
            and spares_settled(desired_models, seats)
            and self._view.gateways_settled
        ):
            return True
        await self._remove_ended_seats()
        await self._give_up_crowded(snapshot)
        await self._free_seats(snapshot)
        actions = reconcile(desired_models, self._view.seats(snapshot))
        for action in actions:
            if isinstance(action, Start):
                await self._start(action)
            elif isinstance(action, Promote):
                await self._registry.promote.remote(action.seat)
            else:
                await self._stop(action)
        if actions:
            self._store.save()
        return False

    async def _autoscale(self, snapshot: RegistrySnapshot) -> None:
        """Set the number of groups of each model with `autoscale`, as far as there is room."""
        for name, state in self._store.state.models.items():
            count, reason = self._counts.count(self._store.settings(name), state.count, snapshot)
            if count > state.count:
                count = max(state.count, min(count, await self._room(name)))
            if count != state.count:
                text = f"{name}: {state.count} to {count} groups: {reason}"
                state.count = count
                self._store.save()
                await self._note("autoscale", name, text)

    async def _room(self, model: str) -> int:
        """Number of groups of a model that the cluster can hold beside the other models."""
        capacity = await asyncio.to_thread(self._store.read_capacity, self._store.spec)
        wanted = self._store.wanted_groups()
        others = [entry for entry in wanted if entry.model.name != model]
        settings, memory = next(
            (entry.model, entry.memory) for entry in wanted if entry.model.name == model
        )
        return most_groups(settings, capacity, others, memory)

    async def _assign_roles(self, snapshot: RegistrySnapshot) -> None:
        """Send leaders the roles of their groups, where a role has changed."""
        tls = self._store.spec.link_tls
        context = None if tls is None else tls.files().link_client("link_tls")
        self._roles.retain({group.group_id for group in snapshot.groups})
        for name in self._store.state.models:
            groups = [
                group
                for group in snapshot.groups
                if group.model == name
                and group.phase == "serving"
                and not self._store.state.seats.get(group.seat, SeatState(name, 0)).stopping
            ]
            num_prefill = self._store.settings(name).prefill_groups
            for group_id, role in await self._roles.assign(groups, num_prefill, context):
                await self._note("role", group_id, f"for {role}")

    async def _remove_ended_seats(self) -> None:
        """Read the status of all applications, and remove stopped seats without an application."""
        deployed = await self._applications.read()
        state = self._store.state
        for name in [name for name, seat in state.seats.items() if seat.stopping]:
            if name not in deployed:
                seat = state.seats.pop(name)
                # the next group of the seat is no spare, unless `_start` says so
                await self._registry.promote.remote(name)
                if (model := state.models.get(seat.model)) is not None:
                    model.drained = [drained for drained in model.drained if drained != name]
                self._store.save()

    async def _give_up_crowded(self, snapshot: RegistrySnapshot) -> None:
        """Stop extra groups that found no placement."""
        started = {group_id.rpartition(".")[0] for group_id in snapshot.progress}
        seats = self._view.seats(snapshot)
        for seat in self._placements.give_up(seats, started, self._view.surplus_models()):
            await self._stop(Stop(seat=seat, why="the cluster has no room for an extra group"))

    async def _free_seats(self, snapshot: RegistrySnapshot) -> None:
        """Stop groups that wait for a placement and avoid a node that takes groups again."""
        started = {group_id.rpartition(".")[0] for group_id in snapshot.progress}
        drained = set(self._store.state.drained_nodes)
        for seat in self._view.seats(snapshot):
            waits = seat.phase is Phase.STARTING and seat.name not in started
            if waits and set(self._store.state.seats[seat.name].avoids) - drained:
                await self._stop(Stop(seat=seat.name, why="a node takes groups again"))

    async def _start(self, action: Start) -> None:
        revision = self._store.state.models[action.model].revision(action.revision)
        built = app.leader(
            ModelSpec.model_validate(revision.settings),
            self._store.spec,
            self._store.capacity,
            seat=action.seat,
            revision=action.revision,
            avoid=self._store.state.drained_nodes,
        )
        avoids = list(self._store.state.drained_nodes)
        seat = SeatState(action.model, action.revision, avoids=avoids)
        self._store.state.seats[action.seat] = seat
        self._store.save()
        if action.spare:
            await self._registry.spare.remote(action.seat, action.model, action.revision)
        text = f"revision {action.revision}{' as a spare' if action.spare else ''}"
        await self._note("starting", action.seat, text)
        await self._applications.start_group(action.seat, built)

    async def _stop(self, action: Stop) -> None:
        self._store.state.seats[action.seat].stopping = True
        self._store.save()
        await self._note("stopping", action.seat, action.why)
        await self._applications.stop_group(action.seat)

    async def _note(self, kind: str, who: str, text: str) -> None:
        """Record an event in the registry."""
        await self._registry.note.remote(kind, who, text)


def connect(spec: DeploymentSpec, *, shared: bool, token: str) -> ActorHandle[Operator]:
    """The operator of the cluster; creates the actor for `spec` if there is none.

    Ray stores the arguments of an actor, so the actor gets the hash of `token`.
    """
    handle: ActorHandle[Operator] = (
        ray.remote(Operator)
        .options(  # type: ignore[assignment]
            name=NAME,
            namespace=registry.NAMESPACE,
            lifetime="detached",
            get_if_exists=True,
            num_cpus=0,
            enable_task_events=False,  # several calls a second, which Ray's head would record
            resources=nodes.ON_HEAD,
            max_restarts=-1,
            max_concurrency=100,
        )
        .remote(spec.model_dump(mode="json"), shared, AdminToken.of(FIRST, Role.OWN, token))
    )
    return handle
