"""The settings of a group, from the spec, for its leader.

Knows fields; knows nothing of the work of a leader.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from arriero.shards.config.group import GroupConfig
from arriero.shards.leader.health import HealthLimits

if TYPE_CHECKING:
    from arriero.cluster.spec.gateway import TlsSpec, TracingSpec


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupSettings:
    """Settings of a group.

    Attributes:
        model: name of the model.
        seat: place of the group in the deployment; each new group in a seat has a new epoch.
        revision: of the model's settings.
        config: of the group, with the device decided.
        cpus_per_slice: Ray's logical CPUs of each slice.
        slices_per_bundle: number of slices that share a node.
        period_s: seconds between two renewals of the group's registry entry.
        start_timeout_s: limit of the whole start, in seconds.
        drain_s: seconds for which running streams may continue at the end.
        canary_s: seconds between two test tokens of an idle group.
        limits: limits of silence, hangs and steps.
        log_level, log_format: level and form of the logs of the leader and the slices.
        link_tls: TLS files of the link with gateways; None for a link without TLS.
        tracing: export of spans; None for none.
        guard: kind of a guard model that the spec names; "" for none.
    """

    model: str
    seat: str
    revision: int
    config: GroupConfig
    cpus_per_slice: float
    slices_per_bundle: int
    period_s: float
    start_timeout_s: float
    drain_s: float
    canary_s: float
    limits: HealthLimits
    log_level: str = "warning"
    log_format: str = "text"
    link_tls: TlsSpec | None = None
    tracing: TracingSpec | None = None
    guard: str = ""

    @property
    def layout(self) -> str:
        """The mesh as text."""
        config = self.config
        dp = f" dp{config.dp}" if config.dp > 1 else ""
        return f"tp{config.tp}{dp} pp{config.pp}"

    @property
    def numerics(self) -> str:
        """Dtypes, quantization and attention window as text: all that changes tokens."""
        config = self.config
        words = (config.dtype, config.quantization, config.activation_words)
        return " ".join(filter(None, (*words, config.kv_words, config.window_words)))
