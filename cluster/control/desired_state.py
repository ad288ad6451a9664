"""The desired state of a deployment, as the operator stores it in Ray's key-value store.

Knows settings by revision, counts and seats; knows nothing of the current state.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from arriero.cluster.replica.adapter_actions import WantedAdapter
from arriero.cluster.replica.weight_actions import WantedWeights
from arriero.cluster.spec.model import COUNTS
from arriero.shards.errors import NotFound

_KEEP_REVISIONS = 8


@dataclass(slots=True)
class Revision:
    """One revision of a model's settings.

    Attributes:
        number: counts up from 1.
        settings: a `ModelSpec` as JSON.
        digest: of the weights at the start of the revision.
    """

    number: int
    settings: dict[str, Any]
    digest: str


@dataclass(slots=True)
class Deadline:
    """The time that a rollout has; a pause stops the clock. The caller passes the time.

    Attributes:
        limit_s: seconds that the rollout was given.
        count_before: number of groups before the rollout.
        ends_at: seconds since 1970; 0 while paused.
        left_s: seconds left at the pause.
    """

    limit_s: float
    count_before: int
    ends_at: float = 0.0
    left_s: float = 0.0

    @classmethod
    def start(cls, limit_s: float, count_before: int, now_s: float) -> Deadline:
        """A deadline that starts now."""
        return cls(limit_s, count_before, ends_at=now_s + limit_s)

    def pause(self, now_s: float) -> None:
        """Stop the clock; does nothing while it is stopped."""
        if self.ends_at:
            self.left_s, self.ends_at = max(0.0, self.ends_at - now_s), 0.0

    def resume(self, now_s: float) -> None:
        """Start the clock again with the time that was left."""
        if not self.ends_at:
            self.ends_at = now_s + self.left_s

    def remaining_s(self, now_s: float) -> float:
        """Seconds left; 0 once the deadline has passed."""
        return max(0.0, self.ends_at - now_s) if self.ends_at else self.left_s

    def is_over(self, now_s: float) -> bool:
        """Whether the deadline has passed; never while paused."""
        return bool(self.ends_at) and now_s >= self.ends_at


@dataclass(slots=True)
class ModelState:
    """Desired state of a model; the last revision is the current revision.

    Attributes:
        count: number of groups.
        revisions: oldest first.
        drained: seats that must stop.
        paused: the rollout is paused.
        deadline: of the rollout that runs; None without a deadline or without a rollout.
        rolled_back: why the last rollout was taken back without a command; "" otherwise.
        last_number: largest number of a revision that was ever current.
        adapters: adapters that came while groups served, by name.
        adapter_version: version of the adapter that came last.
        weights: weights that were pushed; None for those of the spec.
    """

    count: int
    revisions: list[Revision]
    drained: list[str] = field(default_factory=list)
    paused: bool = False
    deadline: Deadline | None = None
    rolled_back: str = ""
    last_number: int = 0
    adapters: dict[str, WantedAdapter] = field(default_factory=dict)
    adapter_version: int = 0
    weights: WantedWeights | None = None

    @property
    def current(self) -> Revision:
        """The current revision."""
        return self.revisions[-1]

    def revision(self, number: int) -> Revision:
        """A revision by number."""
        return next(revision for revision in self.revisions if revision.number == number)

    def revise(self, settings: dict[str, Any], digest: str) -> Revision:
        """Add a revision and make it current; the oldest beyond eight is dropped."""
        self.last_number = self.next_number
        self.revisions.append(Revision(self.last_number, settings, digest))
        del self.revisions[:-_KEEP_REVISIONS]
        return self.current

    @property
    def next_number(self) -> int:
        """Number of the next revision."""
        return max(self.current.number, self.last_number) + 1

    def begin(self, deadline_s: float, count_before: int, now_s: float) -> None:
        """A change of the revision begins; 0 for no deadline.

        Args:
            deadline_s: seconds within which all groups of the new revision must serve.
            count_before: number of groups before the change.
            now_s: seconds since 1970.
        """
        self.paused, self.rolled_back = False, ""
        self.deadline = Deadline.start(deadline_s, count_before, now_s) if deadline_s else None

    def take_back(self, why: str) -> None:
        """Make the revision before current again: its groups that still serve stay as they are."""
        assert self.deadline is not None, "only a rollout with a deadline is taken back"
        failed = self.revisions.pop()
        self.last_number = max(self.last_number, failed.number)
        self.count = self.deadline.count_before
        self.deadline, self.paused = None, False
        self.rolled_back = f"{why}; revision {self.current.number} is current again"


@dataclass(slots=True)
class SeatState:
    """A seat with the model and the revision of its group.

    Attributes:
        avoids: ids of the drained nodes at the group's start, where the group may not start.
    """

    model: str
    revision: int
    stopping: bool = False
    avoids: list[str] = field(default_factory=list)


@dataclass(slots=True)
class OperatorState:
    """All state that outlives the operator's process.

    Attributes:
        spec: the `DeploymentSpec` as JSON.
        shared: other applications use the Ray cluster too.
        admin_port: port of Admin; 0 before the first start.
        live_version: version of the live settings.
        models: by name.
        seats: by name.
        drained_nodes: Ray's ids of the nodes on which no group may start.
    """

    spec: dict[str, Any]
    shared: bool
    admin_port: int = 0
    live_version: int = 0
    models: dict[str, ModelState] = field(default_factory=dict)
    seats: dict[str, SeatState] = field(default_factory=dict)
    drained_nodes: list[str] = field(default_factory=list)

    def model(self, name: str) -> ModelState:
        """The state of a model.

        Raises:
            NotFound: the deployment has no such model.
        """
        if name not in self.models:
            known = ", ".join(self.models)
            raise NotFound(f"no model {name[:128]!r}; the deployment has {known}")
        return self.models[name]

    def groups_in(self, model: str, spares: frozenset[str] = frozenset()) -> int:
        """Number of seats of a model, the seats `spares` left out."""
        return sum(seat.model == model and name not in spares for name, seat in self.seats.items())


def restart_settings(settings: Mapping[str, Any]) -> str:
    """The settings of a model that a group takes only at its start, as text to compare."""
    return json.dumps({k: v for k, v in settings.items() if k not in COUNTS}, sort_keys=True)


def count_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a model that set the number of groups."""
    return {name: settings[name] for name in COUNTS if name in settings}
