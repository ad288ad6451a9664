"""Prefixes that stay in the KV cache for a time after their last use: sans-I/O.

A request may ask that its blocks stay for some minutes, because an agent that waits for a tool will
send the same prefix again. The blocks of such a prefix are evicted after all other blocks; they
never keep a request from running. A prefix counts against the share of its tenant; the prefixes
that the tenant has not used for longest lose their protection first.

The pool on the device has a `Retention`, and so has each bounded tier below: a prefix that leaves
the device under pressure stays in a lower tier for its time, within that tier's own limits.

Knows block keys, tenants, and times given by the caller; knows nothing of blocks, pools or tokens.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

MAX_PREFIXES = 1024
"""Most prefixes of a tenant."""
MAX_RETAINED = 0.5
"""Largest share of a pool or a tier for the retained prefixes of all tenants."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Retain:
    """A beginning of a request's tokens that stays in the cache.

    Attributes:
        num_tokens: length of the beginning; 0 stands for the whole prompt and output.
        seconds: time for which it stays after the request.
    """

    num_tokens: int = 0
    seconds: float


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheHint:
    """Which tokens of a request will be needed again.

    Attributes:
        session: name of the session, unique in the tenant; "" for none.
        retain: beginnings that stay in the cache.
    """

    session: str = ""
    retain: tuple[Retain, ...] = ()


@dataclass(slots=True)
class RetentionChanges:
    """Keys that are retained from now on, and keys that no longer are, each in order of a chain."""

    added: dict[bytes, None] = field(default_factory=dict)
    dropped: dict[bytes, None] = field(default_factory=dict)

    def add(self, key: bytes) -> None:
        """Note a key that is retained from now on."""
        if key in self.dropped:
            del self.dropped[key]
        else:
            self.added[key] = None

    def drop(self, key: bytes) -> None:
        """Note a key that is no longer retained."""
        if key in self.added:
            del self.added[key]
        else:
            self.dropped[key] = None


@dataclass(slots=True)
class _Prefix:
    """A retained prefix.

    Attributes:
        session: name of the session.
        keys: keys of its blocks.
        ends: pairs of number of keys and monotonic time of expiry; the first pair has all keys,
            and each later pair has fewer keys and a later time.
    """

    session: str
    keys: list[bytes]
    ends: list[tuple[int, float]]

    @property
    def name(self) -> tuple[str, bytes]:
        """Session and last key; no two prefixes of a tenant have the same."""
        return self.session, self.keys[-1]


class _Tenant:
    """The prefixes of a tenant by name, least recently used first, and the number of their keys."""

    def __init__(self) -> None:
        self.prefixes: OrderedDict[tuple[str, bytes], _Prefix] = OrderedDict()
        self.uses: Counter[bytes] = Counter()


