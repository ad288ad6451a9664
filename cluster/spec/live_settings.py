"""The settings that gateways and leaders accept while running.

Knows values; knows nothing of the spec behind the values (see `diff`): each leader and the registry
import this module, and a short list of imports makes the processes start sooner.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from arriero.router.tenants.tenant import QueueLimits, Tenant
from arriero.shards.leader.health import HealthLimits


@dataclass(frozen=True, kw_only=True, slots=True)
class LiveSettings:
    """Settings that `reload` or `rollout` changed after `up`.

    Attributes:
        version: counts up from 1.
        log_level, log_format: level and form of the logs of arriero's own processes.
        tenants, queue, lost_s, wake_s: settings of gateways; see `GatewayConfig`.
        health: limits of the health checks of groups.
        canary_s: seconds between two test tokens of an idle group.
        models: names of the deployment's models; empty in what an earlier version stored.
    """

    version: int
    log_level: str
    tenants: tuple[Tenant, ...]
    queue: QueueLimits
    lost_s: float
    wake_s: Mapping[str, float]
    health: HealthLimits
    canary_s: float
    models: tuple[str, ...] = ()
    log_format: str = "text"
