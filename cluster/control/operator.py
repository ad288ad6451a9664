"""The operator: one detached actor that brings the deployment to its desired state.

Stores the desired state (settings by revision, counts) in Ray's key-value store, reads the current
state from the registry, and carries out the actions of `reconcile`. Each group is a Serve
application of its own, so that the operator can start and drain one group by name; Serve replaces a
group that dies. Serves `arriero.v1.Admin`.

Knows applications and the desired state; knows nothing of requests or steps.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import ray
from ray import serve
from ray.actor import ActorHandle

from arriero.cluster import app
from arriero.cluster.control.autoscale import Autoscaler, ModelLoad
from arriero.cluster.control.desired_state import (
    ModelState,
    OperatorState,
    Revision,
    SeatState,
    count_settings,
    restart_settings,
)
from arriero.cluster.control.placement_tracker import PlacementTracker
from arriero.cluster.control.reconcile import (
    DesiredModel,
    GroupSeat,
    Phase,
    Promote,
    Start,
    Stop,
    reconcile,
    settled,
    spares_settled,
)
from arriero.cluster.control.role_assigner import RoleAssigner
from arriero.cluster.control.weights_digest import weights_digest
from arriero.cluster.hosts import kv_store as store
from arriero.cluster.hosts import nodes
from arriero.cluster.hosts.log_level import set_log_level
from arriero.cluster.registry import registry
from arriero.cluster.registry.snapshot import RegistrySnapshot
from arriero.cluster.spec.deployment import DeploymentSpec
from arriero.cluster.spec.diff import FieldChange, diff, live_settings, refuse
from arriero.cluster.spec.model import ModelSpec
from arriero.shards.checkpoint.remote import is_url
from arriero.shards.errors import NotFound, SpecError

log = logging.getLogger(__name__)

NAME = "operator"
PREFIX = f"{app.NAME}-"
"""Name of a group's application: this prefix, then the seat."""
_BUSY_S = 0.3
_QUIET_S = 2.0


