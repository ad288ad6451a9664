"""Which adapters are in host memory and in slots of the device: decisions of the leader, sans-I/O.

Adapters in slots are in host memory too, so that a sequence that left its slot comes back without
its files. Of unused places, the place whose last use is the longest ago is taken first.

A waiting sequence whose adapter is in no slot *claims* a slot when all are in use: from then on
only sequences of higher precedence enter that slot. So every sequence gets a slot once those
sequences, and the sequences in the claimed slot, have ended.

Knows digests, counts and order; knows nothing of files, tensors and blocks.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Container, Iterable, Sequence
from itertools import chain

from arriero.shards.config.adapters import AdapterSlots
from arriero.shards.engine.stats import AdapterStats
from arriero.shards.protocol.adapters import AdapterBatch, AdapterLoad, AdapterResult, SlotChange

EMPTY = ""
"""Digest of an empty slot."""
NO_ADAPTER = -1
"""Slot of a sequence of the base model."""


class AdapterResidency:
    """Adapters of one data-parallel rank.

    Args:
        slots: room for adapters that come and go; None for listed adapters alone, each of which is
            in its slot from the start.
        listed: digest and folder of each listed adapter, in order of their slots.
        num_ranks: slices that load each adapter.

    Attributes:
        entries: sequences with an adapter that entered a slot so far.
        changes: adapters put into slots so far.
    """

    def __init__(
        self, slots: AdapterSlots | None, listed: Sequence[tuple[str, str]], num_ranks: int
    ) -> None:
        self._limits, self._num_ranks = slots, num_ranks
        self._paths: dict[str, str] = dict(listed)
        self._offered = dict.fromkeys(self._paths)
        self._live: Counter[str] = Counter()
        digests = [digest for digest, _ in listed] if slots is None else [EMPTY] * slots.device
        self._slots = digests
        self._slot_of = {digest: slot for slot, digest in enumerate(digests) if digest}
        self._users = [0] * len(digests)
        self._used_at = [0] * len(digests)
        self._clock = 0
        self._claims: dict[str, int] = {}  # slot by digest
        self._passed: set[int] = set()  # claimed slots whose claimant was reached in this pass
        self._host: OrderedDict[str, None] = OrderedDict()  # least recently used first
        self._loading: dict[str, int] = {}  # ranks that have not reported, by digest
        self._errors: dict[str, str] = {}  # first error of a load in progress
        self._prefetched: dict[str, None] = {}
        self._batch = AdapterBatch()
        self._changes: list[SlotChange] = []
        self.entries = 0
        self.changes = 0

    # ---- which adapters the group serves ----

    @property
    def offered(self) -> Container[str]:
        """Digests that a new request may ask for; thread-safe."""
        return self._offered

    @property
    def has_any(self) -> bool:
        """Whether a request may wait for an adapter to be loaded."""
        return self._limits is not None and bool(self._paths)

    @property
    def num_loading(self) -> int:
        """Adapters that are loading, or are to be loaded ahead of requests."""
        return len(self._loading) + len(self._prefetched)

    @property
    def stats(self) -> AdapterStats:
        """A snapshot; thread-safe."""
        slot_of, live = dict(self._slot_of), dict(self._live)
        running = {digest: self._users[slot] for digest, slot in slot_of.items()}
        return AdapterStats(
            in_slots=tuple(slot_of),
            num_slots=len(self._slots),
            running=tuple(digest for digest, count in running.items() if count),
            waiting=tuple(d for d, count in live.items() if count > running.get(d, 0)),
            entries=self.entries,
            changes=self.changes,
        )

    def offer(self, digest: str, path: str) -> bool:
        """Serve an adapter from now on; whether it is loaded now, ahead of its first request."""
        assert self._limits is not None, "a group without slots takes no adapters"
        self._paths[digest] = path
        self._offered[digest] = None
        if digest not in self._host and digest not in self._loading:
            self._prefetched[digest] = None
        return digest not in self._host

    def withdraw(self, digest: str) -> None:
        """Accept no more requests for an adapter; requests that are live end as usual."""
        self._offered.pop(digest, None)
        self._prefetched.pop(digest, None)
        self._forget_unused(digest)

    def begin(self, digest: str) -> bool:
        """A request for an adapter is live from now on; False if the adapter was withdrawn."""
        if digest not in self._offered:
            return False
        self._live[digest] += 1
        return True

    def end(self, digest: str) -> None:
        """A request for an adapter has ended."""
        self._live[digest] -= 1
        self._forget_unused(digest)

    def _forget_unused(self, digest: str) -> None:
        """Drop an adapter that is withdrawn, once no request and no load needs it."""
        if digest in self._offered or self._live[digest] > 0 or digest in self._loading:
            return
        del self._live[digest]
        self._paths.pop(digest, None)
        self._claims.pop(digest, None)
        slot = self._slot_of.pop(digest, None)
        if slot is not None:
            self._slots[slot], self._used_at[slot] = EMPTY, 0
        if digest in self._host:
            self._drop(digest)

    # ---- host memory ----

    def prepare(self, wanted: Iterable[str]) -> None:
        """Begin a pass over the queue: load adapters that waiting sequences will need.

        Args:
            wanted: digests of waiting sequences, in order of precedence.
        """
        order = dict.fromkeys([*self._prefetched, *wanted])
        for digest in [digest for digest in self._claims if digest not in order]:
            del self._claims[digest]
        self._passed = set()
        kept = set(self._slot_of) | set(self._loading)
        for digest in order:
            if digest in self._host:
                kept.add(digest)
            elif digest not in self._loading and not self._load(digest, kept, order):
                return
            self._prefetched.pop(digest, None)

    def _load(self, digest: str, kept: set[str], order: dict[str, None]) -> bool:
        """Load an adapter, if there is a place in host memory beside the adapters `kept`.

        An adapter that no sequence of `order` waits for makes room first, then the last of `order`.
        """
        assert self._limits is not None, "without slots every adapter is in a slot"
        if len(self._host) + len(self._loading) >= self._limits.host:
            unwanted = (other for other in self._host if other not in kept and other not in order)
            last = (other for other in reversed(order) if other in self._host and other not in kept)
            victim = next(chain(unwanted, last), None)
            if victim is None:
                return False
            self._drop(victim)
        self._loading[digest] = self._num_ranks
        self._batch.loads.append(AdapterLoad(digest, self._paths[digest]))
        kept.add(digest)
        return True

    def _drop(self, digest: str) -> None:
        del self._host[digest]
        self._claims.pop(digest, None)
        self._batch.dropped.append(digest)

    def take_batch(self) -> AdapterBatch | None:
        """Changes of the slices' host memory since the last call; None for none."""
        batch = self._batch
        if not batch.loads and not batch.dropped:
            return None
        self._batch = AdapterBatch()
        return batch

    def apply(self, result: AdapterResult) -> str | None:
        """Take the result of a load; the error once all ranks have reported, "" for success.

        Returns:
            None while other ranks are still loading.
        """
        digest = result.digest
        if digest not in self._loading:
            return None
        if result.error:
            self._errors.setdefault(digest, result.error)
        self._loading[digest] -= 1
        if self._loading[digest]:
            return None
        del self._loading[digest]
        error = self._errors.pop(digest, "")
        if error:  # other ranks may have loaded the adapter
            self._batch.dropped.append(digest)
        else:
            self._host[digest] = None
        self._forget_unused(digest)
        return error

    # ---- slots of the device ----

    def slot_for(self, digest: str) -> int | None:
        """A slot that the next waiting sequence may enter now; None while it must wait.

        Call for waiting sequences in order of precedence, after `prepare`.
        """
        slot = self._slot_of.get(digest)
        if slot is not None:
            return None if slot in self._passed else slot
        if digest not in self._host:
            return None
        slot = self._claims.get(digest)
        if slot is None:
            slot = self._choose()
            if slot is None:
                return None
            self._claims[digest] = slot
        self._passed.add(slot)
        return None if self._users[slot] else slot

    def _choose(self) -> int | None:
        """The slot to claim: least used now, then longest unused; None if all are claimed."""
        claimed = set(self._claims.values())
        free = [slot for slot in range(len(self._slots)) if slot not in claimed]
        return min(free, key=lambda slot: (self._users[slot], self._used_at[slot]), default=None)

    def enter(self, digest: str, slot: int) -> None:
        """A sequence enters with an adapter in a slot, a result of `slot_for`."""
        if self._slots[slot] != digest:
            assert not self._users[slot], f"adapter slot {slot} is in use"
            if self._slots[slot]:
                del self._slot_of[self._slots[slot]]
            self._slots[slot], self._slot_of[digest] = digest, slot
            self._claims.pop(digest, None)
            self._passed.discard(slot)
            self._changes.append(SlotChange(slot, digest))
            self.changes += 1
        self._users[slot] += 1
        self.entries += 1
        self._touch(digest, slot)

    def leave(self, digest: str) -> None:
        """A sequence with an adapter leaves its slot."""
        slot = self._slot_of[digest]
        self._users[slot] -= 1
        assert self._users[slot] >= 0, f"adapter slot {slot} was left more often than entered"
        self._touch(digest, slot)

    def _touch(self, digest: str, slot: int) -> None:
        self._clock += 1
        self._used_at[slot] = self._clock
        if digest in self._host:
            self._host.move_to_end(digest)

    def take_changes(self) -> list[SlotChange]:
        """Changes of slots for the next plan."""
        changes, self._changes = self._changes, []
        return changes
