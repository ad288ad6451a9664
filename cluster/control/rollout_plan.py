"""What a rollout changes, in words and as decisions; and how a rollout with a deadline goes.

Sans-I/O: `changes` reads weights and nodes, and carries a plan out. Knows specs, revisions and
seats; knows nothing of Ray.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from arriero.cluster.control.desired_state import ModelState, restart_settings
from arriero.cluster.control.reconcile import DesiredModel, GroupSeat, Phase, settled
from arriero.cluster.spec.deployment import DeploymentSpec
from arriero.cluster.spec.diff import FieldChange, diff, refuse
from arriero.shards.errors import SpecError

_RESTART_GROUPS = ("health", "tracing")
"""Sections that a leader takes only at its start."""
_RESTART_GATEWAYS = ("gateway", *_RESTART_GROUPS)


@dataclass(frozen=True, kw_only=True, slots=True)
class NewRevision:
    """Settings of a model, and the digest of its weights."""

    settings: dict[str, Any]
    digest: str


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelRoom:
    """Room for a model after a change.

    Attributes:
        count: wanted groups.
        most: groups that the nodes can hold beside the other models.
        has_extra: a further group has room now, so that a successor starts before a group stops.
    """

    count: int
    most: int
    has_extra: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class RolloutPlan:
    """What a rollout does.

    Attributes:
        changes: fields that differ.
        added: models that come.
        removed: models that go.
        revised: models whose groups are replaced, with the new revision.
        replaces_gateways: the gateways are replaced.
    """

    changes: tuple[FieldChange, ...]
    added: tuple[str, ...]
    removed: tuple[str, ...]
    revised: Mapping[str, NewRevision] = field(default_factory=dict)
    replaces_gateways: bool = False

    def details(self, states: Mapping[str, ModelState], room: Mapping[str, ModelRoom]) -> list[str]:
        """The plan for people, an entry each: fields, restarts, and what fits.

        Args:
            states: models before the rollout.
            room: room for each model of the new spec.
        """
        lines = [f"{change.words} ({_effect(change)})" for change in self.changes]
        for name in self.added:
            lines.append(f"{name}: new, {room[name].count} groups start; {_fits(room[name])}")
        for name in self.removed:
            lines.append(f"{name}: removed, {states[name].count} groups end")
        for name, revision in self.revised.items():
            state = states[name]
            why = "settings"
            if revision.digest != state.current.digest:
                why = f"weights {state.current.digest[:12]} -> {revision.digest[:12]}"
            order = "a successor starts before a group stops"
            if not room[name].has_extra:
                order = "no room for an extra group now: a group stops before its successor starts"
            lines.append(
                f"{name}: {state.count} groups restart one after the other ({why}), revision"
                f" {state.next_number}; {order}; {_fits(room[name])}"
            )
        for name, entry in room.items():
            restarts = name in self.added or name in self.revised
            if not restarts and entry.count != states[name].count:
                lines.append(
                    f"{name}: {states[name].count} to {entry.count} groups; {_fits(entry)}"
                )
        if self.replaces_gateways:
            lines.append("gateways: restart one after the other; their streams drain or move")
        return lines or ["settings and weights are as they were; nothing restarts"]


def plan_rollout(
    old: DeploymentSpec,
    new: DeploymentSpec,
    states: Mapping[str, ModelState],
    revisions: Mapping[str, NewRevision],
    *,
    force: bool,
) -> RolloutPlan:
    """The plan of a rollout.

    Args:
        old: spec of the deployment.
        new: spec to roll out.
        states: models of the deployment.
        revisions: settings and weights of each model of `new`.
        force: replace all groups.
    """
    changes = diff(old, new)
    sections = {
        change.field.partition(".")[0] for change in changes if change.applied_by == "rollout"
    }
    restart_all = force or not sections.isdisjoint(_RESTART_GROUPS)
    revised = {}
    for name, revision in revisions.items():
        if name not in states:
            continue
        current = states[name].current
        after = restart_settings(revision.settings), revision.digest
        if restart_all or after != (restart_settings(current.settings), current.digest):
            revised[name] = revision
    names = [model.name for model in new.models]
    return RolloutPlan(
        changes=tuple(changes),
        added=tuple(name for name in names if name not in states),
        removed=tuple(name for name in states if name not in names),
        revised=revised,
        replaces_gateways=not sections.isdisjoint(_RESTART_GATEWAYS),
    )


def refuse_rollout(old: DeploymentSpec, new: DeploymentSpec, *, prune: bool) -> None:
    """Refuse what a rollout cannot change, and the end of models without the word for it.

    Raises:
        SpecError: names the fields or the models, and the remedy.
    """
    refuse(diff(old, new), "rollout")
    names = {model.name for model in new.models}
    missing = [model.name for model in old.models if model.name not in names]
    if missing and not prune:
        listed = "`, `".join(missing)
        serve = "serves" if len(missing) == 1 else "serve"
        raise SpecError(
            f"the spec lacks `{listed}`, which {serve}; keep the name in the spec, or end the model"
            " with `arriero rollout SPEC --prune`"
        )


def judge(
    model: str,
    state: ModelState,
    desired: DesiredModel,
    seats: Iterable[GroupSeat],
    now_s: float,
) -> str | None:
    """How a rollout with a deadline goes.

    Args:
        model: name of the model.
        state: with a deadline.
        desired: desired state of the model.
        seats: of the model.
        now_s: seconds since 1970.

    Returns:
        "" once all groups have the new revision; why the rollout must be taken back; or None while
        the rollout may go on.
    """
    seats = list(seats)
    if settled({model: desired}, seats):
        return ""
    assert state.deadline is not None, "only a rollout with a deadline is judged"
    if any(seat.phase is Phase.FAILED and seat.revision == desired.revision for seat in seats):
        return f"a group of revision {desired.revision} cannot start"
    if state.deadline.is_over(now_s):
        return (
            f"revision {desired.revision} was not ready within {state.deadline.limit_s:g} s,"
            " the deadline of the rollout"
        )
    return None


def _effect(change: FieldChange) -> str:
    return {"reload": "at once", "rollout": "by restart", "up": "needs `arriero down`"}[
        change.applied_by
    ]


def _fits(room: ModelRoom) -> str:
    return f"fits: {room.count} of at most {room.most} groups"
