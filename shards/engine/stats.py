"""The engine's load at one moment: numbers for gateways, metrics and operators.

Knows numbers; imports nothing heavy, since the registry and the command line read them too.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import zip_longest


@dataclass(kw_only=True, slots=True)
class SpeculationStats:
    """Drafts since the start.

    Attributes:
        drafts: rows with drafted tokens.
        drafted: drafted tokens.
        accepted: drafted tokens that were right.
        by_position: accepted tokens by their place in the draft.
    """

    drafts: int = 0
    drafted: int = 0
    accepted: int = 0
    by_position: list[int] = field(default_factory=list)

    def add(self, num_drafted: int, num_accepted: int) -> None:
        """Count a draft."""
        self.drafts += 1
        self.drafted += num_drafted
        self.accepted += num_accepted
        self.by_position += [0] * (num_accepted - len(self.by_position))
        for position in range(num_accepted):
            self.by_position[position] += 1

    @property
    def mean_accepted(self) -> float:
        """Tokens of a row with a draft, the one after the right drafted tokens included."""
        return 1 + self.accepted / self.drafts if self.drafts else 1.0

    @classmethod
    def total(cls, parts: Iterable[SpeculationStats]) -> SpeculationStats:
        """Sums over engines."""
        total = cls()
        for part in parts:
            total.drafts += part.drafts
            total.drafted += part.drafted
            total.accepted += part.accepted
            total.by_position = [
                sum(pair) for pair in zip_longest(total.by_position, part.by_position, fillvalue=0)
            ]
        return total


@dataclass(frozen=True, kw_only=True, slots=True)
class AdapterStats:
    """Adapters of an engine.

    Attributes:
        in_slots: digests of the adapters in slots of the device.
        num_slots: slots of the device.
        running: digests of the adapters of running sequences.
        waiting: digests of the adapters of waiting requests.
        entries: sequences with an adapter that began to run so far.
        changes: adapters put into slots so far.
    """

    in_slots: tuple[str, ...] = ()
    num_slots: int = 0
    running: tuple[str, ...] = ()
    waiting: tuple[str, ...] = ()
    entries: int = 0
    changes: int = 0

    @classmethod
    def total(cls, parts: Iterable[AdapterStats]) -> AdapterStats:
        """Over engines: all adapters, each once, and sums."""
        every = list(parts)

        def each_once(name: str) -> tuple[str, ...]:
            return tuple(dict.fromkeys(digest for part in every for digest in getattr(part, name)))

        return cls(
            in_slots=each_once("in_slots"),
            num_slots=sum(part.num_slots for part in every),
            running=each_once("running"),
            waiting=each_once("waiting"),
            entries=sum(part.entries for part in every),
            changes=sum(part.changes for part in every),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineStats:
    """A snapshot of the engine's load.

    `expert_loads` is the number of tokens sent to each expert since the start, by layer;
    `expert_imbalance` is the largest rank load over the mean, 1 being even; `expert_moves` is the
    number of changed placements. All three need expert parallelism. `tiers` has blocks by tier
    below the device, and transfers since the start; empty without tiers. `speculation` counts
    drafts. `adapters` has the adapters in slots. `holding`: new requests wait for the end of a
    pause, a sleep or a change of weights.
    """

    num_waiting: int = 0
    num_running: int = 0
    blocks_used: int = 0
    blocks_cached: int = 0
    blocks_total: int = 0
    local_blocks_used: int = 0
    local_blocks_total: int = 0
    steps: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    preemptions: int = 0
    expert_moves: int = 0
    expert_imbalance: float = 1.0
    expert_loads: dict[str, list[int]] = field(default_factory=dict)
    step_us: dict[str, float] = field(default_factory=dict)
    tiers: dict[str, int] = field(default_factory=dict)
    speculation: SpeculationStats = field(default_factory=SpeculationStats)
    adapters: AdapterStats = AdapterStats()
    holding: bool = False
