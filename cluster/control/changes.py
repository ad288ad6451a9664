"""Changes of the desired state that people ask for: scale, drain, rollout, reload, rollback, token.

Each change is checked as a whole before anything changes, and is stored before it shows. Knows the
desired state and the spec; knows nothing of the current state and of the actions that follow.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

from ray.actor import ActorHandle

from arriero.cluster import app
from arriero.cluster.control.applications import Applications
from arriero.cluster.control.desired_state import count_settings, restart_settings
from arriero.cluster.control.state_store import StateStore
from arriero.cluster.control.weights_digest import weights_digest
from arriero.cluster.hosts.log_level import set_log_level
from arriero.cluster.registry.registry import Registry
from arriero.cluster.spec.deployment import DeploymentSpec
from arriero.cluster.spec.diff import FieldChange, diff, live_settings, refuse
from arriero.cluster.spec.model import ModelSpec
from arriero.shards.errors import NotFound, SpecError


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
        self._lock = asyncio.Lock()

    async def scale(self, model: str, groups: int) -> str:
        """Set the number of groups of a model."""
        async with self._lock:
            state = self._store.state.model(model)
            if self._store.settings(model).autoscale is not None:
                raise SpecError(
                    f"model `{model}` has `autoscale`, which sets the number of groups; change"
                    " `autoscale.min` and `autoscale.max` in the spec, then `arriero rollout SPEC`"
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

    async def rollout(self, spec: DeploymentSpec | None, *, force: bool) -> str:
        """Apply the settings of `spec`; None keeps the settings and applies changed weights."""
        async with self._lock:
            new_spec = spec or self._store.spec
            changes = diff(self._store.spec, new_spec)
            refuse(changes, "rollout")
            sections = {
                change.field.partition(".")[0]
                for change in changes
                if change.applied_by == "rollout"
            }
            # a leader takes these sections only at its start
            force = force or not sections.isdisjoint(("health", "tracing"))
            # an unreadable checkpoint is an error before any change
            revisions = await self._new_revisions(new_spec, keep_settings=spec is None)
            if spec is not None:
                await self._set_spec(spec, changes)
            texts = []
            for model in new_spec.models:
                state = self._store.state.models[model.name]
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
                self._applications.replacing_gateways = True
                await self._applications.deploy_gateways(self._store.spec)
            if not texts:
                return await self._commit(app.NAME, "settings and weights are as they were")
            return "; ".join(texts)

    async def reload(self, spec: DeploymentSpec) -> str:
        """Apply the fields of a spec that can change while everything runs.

        Raises:
            SpecError: another field differs; nothing has changed.
        """
        async with self._lock:
            changes = diff(self._store.spec, spec)
            refuse(changes, "reload")
            if not changes:
                return "settings are as they were"
            models_before = {model.name: model for model in self._store.spec.models}
            for model in spec.models:
                before = models_before[model.name]
                settings = model.model_dump(mode="json")
                if count_settings(settings) != count_settings(before.model_dump(mode="json")):
                    self._set_counts(model.name, settings)
                if model.groups != before.groups:
                    self._store.state.models[model.name].count = model.groups
            await self._set_spec(spec, changes)
            fields = ", ".join(change.field for change in changes)
            return await self._commit(app.NAME, f"reloaded {fields}")

    async def rollback(self, model: str) -> str:
        """Go back to the settings before the last rollout of a model."""
        async with self._lock:
            revisions = self._store.state.model(model).revisions
            if len(revisions) < 2:
                raise SpecError(f"model `{model}` has no revision before {revisions[-1].number}")
            before = revisions[-2]
            return await self._revise(model, before.settings, before.digest)

    async def rotate_token(self, overlap_s: float) -> str:
        """Replace the admin token; the token before stays valid for `overlap_s` seconds."""
        async with self._lock:
            token = self._store.state.rotate_token(overlap_s)
            self._store.save()
            text = f"new admin token; the token before is valid for {overlap_s:g} s more"
            await self._registry.note.remote("keys", app.NAME, text)
            return token

    async def _new_revisions(
        self, spec: DeploymentSpec, *, keep_settings: bool
    ) -> dict[str, tuple[dict[str, Any], str]]:
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
            revisions[model.name] = settings, digest
        return revisions

    async def _set_spec(self, spec: DeploymentSpec, changes: Sequence[FieldChange]) -> None:
        """Store a spec, and send its live settings to gateways and leaders."""
        self._store.set_spec(spec)
        set_log_level(spec.log_level)
        if any(change.applied_by == "reload" for change in changes):
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
        await self._registry.note.remote("change", who, text)
        return text
