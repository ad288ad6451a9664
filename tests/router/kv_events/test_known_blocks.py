"""Events of known blocks: what routers outside are told, in which order, and never twice."""

from __future__ import annotations

import random

import numpy as np

from arriero.router.directory.directory import Directory
from arriero.router.directory.events import Batch, CacheChange, Snapshot
from arriero.router.directory.prefixes import CacheRoot
from arriero.router.directory.table import Keys, fingerprints
from arriero.router.kv_events.known_blocks import Cleared, KnownBlocks, Removed, Stored
from arriero.shards.kv.blocks import chain_keys

ROOT = CacheRoot(b"r" * 16, 4)


def prints(tokens: list[int]) -> Keys:
    return fingerprints(b"".join(chain_keys(ROOT.key, np.asarray(tokens, dtype=np.int32), 4)))


class Groups:
    """A directory and the known blocks beside it, as a gateway feeds them."""

    def __init__(self, capacity: int = 1000) -> None:
        self.directory = Directory(lease_s=1e9)
        self.blocks = KnownBlocks(capacity)
        self._numbers: dict[str, int] = {}

    def join(self, group: str, near: Keys | None = None, far: Keys | None = None) -> None:
        empty = np.zeros(0, dtype=np.uint64)
        snapshot = Snapshot(0, empty if near is None else near, empty if far is None else far, 100)
        self._numbers[group] = 0
        self.directory.snapshot(group, snapshot, 0.0)
        self.blocks.replace(group, snapshot)

    def change(self, group: str, keys: Keys, kind: CacheChange) -> None:
        self._numbers[group] += 1
        kinds = np.full(len(keys), kind, dtype=np.uint8)
        batch = Batch(self._numbers[group], kinds, keys)
        self.directory.apply(group, batch, 0.0)
        self.blocks.apply(group, batch)

    def learn(self, tokens: list[int]) -> None:
        self.blocks.learn(ROOT, tokens, self.directory.holders)

    def leave(self, group: str) -> None:
        self.directory.drop(group)
        self.blocks.drop(group)


def test_stored_blocks_have_tokens_and_their_parent() -> None:
    groups = Groups()
    groups.join("g0")
    tokens = list(range(14))
    keys = prints(tokens)
    groups.learn(tokens)
    assert groups.blocks.take() == []
    groups.change("g0", keys[:2], CacheChange.ON_DEVICE)
    groups.change("g0", keys[2:], CacheChange.ON_DEVICE)
    # one run of the chain is one event; what follows an event that was taken names its parent
    assert groups.blocks.take() == [Stored("device", None, 4, keys.tolist(), tokens[:12])]
    longer = [*tokens[:12], 90, 91, 92, 93]
    groups.learn(longer)
    groups.change("g0", prints(longer)[3:], CacheChange.ON_DEVICE)
    (event,) = groups.blocks.take()
    assert event == Stored("device", int(keys[2]), 4, [int(prints(longer)[3])], longer[12:])


def test_tokens_may_be_learned_after_the_groups_have_the_blocks() -> None:
    groups = Groups()
    tokens = list(range(12))
    keys = prints(tokens)
    groups.join("g0", near=keys[:2], far=keys[1:])
    assert groups.blocks.take() == []
    groups.learn(tokens)
    assert groups.blocks.take() == [
        Stored("device", None, 4, keys[:2].tolist(), tokens[:8]),
        Stored("below", int(keys[0]), 4, keys[1:].tolist(), tokens[4:]),
    ]


def test_a_block_is_held_while_any_group_holds_it() -> None:
    groups = Groups()
    groups.join("g0")
    groups.join("g1")
    tokens = list(range(8))
    keys = prints(tokens)
    groups.learn(tokens)
    groups.change("g0", keys, CacheChange.ON_DEVICE)
    groups.change("g1", keys, CacheChange.ON_DEVICE)
    assert len(groups.blocks.take()) == 1
    groups.change("g0", keys[1:], CacheChange.OFF_DEVICE)
    assert groups.blocks.take() == []
    groups.change("g1", keys[1:], CacheChange.OFF_DEVICE)
    assert groups.blocks.take() == [Removed("device", keys[1:].tolist())]
    groups.leave("g0")
    assert groups.blocks.take() == []
    groups.leave("g1")
    assert groups.blocks.take() == [Cleared()]
    groups.leave("g1")
    assert groups.blocks.take() == []


def test_a_full_table_forgets_the_ends_of_the_oldest_chains() -> None:
    groups = Groups(capacity=4)
    groups.join("g0")
    old, new = list(range(12)), [*range(4), *range(50, 58)]
    groups.learn(old)
    groups.change("g0", prints(old), CacheChange.ON_DEVICE)
    groups.blocks.take()
    groups.learn(new)
    # both chains begin with the same block: the last block of the old chain goes
    assert groups.blocks.take() == [Removed("device", [int(prints(old)[2])])]
    assert len(groups.blocks) == 4


def test_a_reader_of_the_events_always_knows_what_the_groups_hold() -> None:
    random.seed(7)
    groups = Groups(capacity=60)
    told: dict[str, set[int]] = {"device": set(), "below": set()}
    names = ["g0", "g1", "g2"]
    for name in names:
        groups.join(name)
    for _ in range(3000):
        tokens = [random.randrange(2) for _ in range(4 * random.randrange(1, 6))]
        name = random.choice(names)
        action = random.randrange(20)
        if action == 0:
            groups.leave(name)
            groups.join(name, near=prints(tokens))
        elif action < 8:
            groups.learn(tokens)
        else:
            groups.change(name, prints(tokens), random.choice(list(CacheChange)))
        for event in groups.blocks.take():
            if isinstance(event, Cleared):
                told = {"device": set(), "below": set()}
            elif isinstance(event, Stored):
                assert len(event.tokens) == 4 * len(event.keys)
                assert not told[event.medium] & set(event.keys), "told twice"
                told[event.medium] |= set(event.keys)
            else:
                assert set(event.keys) <= told[event.medium], "never told"
                told[event.medium] -= set(event.keys)
        stored: dict[str, set[int]] = {"device": set(), "below": set()}
        for event in groups.blocks.snapshot():
            stored[event.medium] |= set(event.keys)
        assert stored == told
        known = np.asarray(sorted(stored["device"] | stored["below"]), dtype=np.uint64)
        if len(known):
            by_group = groups.directory.holders(known).values()
            for number, medium in enumerate(("device", "below")):
                any_holds = np.any([pair[number] for pair in by_group], axis=0)
                assert set(known[any_holds].tolist()) == stored[medium]
