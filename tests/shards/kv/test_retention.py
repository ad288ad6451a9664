"""Prefixes that stay in the cache: by session, tenant, share and time."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import given, settings
from hypothesis import strategies as st

from arriero.shards.kv.blocks import BlockManager
from arriero.shards.kv.retention import MAX_PREFIXES, Retention, RetentionChanges

MINUTE_S = 60.0


def chain(name: str, count: int, *, after: Sequence[bytes] = ()) -> list[bytes]:
    return [*after, *(f"{name}{number}".encode() for number in range(count))]


class Watched(Retention):
    """A retention, and the keys that its changes add up to."""

    def __init__(self, max_keys: int = 100, max_tenant_keys: int = 100) -> None:
        super().__init__(max_keys, max_tenant_keys)
        self.keys: set[bytes] = set()

    def take(self, changes: RetentionChanges) -> RetentionChanges:
        assert not self.keys & set(changes.added) and self.keys >= set(changes.dropped)
        self.keys |= set(changes.added)
        self.keys -= set(changes.dropped)
        return changes

    def put(
        self, keys: list[bytes], now_s: float = 0.0, tenant: str = "t", session: str = "s"
    ) -> None:
        self.take(self.keep(tenant, session, keys, [(len(keys), MINUTE_S)], now_s))


def test_a_prefix_stays_for_its_time_and_no_longer() -> None:
    retention = Watched()
    keys = chain("a", 5)
    retention.put(keys)
    retention.take(retention.expire(59.9))
    assert retention.keys == set(keys)
    retention.put(keys, 30.0)  # used again: the time begins anew
    retention.take(retention.expire(60.0))
    assert retention.keys == set(keys)
    retention.take(retention.expire(90.0))
    assert not retention.keys and not len(retention) and not list(retention.sessions())


def test_a_turn_extends_the_prefix_of_the_turn_before() -> None:
    retention = Watched()
    first = chain("a", 5)
    retention.put(first)
    retention.put(chain("b", 3, after=first), 30.0)
    assert [count for _, _, count in retention.sessions()] == [8]
    retention.take(retention.expire(89.9))
    assert len(retention.keys) == 8


def test_breakpoints_have_times_of_their_own() -> None:
    retention = Watched()
    keys = chain("a", 9)
    retention.take(retention.keep("t", "", keys, [(9, 300.0), (4, 3600.0), (2, 60.0)], 0.0))
    assert retention.keys == set(keys)
    retention.take(retention.expire(300.0))
    assert retention.keys == set(keys[:4])
    # the prefix that is left is found again and grows
    retention.take(retention.keep("t", "", keys, [(9, 300.0)], 400.0))
    retention.take(retention.expire(700.0))
    assert retention.keys == set(keys[:4])
    retention.take(retention.expire(3600.0))
    assert not retention.keys


def test_a_shared_prefix_stays_for_as_long_as_one_session_needs_it() -> None:
    retention = Watched()
    system = chain("system", 4)
    retention.put(chain("a", 2, after=system), session="a")
    retention.put(chain("b", 2, after=system), 30.0, session="b", tenant="u")
    retention.take(retention.release("t", "a"))
    assert retention.keys == set(chain("b", 2, after=system))
    retention.take(retention.release("t", "b"))  # of another tenant
    assert len(retention.keys) == 6
    retention.take(retention.release("u", "b"))
    assert not retention.keys


def test_sessions_with_the_same_prompt_end_apart() -> None:
    retention = Watched()
    keys = chain("a", 4)
    retention.put(keys, session="x")
    retention.put(keys, session="y")
    retention.take(retention.release("t", "y"))
    assert retention.keys == set(keys)
    retention.take(retention.release("t", "x"))
    assert not retention.keys


def test_a_tenant_stays_within_its_share() -> None:
    retention = Watched(max_keys=100, max_tenant_keys=20)
    retention.put(chain("other", 10), tenant="u")
    for number in range(30):
        retention.put(chain(f"a{number}-", 6), session=str(number))
        assert len(retention.keys) <= 30
    assert set(chain("other", 10)) <= retention.keys
    assert set(chain("a29-", 6)) <= retention.keys and not set(chain("a0-", 6)) & retention.keys
    long = chain("long", 50)
    retention.put(long, session="long")  # more than its share: the beginning stays
    assert retention.keys == {*chain("other", 10), *long[:20]}


def test_the_largest_tenant_gives_first() -> None:
    retention = Watched(max_keys=30)
    for number in range(3):
        retention.put(chain(f"a{number}-", 8), session=str(number))
    retention.put(chain("b", 12), tenant="u")
    assert set(chain("b", 12)) <= retention.keys
    assert retention.keys == {*chain("b", 12), *chain("a1-", 8), *chain("a2-", 8)}


def test_a_single_prefix_is_cut_rather_than_lost() -> None:
    retention = Watched(max_keys=24)
    retention.put(chain("b", 10), tenant="u")
    keys = chain("a", 20)
    retention.put(keys)
    assert retention.keys == {*chain("b", 10), *keys[:14]}


def test_prefixes_are_bounded_in_number() -> None:
    retention = Watched(max_keys=10**6, max_tenant_keys=10**6)
    for number in range(MAX_PREFIXES + 50):
        retention.put(chain(f"{number}-", 1), session=str(number))
    assert len(list(retention.sessions())) == MAX_PREFIXES == len(retention.keys)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_changes_add_up(data: st.DataObject) -> None:
    """Whatever happens, the retained keys are those of the prefixes, within the limits."""
    retention = Watched(max_keys=24, max_tenant_keys=16)
    now_s = 0.0
    grown: dict[str, list[bytes]] = {}
    for step in range(data.draw(st.integers(1, 30))):
        now_s += data.draw(st.floats(0, 40))
        tenant = data.draw(st.sampled_from("tu"))
        session = data.draw(st.sampled_from(["", "x", "y"]))
        if data.draw(st.integers(0, 5)) == 0:
            retention.take(retention.release(tenant, session))
        else:
            name = data.draw(st.sampled_from("ab"))
            keys = grown.get(name, [])
            keys = chain(f"{name}{step}-", data.draw(st.integers(0, 6)), after=keys)
            grown[name] = keys[: data.draw(st.integers(0, 12))]
            ends = data.draw(
                st.lists(st.tuples(st.integers(0, 30), st.floats(0, 90)), min_size=1, max_size=3)
            )
            retention.take(retention.keep(tenant, session, keys, ends, now_s))
        held = {key for owner in retention._tenants.values() for key in owner.uses}
        assert retention.keys == held and len(held) == len(retention) <= 24
        for owner in retention._tenants.values():
            assert owner.prefixes and len(owner.uses) <= 16
            for name, prefix in owner.prefixes.items():
                assert prefix.name == name and prefix.ends[0][0] == len(prefix.keys)
    retention.take(retention.expire(now_s + 100))
    assert not retention.keys and not retention._tenants


def test_retained_blocks_go_last_and_block_nothing() -> None:
    pool = BlockManager(8, 16)
    for number, name in enumerate("ab"):
        pool.allocate(number, 4)
        pool.store(number, 0, chain(name, 4))
    pool.retain(chain("a", 4))
    pool.free(0)  # the older of the two
    pool.free(1)
    assert pool.num_available == 8 and pool.num_cached == 8
    pool.allocate(2, 4)  # takes those of b, although a was freed before
    assert pool.match(chain("a", 4)) and not pool.match(chain("b", 4))
    pool.allocate(3, 2)  # and retained ones when no others are left, the last of the chain first
    assert len(pool.match(chain("a", 4))) == 2
    pool.free(2)
    pool.free(3)
    pool.allocate(4, 4)
    pool.store(4, 2, chain("a", 4)[2:])  # computed again: retained again
    pool.free(4)
    pool.unretain(chain("a", 4))
    pool.allocate(5, 7)  # from now on the first to go, the last of the chain first
    assert len(pool.match(chain("a", 4))) == 1
    pool.free(5)
    assert pool.flush() == 1 and pool.num_available == 8 and pool.num_cached == 0
