"""One tenant's limits, and the limits of a whole gateway.

Knows numbers; knows nothing of keys, queues or clocks.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

ANYONE = "anyone"
"""The tenant of callers without a key, where no keys are asked for."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Tenant:
    """What one tenant may take.

    Attributes:
        name: the tenant's.
        weight: its share of tokens beside the other tenants' that wait, as a ratio.
        priority: of tenants that wait, those with a lower one go first, always.
        requests_per_minute: most requests that begin in a minute; None for any number.
        tokens_per_minute: most tokens, prompt and output, in a minute; None for any number. The
            output is charged as it comes, so the last request may overdraw; what follows waits
            until that is paid back.
        max_running: most of its requests that compute at once; others wait. None for any number.
        max_queued: most of its requests that wait; None leaves it to the gateway's limit.
        metrics: its keys may read `/metrics`.
        private_cache: its prompts' KV blocks are found by its own requests alone, so that no other
            tenant can tell from the time of an answer what it has asked.
    """

    name: str
    weight: float = 1.0
    priority: int = 0
    requests_per_minute: float | None = None
    tokens_per_minute: float | None = None
    max_running: int | None = None
    max_queued: int | None = None
    metrics: bool = False
    private_cache: bool = False

    @property
    def cache_salt(self) -> bytes:
        """What the keys of its blocks are kept apart by; b"" where they are not."""
        return b"tenant " + self.name.encode() if self.private_cache else b""

    def share(self, num_gateways: int) -> Tenant:
        """The part of these limits that one of `num_gateways` gateways enforces."""

        def part(limit: int | None) -> int | None:
            return None if limit is None else -(-limit // num_gateways)

        def rate(limit: float | None) -> float | None:
            return None if limit is None else limit / num_gateways

        return replace(
            self,
            requests_per_minute=rate(self.requests_per_minute),
            tokens_per_minute=rate(self.tokens_per_minute),
            max_running=part(self.max_running),
            max_queued=part(self.max_queued),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class QueueLimits:
    """What a gateway keeps waiting.

    Attributes:
        max_queued: most requests of one model that wait.
        max_wait_s: a request that would wait longer, as far as one can tell, is refused at once;
            one that has waited so long is refused then.
    """

    max_queued: int = 4096
    max_wait_s: float = 60.0
