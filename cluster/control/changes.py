"""Changes of the desired state that people ask for: scale, drain, rollout, reload, rollback, token.

Each change is checked as a whole before anything changes, and is stored before it shows: first what
takes no time (sizes against the model's config, groups against the nodes of the cluster), then the
weights. Knows the desired state and the spec; knows nothing of the current state and of the actions
that follow.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ray.actor import ActorHandle

from arriero.cluster import app
from arriero.cluster.control import cluster_nodes
from arriero.cluster.control.admin_roles import caller_name
from arriero.cluster.control.applications import Applications
from arriero.cluster.control.deployment_view import DeploymentView
from arriero.cluster.control.desired_state import ModelState, Revision, count_settings
from arriero.cluster.control.node_drain import find_node
from arriero.cluster.control.nodes_check import check_nodes, checks_of
from arriero.cluster.control.rollout_plan import (
    NewRevision,
    RolloutPlan,
    judge,
    plan_rollout,
    refuse_rollout,
)
from arriero.cluster.control.room_check import RoomCheck
from arriero.cluster.control.state_store import StateStore
from arriero.cluster.control.weights_digest import weights_digest
from arriero.cluster.hosts.log_level import set_log_level
from arriero.cluster.planner.model_check import check_known_sizes
from arriero.cluster.registry.registry import Registry
from arriero.cluster.registry.snapshot import RegistrySnapshot
from arriero.cluster.spec.deployment import DeploymentSpec
from arriero.cluster.spec.diff import FieldChange, diff, live_settings, refuse
from arriero.cluster.spec.model import ModelSpec
from arriero.shards.errors import InvalidRequest, NotFound, SpecError


@dataclass(frozen=True, slots=True)
class Change:
    """A change in words; `details` are for people who want to know what it does."""

    text: str
    details: tuple[str, ...] = ()


class DeploymentChanges:
    """Makes one change at a time.

    Args:
        store: the desired state.
        applications: replaces the gateways.
        registry: takes live settings and events.
        on_change: called after a stored change; wakes the operator's loop.
        on_count_settings: called with a model whose settings for the number of groups changed.
    """

    def __init__(
        self,
        store: StateStore,
        applications: Applications,
        registry: ActorHandle[Registry],
        *,
        on_change: Callable[[], None],
        on_count_settings: Callable[[str], None],
    ) -> None:
        self._store, self._applications, self._registry = store, applications, registry
        self._on_change, self._on_count_settings = on_change, on_count_settings
        self._room = RoomCheck(store)
        self._lock = asyncio.Lock()

    async def scale(self, model: str, groups: int) -> str:
        """Set the number of groups of a model.

        Raises:
            SpecError: the model has `autoscale`, or the cluster cannot hold so many groups.
        """
        async with self._lock:
            state = self._store.state.model(model)
            if self._store.settings(model).autoscale is not None:
                raise SpecError(
                    f"model `{model}` has `autoscale`, which sets the number of groups; change"
                    " `autoscale.min` and `autoscale.max` in the spec, then `arriero rollout SPEC`"
                )
            counts = {name: model.count for name, model in self._store.state.models.items()}
            await self._room.refuse(
                self._store.spec, self._store.current_settings(), counts | {model: groups}
            )
            before, state.count = state.count, groups
            return await self._commit(model, f"{model}: {before} to {groups} groups")

    async def drain(self, name: str) -> str:
        """Stop a group; where there is room, a successor starts first."""
        async with self._lock:
            seats = self._store.state.seats
            seat_name = name if name in seats else name.rpartition(".")[0]
            seat = seats.get(seat_name)
            if seat is None:
                known = ", ".join(seats) or "none"
                raise NotFound(f"no group or seat {name[:128]!r}; the deployment has {known}")
            model = self._store.state.models[seat.model]
            if seat_name not in model.drained and not seat.stopping:
                model.drained.append(seat_name)
            text = f"{seat_name}: draining; a successor takes its place"
            return await self._commit(seat_name, text)

    async def rollout(
        self,
        spec: DeploymentSpec | None,
        *,
        force: bool,
        dry_run: bool = False,
        deadline_s: float = 0.0,
        prune: bool = False,
    ) -> Change:
        """Apply the settings of `spec`; None keeps the settings and applies changed weights.

        Args:
            spec: the new spec.
            force: replace all groups, also without a difference.
            dry_run: change nothing; the details tell what would change.
            deadline_s: seconds until a rollout that is not done is taken back; 0 for the
                `rollout_deadline_s` of each model.
            prune: end the models that `spec` lacks.

        Raises:
            SpecError: a field does not fit the model or the cluster; nothing has changed.
            CheckpointError: a checkpoint cannot be read; nothing has changed.
        """
        async with self._lock:
            new_spec = spec or self._store.spec
            refuse_rollout(self._store.spec, new_spec, prune=prune)
            if spec is not None:
                await asyncio.to_thread(check_known_sizes, spec.models)
                counts = {model.name: model.groups for model in spec.models}
                await self._room.refuse(spec, spec.models, counts)
                await check_nodes(checks_of(self._store.spec, spec))
            # an unreadable checkpoint is an error before any change
            revisions = await self._new_revisions(new_spec, keep_settings=spec is None)
            states = self._store.state.models
            plan = plan_rollout(self._store.spec, new_spec, states, revisions, force=force)
            details = plan.details(
                states, await self._room.read(new_spec, keep_counts=spec is None)
            )
            if dry_run:
                return Change("nothing has changed (dry run)", tuple(details))
            for state in states.values():
                state.rolled_back = ""  # of an earlier rollout
            if spec is not None:
                await self._set_spec(spec, plan.changes)
            text = await self._carry_out(plan, new_spec, revisions, deadline_s, spec is not None)
            return Change(text, tuple(details))

    async def _carry_out(
        self,
        plan: RolloutPlan,
        spec: DeploymentSpec,
        revisions: Mapping[str, NewRevision],
        deadline_s: float,
        set_counts: bool,
    ) -> str:
        """Store what a rollout changes; returns the change in words.

        Args:
            plan: of the rollout.
            spec: the new spec.
            revisions: settings and weights by model.
            deadline_s: of the whole rollout; 0 for each model's own.
            set_counts: take the numbers of groups from the spec.
        """
        texts, states = [], self._store.state.models
        for name in plan.removed:
            del states[name]
            self._on_count_settings(name)
            texts.append(await self._commit(name, f"{name}: removed"))
        for model in spec.models:
            new = revisions[model.name]
            if model.name in plan.added:
                first = Revision(1, new.settings, new.digest)
                states[model.name] = ModelState(model.groups, [first])
                texts.append(await self._commit(model.name, f"{model.name}: added"))
                continue
            state, count_before = states[model.name], states[model.name].count
            if set_counts:
                state.count = model.groups
                if count_settings(new.settings) != count_settings(state.current.settings):
                    self._set_counts(model.name, new.settings)
            if model.name in plan.revised:
                limit_s = deadline_s or model.rollout_deadline_s or 0.0
                state.begin(limit_s, count_before, time.time())
                texts.append(await self._revise(model.name, new.settings, new.digest))
        if plan.replaces_gateways:
            texts.append("gateways: new settings")
            self._applications.replacing_gateways = True
            await self._applications.deploy_gateways(self._store.spec)
        if not texts:
            return await self._commit(app.NAME, "settings and weights are as they were")
        return "; ".join(texts)

    async def pause_rollout(self, model: str, *, paused: bool) -> str:
        """Pause or resume the rollout of a model; a pause stops the clock of its deadline."""
        async with self._lock:
            state, now_s = self._store.state.model(model), time.time()
            if state.paused == paused:
                return f"{model}: the rollout is {'paused' if paused else 'not paused'} already"
            state.paused = paused
            if state.deadline is not None and paused:
                state.deadline.pause(now_s)
            elif state.deadline is not None:
                state.deadline.resume(now_s)
            if paused:
                text = f"{model}: rollout paused; `arriero rollout resume {model}` goes on with it"
            else:
                text = f"{model}: rollout resumed"
            return await self._commit(model, text)

    async def judge_rollouts(self, view: DeploymentView, snapshot: RegistrySnapshot) -> None:
        """Take back rollouts that failed or exceeded their deadline; call at each step."""
        states = self._store.state.models
        if self._lock.locked() or all(state.deadline is None for state in states.values()):
            return
        desired, seats = view.desired_models(), view.seats(snapshot)
        for name, state in states.items():
            if state.deadline is None:
                continue
            own = [seat for seat in seats if seat.model == name and not seat.spare]
            why = judge(name, state, desired[name], own, time.time())
            if why is None:
                continue
            if why == "" or len(state.revisions) < 2:
                state.deadline = None
                self._store.save()
                continue
            problems = [view.start_problem(seat.name) for seat in own]
            details = "; ".join(dict.fromkeys(filter(None, problems)))
            state.take_back(f"{why} ({details[:500]})" if details else why)
            self._on_count_settings(name)
            self._store.save()
            await self._registry.note.remote("rollback", name, state.rolled_back)

    async def drain_node(self, name: str, *, undo: bool) -> str:
        """Let no group start on a node, and let its groups move to others; or take that back.

        Raises:
            NotFound: no node has the name.
            InvalidRequest: several nodes have the name, or the node is not drained (`undo`).
        """
        async with self._lock:
            drained = self._store.state.drained_nodes
            node = find_node(name, await asyncio.to_thread(cluster_nodes.read))
            words = f"node {node.address} ({node.id[:8]})"
            if undo:
                if node.id not in drained:
                    raise InvalidRequest("name", f"{words} is not drained")
                drained.remove(node.id)
                return await self._commit(words, f"{words}: takes groups again")
            alive = {other.id for other in cluster_nodes.read() if other.alive}
            drained[:] = [other for other in drained if other in alive and other != node.id]
            drained.append(node.id)
            text = f"{words}: no group starts there, and its groups move to nodes with room"
            return await self._commit(words, text)

    async def reload(self, spec: DeploymentSpec) -> str:
        """Apply the fields of a spec that can change while everything runs.

        Raises:
            SpecError: another field differs, or the cluster cannot hold the groups; nothing has
                changed.
        """
        async with self._lock:
            changes = diff(self._store.spec, spec)
            refuse(changes, "reload")
            if not changes:
                return "settings are as they were"
            models_before = {model.name: model for model in self._store.spec.models}
            counts = {
                model.name: self._store.state.models[model.name].count
                if model.groups == models_before[model.name].groups
                else model.groups
                for model in spec.models
            }
            await self._room.refuse(spec, spec.models, counts)
            for model in spec.models:
                before = models_before[model.name]
                settings = model.model_dump(mode="json")
                if count_settings(settings) != count_settings(before.model_dump(mode="json")):
                    self._set_counts(model.name, settings)
                self._store.state.models[model.name].count = counts[model.name]
            await self._set_spec(spec, changes)
            fields = ", ".join(change.field for change in changes)
            return await self._commit(app.NAME, f"reloaded {fields}")

    async def rollback(self, model: str) -> str:
        """Go back to the settings before the last rollout of a model.

        Raises:
            SpecError: there is no revision before, or the cluster can no longer hold its groups.
        """
        async with self._lock:
            revisions = self._store.state.model(model).revisions
            if len(revisions) < 2:
                raise SpecError(f"model `{model}` has no revision before {revisions[-1].number}")
            before = revisions[-2]
            settings = [
                ModelSpec.model_validate(before.settings) if current.name == model else current
                for current in self._store.current_settings()
            ]
            counts = {name: state.count for name, state in self._store.state.models.items()}
            await self._room.refuse(self._store.spec, settings, counts)
            self._store.state.model(model).begin(0.0, counts[model], time.time())
            return await self._revise(model, before.settings, before.digest)

    async def rotate_token(self, overlap_s: float) -> str:
        """Replace the caller's admin token; the old token stays valid for `overlap_s` seconds."""
        async with self._lock:
            name = caller_name()
            token = self._store.admin_tokens.rotate(name, overlap_s)
            text = f"new admin token {name}; the token before is valid for {overlap_s:g} s more"
            await self._registry.note.remote("keys", app.NAME, text, name)
            return token

    async def _new_revisions(
        self, spec: DeploymentSpec, *, keep_settings: bool
    ) -> dict[str, NewRevision]:
        """Settings and digest of the weights of each model of `spec`.

        Args:
            spec: the new spec.
            keep_settings: take the settings of the current revisions instead.
        """
        revisions = {}
        for model in spec.models:
            settings = model.model_dump(mode="json")
            if keep_settings:
                settings = self._store.state.models[model.name].current.settings
            digest = await weights_digest(ModelSpec.model_validate(settings))
            revisions[model.name] = NewRevision(settings=settings, digest=digest)
        return revisions

    async def _set_spec(self, spec: DeploymentSpec, changes: Sequence[FieldChange]) -> None:
        """Store a spec, and send its live settings to gateways and leaders."""
        self._store.set_spec(spec)
        set_log_level(spec.log_level, spec.log_format)
        if changes:
            self._store.state.live_version += 1
            live = live_settings(spec, self._store.state.live_version)
            await self._registry.reload.remote(live)

    def _set_counts(self, model: str, settings: dict[str, Any]) -> None:
        """Copy the settings for the number of groups into the current revision of a model."""
        current = self._store.state.models[model].current
        current.settings = {**current.settings, **count_settings(settings)}
        self._on_count_settings(model)

    async def _revise(self, model: str, settings: dict[str, Any], digest: str) -> str:
        revision = self._store.state.model(model).revise(settings, digest)
        text = f"{model}: revision {revision.number}, weights {digest[:12]}"
        return await self._commit(model, text)

    async def _commit(self, who: str, text: str) -> str:
        """Store a change, wake the loop, and record the event; returns the text."""
        self._store.save()
        self._on_change()
        await self._registry.note.remote("change", who, text, caller_name())
        return text
