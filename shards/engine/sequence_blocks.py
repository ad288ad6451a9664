"""The blocks of sequences: what each shares with the prefix cache and with its own siblings.

Samples of one request share its full prompt blocks. The first sample computes them; an *anchor*
then holds them until the others have begun, whatever becomes of the first meanwhile. Anchors only
save work, so they are the first to go when blocks run out. Blocks that were loaded from a lower
tier for a request are anchored in the same way until it begins.

Knows sequences and blocks; knows nothing of slots, steps or who goes first.
"""

from __future__ import annotations

from collections.abc import Sequence as Many
from typing import Literal

from arriero.shards.engine.blocks import BlockManager, CacheListener, chain_keys, root_key
from arriero.shards.engine.sequence import LiveRequest, Sequence
from arriero.shards.engine.types import EngineConfig
from arriero.shards.kv.leader import KvTiers, Load


class SequenceBlocks:
    """One pool's blocks, by sequence.

    Args:
        config: sizes, and whether there is a prefix cache.
        on_event: told of keys stored in and evicted from the prefix cache.

    Attributes:
        pool: the blocks themselves.
        tiers: what is kept of them below the device.
    """

    def __init__(self, config: EngineConfig, on_event: CacheListener | None) -> None:
        self._on_event = on_event
        self.pool = BlockManager(config.num_blocks, config.block_size, on_event=self._changed)
        self._prefix_cache = config.prefix_cache
        self._model_salt = config.cache_salt
        self._anchors: dict[int, LiveRequest] = {}
        self._owners = 0
        self.tiers = KvTiers(config.tiers, self.pool, self.new_owner)

    @property
    def num_anchors(self) -> int:
        """Prompts kept for samples that have not begun."""
        return len(self._anchors)

    def new_owner(self) -> int:
        """A number that has owned no table before."""
        self._owners += 1
        return self._owners

    def count(self, sequence: Sequence) -> int:
        """Blocks that hold all its known tokens."""
        return -(-len(sequence.tokens) // self.pool.block_size)

    def find_shared(self, sequence: Sequence) -> list[int]:
        """Blocks that hold its first tokens already; at least one known token is left over."""
        if sequence.wants_prompt_rows:
            return []  # they come of computing every prompt token
        found: list[int] = []
        if self._prefix_cache:
            most = (len(sequence.tokens) - 1) // self.pool.block_size
            self._extend_keys(sequence, most)
            found = self.pool.match(sequence.keys[:most])
        anchor = sequence.live.anchor
        if anchor is not None and len(self.pool.table(anchor)) > len(found):
            found = list(self.pool.table(anchor))
        return found

    def open(self, sequence: Sequence, shared: Many[int]) -> Many[int]:
        """Give a sequence blocks for all its known tokens, the first of them `shared`."""
        self.pool.allocate(sequence.owner, self.count(sequence), shared)
        sequence.num_stored = len(shared)
        return self.pool.table(sequence.owner)

    def grow(self, sequence: Sequence) -> tuple[int, int]:
        """Add a block to a sequence's table; gives its index there and its id."""
        index = len(self.pool.table(sequence.owner))
        return index, self.pool.append(sequence.owner)

    def close(self, sequence: Sequence) -> None:
        """Take a sequence's blocks back."""
        self.pool.free(sequence.owner)

    def store(self, sequence: Sequence, num_tokens: int) -> None:
        """Make the blocks findable that its first `num_tokens` fill, all of them in a plan."""
        full = num_tokens // self.pool.block_size
        if self._prefix_cache and full > sequence.num_stored:
            self._extend_keys(sequence, full)
            first = sequence.num_stored
            keys = sequence.keys[first:full]
            self.pool.store(sequence.owner, first, keys)
            self.tiers.note(keys, first, sequence.live.request.cache_salt)
            sequence.num_stored = full

    def begin_load(self, sequence: Sequence, spare: int) -> Load | None:
        """Begin to bring up what lower tiers hold of a sequence's first tokens, if they do.

        Args:
            sequence: not in a slot.
            spare: blocks that must stay available.
        """
        request = sequence.live.request
        if not self._prefix_cache or sequence.wants_prompt_rows or sequence.live.anchor is not None:
            return None
        most = (len(sequence.tokens) - 1) // self.pool.block_size
        self._extend_keys(sequence, most)
        return self.tiers.load(sequence.keys[:most], spare, request.cache_salt, request.peer)

    def end_load(self, load: Load, live: LiveRequest | None) -> None:
        """Take what was loaded over from its load; kept for the request, if it still is."""
        if live is not None and live.anchor is None and load.num_good:
            self._anchor(live, load.owner, load.num_good * self.pool.block_size)
        self.pool.free(load.owner)

    def keep_prompt(self, sequence: Sequence) -> None:
        """Anchor the full prompt blocks of a request's first sample, but for the last token."""
        if sequence.num_prompt > self.pool.block_size:
            self.drop_prompt(sequence.live)
            self._anchor(sequence.live, sequence.owner, sequence.num_prompt - 1)

    def drop_prompt(self, live: LiveRequest) -> None:
        """Drop a request's anchor, if it has one."""
        if live.anchor is not None:
            self.pool.free(live.anchor)
            del self._anchors[live.anchor]
            live.anchor = None

    def drop_latest_prompt(self) -> None:
        """Drop the anchor that was made last."""
        self.drop_prompt(next(reversed(self._anchors.values())))

    def _anchor(self, live: LiveRequest, owner: int, num_tokens: int) -> None:
        anchor = live.anchor = self.new_owner()
        self.pool.fork(owner, anchor, num_tokens)
        self._anchors[anchor] = live

    def _changed(self, kind: Literal["stored", "evicted"], key: bytes) -> None:
        self.tiers.changed(key)
        if self._on_event is not None:
            self._on_event(kind, key)

    def _extend_keys(self, sequence: Sequence, count: int) -> None:
        keys, size = sequence.keys, self.pool.block_size
        if len(keys) < count:
            salt = sequence.live.request.cache_salt
            parent = keys[-1] if keys else root_key(self._model_salt, salt)
            tokens = sequence.window(len(keys) * size, count * size)
            keys.extend(chain_keys(parent, tokens, size))
