"""The blocks of sequences: what each shares with the prefix cache and with its own siblings.

Samples of one request share its full prompt blocks. The first sample computes them; an *anchor*
then holds them until the others have begun, whatever becomes of the first meanwhile. Anchors only
save work, so they are the first to go when blocks run out. Blocks that were brought up from a
lower tier for a request are anchored in the same way until it begins.

Where some layers attend within their chunk only, their blocks are of a second pool; a sequence
has room only if it has room in both, and a prefix is shared only as far as both can be found.
Where all layers have a window, their blocks are managed like those, and are all there is.

Knows sequences and blocks; knows nothing of slots, steps or who goes first.
"""

from __future__ import annotations

from collections.abc import Sequence as Many
from dataclasses import dataclass, field

from arriero.shards.engine.null_pool import NullBlockPool
from arriero.shards.engine.sequence import LiveRequest, Sequence
from arriero.shards.engine.types import EngineConfig, EngineRequest
from arriero.shards.errors import InvalidRequest
from arriero.shards.images.request import key_tokens
from arriero.shards.kv.blocks import BlockManager, CacheListener, chain_keys, root_key
from arriero.shards.kv.local_blocks import LocalBlocks
from arriero.shards.kv.tiers import OffloadManager, PrefixLoad
from arriero.shards.kv.transfers import Pool
from arriero.shards.protocol.step_plan import int32


@dataclass(frozen=True, slots=True)
class Shared:
    """Blocks that hold a sequence's first tokens already.

    Attributes:
        blocks: of all these tokens.
        local: of layers that see a part: those that the next token sees.
    """

    blocks: list[int] = field(default_factory=list)
    local: list[int] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Pin:
    """A prefix whose blocks stay on the device.

    Attributes:
        owner: of the table that holds them.
        num_tokens: of the prefix, as far as it was on the device when it was pinned.
    """

    owner: int
    num_tokens: int


MAX_PINNED = 0.25
"""Most of a pool that pins may hold."""


