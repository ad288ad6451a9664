"""Limits of a tenant and limits of a whole gateway.

Knows numbers; knows nothing of keys, queues or clocks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from arriero.router.tenants.safety import SafetyPolicy
from arriero.shards.config.priorities import BACKGROUND_PRIORITY

ANYONE = "anyone"
"""Tenant of callers without a key, at a gateway that needs no keys."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Tenant:
    """Limits and rights of a tenant.

    Attributes:
        name: name of the tenant.
        weight: share of tokens among the waiting tenants, as a ratio.
        priority: waiting tenants with a lower priority always go first.
        requests_per_minute: most requests accepted in a minute; None for any number.
        tokens_per_minute: most tokens, prompt and output, in a minute; None for any number. Output
            is charged when it is computed, so the last request may overdraw; later requests are
            refused until the debt is paid.
        max_running: most requests that run at once; further requests wait. None for any number.
        max_queued: most waiting requests; None for the limit of the gateway.
        tokens_per_day: most tokens, prompt and output, from 00:00 to 24:00 UTC, over all gateways;
            None for any number. Output is charged as in `tokens_per_minute`.
        tokens_per_day_by_model: the same for single models, by id.
        metrics: keys of the tenant may read `/metrics`.
        private_cache: only requests of the tenant reuse the KV blocks of its prompts, so no other
            tenant can infer a prompt from the time to an answer.
        charged_to: tenant whose budget of a day pays; "" for this tenant.
    """

    name: str
    weight: float = 1.0
    priority: int = 0
    requests_per_minute: float | None = None
    tokens_per_minute: float | None = None
    max_running: int | None = None
    max_queued: int | None = None
    tokens_per_day: int | None = None
    tokens_per_day_by_model: Mapping[str, int] = field(default_factory=dict)
    metrics: bool = False
    private_cache: bool = False
    safety: SafetyPolicy | None = None
    charged_to: str = ""

    @property
    def account(self) -> str:
        """Name of the tenant whose budget of a day pays."""
        return self.charged_to or self.name

    @property
    def background(self) -> bool:
        """Whether this is the queue of a tenant's background requests."""
        return bool(self.charged_to)

    def in_background(self) -> Tenant:
        """The tenant in the queue, for its background requests.

        These wait behind the requests of all tenants and leave the tenant's other limits to its
        interactive requests; only the budgets of a day count both.
        """
        return replace(
            self,
            name=f"{self.name}/background",  # no tenant has a name with a slash
            priority=BACKGROUND_PRIORITY,
            requests_per_minute=None,
            tokens_per_minute=None,
            max_running=None,
            max_queued=None,
            charged_to=self.name,
        )

    @property
    def has_day_budget(self) -> bool:
        """Whether the tenant's tokens of a day are limited."""
        return self.tokens_per_day is not None or bool(self.tokens_per_day_by_model)

    @property
    def cache_salt(self) -> bytes:
        """Salt of the tenant's KV block keys; b"" for a shared cache."""
        return b"tenant " + self.name.encode() if self.private_cache else b""

    def share(self, num_gateways: int) -> Tenant:
        """The share of these limits that each of `num_gateways` gateways enforces.

        Budgets of a day stay whole: gateways count them together.
        """

        def count(limit: int | None) -> int | None:
            return None if limit is None else -(-limit // num_gateways)

        def rate(limit: float | None) -> float | None:
            return None if limit is None else limit / num_gateways

        return replace(
            self,
            requests_per_minute=rate(self.requests_per_minute),
            tokens_per_minute=rate(self.tokens_per_minute),
            max_running=count(self.max_running),
            max_queued=count(self.max_queued),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class QueueLimits:
    """Limits of a queue.

    Attributes:
        max_queued: most waiting requests of a model.
        max_wait_s: longest wait in seconds. A request with a longer expected wait is refused at
            once; a request that has waited so long is refused then.
    """

    max_queued: int = 4096
    max_wait_s: float = 60.0
