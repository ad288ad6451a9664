"""Pushed weights, pauses and sleep: Admin's changes, and the update of every group.

A push is checked by all groups that serve; only when each accepts the weights are they stored, and
then the groups change one after another. Groups that start later read the stored weights. Knows the
desired state and leaders; knows nothing of tensors.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass

import ray
from ray.actor import ActorHandle

from arriero.cluster.control.admin_roles import caller_name
from arriero.cluster.control.state_store import StateStore
from arriero.cluster.hosts import kv_store
from arriero.cluster.registry.registry import Registry
from arriero.cluster.registry.snapshot import GroupEntry, RegistrySnapshot
from arriero.cluster.replica.weight_actions import (
    ACTION,
    STORED,
    WantedWeights,
    WeightArguments,
    WeightReport,
)
from arriero.router.link.leader_rpc import ask_leader
from arriero.router.proto.arriero.v1 import admin_pb2 as pb
from arriero.shards.checkpoint.sources import with_source
from arriero.shards.engine.holds import MODES, Change, Kind
from arriero.shards.errors import ArrieroError, GroupFailed, InvalidRequest, NotFound

log = logging.getLogger(__name__)

WAIT_S = 20.0
"""Longest wait of one call for a leader's change; the change goes on, and the next call waits."""
RETRY_S = 15.0
"""Seconds until a group that did not take the weights is asked again."""


@dataclass(slots=True)
class _Push:
    """The last push to a model."""

    phase: str = "checking"
    error: str = ""
    task: asyncio.Task[None] | None = None


