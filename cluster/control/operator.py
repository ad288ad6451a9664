"""Who makes the deployment what it is wanted to be: one detached actor.

Keeps what is wanted (settings by revision, counts) in Ray's store, looks at what is, and carries
out what `diff.reconcile` says: each group is a Serve application of its own, so that any one can be
started and drained by name; Serve replaces a group that dies. Serves `arriero.v1.Admin`.

Knows applications and wishes; knows nothing of requests or steps.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
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
    count_of,
    essence,
)
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
from arriero.cluster.control.role_assigner import Roles
from arriero.cluster.hosts import kv_store as store
from arriero.cluster.hosts import nodes
from arriero.cluster.hosts.log_level import set_log_level
from arriero.cluster.registry import registry
from arriero.cluster.registry.snapshot import RegistrySnapshot
from arriero.cluster.spec.deployment import DeploymentSpec
from arriero.cluster.spec.diff import FieldChange, diff, live_settings, refuse
from arriero.cluster.spec.model import ModelSpec
from arriero.shards.checkpoint.remote import is_url
from arriero.shards.errors import ArrieroError, NotFound, SpecError

log = logging.getLogger(__name__)

NAME = "operator"
PREFIX = f"{app.NAME}-"
"""Applications of groups: the prefix, then the seat."""
_BUSY_S = 0.3
_QUIET_S = 2.0
_KEEP_REVISIONS = 8
_PLACE_SOON_S = 3.0
PLACE_S = 20.0
"""A group beyond the wanted count that has found no place by then is given up."""
CROWDED_S = 600.0
"""For so long no other is tried."""


class Operator:
    """The actor behind `connect()`."""

    async def __init__(self, spec: dict[str, Any], shared: bool, token: str) -> None:  # type: ignore[misc]  # Ray awaits it
        kept = store.get(NAME)
        self._kept = (
            OperatorState(spec, shared, token) if kept is None else OperatorState.from_wire(kept)
        )
        self._spec = DeploymentSpec.model_validate(self._kept.spec)
        set_log_level(self._spec.log_level)
        self._registry = registry.connect()
        self._wake = asyncio.Event()
        self._failed: dict[str, str] = {}
        self._placing_since_s: dict[str, float] = {}
        self._crowded_until_s: dict[str, float] = {}
        self._roles = Roles()
        self._scalers: dict[str, Autoscaler] = {}
        self._change = asyncio.Lock()
        self._gateways_change = False  # until Serve has replaced them
        self._spares: frozenset[str] = frozenset()  # seats that stand by, as last seen
        from arriero.cluster.control.admin_server import AdminServer

        self._admin = AdminServer(self, self._registry)
        at = self._spec.admin
        tls = None if at.tls is None else at.tls.files()
        try:  # where it was before a restart: the command line knows that port
            port = at.port or self._kept.admin_port
            self._address = await self._admin.start(at.host, port, tls)
        except OSError:
            self._address = await self._admin.start(at.host, at.port, tls)
        self._kept.admin_port = int(self._address.rpartition(":")[2])
        if not self._kept.models:
            for model in self._spec.models:
                # `up` has checked the folders; what is fetched is seen here for the first time
                digest = await self._digest(model, check=is_url(model.path))
                first = Revision(1, model.model_dump(mode="json"), digest)
                self._kept.models[model.name] = ModelState(model.groups, [first])
        self._keep()
        self._room = app.ClusterCapacity.of_cluster(self._spec, shared=self._kept.shared)
        self._running = asyncio.create_task(self._run())

    async def deploy(self) -> str:
        """Deploy the gateways; the groups follow by themselves. Gives Admin's address."""
        await asyncio.to_thread(_run_app, app.NAME, app.gateways(self._spec))
        return self._address

    # ---- what Admin asks ----

    @property
    def spec(self) -> DeploymentSpec:
        """The deployment's, as it was last deployed."""
        return self._spec

    def tokens(self) -> list[str]:
        """The tokens that Admin takes now."""
        kept = self._kept
        before = [kept.token_before] if time.time() < kept.token_before_until else []
        return [kept.token, *before]

    @property
    def gateways_settled(self) -> bool:
        """Whether the gateways are those of the wanted spec."""
        return not self._gateways_change

    def desired_models(self) -> dict[str, DesiredModel]:
        """What is wanted now."""
        return {
            name: DesiredModel(
                revision=one.revisions[-1].number,
                count=one.count,
                surge=self._surge(name),
                drained=frozenset(one.drained),
                spares=self.settings(name).spares,
            )
            for name, one in self._kept.models.items()
        }

    def seats(self, snapshot: RegistrySnapshot) -> list[GroupSeat]:
        """What there is."""
        self._spares = frozenset(snapshot.spares)
        serving = {one.seat: one for one in snapshot.groups if one.phase == "serving"}
        found = []
        for name, place in self._kept.places.items():
            if place.stopping:
                phase = Phase.STOPPING
            elif name in serving:
                phase = Phase.SERVING
            elif name in snapshot.standby:
                phase = Phase.STANDBY
            else:
                phase = Phase.FAILED if name in self._failed else Phase.STARTING
            load = 0 if name not in serving else serving[name].stats.get("num_running", 0)
            found.append(
                GroupSeat(
                    name=name,
                    model=place.model,
                    revision=place.revision,
                    phase=phase,
                    load=load,
                    spare=name in self._spares,
                )
            )
        return found

    def trouble(self, seat: str) -> str:
        """Why a seat did not start, or what it waits for; "" if nothing is amiss."""
        if seat in self._failed:
            return self._failed[seat]
        since_s = self._placing_since_s.get(seat)
        if since_s is None or time.monotonic() - since_s < _PLACE_SOON_S:
            return ""
        each = self._bundles(self.settings(self._kept.places[seat].model))
        wanted = ", ".join(f"{amount:g} {name}" for name, amount in each[0].items())
        return (
            f"waits for a place: it wants {len(each)} x ({wanted}), each on one node, and"
            f" {nodes.room_for(each[0])} are free"
        )

    def settings(self, model: str) -> ModelSpec:
        """The wanted settings of a model."""
        return ModelSpec.model_validate(self._model(model).revisions[-1].settings)

    async def scale(self, model: str, groups: int) -> str:
        """Want so many groups of a model."""
        async with self._change:
            managed = self._model(model)
            if self.settings(model).autoscale is not None:
                raise SpecError(
                    f"model `{model}` has `autoscale`, which counts its groups; change `min` and"
                    " `max` in the spec, and `arriero rollout` it"
                )
            before, managed.count = managed.count, groups
            return await self._begin(model, f"{model}: {before} to {groups} groups")

    async def drain(self, name: str) -> str:
        """Want a group gone; a successor comes first where there is room."""
        async with self._change:
            seat = name if name in self._kept.places else name.rpartition(".")[0]
            place = self._kept.places.get(seat)
            if place is None:
                there = ", ".join(self._kept.places) or "none"
                raise NotFound(f"no group or seat {name[:128]!r}; there is {there}")
            managed = self._kept.models[place.model]
            if seat not in managed.drained and not place.stopping:
                managed.drained.append(seat)
            return await self._begin(seat, f"{seat}: draining; a successor takes its place")

    async def rollout(self, spec: DeploymentSpec | None, *, force: bool) -> str:
        """Want the settings of `spec`, or the same ones with the weights that are there now."""
        async with self._change:
            wanted = spec or self._spec
            differing = diff(self._spec, wanted)
            refuse(differing, "rollout")
            rolled = [one.field for one in differing if one.applied_by == "rollout"]
            # what each group's leader was started with
            force = force or any(_part(one) in ("health", "tracing") for one in rolled)
            looked = {}
            for model in wanted.models:  # what cannot be read is said before anything is changed
                last = self._kept.models[model.name].revisions[-1]
                settings = model.model_dump(mode="json") if spec is not None else last.settings
                digest = await self._digest(ModelSpec.model_validate(settings))
                looked[model.name] = settings, digest
            if spec is not None:
                await self._publish(spec, differing)
            told = []
            for model in wanted.models:
                managed = self._kept.models[model.name]
                last = managed.revisions[-1]
                settings, digest = looked[model.name]
                managed.count = model.groups if spec is not None else managed.count
                if spec is not None and count_of(settings) != count_of(last.settings):
                    last.settings = {**last.settings, **count_of(settings)}
                    self._scalers.pop(model.name, None)
                if force or (essence(settings), digest) != (essence(last.settings), last.digest):
                    told.append(await self._revise(model.name, settings, digest))
            if any(_part(one) in ("gateway", "health", "tracing") for one in rolled):
                told.append("gateways: new settings")
                self._gateways_change = True
                await asyncio.to_thread(_run_app, app.NAME, app.gateways(self._spec))
            if not told:
                return await self._begin(app.NAME, "settings and weights are as they were")
            return "; ".join(told)

    async def reload(self, spec: DeploymentSpec) -> str:
        """Take what of a spec can be changed while everything runs.

        Raises:
            SpecError: something else differs; nothing is changed then.
        """
        async with self._change:
            differing = diff(self._spec, spec)
            refuse(differing, "reload")
            if not differing:
                return "settings are as they were"
            for model in spec.models:
                last = self._kept.models[model.name].revisions[-1]
                before = next(one for one in self._spec.models if one.name == model.name)
                wanted = count_of(model.model_dump(mode="json"))
                if wanted != count_of(before.model_dump(mode="json")):
                    last.settings = {**last.settings, **wanted}
                    self._scalers.pop(model.name, None)
                if model.groups != before.groups:
                    self._kept.models[model.name].count = model.groups
            await self._publish(spec, differing)
            return await self._begin(app.NAME, f"reloaded {', '.join(c.field for c in differing)}")

    async def rotate_token(self, overlap_s: float) -> str:
        """Have Admin ask for another token, and take this one for a while."""
        async with self._change:
            kept = self._kept
            kept.token_before, kept.token = kept.token, secrets.token_urlsafe(32)
            kept.token_before_until = time.time() + overlap_s
            self._keep()
            text = f"Admin's token was replaced; the one before is taken for {overlap_s:g} s"
            await self._note("keys", app.NAME, text)
            return kept.token

    async def rollback(self, model: str) -> str:
        """Want the settings before the last rollout again."""
        async with self._change:
            revisions = self._model(model).revisions
            if len(revisions) < 2:
                raise SpecError(f"model `{model}` has no revision before {revisions[-1].number}")
            before = revisions[-2]
            return await self._revise(model, before.settings, before.digest)

    async def _publish(self, spec: DeploymentSpec, differing: Sequence[FieldChange]) -> None:
        """Want a spec, and have gateways and leaders take what they can while they run."""
        self._spec = spec
        self._kept.spec = spec.model_dump(mode="json")
        self._room = app.ClusterCapacity.of_cluster(spec, shared=self._kept.shared)
        set_log_level(spec.log_level)
        if any(one.applied_by == "reload" for one in differing):
            self._kept.live_version += 1
            await self._registry.reload.remote(live_settings(spec, self._kept.live_version))

    # ---- the loop ----

    async def _run(self) -> None:
        while True:
            done = False
            try:
                done = await self._step()
            except ray.exceptions.RayError as error:
                log.warning("the deployment cannot be seen now: %s", error)
            except Exception:
                log.exception("a step of the operator failed")
            try:
                await asyncio.wait_for(self._wake.wait(), _QUIET_S if done else _BUSY_S)
            except TimeoutError:
                continue
            self._wake.clear()

    async def _step(self) -> bool:
        """Look, decide, act; True when all is as wanted."""
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
        await self._look()
        await self._unplace(snapshot)
        actions = reconcile(desired_models, self.seats(snapshot))
        for action in actions:
            if isinstance(action, Start):
                await self._start(action)
            elif isinstance(action, Promote):
                await self._registry.promote.remote(action.seat)
            else:
                await self._stop(action)
        if actions:
            self._keep()
        return False

    async def _autoscale(self, snapshot: RegistrySnapshot) -> None:
        """Want as many groups as are needed, of models whose spec leaves it open."""
        for name, managed in self._kept.models.items():
            settings = self.settings(name)
            if settings.autoscale is None:
                continue
            limits = settings.autoscale.limits()
            scaler = self._scalers.setdefault(name, Autoscaler(limits))
            waiting, wait_s = snapshot.demand.get(name, (0, 0.0))
            own = [one for one in snapshot.groups if one.model == name]
            demand = ModelLoad(
                sequences=waiting
                + sum(
                    one.stats.get("num_running", 0) + one.stats.get("num_waiting", 0) for one in own
                ),
                capacity=settings.limits.max_sequences,
                serving=sum(one.phase == "serving" for one in own),
                wait_s=wait_s,
            )
            count = scaler.count(demand, managed.count, time.monotonic())
            if count != managed.count:
                text = f"{name}: {managed.count} to {count} groups: {demand.sequences} sequences"
                managed.count = count
                self._keep()
                await self._note("autoscale", name, f"{text}, {wait_s:.1f} s to wait")

    async def _assign_roles(self, snapshot: RegistrySnapshot) -> None:
        """Tell leaders which part of requests they are for, where that has changed."""
        tls = self._spec.link_tls
        context = None if tls is None else tls.files().link_client("link_tls")
        self._roles.forget_but({one.group_id for one in snapshot.groups})
        for name in self._kept.models:
            groups = [
                one
                for one in snapshot.groups
                if one.model == name
                and one.phase == "serving"
                and not self._kept.places.get(one.seat, SeatState(name, 0)).stopping
            ]
            wanted = self.settings(name).prefill_groups
            for group_id, role in await self._roles.tell(groups, wanted, context):
                await self._note("role", group_id, f"for {role}")

    async def _look(self) -> None:
        """Which applications there are, and which could not start."""
        apps = (await asyncio.to_thread(serve.status)).applications
        if app.NAME in apps and apps[app.NAME].status == "RUNNING":
            self._gateways_change = False
        self._failed = {
            name.removeprefix(PREFIX): one.message.strip()
            for name, one in apps.items()
            if name.startswith(PREFIX) and one.status == "DEPLOY_FAILED"
        }
        for seat in [name for name, place in self._kept.places.items() if place.stopping]:
            if PREFIX + seat not in apps:
                place = self._kept.places.pop(seat)
                await self._registry.promote.remote(seat)  # whoever comes there next is no spare
                managed = self._kept.models[place.model]
                managed.drained = [one for one in managed.drained if one != seat]
                self._keep()

    async def _start(self, action: Start) -> None:
        model = ModelSpec.model_validate(self._revision(action.model, action.revision).settings)
        built = app.leader(
            model, self._spec, self._room, seat=action.seat, revision=action.revision
        )
        self._kept.places[action.seat] = SeatState(action.model, action.revision)
        self._keep()
        if action.spare:
            await self._registry.spare.remote(action.seat, action.model, action.revision)
        what = " as a spare" if action.spare else ""
        await self._note("starting", action.seat, f"revision {action.revision}{what}")
        await asyncio.to_thread(_run_app, PREFIX + action.seat, built)

    async def _stop(self, action: Stop) -> None:
        self._kept.places[action.seat].stopping = True
        self._keep()
        await self._note("stopping", action.seat, action.why)
        await asyncio.to_thread(serve.delete, PREFIX + action.seat, False)

    # ---- small things ----

    def _model(self, name: str) -> ModelState:
        managed = self._kept.models.get(name)
        if managed is None:
            there = ", ".join(self._kept.models)
            raise NotFound(f"no model {name[:128]!r}; there is {there}")
        return managed

    def _revision(self, model: str, number: int) -> Revision:
        return next(r for r in self._kept.models[model].revisions if r.number == number)

    def _surge(self, name: str) -> int:
        """A group more while others are replaced, where the cluster has room for it."""
        places = [
            seat
            for seat, one in self._kept.places.items()
            if one.model == name and seat not in self._spares
        ]
        if self._crowded_until_s.get(name, 0.0) > time.monotonic():
            return 0
        if len(places) != self._kept.models[name].count:
            return 1  # it is there already, or is not wanted yet
        wanted = self._bundles(self.settings(name))
        return int(nodes.room_for(wanted[0]) >= len(wanted))

    def _bundles(self, model: ModelSpec) -> list[dict[str, float]]:
        """What a group of a model wants, its leader's small part aside."""
        cuda = model.device == "cuda" or (model.device == "auto" and self._room.num_gpus > 0)
        cpus = model.cpus_per_slice or self._room.cpus_per_slice
        return app.PlacementBundles.of(model).bundles(cpus, "cuda" if cuda else "cpu")

    async def _unplace(self, snapshot: RegistrySnapshot) -> None:
        """Give up a surplus group that finds no place: what looked like room was not."""
        started = {who.rpartition(".")[0] for who in snapshot.progress}
        now_s = time.monotonic()
        for seat in self.seats(snapshot):
            if seat.phase is not Phase.STARTING or seat.name in started:
                self._placing_since_s.pop(seat.name, None)
                continue
            since_s = self._placing_since_s.setdefault(seat.name, now_s)
            surplus = sum(
                one.model == seat.model and name not in self._spares
                for name, one in self._kept.places.items()
            )
            if seat.spare:
                continue  # it waits for room as long as it takes
            if now_s - since_s > PLACE_S and surplus > self._kept.models[seat.model].count:
                self._crowded_until_s[seat.model] = now_s + CROWDED_S
                await self._stop(Stop(seat=seat.name, why="there is no room for a group more"))

    async def _revise(self, model: str, settings: dict[str, Any], digest: str) -> str:
        revisions = self._model(model).revisions
        number = revisions[-1].number + 1
        revisions.append(Revision(number, settings, digest))
        del revisions[:-_KEEP_REVISIONS]
        return await self._begin(model, f"{model}: revision {number}, weights {digest[:12]}")

    async def _begin(self, who: str, text: str) -> str:
        self._keep()
        self._wake.set()
        await self._note("change", who, text)
        return text

    async def _note(self, kind: str, who: str, text: str) -> None:
        await self._registry.note.remote(kind, who, text)

    async def _digest(self, model: ModelSpec, *, check: bool = True) -> str:
        """The digest of a model's weights.

        Raises:
            CheckpointError: the weights cannot be read; with `check`, a group or a gateway could
                not use the folder.
            SpecError: with `check`, the settings do not fit the model.
        """
        task: Any = ray.remote(_digest_of)
        try:
            wire = model.model_dump(mode="json") if check else None
            return str(await task.options(num_cpus=0).remote(model.path, wire))
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, ArrieroError):
                raise error.cause from None
            raise

    def _keep(self) -> None:
        store.put(NAME, asdict(self._kept))


def connect(spec: DeploymentSpec, *, shared: bool, token: str) -> ActorHandle[Operator]:
    """The cluster's operator, made for `spec` if there is none."""
    handle: ActorHandle[Operator] = (
        ray.remote(Operator)
        .options(  # type: ignore[assignment]
            name=NAME,
            namespace=registry.NAMESPACE,
            lifetime="detached",
            get_if_exists=True,
            num_cpus=0,
            enable_task_events=False,  # as Serve's own: calls by the second, kept by the head
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


def _digest_of(where: str, settings: dict[str, Any] | None) -> str:
    """Digest of a folder's or a URL's weights; with a model's settings, a check of both first."""
    from arriero.cluster.planner.model_check import check_checkpoint
    from arriero.shards.checkpoint.reader import Checkpoint

    opened = Checkpoint.open(where)
    if settings is not None:
        check_checkpoint(opened, ModelSpec.model_validate(settings))
    return opened.digest


def _part(field: str) -> str:
    """The section of the spec that a field is of."""
    return field.partition(".")[0]
