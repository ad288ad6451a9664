"""The block manager: nothing lost, nothing held twice, keys the same everywhere."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from arriero.shards.kv.blocks import BlockManager, chain_keys, root_key
from arriero.shards.protocol.step_plan import int32

SIZE = 2
POOL = 12


class Blocks(RuleBasedStateMachine):
    """Tables with the tokens they hold, against a pool that really holds tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.events: Counter[bytes] = Counter()
        self.manager = BlockManager(POOL, SIZE, on_event=self.on_event)
        self.content: dict[int, tuple[int, ...]] = {}  # block -> its whole prefix of tokens
        self.tokens: dict[int, list[int]] = {}  # owner -> tokens, in full blocks
        self.owners = 0

    def on_event(self, kind: str, key: bytes) -> None:
        self.events[key] += 1 if kind == "stored" else -1
        assert self.events[key] in (0, 1)

    def keys(self, tokens: list[int]) -> list[bytes]:
        return list(chain_keys(root_key(b"model"), int32(tokens), SIZE))

    def write(self, owner: int, first: int) -> None:
        """Fill an owner's blocks from `first` on."""
        tokens = self.tokens[owner]
        table = self.manager.table(owner)
        for index in range(first, len(table)):
            for other in self.tokens:
                assert other == owner or table[index] not in self.manager.table(other)
            self.content[table[index]] = tuple(tokens[: (index + 1) * SIZE])
        self.manager.store(owner, first, self.keys(tokens)[first:])

    @rule(tokens=st.lists(st.integers(0, 1), min_size=SIZE, max_size=5 * SIZE))
    def allocate(self, tokens: list[int]) -> None:
        tokens = tokens[: len(tokens) // SIZE * SIZE]
        shared = self.manager.match(self.keys(tokens))
        num_blocks = len(tokens) // SIZE
        cost = self.manager.cost(num_blocks, shared)
        available = self.manager.num_available
        if cost > available:
            return
        self.owners += 1
        self.tokens[self.owners] = tokens
        self.manager.allocate(self.owners, num_blocks, shared)
        assert self.manager.num_available == available - cost
        self.write(self.owners, len(shared))

    @precondition(lambda self: self.tokens)
    @rule(data=st.data(), block=st.lists(st.integers(0, 1), min_size=SIZE, max_size=SIZE))
    def append(self, data: st.DataObject, block: list[int]) -> None:
        if not self.manager.num_available:
            return
        owner = data.draw(st.sampled_from(sorted(self.tokens)))
        table = len(self.manager.table(owner))
        self.manager.append(owner)
        self.tokens[owner] += block
        self.write(owner, table)

    @precondition(lambda self: self.tokens)
    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        parent = data.draw(st.sampled_from(sorted(self.tokens)))
        shared = list(self.manager.table(parent))
        del shared[data.draw(st.integers(0, len(shared))) :]
        self.owners += 1
        available = self.manager.num_available
        self.manager.allocate(self.owners, len(shared), shared)
        assert self.manager.num_available == available
        self.tokens[self.owners] = self.tokens[parent][: len(shared) * SIZE]

    @precondition(lambda self: self.tokens)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        owner = data.draw(st.sampled_from(sorted(self.tokens)))
        self.manager.free(owner)
        del self.tokens[owner]

    @invariant()
    def tables_read_their_own_tokens(self) -> None:
        for owner, tokens in self.tokens.items():
            table = self.manager.table(owner)
            assert len(table) == len(tokens) // SIZE
            for index, block in enumerate(table):
                assert self.content[block] == tuple(tokens[: (index + 1) * SIZE])

    @invariant()
    def counts_agree(self) -> None:
        held = {block for owner in self.tokens for block in self.manager.table(owner)}
        assert self.manager.num_used == len(held)
        assert self.manager.num_available == POOL - len(held)
        findable = sum(self.events.values())
        assert self.manager.num_cached <= findable <= POOL

    def teardown(self) -> None:
        for owner in list(self.tokens):
            self.manager.free(owner)
        assert self.manager.num_available == POOL


TestBlocks = Blocks.TestCase
TestBlocks.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


def test_the_tail_of_a_sequence_is_evicted_before_its_head() -> None:
    evicted = []
    manager = BlockManager(
        4, SIZE, on_event=lambda kind, key: evicted.append(key) if kind == "evicted" else None
    )
    old = list(chain_keys(root_key(b""), int32([1, 2, 3, 4]), SIZE))
    new = list(chain_keys(root_key(b""), int32([5, 6, 7, 8]), SIZE))
    for owner, keys in enumerate((old, new)):
        manager.allocate(owner, 2)
        manager.store(owner, 0, keys)
    manager.free(0)
    manager.free(1)
    manager.allocate(2, 3)
    assert evicted == [old[1], old[0], new[1]]
    assert len(manager.match(new)) == 1


def test_keys_are_the_same_in_every_process() -> None:
    script = (
        "import numpy as np\n"
        "from arriero.shards.kv.blocks import chain_keys, root_key\n"
        "tokens = np.arange(48, dtype=np.int32)\n"
        "print(*(k.hex() for k in chain_keys(root_key(b'm', b't'), tokens, 16)))\n"
    )
    expected = """
        fd8279741b40d6c0268b07f4941376f7
        a73db1731583ada9702953157518d41b
        eb35ce2ab5ac06b151b211028559573d
    """
    for hash_seed in ("0", "1"):
        done = subprocess.run(
            [sys.executable, "-c", script],
            env={"PYTHONPATH": ":".join(sys.path), "PYTHONHASHSEED": hash_seed},
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout.split() == expected.split()


@pytest.mark.parametrize("other", [(b"ab", b"c"), (b"a", b"bcd"), (b"abc", b"")])
def test_no_salt_poses_as_another(other: tuple[bytes, bytes]) -> None:
    assert root_key(b"a", b"bc") != root_key(*other)


def test_a_key_depends_on_the_whole_prefix() -> None:
    root = root_key(b"")
    one = list(chain_keys(root, int32([1, 2, 3, 4, 5]), SIZE))
    two = list(chain_keys(root, int32([9, 2, 3, 4]), SIZE))
    assert len(one) == 2, "a block that is not full has no key"
    assert {len(key) for key in one} == {16}
    assert not set(one) & set(two)
    assert list(chain_keys(one[0], int32([3, 4]), SIZE)) == one[1:]