class Retention:
    """Retained prefixes of all tenants.

    Args:
        max_keys: most keys of all tenants.
        max_tenant_keys: most keys of one tenant.
    """

    def __init__(self, max_keys: int, max_tenant_keys: int) -> None:
        self._max_keys = max_keys
        self._max_tenant_keys = min(max_keys, max_tenant_keys)
        self._tenants: dict[str, _Tenant] = {}
        self._uses: Counter[bytes] = Counter()  # tenants by key
        self._next_expiry_s = float("inf")

    @classmethod
    def of_capacity(cls, num_blocks: int, max_tenant_share: float) -> Retention:
        """The retention of a pool or a tier of `num_blocks` blocks.

        Args:
            num_blocks: most blocks of the pool or the tier.
            max_tenant_share: largest share of the blocks for one tenant, 0 to 1.
        """
        return cls(int(MAX_RETAINED * num_blocks), int(max_tenant_share * num_blocks))

    def __len__(self) -> int:
        """Number of retained keys."""
        return len(self._uses)

    def sessions(self) -> Iterator[tuple[str, str, int]]:
        """Tenant, session and number of keys of each prefix."""
        for name, tenant in self._tenants.items():
            for prefix in tenant.prefixes.values():
                yield name, prefix.session, len(prefix.keys)

    def keep(
        self,
        tenant: str,
        session: str,
        keys: Sequence[bytes],
        ends: Sequence[tuple[int, float]],
        now_s: float,
    ) -> RetentionChanges:
        """Retain a chain of keys.

        A retained prefix of the same session that the chain continues becomes part of it.

        Args:
            tenant: tenant whose share counts.
            session: name of the session.
            keys: the chain, from the first block on.
            ends: pairs of number of leading keys and seconds.
            now_s: monotonic time.
        """
        changes = self.expire(now_s)
        times = [(min(count, len(keys), self._max_tenant_keys), now_s + s) for count, s in ends]
        if not any(count for count, _ in times):
            return changes
        owner = self._tenants.setdefault(tenant, _Tenant())
        earlier = self._pop_earlier(owner, session, keys)
        times += earlier.ends
        prefix = _Prefix(session, [], _undominated(times))
        prefix.keys = list(keys[: prefix.ends[0][0]])
        # equal last keys mean equal chains, so the earlier prefix is a beginning of this one
        self._add(owner, prefix.keys[len(earlier.keys) :], changes)
        owner.prefixes[prefix.name] = prefix
        self._next_expiry_s = min(self._next_expiry_s, prefix.ends[0][1])
        self._bound(owner, changes)
        return changes

    def release(self, tenant: str, session: str) -> RetentionChanges:
        """Retain the prefixes of a session no longer; does nothing for an unknown session."""
        changes = RetentionChanges()
        owner = self._tenants.get(tenant)
        if owner is None:
            return changes
        for name, prefix in list(owner.prefixes.items()):
            if prefix.session == session:
                del owner.prefixes[name]
                self._drop(owner, prefix.keys, changes)
        self._forget_empty()
        return changes

    def expire(self, now_s: float) -> RetentionChanges:
        """Retain the prefixes whose time has passed no longer."""
        changes = RetentionChanges()
        if now_s < self._next_expiry_s:
            return changes
        self._next_expiry_s = float("inf")
        for owner in self._tenants.values():
            for prefix in list(owner.prefixes.values()):
                while prefix.ends and prefix.ends[0][1] <= now_s:
                    prefix.ends.pop(0)
                self._shorten(owner, prefix, changes)
                if prefix.ends:
                    self._next_expiry_s = min(self._next_expiry_s, prefix.ends[0][1])
        self._forget_empty()
        return changes

    def _pop_earlier(self, owner: _Tenant, session: str, keys: Sequence[bytes]) -> _Prefix:
        """Take out the longest retained prefix of the session that the chain continues."""
        for key in reversed(keys):
            prefix = owner.prefixes.pop((session, key), None)
            if prefix is not None:
                return prefix
        return _Prefix(session, [], [])

    def _shorten(self, owner: _Tenant, prefix: _Prefix, changes: RetentionChanges) -> None:
        """Drop the keys of a prefix that no end needs."""
        count = prefix.ends[0][0] if prefix.ends else 0
        if count == len(prefix.keys):
            return
        del owner.prefixes[prefix.name]
        self._drop(owner, prefix.keys[count:], changes)
        del prefix.keys[count:]
        if not prefix.keys:
            return
        other = owner.prefixes.get(prefix.name)
        if other is not None:  # ends at the same block
            self._drop(owner, prefix.keys, changes)
            other.ends = _undominated([*other.ends, *prefix.ends])
        else:
            owner.prefixes[prefix.name] = prefix
            owner.prefixes.move_to_end(prefix.name, last=False)

    def _bound(self, owner: _Tenant, changes: RetentionChanges) -> None:
        """Drop the least recently used prefixes beyond the limits, never the newest of `owner`."""
        while len(owner.prefixes) > 1 and (
            len(owner.prefixes) > MAX_PREFIXES or len(owner.uses) > self._max_tenant_keys
        ):
            self._drop_oldest(owner, changes)
        while (excess := len(self._uses) - self._max_keys) > 0:
            largest = max(self._tenants.values(), key=lambda tenant: len(tenant.uses))
            if len(largest.prefixes) > 1:
                self._drop_oldest(largest, changes)
                continue
            (prefix,) = largest.prefixes.values()
            most = max(0, len(prefix.keys) - excess)
            prefix.ends = _undominated([(min(count, most), end_s) for count, end_s in prefix.ends])
            self._shorten(largest, prefix, changes)
        self._forget_empty()

    def _drop_oldest(self, owner: _Tenant, changes: RetentionChanges) -> None:
        _, prefix = owner.prefixes.popitem(last=False)
        self._drop(owner, prefix.keys, changes)

    def _forget_empty(self) -> None:
        for name in [name for name, tenant in self._tenants.items() if not tenant.prefixes]:
            del self._tenants[name]

    def _add(self, owner: _Tenant, keys: Sequence[bytes], changes: RetentionChanges) -> None:
        for key in keys:
            owner.uses[key] += 1
            if owner.uses[key] == 1:
                self._uses[key] += 1
                if self._uses[key] == 1:
                    changes.add(key)

    def _drop(self, owner: _Tenant, keys: Sequence[bytes], changes: RetentionChanges) -> None:
        for key in keys:
            owner.uses[key] -= 1
            if not owner.uses[key]:
                del owner.uses[key]
                self._uses[key] -= 1
                if not self._uses[key]:
                    del self._uses[key]
                    changes.drop(key)


def _undominated(ends: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """The ends that keep a key longer than all others do, most keys first."""
    best: list[tuple[int, float]] = []
    for count, until_s in sorted(ends, reverse=True):
        if count and (not best or until_s > best[-1][1]):
            best.append((count, until_s))
    return best