class WeightAdmin:
    """Answers Admin's `Weights` and `Hold`, and keeps the weights of all groups up to date.

    Args:
        store: the desired state.
        registry: of the cluster.
    """

    def __init__(self, store: StateStore, registry: ActorHandle[Registry]) -> None:
        self._store, self._registry = store, registry
        self._pushes: dict[str, _Push] = {}
        self._settled: dict[str, tuple[str, int]] = {}  # model and version, by group
        self._retry_at: dict[str, float] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}  # by model: one group at a time

    # ---- calls of Admin ----

    async def weights(self, request: pb.WeightsRequest) -> pb.WeightsResponse:
        """Push weights, take pushed weights back, or tell which weights serve.

        Raises:
            InvalidRequest: the action is unknown, or the push makes no sense.
            NotFound: no such model.
        """
        if request.action == "status":
            return await self._status(request.model)
        if request.action not in ("push", "reset"):
            raise InvalidRequest(
                "action",
                f"`action`={request.action[:32]!r} is unknown; use push, reset or status",
            )
        model = self.model_name(request.model)
        before = self.wanted(model)
        sources: tuple[str, ...] = ()
        if request.action == "push":
            sources = with_source(() if before is None else before.sources, request.path)
        elif before is None:
            return pb.WeightsResponse(text=f"{model}: serves the weights of the spec already")
        return pb.WeightsResponse(text=await self.begin_push(model, sources))

    async def begin_push(self, model: str, sources: tuple[str, ...], label: str = "") -> str:
        """Let all groups check weights, and then take them; returns at once, with a text.

        Args:
            model: name of a model.
            sources: what replaces tensors of the model folder.
            label: the trainer's name of the version, for the history.

        Raises:
            InvalidRequest: another push is being checked, or no group serves.
        """
        state = self._store.state.models[model]
        push = self._pushes.get(model)
        if push is not None and push.task is not None and not push.task.done():
            raise InvalidRequest("model", f"a push to {model!r} is being checked; try again")
        path = self._store.settings(model).path
        version = 1 if state.weights is None else state.weights.version + 1
        wanted = WantedWeights(path=str(path), sources=sources, version=version)
        entries = await self.serving(model)
        if not entries:
            raise InvalidRequest("model", f"no group of {model!r} serves now; try again")
        push = self._pushes[model] = _Push()
        caller = f"{caller_name()} ({label})" if label else caller_name()
        push.task = asyncio.create_task(self._check(model, wanted, entries, push, caller))
        return f"{model}: push {version} is being checked by {len(entries)} groups"

    async def hold(self, request: pb.HoldRequest) -> pb.WeightsResponse:
        """Pause, resume, put to sleep or wake groups, at the same time.

        Raises:
            InvalidRequest: the action, mode or level is unknown, or all groups refuse.
            NotFound: no group has the name.
        """
        change = _change(request)
        snapshot = await self._registry.snapshot.remote()
        entries = [
            entry
            for entry in snapshot.groups
            if entry.phase == "serving"
            and request.name in ("", entry.group_id, entry.seat, entry.model)
        ]
        if not entries:
            raise NotFound(f"no group {request.name[:128]!r} serves; `arriero status` shows them")
        answers = await asyncio.gather(
            *(self._ask(entry, change, WAIT_S) for entry in entries), return_exceptions=True
        )
        groups, errors = [], []
        for entry, answer in zip(entries, answers, strict=True):
            if isinstance(answer, WeightReport):
                groups.append(_message(entry, answer))
                continue
            if not isinstance(answer, ArrieroError):
                raise answer
            errors.append(answer)
            message = pb.GroupWeights(group=entry.group_id, model=entry.model, error=str(answer))
            groups.append(message)
        if len(errors) == len(entries):
            raise errors[0]
        names = ", ".join(entry.group_id for entry in entries)
        await self._registry.note.remote("hold", names, str(change.kind), caller_name())
        return pb.WeightsResponse(groups=groups, text=f"{change.kind}: {names}")

    async def _status(self, model: str) -> pb.WeightsResponse:
        if model:
            self.model_name(model)
        snapshot = await self._registry.snapshot.remote()
        entries = [e for e in snapshot.groups if e.phase == "serving" and model in ("", e.model)]
        answers = await asyncio.gather(
            *(self._ask(entry, None, 0.0) for entry in entries), return_exceptions=True
        )
        groups = [
            _message(entry, answer)
            if isinstance(answer, WeightReport)
            else pb.GroupWeights(group=entry.group_id, model=entry.model, error=str(answer))
            for entry, answer in zip(entries, answers, strict=True)
        ]
        models = []
        for name in self._store.state.models:
            if model not in ("", name):
                continue
            push, wanted = self._pushes.get(name, _Push(phase="")), self.wanted(name)
            of_model = [e.group_id for e in entries if e.model == name]
            version = 0 if wanted is None else wanted.version
            settled = not push.phase or push.phase == "applying"
            settled = settled and (
                wanted is None or all(self._settled.get(g) == (name, version) for g in of_model)
            )
            message = pb.ModelWeights(model=name, version=version, settled=settled)
            message.error = push.error
            message.phase = "" if settled else push.phase or "applying"
            message.sources.extend(() if wanted is None else wanted.sources)
            models.append(message)
        return pb.WeightsResponse(groups=groups, models=models)

    # ---- the loop of the operator ----

    def assign(self, snapshot: RegistrySnapshot) -> None:
        """Let the groups take the stored weights, one group of a model at a time; returns at once.

        The registry may hold groups that started on the stored weights: their change ends at once.
        """
        serving = [entry for entry in snapshot.groups if entry.phase == "serving"]
        names = {entry.group_id for entry in serving}
        self._settled = {g: done for g, done in self._settled.items() if g in names}
        for entry in sorted(serving, key=lambda entry: entry.group_id):
            wanted = self.wanted(entry.model)
            task = self._tasks.get(entry.model)
            if wanted is None or (task is not None and not task.done()):
                continue
            done = self._settled.get(entry.group_id) == (entry.model, wanted.version)
            if done or time.monotonic() < self._retry_at.get(entry.group_id, 0.0):
                continue
            self._tasks[entry.model] = asyncio.create_task(self._apply(entry, wanted))

    async def _apply(self, entry: GroupEntry, wanted: WantedWeights) -> None:
        """Push the weights to a group, and wait for the end."""
        change = Change(kind=Kind.PUSH, sources=wanted.sources)
        group_id = entry.group_id
        try:
            report = await self.until_done(entry, change)
            if report.error:
                raise GroupFailed(report.error)
        except ArrieroError as error:
            self._retry_at[group_id] = time.monotonic() + RETRY_S
            if (push := self._pushes.get(entry.model)) is not None:
                push.error = f"group {group_id}: {error}"
            log.warning("group %s does not serve the pushed weights: %s", group_id, error)
            return
        self._settled[group_id] = entry.model, wanted.version
        if (push := self._pushes.get(entry.model)) is not None:
            push.error = ""
        text = f"serves push {wanted.version}, weights {report.status.digest[:12]}"
        with contextlib.suppress(ray.exceptions.RayError):
            await self._registry.note.remote("weights", group_id, "; ".join([text, *report.notes]))

    async def _check(
        self,
        model: str,
        wanted: WantedWeights,
        entries: Sequence[GroupEntry],
        push: _Push,
        caller: str,
    ) -> None:
        """Let every group check the weights; store them when each accepts."""
        change = Change(kind=Kind.CHECK, sources=wanted.sources)
        answers = await asyncio.gather(
            *(self.until_done(entry, change) for entry in entries), return_exceptions=True
        )
        for entry, answer in zip(entries, answers, strict=True):
            error = answer.error if isinstance(answer, WeightReport) else str(answer)
            if error:
                push.phase, push.error = "", f"group {entry.group_id}: {error}"
                return
        reports = [answer for answer in answers if isinstance(answer, WeightReport)]
        digests = {report.status.checked for report in reports}
        if len(digests) > 1:
            push.phase = ""
            push.error = "the groups read different files: copy the weights to every node"
            return
        self._store.state.models[model].weights = wanted
        self._store.save()
        self._publish()
        push.phase = "applying"
        text = f"push {wanted.version}: {', '.join(wanted.sources) or 'the weights of the spec'}"
        await self._registry.note.remote("weights", model, text, caller)

    def _publish(self) -> None:
        """Store the weights of all models where leaders that start read them."""
        models = self._store.state.models
        stored = {name: state.weights for name, state in models.items() if state.weights}
        kv_store.put(STORED, stored)

    async def until_done(self, entry: GroupEntry, change: Change) -> WeightReport:
        """Make a change of a group, however long it takes."""
        report = await self._ask(entry, change, WAIT_S)
        while report.status.change:
            report = await self._ask(entry, None, WAIT_S)
        return report

    async def _ask(self, entry: GroupEntry, change: Change | None, wait_s: float) -> WeightReport:
        tls = self._store.spec.link_tls
        context = None if tls is None else tls.files().link_client("link_tls")
        arguments = WeightArguments(change=change, wait_s=wait_s)
        leader = entry.address, entry.link_token
        return await ask_leader(leader, context, ACTION, arguments, WeightReport, wait_s + 5.0)

    async def serving(self, model: str) -> list[GroupEntry]:
        """The groups of a model that serve."""
        snapshot = await self._registry.snapshot.remote()
        return [e for e in snapshot.groups if e.model == model and e.phase == "serving"]

    def wanted(self, model: str) -> WantedWeights | None:
        """The pushed weights of a model; None without, or where the spec names another folder."""
        state = self._store.state.models.get(model)
        if state is None or state.weights is None:
            return None
        same = state.weights.path == str(self._store.settings(model).path)
        return state.weights if same else None

    def path(self, model: str) -> str:
        """Model folder of the spec."""
        return str(self._store.settings(model).path)

    def model_name(self, name: str) -> str:
        """The name, or that of the only model.

        Raises:
            InvalidRequest: no name is given, and there are several models.
            NotFound: no such model.
        """
        models = self._store.state.models
        if not name and len(models) == 1:
            return next(iter(models))
        if not name:
            raise InvalidRequest("model", f"name one of the models: {', '.join(models)}")
        self._store.state.model(name)  # an unknown name is an error
        return name


