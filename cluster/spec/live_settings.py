"""The settings that gateways and leaders take while they run.

Knows numbers; knows nothing of the spec that they come from (see `differences`), since every
leader and the registry load this, and they start sooner for what they do not load.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from arriero.router.tenants.tenant import QueueLimits, Tenant
from arriero.shards.leader.health import HealthLimits


@dataclass(frozen=True, kw_only=True, slots=True)
class LiveSettings:
    """Settings that were changed since the deployment was brought up.

    Attributes:
        version: counts up from 1.
        log_level: of what arriero's own processes log.
        tenants, queue, lost_s, wake_s: of gateways; see `GatewayConfig`.
        health: of groups.
        canary_s: between two tokens that an idle group draws.
    """

    version: int
    log_level: str
    tenants: tuple[Tenant, ...]
    queue: QueueLimits
    lost_s: float
    wake_s: Mapping[str, float]
    health: HealthLimits
    canary_s: float

    def to_wire(self) -> dict[str, Any]:
        """As JSON can carry it."""
        return asdict(self)

    @classmethod
    def from_wire(cls, data: Mapping[str, Any]) -> LiveSettings:
        """Undo `to_wire`."""
        return cls(
            **{
                **data,
                "tenants": tuple(Tenant(**one) for one in data["tenants"]),
                "queue": QueueLimits(**data["queue"]),
                "health": HealthLimits(**data["health"]),
            }
        )
