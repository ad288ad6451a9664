"""The desired state of a deployment, as the operator stores it in Ray's key-value store.

Knows settings by revision, counts, seats and tokens; knows nothing of the current state.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

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
class ModelState:
    """Desired state of a model; the last revision is the current revision.

    Attributes:
        count: number of groups.
        revisions: oldest first.
        drained: seats that must stop.
    """

    count: int
    revisions: list[Revision]
    drained: list[str] = field(default_factory=list)

    @property
    def current(self) -> Revision:
        """The current revision."""
        return self.revisions[-1]

    def revision(self, number: int) -> Revision:
        """A revision by number."""
        return next(revision for revision in self.revisions if revision.number == number)

    def revise(self, settings: dict[str, Any], digest: str) -> Revision:
        """Add a revision and make it current; the oldest beyond eight is dropped."""
        self.revisions.append(Revision(self.current.number + 1, settings, digest))
        del self.revisions[:-_KEEP_REVISIONS]
        return self.current


@dataclass(slots=True)
class SeatState:
    """A seat with the model and the revision of its group."""

    model: str
    revision: int
    stopping: bool = False


@dataclass(slots=True)
class OperatorState:
    """All state that outlives the operator's process.

    Attributes:
        spec: the `DeploymentSpec` as JSON.
        shared: other applications use the Ray cluster too.
        token: admin token.
        admin_port: port of Admin; 0 before the first start.
        token_before: admin token before the last rotation.
        token_before_until: time, in seconds since 1970, at which `token_before` expires.
        live_version: version of the live settings.
        models: by name.
        seats: by name.
    """

    spec: dict[str, Any]
    shared: bool
    token: str
    admin_port: int = 0
    token_before: str = ""
    token_before_until: float = 0.0
    live_version: int = 0
    models: dict[str, ModelState] = field(default_factory=dict)
    seats: dict[str, SeatState] = field(default_factory=dict)

    def model(self, name: str) -> ModelState:
        """The state of a model.

        Raises:
            NotFound: the deployment has no such model.
        """
        if name not in self.models:
            known = ", ".join(self.models)
            raise NotFound(f"no model {name[:128]!r}; the deployment has {known}")
        return self.models[name]

    def tokens(self) -> list[str]:
        """The admin tokens that are valid now."""
        before = [self.token_before] if time.time() < self.token_before_until else []
        return [self.token, *before]

    def rotate_token(self, overlap_s: float) -> str:
        """Replace the admin token; the token before stays valid for `overlap_s` seconds."""
        self.token_before, self.token = self.token, secrets.token_urlsafe(32)
        self.token_before_until = time.time() + overlap_s
        return self.token

    def groups_in(self, model: str, spares: frozenset[str] = frozenset()) -> int:
        """Number of seats of a model, the seats `spares` left out."""
        return sum(seat.model == model and name not in spares for name, seat in self.seats.items())


def restart_settings(settings: Mapping[str, Any]) -> str:
    """The settings of a model that a group takes only at its start, as text to compare."""
    return json.dumps({k: v for k, v in settings.items() if k not in COUNTS}, sort_keys=True)


def count_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a model that set the number of groups."""
    return {name: settings[name] for name in COUNTS if name in settings}
