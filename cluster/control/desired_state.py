"""What is wanted of a deployment, as the operator keeps it in Ray's store.

Knows settings by revision, counts and seats; knows nothing of what there is.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from arriero.cluster.spec.model import COUNTS


@dataclass(slots=True)
class Revision:
    """Settings of a model that are or were wanted.

    Attributes:
        number: counts up.
        settings: a `ModelSpec` as JSON.
        digest: of the weights when it began.
    """

    number: int
    settings: dict[str, Any]
    digest: str


@dataclass(slots=True)
class ModelState:
    """One model as the operator keeps it; the latest revision is the wanted one."""

    count: int
    revisions: list[Revision]
    drained: list[str] = field(default_factory=list)


@dataclass(slots=True)
class SeatState:
    """One seat as the operator keeps it."""

    model: str
    revision: int
    stopping: bool = False


@dataclass(slots=True)
class OperatorState:
    """All that outlives the operator's process."""

    spec: dict[str, Any]
    shared: bool
    token: str
    admin_port: int = 0
    token_before: str = ""
    token_before_until: float = 0.0
    live_version: int = 0
    models: dict[str, ModelState] = field(default_factory=dict)
    places: dict[str, SeatState] = field(default_factory=dict)

    @classmethod
    def from_wire(cls, data: Mapping[str, Any]) -> OperatorState:
        """Undo `asdict`."""
        models = {
            name: ModelState(**{**one, "revisions": [Revision(**r) for r in one["revisions"]]})
            for name, one in data["models"].items()
        }
        places = {name: SeatState(**one) for name, one in data["places"].items()}
        return cls(**{**data, "models": models, "places": places})


def essence(settings: Mapping[str, Any]) -> str:
    """What of a model's settings its groups must be replaced for."""
    return json.dumps({k: v for k, v in settings.items() if k not in COUNTS}, sort_keys=True)


def count_of(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The rest, which says how many groups there are."""
    return {name: settings[name] for name in COUNTS if name in settings}