class Operator:
    """The actor behind `connect()`."""

    async def __init__(self, spec: dict[str, Any], shared: bool, token: str) -> None:  # type: ignore[misc]  # Ray awaits it
        stored = store.get(NAME)
        self._state = (
            OperatorState(spec, shared, token)
            if stored is None
            else OperatorState.from_wire(stored)
        )
        self._spec = DeploymentSpec.model_validate(self._state.spec)
        set_log_level(self._spec.log_level)
        self._registry = registry.connect()
        self._wake = asyncio.Event()
        self._failed: dict[str, str] = {}  # seat: why its application did not deploy
        self._placements = PlacementTracker()
        self._roles = RoleAssigner()
        self._autoscalers: dict[str, Autoscaler] = {}
        self._change_lock = asyncio.Lock()
        self._replacing_gateways = False
        self._spares: frozenset[str] = frozenset()  # spare seats of the last snapshot
        self._address = await self._serve_admin()
        self._state.admin_port = int(self._address.rpartition(":")[2])
        if not self._state.models:
            for model in self._spec.models:
                # `up` has checked local folders; a URL is opened here for the first time
                digest = await weights_digest(model, check=is_url(model.path))
                first = Revision(1, model.model_dump(mode="json"), digest)
                self._state.models[model.name] = ModelState(model.groups, [first])
        self._save()
        self._capacity = app.ClusterCapacity.of_cluster(self._spec, shared=self._state.shared)
        self._running = asyncio.create_task(self._run())

    async def _serve_admin(self) -> str:
        from arriero.cluster.control.admin_server import AdminServer

        self._admin = AdminServer(self, self._registry)
        admin = self._spec.admin
        tls = None if admin.tls is None else admin.tls.files()
        try:  # after a restart the port must stay: the command line has stored it
            return await self._admin.start(admin.host, admin.port or self._state.admin_port, tls)
        except OSError:
            return await self._admin.start(admin.host, admin.port, tls)

    async def deploy(self) -> str:
        """Deploy the gateways; the loop then starts the groups. Returns Admin's address."""
        await asyncio.to_thread(_run_app, app.NAME, app.gateways(self._spec))
        return self._address

    # ---- questions and changes of Admin ----

    @property
    def spec(self) -> DeploymentSpec:
        """The current spec of the deployment."""
        return self._spec

    def tokens(self) -> list[str]:
        """The admin tokens that are valid now."""
        return self._state.tokens()

    @property
    def gateways_settled(self) -> bool:
        """Whether all gateways run with the current spec."""
        return not self._replacing_gateways

    def desired_models(self) -> dict[str, DesiredModel]:
        """The desired state of each model."""
        desired = {}
        for name, model in self._state.models.items():
            settings = self.settings(name)
            surge = self._placements.surge(
                settings,
                self._capacity,
                num_seats=self._state.groups_in(name, self._spares),
                count=model.count,
            )
            desired[name] = DesiredModel(
                revision=model.current.number,
                count=model.count,
                surge=surge,
                drained=frozenset(model.drained),
                spares=settings.spares,
            )
        return desired

    def seats(self, snapshot: RegistrySnapshot) -> list[GroupSeat]:
        """The current state of each seat."""
        self._spares = frozenset(snapshot.spares)
        serving = {group.seat: group for group in snapshot.groups if group.phase == "serving"}
        seats = []
        for name, seat in self._state.seats.items():
            if seat.stopping:
                phase = Phase.STOPPING
            elif name in serving:
                phase = Phase.SERVING
            elif name in snapshot.standby:
                phase = Phase.STANDBY
            else:
                phase = Phase.FAILED if name in self._failed else Phase.STARTING
            load = 0 if name not in serving else serving[name].stats.get("num_running", 0)
            seats.append(
                GroupSeat(
                    name=name,
                    model=seat.model,
                    revision=seat.revision,
                    phase=phase,
                    load=load,
                    spare=name in self._spares,
                )
            )
        return seats

    def start_problem(self, seat: str) -> str:
        """Why the group of a seat did not start, or still waits; "" for no problem."""
        if seat in self._failed:
            return self._failed[seat]
        settings = self.settings(self._state.seats[seat].model)
        return self._placements.problem(seat, settings, self._capacity)

    def settings(self, model: str) -> ModelSpec:
        """The settings of a model's current revision."""
        return ModelSpec.model_validate(self._state.model(model).current.settings)

    async def scale(self, model: str, groups: int) -> str:
        """Set the number of groups of a model."""
        async with self._change_lock:
            state = self._state.model(model)
            if self.settings(model).autoscale is not None:
                raise SpecError(
                    f"model `{model}` has `autoscale`, which sets the number of groups; change"
                    " `autoscale.min` and `autoscale.max` in the spec, then `arriero rollout SPEC`"
                )
            before, state.count = state.count, groups
            return await self._commit(model, f"{model}: {before} to {groups} groups")

    async def drain(self, name: str) -> str:
        """Stop a group; where there is room, a successor starts first."""
        async with self._change_lock:
            seat_name = name if name in self._state.seats else name.rpartition(".")[0]
            seat = self._state.seats.get(seat_name)
            if seat is None:
                known = ", ".join(self._state.seats) or "none"
                raise NotFound(f"no group or seat {name[:128]!r}; the deployment has {known}")
            model = self._state.models[seat.model]
            if seat_name not in model.drained and not seat.stopping:
                model.drained.append(seat_name)
            text = f"{seat_name}: draining; a successor takes its place"
            return await self._commit(seat_name, text)

    async def rollout(self, spec: DeploymentSpec | None, *, force: bool) -> str:
        """Apply the settings of `spec`; None keeps the settings and applies changed weights."""
        async with self._change_lock:
            new_spec = spec or self._spec
            changes = diff(self._spec, new_spec)
            refuse(changes, "rollout")
            sections = {
                change.field.partition(".")[0]
                for change in changes
                if change.applied_by == "rollout"
            }
            # a leader takes these sections only at its start
            force = force or not sections.isdisjoint(("health", "tracing"))
            revisions = {}
            for model in new_spec.models:  # an unreadable checkpoint is an error before any change
                settings = self._state.models[model.name].current.settings
                if spec is not None:
                    settings = model.model_dump(mode="json")
                digest = await weights_digest(ModelSpec.model_validate(settings))
                revisions[model.name] = settings, digest
            if spec is not None:
                await self._set_spec(spec, changes)
            texts = []
            for model in new_spec.models:
                state = self._state.models[model.name]
                settings, digest = revisions[model.name]
                current = state.current
                if spec is not None:
                    state.count = model.groups
                    if count_settings(settings) != count_settings(current.settings):
                        self._set_counts(model.name, settings)
                before = restart_settings(current.settings), current.digest
                if force or (restart_settings(settings), digest) != before:
                    texts.append(await self._revise(model.name, settings, digest))
            if not sections.isdisjoint(("gateway", "health", "tracing")):
                texts.append("gateways: new settings")
                self._replacing_gateways = True
                await asyncio.to_thread(_run_app, app.NAME, app.gateways(self._spec))
            if not texts:
                return await self._commit(app.NAME, "settings and weights are as they were")
            return "; ".join(texts)

    async def reload(self, spec: DeploymentSpec) -> str:
        """Apply the fields of a spec that can change while everything runs.

        Raises:
            SpecError: another field differs; nothing has changed.
        """
        async with self._change_lock:
            changes = diff(self._spec, spec)
            refuse(changes, "reload")
            if not changes:
                return "settings are as they were"
            models_before = {model.name: model for model in self._spec.models}
            for model in spec.models:
                before = models_before[model.name]
                settings = model.model_dump(mode="json")
                if count_settings(settings) != count_settings(before.model_dump(mode="json")):
                    self._set_counts(model.name, settings)
                if model.groups != before.groups:
                    self._state.models[model.name].count = model.groups
            await self._set_spec(spec, changes)
            fields = ", ".join(change.field for change in changes)
            return await self._commit(app.NAME, f"reloaded {fields}")

    async def rotate_token(self, overlap_s: float) -> str:
        """Replace the admin token; the token before stays valid for `overlap_s` seconds."""
        async with self._change_lock:
            token = self._state.rotate_token(overlap_s)
            self._save()
            text = f"new admin token; the token before is valid for {overlap_s:g} s more"
            await self._note("keys", app.NAME, text)
            return token

    async def rollback(self, model: str) -> str:
        """Go back to the settings before the last rollout of a model."""
        async with self._change_lock:
            revisions = self._state.model(model).revisions
            if len(revisions) < 2:
                raise SpecError(f"model `{model}` has no revision before {revisions[-1].number}")
            before = revisions[-2]
            return await self._revise(model, before.settings, before.digest)

    async def _set_spec(self, spec: DeploymentSpec, changes: Sequence[FieldChange]) -> None:
        """Store a spec, and send its live settings to gateways and leaders."""
        self._spec = spec
        self._state.spec = spec.model_dump(mode="json")
        self._capacity = app.ClusterCapacity.of_cluster(spec, shared=self._state.shared)
        set_log_level(spec.log_level)
        if any(change.applied_by == "reload" for change in changes):
            self._state.live_version += 1
            await self._registry.reload.remote(live_settings(spec, self._state.live_version))

    def _set_counts(self, model: str, settings: dict[str, Any]) -> None:
        """Copy the settings for the number of groups into the current revision of a model."""
        current = self._state.models[model].current
        current.settings = {**current.settings, **count_settings(settings)}
        self._autoscalers.pop(model, None)

    async def _revise(self, model: str, settings: dict[str, Any], digest: str) -> str:
        revision = self._state.model(model).revise(settings, digest)
        text = f"{model}: revision {revision.number}, weights {digest[:12]}"
        return await self._commit(model, text)

    async def _commit(self, who: str, text: str) -> str:
        """Store a change, record the event, and wake the loop; returns the text."""
        self._save()
        self._wake.set()
        await self._note("change", who, text)
        return text

    # ---- the loop ----

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
        desired_models = self.desired_models()
        seats = self.seats(snapshot)
        if (
            settled(desired_models, seats)
            and spares_settled(desired_models, seats)
            and self.gateways_settled
        ):
            return True
        await self._read_applications()
        await self._give_up_crowded(snapshot)
        actions = reconcile(desired_models, self.seats(snapshot))
        for action in actions:
            if isinstance(action, Start):
                await self._start(action)
            elif isinstance(action, Promote):
                await self._registry.promote.remote(action.seat)
            else:
                await self._stop(action)
        if actions:
            self._save()
        return False

    async def _autoscale(self, snapshot: RegistrySnapshot) -> None:
        """Set the number of groups of each model with `autoscale`."""
        for name, state in self._state.models.items():
            settings = self.settings(name)
            if settings.autoscale is None:
                continue
            limits = settings.autoscale.limits()
            autoscaler = self._autoscalers.setdefault(name, Autoscaler(limits))
            waiting, wait_s = snapshot.demand.get(name, (0, 0.0))
            groups = [group for group in snapshot.groups if group.model == name]
            in_groups = sum(
                group.stats.get("num_running", 0) + group.stats.get("num_waiting", 0)
                for group in groups
            )
            load = ModelLoad(
                sequences=waiting + in_groups,
                capacity=settings.limits.max_sequences,
                serving=sum(group.phase == "serving" for group in groups),
                wait_s=wait_s,
            )
            count = autoscaler.count(load, state.count, time.monotonic())
            if count != state.count:
                text = f"{name}: {state.count} to {count} groups: {load.sequences} sequences"
                state.count = count
                self._save()
                await self._note("autoscale", name, f"{text}, {wait_s:.1f} s to wait")

    async def _assign_roles(self, snapshot: RegistrySnapshot) -> None:
        """Send leaders the roles of their groups, where a role has changed."""
        tls = self._spec.link_tls
        context = None if tls is None else tls.files().link_client("link_tls")
        self._roles.retain({group.group_id for group in snapshot.groups})
        for name in self._state.models:
            groups = [
                group
                for group in snapshot.groups
                if group.model == name
                and group.phase == "serving"
                and not self._state.seats.get(group.seat, SeatState(name, 0)).stopping
            ]
            num_prefill = self.settings(name).prefill_groups
            for group_id, role in await self._roles.assign(groups, num_prefill, context):
                await self._note("role", group_id, f"for {role}")

    async def _read_applications(self) -> None:
        """Read the status of all applications; seats whose application is gone are removed."""
        apps = (await asyncio.to_thread(serve.status)).applications
        if app.NAME in apps and apps[app.NAME].status == "RUNNING":
            self._replacing_gateways = False
        self._failed = {
            name.removeprefix(PREFIX): status.message.strip()
            for name, status in apps.items()
            if name.startswith(PREFIX) and status.status == "DEPLOY_FAILED"
        }
        for name in [name for name, seat in self._state.seats.items() if seat.stopping]:
            if PREFIX + name not in apps:
                seat = self._state.seats.pop(name)
                # the next group of the seat is no spare, unless `_start` says so
                await self._registry.promote.remote(name)
                model = self._state.models[seat.model]
                model.drained = [drained for drained in model.drained if drained != name]
                self._save()

    async def _give_up_crowded(self, snapshot: RegistrySnapshot) -> None:
        """Stop extra groups that found no placement."""
        started = {group_id.rpartition(".")[0] for group_id in snapshot.progress}
        seats = self.seats(snapshot)
        surplus = {
            name
            for name, model in self._state.models.items()
            if self._state.groups_in(name, self._spares) > model.count
        }
        for seat in self._placements.give_up(seats, started, surplus):
            await self._stop(Stop(seat=seat, why="the cluster has no room for an extra group"))

    async def _start(self, action: Start) -> None:
        revision = self._state.models[action.model].revision(action.revision)
        model = ModelSpec.model_validate(revision.settings)
        built = app.leader(
            model, self._spec, self._capacity, seat=action.seat, revision=action.revision
        )
        self._state.seats[action.seat] = SeatState(action.model, action.revision)
        self._save()
        if action.spare:
            await self._registry.spare.remote(action.seat, action.model, action.revision)
        text = f"revision {action.revision}{' as a spare' if action.spare else ''}"
        await self._note("starting", action.seat, text)
        await asyncio.to_thread(_run_app, PREFIX + action.seat, built)

    async def _stop(self, action: Stop) -> None:
        self._state.seats[action.seat].stopping = True
        self._save()
        await self._note("stopping", action.seat, action.why)
        await asyncio.to_thread(serve.delete, PREFIX + action.seat, False)

    async def _note(self, kind: str, who: str, text: str) -> None:
        """Record an event in the registry."""
        await self._registry.note.remote(kind, who, text)

    def _save(self) -> None:
        store.put(NAME, asdict(self._state))


def connect(spec: DeploymentSpec, *, shared: bool, token: str) -> ActorHandle[Operator]:
    """The operator of the cluster; creates the actor for `spec` if there is none."""
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
        .remote(spec.model_dump(mode="json"), shared, token)
    )
    return handle


def _run_app(name: str, built: serve.Application) -> None:
    serve.run_many(
        [serve.RunTarget(target=built, name=name, route_prefix=None)],
        wait_for_ingress_deployment_creation=False,
        wait_for_applications_running=False,
    )
