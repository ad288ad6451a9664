"""The keys of one tier: who is evicted, in which order, whatever is in use or retained."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from arriero.shards.kv.index import TierIndex

CAPACITY = 6
KEYS = [bytes([number]) for number in range(16)]


def put(index: TierIndex, key: bytes, tenant: str = "t", depth: int = 0) -> bytes | None:
    """Bring a key in; gives the evicted key."""
    reserved = index.reserve(key, tenant, depth)
    assert reserved is not None
    index.commit(key)
    return reserved[1]


def test_retained_keys_go_last_and_then_by_use() -> None:
    index = TierIndex(4)
    for key in KEYS[:4]:
        put(index, key)
        index.touch([key])
    index.retain([KEYS[0], KEYS[2], KEYS[9]])
    assert [put(index, key) for key in KEYS[4:6]] == [KEYS[1], KEYS[3]]
    assert put(index, KEYS[9]) == KEYS[4]  # retained before it came
    assert put(index, KEYS[10]) == KEYS[5]
    index.retain([KEYS[10]])
    index.touch([KEYS[0]])
    assert put(index, KEYS[11]) == KEYS[2]  # all are retained: the least recently used
    index.unretain([KEYS[0]])
    index.retain([KEYS[11]])
    assert put(index, KEYS[12]) == KEYS[0]


OPERATION = st.tuples(
    st.sampled_from(["put", "put", "put", "touch", "retain", "unretain", "hold", "free", "drop"]),
    st.sampled_from(KEYS),
    st.sampled_from("tu"),
)


@settings(max_examples=300, deadline=None)
@given(st.lists(OPERATION, max_size=60), st.sampled_from([0.5, 1.0]))
def test_no_retained_key_goes_while_another_could(
    operations: list[tuple[str, bytes, str]], share: float
) -> None:
    index = TierIndex(CAPACITY, share)
    owners: dict[bytes, str] = {}
    retained: set[bytes] = set()
    in_use: set[bytes] = set()
    for operation, key, tenant in operations:
        if operation == "put" and key not in index:
            full = index.tenants().get(tenant, 0) >= int(CAPACITY * share)
            rivals = {
                other for other, owner in owners.items() if not full or owner == tenant
            } - in_use
            reserved = index.reserve(key, tenant, 0)
            if reserved is None:
                assert not rivals
                continue
            index.commit(key)
            victim = reserved[1]
            if victim is not None:
                assert victim in rivals
                assert victim not in retained or rivals <= retained
                del owners[victim]
            owners[key] = tenant
        elif operation == "touch":
            index.touch([key])
        elif operation == "retain":
            index.retain([key])
            retained.add(key)
        elif operation == "unretain":
            index.unretain([key])
            retained.discard(key)
        elif operation == "hold" and key in owners and key not in in_use:
            index.acquire([key])
            in_use.add(key)
        elif operation == "free" and key in in_use:
            index.release([key])
            in_use.discard(key)
        elif operation == "drop" and key in owners and key not in in_use:
            index.discard(key)
            del owners[key]
        assert set(index) == set(owners) and len(index) <= CAPACITY
        assert index.lacks_retained(key) is (key in retained and key not in owners)
