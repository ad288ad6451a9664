"""Arguments and answer of a leader's actions on its KV cache.

Knows values; knows nothing of the work behind them (see `kv_admin`) or of callers.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from arriero.shards.engine.cache_report import CacheReport


@dataclass(frozen=True, kw_only=True, slots=True)
class KvArguments:
    """Arguments of an action.

    Attributes:
        texts: of warm and pin: texts at the start of prompts.
        raw: of warm and pin: True for beginnings of prompts, False for system prompts.
        name: of pin and unpin: name of the pin.
    """

    texts: tuple[str, ...] = ()
    raw: bool = False
    name: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class KvCopies:
    """Copied blocks since the start: loaded to the device, saved from the device, failed."""

    loaded: int = 0
    saved: int = 0
    failed: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class KvReport(CacheReport):
    """Cache of a group after an action.

    Attributes:
        changed: number of flushed blocks, or of warmed or pinned tokens.
        copies: copied blocks.
    """

    changed: int = 0
    copies: KvCopies = field(default_factory=KvCopies)
