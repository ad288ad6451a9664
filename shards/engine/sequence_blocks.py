"""Blocks of sequences, shared with the prefix cache and with other samples of the same request.

Samples of one request share the full prompt blocks. The first sample computes these blocks; an
*anchor* then keeps them until the other samples have entered a slot, even if the first sample ends
before. Anchors only save work, so they are the first to go when blocks run out. Blocks that were
loaded from a lower tier for a request are anchored in the same way until the request begins.

Layers with chunked attention have blocks of a second pool; a sequence needs room in both pools, and
a prefix is shared only as far as both pools have it. If all layers have a window, the second kind
of blocks is the only kind.

Knows sequences and blocks; knows nothing of slots, steps or precedence.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from collections.abc import Sequence as Many

from arriero.shards.engine.null_pool import NullBlockPool
from arriero.shards.engine.sequence import LiveRequest, Sequence
from arriero.shards.engine.shared_blocks import Pin, SharedBlocks
from arriero.shards.engine.types import EngineConfig, EngineRequest
from arriero.shards.errors import InvalidRequest
from arriero.shards.images.request import key_tokens
from arriero.shards.kv.blocks import BlockManager, CacheListener, chain_keys, root_key
from arriero.shards.kv.local_blocks import LocalBlocks
from arriero.shards.kv.retention import Retention, RetentionChanges
from arriero.shards.kv.tiers import OffloadManager, PrefixLoad
from arriero.shards.kv.transfers import Pool
from arriero.shards.protocol.step_plan import int32

MAX_PINNED = 0.25
"""Largest share of a pool for pins."""


class SequenceBlocks:
    """Blocks of the pools, by sequence.

    Args:
        config: sizes, and whether there is a prefix cache.
        on_event: callback for keys stored in and evicted from the prefix cache.
        clock: monotonic time in seconds.

    Attributes:
        pool: blocks of layers with full attention.
        local: blocks of layers with chunked or windowed attention; None without such layers.
        pools: both pools by `Pool`, as known to the slices.
        tiers: manager of the blocks below the device.
        retention: prefixes that are evicted last.
    """

    def __init__(
        self,
        config: EngineConfig,
        on_event: CacheListener | None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        seen = config.seen_blocks
        self.pool: BlockManager
        self.local: LocalBlocks | None = None
        if config.attention_window:
            self.pool = NullBlockPool(config.block_size)
            self.local = LocalBlocks(config.num_blocks, seen, on_event)
            self.pools = {Pool.ALL: self.local.pool}
        else:
            self.pool = BlockManager(config.num_blocks, config.block_size, on_event=on_event)
            self.pools = {Pool.ALL: self.pool}
            if config.attention_chunk:
                self.local = LocalBlocks(config.num_local_blocks, seen)
                self.pools[Pool.LOCAL] = self.local.pool
        self._sees_all = not config.attention_window  # whether some layers have full attention
        self._local_pool = Pool.LOCAL if self._sees_all else Pool.ALL
        self._prefix_cache = config.prefix_cache
        self._model_salt = config.cache_salt
        self._image_token = config.image_token
        self._anchors: dict[int, LiveRequest] = {}
        self._pins: dict[str, Pin] = {}
        self._owners = 0
        self._clock = clock
        self.retention = Retention.of_capacity(
            self.pools[Pool.ALL].num_blocks, config.tiers.all.max_tenant_share
        )
        self.tiers = OffloadManager(config.tiers, self.pools, self.local, self.new_owner, on_event)

    @property
    def num_anchors(self) -> int:
        """Prompts with an anchor, for samples that have not entered a slot."""
        return len(self._anchors)

    def new_owner(self) -> int:
        """A new owner of a block table."""
        self._owners += 1
        return self._owners

    def count(self, sequence: Sequence) -> int:
        """Number of blocks for all known tokens."""
        return -(-len(sequence.tokens) // self.pool.block_size)

    def find_shared(self, sequence: Sequence) -> SharedBlocks:
        """Existing blocks with the first tokens; at least one known token is left to compute."""
        if sequence.wants_prompt_rows:
            return SharedBlocks()  # prompt log-probabilities need every prompt token computed
        shared = SharedBlocks()
        if self._prefix_cache:
            most = (len(sequence.tokens) - 1) // self.pool.block_size
            self._extend_keys(sequence, most)
            shared = self._match(sequence.keys[:most])
        anchor = sequence.live.anchor
        if anchor is not None and len(self.pool.table(anchor)) > len(shared.blocks):
            local = [] if self.local is None else list(self.local.pool.table(anchor))
            shared = SharedBlocks(list(self.pool.table(anchor)), local)
        return shared

    def cached_share(self, request: EngineRequest) -> float:
        """Share of a prompt, 0 to 1, in the prefix cache now."""
        if not self._prefix_cache:
            return 0.0
        root = root_key(self._model_salt, request.key_salt)
        tokens = int32(request.prompt)
        if request.images and self._image_token is not None:
            tokens = key_tokens(request.prompt, request.images, self._image_token)
        keys = chain_keys(root, tokens, self.pool.block_size)
        if self._sees_all:
            num_shared = len(self.pool.match(keys))
        else:
            num_shared = len(self._match(list(keys)).blocks)
        return num_shared * self.pool.block_size / len(request.prompt)

    def _match(self, keys: list[bytes]) -> SharedBlocks:
        blocks = self.pool.match(keys)
        if self.local is None:
            return SharedBlocks(blocks)
        end, local = self.local.match(keys[: len(blocks)])
        return SharedBlocks(blocks[:end], local)

    def room(self) -> tuple[int, int]:
        """Available blocks of either pool."""
        return self.pool.num_available, self.local.pool.num_available if self.local else 0

    def has_room(self, sequence: Sequence, shared: SharedBlocks, spare: int) -> bool:
        """Whether a sequence may begin, with `spare` blocks of each pool left over.

        Layers with chunked or windowed attention need the blocks that the first tokens see, up to
        the end of the chunk or window; later blocks come from those freed meanwhile.
        """
        if self.pool.cost(self.count(sequence), shared.blocks) > self.pool.num_available - spare:
            return False
        if self.local is None:
            return True
        rest = self.count(sequence) - len(shared.blocks)
        count = min(rest + len(shared.local), self.local.most)
        pool = self.local.pool
        return pool.cost(count, shared.local) <= pool.num_available - spare

    def open(self, sequence: Sequence, shared: SharedBlocks) -> Many[int]:
        """Give a sequence blocks for all known tokens, the first of them `shared`.

        In the local pool the sequence gets the shared blocks only; `extend_local` adds more.
        Returns the block table of the full-attention layers.
        """
        now_s = self._clock()
        self._retain(self.retention.expire(now_s))
        self.tiers.expire(now_s)
        self.pool.allocate(sequence.owner, self.count(sequence), shared.blocks)
        sequence.num_stored = len(shared.blocks)
        if self.local is not None:
            self.local.open(sequence.owner, len(shared.blocks), shared.local)
        return self.pool.table(sequence.owner) if self._sees_all else ()

    def indexed(self, shared: SharedBlocks) -> list[tuple[int, int]]:
        """Shared blocks of the local pool, as pairs of index and block id."""
        if self.local is None:
            return []
        return list(zip(self.local.seen.numbers(len(shared.blocks)), shared.local, strict=True))

    @property
    def can_grow(self) -> bool:
        """Whether each pool has an available block."""
        return bool(
            self.pool.num_available and (self.local is None or self.local.pool.num_available)
        )

    def grow(self, sequence: Sequence) -> list[tuple[int, int]]:
        """Add a block to a sequence's table; returns its index and id, where it has an id."""
        index = len(self.pool.table(sequence.owner))
        block = self.pool.append(sequence.owner)
        return [(index, block)] if self._sees_all else []

    def local_reach(self, sequence: Sequence, start: int, end: int, spare: int) -> int:
        """End of a chunk from `start`, at most `end`, that the local pool has blocks for.

        Beyond the current chunk or window, `spare` blocks must be left over.
        """
        if self.local is None:
            return end
        size, free = self.pool.block_size, self.local.pool.num_available
        table_end = self.local.end(sequence.owner)
        boundary = self.local.boundary(start // size) * size
        within = min(boundary, (table_end + free) * size)
        return min(end, max(within, (table_end + max(0, free - spare)) * size))

    def spare_reach(self, sequence: Sequence, end: int, spare: int) -> int:
        """End of the tokens that fit a sequence's blocks and others, at most `end`.

        `spare` blocks of each pool must be left over by the others.
        """
        size = self.pool.block_size
        free = max(0, self.pool.num_available - spare)
        end = min(end, (len(self.pool.table(sequence.owner)) + free) * size)
        if self.local is not None:
            free = max(0, self.local.pool.num_available - spare)
            end = min(end, (self.local.end(sequence.owner) + free) * size)
        return end

    def extend_local(self, sequence: Sequence, end: int) -> list[tuple[int, int]]:
        """Allocate missing local blocks for tokens up to `end`: pairs of index and block id."""
        if self.local is None:
            return []
        return self.local.extend(sequence.owner, -(-end // self.pool.block_size))

    def pass_to(self, sequence: Sequence, position: int) -> None:
        """Free local blocks that no token from `position` on sees; all before are in a plan."""
        if self.local is not None:
            # store the freed blocks in the prefix cache, as far as their tokens are known
            self.store(sequence, min(position, len(sequence.tokens)))
            self.local.trim(sequence.owner, position // self.pool.block_size)

    def close(self, sequence: Sequence) -> None:
        """Free a sequence's blocks; those that its request's hint names stay in the cache."""
        self._keep(sequence)
        self.pool.free(sequence.owner)
        if self.local is not None:
            self.local.close(sequence.owner)

    def store(self, sequence: Sequence, num_tokens: int) -> None:
        """Store the blocks of the first `num_tokens` in the prefix cache; all are in a plan."""
        full = num_tokens // self.pool.block_size
        if self._prefix_cache and full > sequence.num_stored:
            self._extend_keys(sequence, full)
            first, tenant = sequence.num_stored, sequence.live.request.tenant
            keys = sequence.keys[first:full]
            self.pool.store(sequence.owner, first, keys)
            if self._sees_all:
                self.tiers.note(Pool.ALL, keys, first, tenant)
            if self.local is not None:
                start, new = self.local.store(sequence.owner, sequence.keys[:full])
                self.tiers.note(self._local_pool, new, start, tenant)
            sequence.num_stored = full

    def begin_load(self, sequence: Sequence, spare: int) -> PrefixLoad | None:
        """Start loading a sequence's first tokens from lower tiers, if a tier has them.

        Args:
            sequence: sequence without a slot.
            spare: blocks of each pool that must stay available.
        """
        if not self._prefix_cache or sequence.wants_prompt_rows or sequence.live.anchor is not None:
            return None
        most = (len(sequence.tokens) - 1) // self.pool.block_size
        self._extend_keys(sequence, most)
        request = sequence.live.request
        return self.tiers.begin(sequence.keys[:most], spare, request.tenant, request.peer)

    def end_load(self, load: PrefixLoad, sequence: Sequence | None) -> None:
        """Unpin loaded blocks; anchor them for the sequence, if given, until it begins."""
        self.tiers.end(load)
        if sequence is not None and sequence.live.anchor is None:
            shared = self.find_shared(sequence)
            self._anchor(sequence.live, shared)

    def anchor_prompt(self, sequence: Sequence) -> None:
        """Anchor the full prompt blocks of a request's first sample, without the last token."""
        if sequence.num_prompt > self.pool.block_size:
            self.drop_prompt(sequence.live)
            count = (sequence.num_prompt - 1) // self.pool.block_size
            blocks = list(self.pool.table(sequence.owner)[:count])
            local = [] if self.local is None else self.local.seen_of(sequence.owner, count)
            self._anchor(sequence.live, SharedBlocks(blocks, local))

    def _anchor(self, live: LiveRequest, shared: SharedBlocks) -> None:
        live.anchor = self._allocate(shared)
        self._anchors[live.anchor] = live

    def _allocate(self, shared: SharedBlocks) -> int:
        """Allocate a table of its own for shared blocks; returns the owner."""
        owner = self.new_owner()
        self.pool.allocate(owner, len(shared.blocks), shared.blocks)
        if self.local is not None:
            self.local.open(owner, len(shared.blocks), shared.local)
        return owner

    def _free(self, owner: int) -> None:
        self.pool.free(owner)
        if self.local is not None:
            self.local.close(owner)

    @property
    def pins(self) -> dict[str, int]:
        """Tokens pinned, by the pin's name."""
        return {name: pin.num_tokens for name, pin in self._pins.items()}

    def pin(self, name: str, tokens: tuple[int, ...]) -> int:
        """Keep a prefix's full blocks on the device, as far as they are there; number of tokens.

        Replaces a pin of the same name. Pins are dropped for a request that needs their blocks.

        Raises:
            InvalidRequest: pins would exceed their share of a pool.
        """
        self.unpin(name)
        root = root_key(self._model_salt)
        shared = self._match(list(chain_keys(root, int32(tokens), self.pool.block_size)))
        pool = self.pools[Pool.ALL]
        num_pinned = sum(len(pool.table(pin.owner)) for pin in self._pins.values())
        count = len(shared.blocks if self._sees_all else shared.local)
        num_tokens = len(shared.blocks) * self.pool.block_size
        most = int(MAX_PINNED * pool.num_blocks)
        if num_pinned + count > most:
            raise InvalidRequest(
                "pin",
                f"{count} blocks and {num_pinned} pinned blocks exceed {most}, a quarter of "
                f"the device's {pool.num_blocks}; unpin others, or give the group more memory",
            )
        if shared.blocks:
            self._pins[name] = Pin(self._allocate(shared), num_tokens)
        return num_tokens

    def unpin(self, name: str) -> bool:
        """Remove a pin; False without a pin of this name."""
        pin = self._pins.pop(name, None)
        if pin is not None:
            self._free(pin.owner)
        return pin is not None

    def drop_pins(self) -> None:
        """Remove all pins."""
        for name in list(self._pins):
            self.unpin(name)

    def _keep(self, sequence: Sequence) -> None:
        """Retain the beginnings that the hint of a sequence's request names."""
        request = sequence.live.request
        if request.hint is None or sequence.index or not sequence.num_stored:
            return
        keys, size = sequence.keys[: sequence.num_stored], self.pool.block_size
        ends = [(r.num_tokens // size or len(keys), r.seconds) for r in request.hint.retain]
        session, now_s = request.hint.session, self._clock()
        self._retain(self.retention.keep(request.tenant, session, keys, ends, now_s))
        self.tiers.keep(request.tenant, session, keys, ends, now_s)

    def release(self, tenant: str, session: str) -> None:
        """Retain the blocks of a tenant's session no longer."""
        self._retain(self.retention.release(tenant, session))
        self.tiers.release(tenant, session)

    def _retain(self, changes: RetentionChanges) -> None:
        for pool in self.pools.values():
            pool.unretain(changes.dropped)
            pool.retain(changes.added)

    def flush(self) -> int:
        """Drop every unused block, on the device and below; returns the number of blocks."""
        return sum(pool.flush() for pool in self.pools.values()) + self.tiers.flush()

    def empty(self) -> None:
        """Drop anchors, pins and every cached block, on the device and below."""
        while self.num_anchors:
            self.drop_latest_prompt()
        self.drop_pins()
        self.flush()

    def set_salt(self, salt: bytes) -> None:
        """Begin the keys of all blocks with another salt; no sequence has keys or blocks."""
        self._model_salt = salt

    def drop_prompt(self, live: LiveRequest) -> None:
        """Remove a request's anchor, if any."""
        if live.anchor is not None:
            self._free(live.anchor)
            del self._anchors[live.anchor]
            live.anchor = None

    def drop_latest_prompt(self) -> None:
        """Remove the newest anchor."""
        self.drop_prompt(next(reversed(self._anchors.values())))

    def _extend_keys(self, sequence: Sequence, count: int) -> None:
        keys, size = sequence.keys, self.pool.block_size
        if len(keys) < count:
            salt = sequence.live.request.key_salt
            parent = keys[-1] if keys else root_key(self._model_salt, salt)
            start, end = len(keys) * size, count * size
            tokens = sequence.window(start, end)
            key_tokens = sequence.live.key_tokens_of(self._image_token)
            if key_tokens is not None:
                tokens[: len(key_tokens[start:end])] = key_tokens[start:end]
            keys.extend(chain_keys(parent, tokens, size))
