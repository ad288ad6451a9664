"""A fake slice with slots for adapters, whose loads end at moments of the test's choice."""

from __future__ import annotations

import random

from arriero.shards.engine.types import EngineConfig
from arriero.shards.protocol import wire
from arriero.shards.protocol.adapters import AdapterBatch, AdapterLoad, AdapterResult
from arriero.shards.protocol.step_plan import StepPlan
from support.fake_slice import FakeExecutor


class AdapterExecutor(FakeExecutor):
    """Checks each plan against the adapters that the ranks hold.

    Args:
        config: of the engine.
        rng: order of the ends of loads.
        broken: digests that cannot be loaded.

    Attributes:
        in_slots: digest in each slot.
        users: digest of the adapter of each sequence, by the sequence's slot.
        num_loads: loads by digest.
    """

    def __init__(
        self, config: EngineConfig, rng: random.Random, broken: frozenset[str] = frozenset()
    ) -> None:
        super().__init__(config)
        assert config.adapter_slots is not None
        self.limits, self.rng, self.broken = config.adapter_slots, rng, broken
        self.num_ranks = config.num_ranks
        self.in_slots: dict[int, str] = {}
        self.users: dict[int, tuple[int, str]] = {}
        self.host: set[str] = set()
        self.loading: list[tuple[int, AdapterLoad]] = []
        self.num_loads: dict[str, int] = {}
        self.wanted_by: dict[tuple[int, ...], str] = {}

    def submit(self, plan: StepPlan) -> None:
        plan = wire.decode(wire.encode(plan), StepPlan)
        for slot in plan.freed.tolist():
            self.users.pop(slot, None)
        for change in plan.adapters:
            assert 0 <= change.slot < self.limits.device
            in_use = [digest for slot, digest in self.users.values() if slot == change.slot]
            assert not in_use, f"slot {change.slot} is used with {in_use} and was replaced"
            assert change.digest in self.host, "an adapter that is not loaded enters a slot"
            self.in_slots[change.slot] = change.digest
        for new in plan.new:
            if new.adapter >= 0:
                self.users[new.slot] = (new.adapter, self.in_slots[new.adapter])
        assert set(self.in_slots.values()) <= self.host, "an adapter in a slot was dropped"
        super().submit(plan)

    def change_adapters(self, batch: AdapterBatch) -> None:
        batch = wire.decode(wire.encode(batch), AdapterBatch)
        for digest in batch.dropped:
            self.host.discard(digest)
            self.in_slots = {s: d for s, d in self.in_slots.items() if d != digest}
        for load in batch.loads:
            assert load.path == f"/adapters/{load.digest}"
            self.num_loads[load.digest] = self.num_loads.get(load.digest, 0) + 1
            self.loading += [(rank, load) for rank in range(self.num_ranks)]
        loading = {load.digest for _, load in self.loading}
        assert len(self.host | loading) <= self.limits.host, "host memory holds too many"

    def collect_adapters(self, timeout_s: float = 0.0) -> list[AdapterResult]:
        """Some loads end; all of them for a caller that waits."""
        self.rng.shuffle(self.loading)
        count = len(self.loading) if timeout_s else self.rng.randint(0, len(self.loading))
        ended, self.loading = self.loading[:count], self.loading[count:]
        results = []
        for rank, load in ended:
            error = "no such file" if load.digest in self.broken and rank == 0 else ""
            results.append(AdapterResult(rank=rank, digest=load.digest, error=error))
        left = {load.digest for _, load in self.loading}
        done = {load.digest for _, load in ended} - left
        self.host |= done - self.broken
        return results
