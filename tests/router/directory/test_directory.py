"""The directory agrees with what groups hold, over a wire that loses, doubles and reorders."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from arriero.router.directory.directory import Directory, Reach
from arriero.router.directory.events import Batch, CacheChange, Snapshot
from arriero.router.directory.table import SLOT_BYTES, KeyTable
from arriero.shards.protocol import wire

LEASE_S = 10.0


def keys(values: object) -> np.ndarray:  # type: ignore[type-arg]
    return np.asarray(list(values), dtype=np.uint64)  # type: ignore[call-overload]


@given(st.integers(0, 2**32), st.integers(1, 60))
def test_table_is_a_dictionary_of_sets(seed: int, distinct: int) -> None:
    rng = random.Random(seed)
    # few homes, so that probes are long; more keys than the first capacity, so that it grows
    pool = [rng.choice([0, 2**62, 2**63]) + rng.randrange(1, 2000) for _ in range(distinct)]
    table, model = KeyTable(8), {}
    for _ in range(40):
        chosen = [rng.choice(pool) for _ in range(rng.randrange(0, 12))]
        holder, near, present = rng.randrange(64), rng.random() < 0.5, rng.random() < 0.6
        table.change(keys(chosen), holder, near=near, present=present)
        for one in chosen:
            held = model.setdefault(one, (set(), set()))[0 if near else 1]
            (held.add if present else held.discard)(holder)
        if rng.random() < 0.1:
            holder, start = rng.randrange(64), 0
            while start := table.drop(holder, start, rng.randrange(1, 9)):
                pass
            for held in model.values():
                for one in held:
                    one.discard(holder)
        found_near, found_far = table.find(keys(pool))
        for key, *bits in zip(pool, found_near.tolist(), found_far.tolist(), strict=True):
            for number, held in zip(bits, model.get(key, (set(), set())), strict=True):
                assert {i for i in range(64) if number >> i & 1} == held


def test_a_key_takes_less_than_forty_bytes() -> None:
    table = KeyTable(100_000)
    rng = np.random.default_rng(0)
    many = rng.integers(1, 2**64, 100_000, dtype=np.uint64)
    for start in range(0, len(many), 5000):
        table.change(many[start : start + 5000], start % 64, near=True, present=True)
    assert table.num_rebuilds == 0 and len(table) == len(many)
    assert table.nbytes / len(many) < 40 and table.nbytes % SLOT_BYTES == 0


@dataclass
class Group:
    """A group that remembers what it holds and what it has said."""

    name: str
    near: set[int] = field(default_factory=set)
    far: set[int] = field(default_factory=set)
    number: int = 0

    def snapshot(self) -> Snapshot:
        return Snapshot(self.number, keys(self.near), keys(self.far))

    def change(self, rng: random.Random, pool: list[int]) -> Batch:
        kinds, changed = [], []
        for _ in range(rng.randrange(1, 30)):
            key, kind = rng.choice(pool), CacheChange(rng.randrange(4))
            held = (
                self.near if kind in (CacheChange.ON_DEVICE, CacheChange.OFF_DEVICE) else self.far
            )
            (held.add if kind in (CacheChange.ON_DEVICE, CacheChange.OFFLOADED) else held.discard)(
                key
            )
            kinds.append(kind)
            changed.append(key)
        self.number += 1
        made = Batch(self.number, np.asarray(kinds, dtype=np.uint8), keys(changed))
        return wire.decode(wire.encode(made), Batch)


def expected(groups: list[Group], chain: list[int]) -> dict[str, Reach]:
    found = {}
    for group in groups:
        near = next((i for i, key in enumerate(chain) if key not in group.near), len(chain))
        either = group.near | group.far
        total = next((i for i, key in enumerate(chain) if key not in either), len(chain))
        if total:
            found[group.name] = Reach(near, total)
    return found


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32), faults=st.sampled_from([0.0, 0.2]))
def test_directory_and_groups_agree_again(seed: int, faults: float) -> None:
    rng = random.Random(seed)
    pool = [rng.randrange(1, 2**64) for _ in range(60)]
    directory, now = Directory(LEASE_S, 4), 0.0
    groups: list[Group] = []
    wire: dict[str, list[Batch]] = {}
    for life in range(80):
        now += rng.random()
        if len(groups) < 5 and rng.random() < 0.3:
            group = Group(f"g{life}", {pool[0]}, {pool[1]})
            assert directory.snapshot(group.name, group.snapshot(), now)
            groups.append(group)
            wire[group.name] = []
        if groups and rng.random() < 0.1:  # it dies, and nobody says so
            groups.remove(rng.choice(groups))
        for group in groups:
            due = wire[group.name]
            due.append(group.change(rng, pool))
            if rng.random() < faults:
                rng.choice([due.pop, lambda due=due: due.append(due[0]), due.reverse])()
            while due and rng.random() < 0.7:
                if not directory.apply(group.name, due.pop(0), now):
                    assert directory.snapshot(group.name, group.snapshot(), now)
                    due.clear()
        directory.expire(now)
        directory.sweep(rng.choice([7, 10**6]))
    now += LEASE_S / 2
    for group in groups:  # one word from each is enough
        for batch in [*wire[group.name], group.change(rng, pool)]:
            if not directory.apply(group.name, batch, now):
                assert directory.snapshot(group.name, group.snapshot(), now)
                break
    now += LEASE_S / 2 + 1e-6
    directory.expire(now)
    assert sorted(directory.groups()) == sorted(group.name for group in groups)
    for _ in range(20):
        chain = rng.sample(pool, rng.randrange(1, 20))
        if groups and rng.random() < 0.7:
            known = [*rng.choice(groups).near]
            chain = known[: rng.randrange(1, 20)] + chain
        assert directory.lookup(keys(chain)) == expected(groups, chain)


def test_long_chains_are_followed_over_pages() -> None:
    directory = Directory(LEASE_S)
    chain = np.random.default_rng(0).integers(1, 2**64, 5000, dtype=np.uint64)
    for number, reach in enumerate((5000, 4999, 1024, 512, 511, 1)):
        directory.snapshot(f"g{number}", Snapshot(0, chain[:reach], chain[: reach + 3]), 0.0)
    found = directory.lookup(chain)
    assert [one.near for one in found.values()] == [5000, 4999, 1024, 512, 511, 1]
    assert [one.total for one in found.values()] == [5000, 5000, 1027, 515, 514, 4]


def test_places_are_given_again_once_they_are_swept() -> None:
    directory = Directory(LEASE_S)
    one = Snapshot(0, keys([5]), keys([]))
    for number in range(64):
        assert directory.snapshot(f"g{number}", one, 0.0)
    assert not directory.snapshot("one too many", one, 0.0)
    assert len(directory.expire(LEASE_S)) == 64
    assert directory.snapshot("new", Snapshot(0), LEASE_S)
    assert not directory.lookup(keys([5]))


@pytest.mark.parametrize("number", [0, 5])
def test_a_batch_that_does_not_follow_asks_for_a_snapshot(number: int) -> None:
    directory = Directory(LEASE_S)
    batch = Batch(number, np.zeros(1, dtype=np.uint8), keys([7]))
    assert not directory.apply("unknown", batch, 0.0)
    directory.snapshot("g", Snapshot(3, keys([6])), 0.0)
    assert directory.apply("g", batch, 0.0) is (number == 0)
    assert not directory.lookup(keys([7]))
    assert directory.lookup(keys([6])) == {"g": Reach(1, 1)}