class SequenceBlocks:
    """The pools' blocks, by sequence.

    Args:
        config: sizes, and whether there is a prefix cache.
        on_event: told of keys stored in and evicted from the prefix cache.

    Attributes:
        pool: the blocks of layers that see everything.
        local: those of layers that see their chunk or a window; None without such layers.
        pools: what there is of both, as the slices know it: `Pool.LOCAL` is beside `Pool.ALL`.
        tiers: what is kept of them below the device.
    """

    def __init__(self, config: EngineConfig, on_event: CacheListener | None) -> None:
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
        self._sees_all = not config.attention_window  # some layers do
        self._local_pool = Pool.LOCAL if self._sees_all else Pool.ALL
        self._prefix_cache = config.prefix_cache
        self._model_salt = config.cache_salt
        self._image_token = config.image_token
        self._anchors: dict[int, LiveRequest] = {}
        self._pins: dict[str, Pin] = {}
        self._owners = 0
        self.tiers = OffloadManager(config.tiers, self.pools, self.local, self.new_owner, on_event)

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

    def find_shared(self, sequence: Sequence) -> Shared:
        """Blocks that hold its first tokens already; at least one known token is left over."""
        if sequence.wants_prompt_rows:
            return Shared()  # they come of computing every prompt token
        found = Shared()
        if self._prefix_cache:
            most = (len(sequence.tokens) - 1) // self.pool.block_size
            self._extend_keys(sequence, most)
            found = self._match(sequence.keys[:most])
        anchor = sequence.live.anchor
        if anchor is not None and len(self.pool.table(anchor)) > len(found.blocks):
            local = [] if self.local is None else list(self.local.pool.table(anchor))
            found = Shared(list(self.pool.table(anchor)), local)
        return found

    def found_share(self, request: EngineRequest) -> float:
        """Share of a prompt, 0 to 1, that can be found now."""
        if not self._prefix_cache:
            return 0.0
        root = root_key(self._model_salt, request.cache_salt)
        tokens = int32(request.prompt)
        if request.images and self._image_token is not None:
            tokens = key_tokens(request.prompt, request.images, self._image_token)
        keys = chain_keys(root, tokens, self.pool.block_size)
        if self._sees_all:
            found = len(self.pool.match(keys))
        else:
            found = len(self._match(list(keys)).blocks)
        return found * self.pool.block_size / len(request.prompt)

    def _match(self, keys: list[bytes]) -> Shared:
        blocks = self.pool.match(keys)
        if self.local is None:
            return Shared(blocks)
        end, local = self.local.match(keys[: len(blocks)])
        return Shared(blocks[:end], local)

    def room(self) -> tuple[int, int]:
        """Blocks that can be handed out now, of either pool."""
        return self.pool.num_available, self.local.pool.num_available if self.local else 0

    def has_room(self, sequence: Sequence, shared: Shared, spare: int) -> bool:
        """Whether it may begin, `spare` blocks of each pool left over.

        Of layers that see a part it needs what its first tokens see, up to the end of their chunk
        or window; it goes on by what it, and others, give back.
        """
        if self.pool.cost(self.count(sequence), shared.blocks) > self.pool.num_available - spare:
            return False
        if self.local is None:
            return True
        rest = self.count(sequence) - len(shared.blocks)
        count = min(rest + len(shared.local), self.local.most)
        pool = self.local.pool
        return pool.cost(count, shared.local) <= pool.num_available - spare

    def open(self, sequence: Sequence, shared: Shared) -> Many[int]:
        """Give a sequence blocks for all its known tokens, the first of them `shared`.

        Of layers that see a part it gets the shared ones; `extend_local` adds to them. Gives the
        blocks of the others.
        """
        self.pool.allocate(sequence.owner, self.count(sequence), shared.blocks)
        sequence.num_stored = len(shared.blocks)
        if self.local is not None:
            self.local.open(sequence.owner, len(shared.blocks), shared.local)
        return self.pool.table(sequence.owner) if self._sees_all else ()

    def numbered(self, shared: Shared) -> list[tuple[int, int]]:
        """Shared blocks of layers that see a part: index and id of each."""
        if self.local is None:
            return []
        return list(zip(self.local.seen.numbers(len(shared.blocks)), shared.local, strict=True))

    @property
    def can_grow(self) -> bool:
        """Whether a block can be handed out of each pool."""
        return bool(
            self.pool.num_available and (self.local is None or self.local.pool.num_available)
        )

    def grow(self, sequence: Sequence) -> list[tuple[int, int]]:
        """Add a block to a sequence's table; gives its index there and its id, where it has one."""
        index = len(self.pool.table(sequence.owner))
        block = self.pool.append(sequence.owner)
        return [(index, block)] if self._sees_all else []

    def local_reach(self, sequence: Sequence, start: int, end: int, spare: int) -> int:
        """How far a step from `start` may go towards `end`, by what the pool of `local` has.

        Past its chunk or window it goes only while `spare` blocks are left over.
        """
        if self.local is None:
            return end
        size, free = self.pool.block_size, self.local.pool.num_available
        held = self.local.end(sequence.owner)
        boundary = self.local.due(start // size) * size
        within = min(boundary, (held + free) * size)
        return min(end, max(within, (held + max(0, free - spare)) * size))

    def extend_local(self, sequence: Sequence, end: int) -> list[tuple[int, int]]:
        """Blocks for its tokens up to `end`, where it lacks them: index and id of each."""
        if self.local is None:
            return []
        return self.local.extend(sequence.owner, -(-end // self.pool.block_size))

    def pass_to(self, sequence: Sequence, position: int) -> None:
        """Give back what nothing from `position` on can see; all before it is in a plan."""
        if self.local is not None:
            # keep findable what is given back, as far as its tokens are known
            self.store(sequence, min(position, len(sequence.tokens)))
            self.local.trim(sequence.owner, position // self.pool.block_size)

    def close(self, sequence: Sequence) -> None:
        """Take a sequence's blocks back."""
        self.pool.free(sequence.owner)
        if self.local is not None:
            self.local.close(sequence.owner)

    def store(self, sequence: Sequence, num_tokens: int) -> None:
        """Make the blocks findable that its first `num_tokens` fill, all of them in a plan."""
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
        """Begin to bring up what lower tiers hold of a sequence's first tokens, if they do.

        Args:
            sequence: not in a slot.
            spare: blocks of each pool that must stay available.
        """
        if not self._prefix_cache or sequence.wants_prompt_rows or sequence.live.anchor is not None:
            return None
        most = (len(sequence.tokens) - 1) // self.pool.block_size
        self._extend_keys(sequence, most)
        request = sequence.live.request
        return self.tiers.begin(sequence.keys[:most], spare, request.tenant, request.peer)

    def end_load(self, load: PrefixLoad, sequence: Sequence | None) -> None:
        """Unpin what was brought up; it is kept for the sequence until that begins, if given."""
        self.tiers.end(load)
        if sequence is not None and sequence.live.anchor is None:
            found = self.find_shared(sequence)
            self._anchor(sequence.live, found)

    def keep_prompt(self, sequence: Sequence) -> None:
        """Anchor the full prompt blocks of a request's first sample, but for the last token."""
        if sequence.num_prompt > self.pool.block_size:
            self.drop_prompt(sequence.live)
            count = (sequence.num_prompt - 1) // self.pool.block_size
            blocks = list(self.pool.table(sequence.owner)[:count])
            local = [] if self.local is None else self.local.seen_of(sequence.owner, count)
            self._anchor(sequence.live, Shared(blocks, local))

    def _anchor(self, live: LiveRequest, kept: Shared) -> None:
        live.anchor = self._hold(kept)
        self._anchors[live.anchor] = live

    def _hold(self, kept: Shared) -> int:
        """Hold blocks by a table of their own; gives its owner."""
        owner = self.new_owner()
        self.pool.allocate(owner, len(kept.blocks), kept.blocks)
        if self.local is not None:
            self.local.open(owner, len(kept.blocks), kept.local)
        return owner

    def _let_go(self, owner: int) -> None:
        self.pool.free(owner)
        if self.local is not None:
            self.local.close(owner)

    @property
    def pins(self) -> dict[str, int]:
        """Tokens pinned, by the pin's name."""
        return {name: pin.num_tokens for name, pin in self._pins.items()}

    def pin(self, name: str, tokens: tuple[int, ...]) -> int:
        """Keep a prefix's full blocks on the device, as far as they are there; how many tokens.

        A pin of the same name is replaced. Pins go before a request that could not run beside them.

        Raises:
            InvalidRequest: pins would hold too much of a pool.
        """
        self.unpin(name)
        root = root_key(self._model_salt)
        kept = self._match(list(chain_keys(root, int32(tokens), self.pool.block_size)))
        pool = self.pools[Pool.ALL]
        held = sum(len(pool.table(pin.owner)) for pin in self._pins.values())
        count = len(kept.blocks if self._sees_all else kept.local)
        most = int(MAX_PINNED * pool.num_blocks)
        if held + count > most:
            raise InvalidRequest(
                "pin",
                f"{count} blocks beside {held} pinned ones exceed {most}, a quarter of "
                f"the device's {pool.num_blocks}; unpin others, or give the group more memory",
            )
        if kept.blocks:
            self._pins[name] = Pin(self._hold(kept), len(kept.blocks) * self.pool.block_size)
        return len(kept.blocks) * self.pool.block_size

    def unpin(self, name: str) -> bool:
        """Let go of a pin; False where there is none of this name."""
        pin = self._pins.pop(name, None)
        if pin is not None:
            self._let_go(pin.owner)
        return pin is not None

    def drop_pins(self) -> None:
        """Let go of all pins."""
        for name in list(self._pins):
            self.unpin(name)

    def flush(self) -> int:
        """Forget every block that nobody holds, on the device and below; how many."""
        return sum(pool.flush() for pool in self.pools.values()) + self.tiers.flush()

    def drop_prompt(self, live: LiveRequest) -> None:
        """Drop a request's anchor, if it has one."""
        if live.anchor is not None:
            self._let_go(live.anchor)
            del self._anchors[live.anchor]
            live.anchor = None

    def drop_latest_prompt(self) -> None:
        """Drop the anchor that was made last."""
        self.drop_prompt(next(reversed(self._anchors.values())))

    def _extend_keys(self, sequence: Sequence, count: int) -> None:
        keys, size = sequence.keys, self.pool.block_size
        if len(keys) < count:
            salt = sequence.live.request.cache_salt
            parent = keys[-1] if keys else root_key(self._model_salt, salt)
            start, end = len(keys) * size, count * size
            tokens = sequence.window(start, end)
            keyed = sequence.live.keyed(self._image_token)
            if keyed is not None:
                tokens[: len(keyed[start:end])] = keyed[start:end]
            keys.extend(chain_keys(parent, tokens, size))