def _change(request: pb.HoldRequest) -> Change:
    """The change of a request.

    Raises:
        InvalidRequest: the action, mode or level is unknown.
    """
    kinds = {kind.value: kind for kind in (Kind.PAUSE, Kind.RESUME, Kind.SLEEP, Kind.WAKE)}
    if request.action not in kinds:
        raise InvalidRequest(
            "action", f"`action`={request.action[:32]!r} is unknown; use {', '.join(kinds)}"
        )
    mode = next((mode for mode in MODES if mode == (request.mode or "keep")), None)
    if mode is None:
        raise InvalidRequest(
            "mode", f"`mode`={request.mode[:32]!r} is unknown; use {', '.join(MODES)}"
        )
    level = request.level or 1
    if level not in (1, 2):
        raise InvalidRequest("level", f"`level`={level} is unknown; use 1 or 2")
    return Change(kind=kinds[request.action], mode=mode, level=level)


def _message(entry: GroupEntry, report: WeightReport) -> pb.GroupWeights:
    status = report.status
    return pb.GroupWeights(
        group=entry.group_id,
        model=entry.model,
        digest=status.digest,
        sources=status.sources,
        paused=status.paused,
        sleep_level=status.level,
        change=status.change,
        held=status.held,
        weights_bytes=status.weights_bytes,
        kv_bytes=status.kv_bytes,
        error=report.error,
        notes=report.notes,
        num_slices=len(entry.slice_pids),
    )
