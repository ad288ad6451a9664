"""The engine's load at one moment: numbers for gateways, metrics and operators.

Knows numbers; imports nothing heavy, since the registry and the command line read them too.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineStats:
    """A snapshot of the engine's load.

    `expert_loads` is the number of tokens sent to each expert since the start, by layer;
    `expert_imbalance` is the largest rank load over the mean, 1 being even; `expert_moves` is the
    number of changed placements. All three need expert parallelism. `tiers` has blocks by tier
    below the device, and transfers since the start; empty without tiers.
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
