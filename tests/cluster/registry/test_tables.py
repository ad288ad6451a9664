"""The registry's tables: groups with leases and epochs, gateways, and spare seats."""

from __future__ import annotations

from dataclasses import replace

from arriero.cluster.registry.gateway_table import LEASE_S, GatewayTable
from arriero.cluster.registry.group_table import GroupTable
from arriero.cluster.registry.snapshot import GatewayEntry, GroupEntry
from arriero.cluster.registry.spare_seats import PROMOTION_POLL_S, SpareSeats


class Clock:
    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def entry(epoch: int, seat: str = "m-0") -> GroupEntry:
    return GroupEntry(
        group_id=f"{seat}.{epoch}", model="m", address="h:1", seat=seat, epoch=epoch, revision=1
    )


def test_a_newer_group_of_a_seat_replaces_the_older() -> None:
    groups = GroupTable({"m-0": 3}, [])
    assert groups.next_epoch("m-0") == 4
    groups.renew(entry(4), 10.0)
    assert [older.epoch for older in groups.older(entry(5))] == [4]
    assert groups.refuses(entry(3))
    assert not groups.refuses(replace(entry(3), phase="draining"))  # its streams may end
    assert not groups.refuses(entry(3, seat="m-1"))


def test_a_fenced_group_is_refused_also_after_a_restart() -> None:
    groups = GroupTable({}, [])
    groups.renew(entry(1), 10.0)
    groups.fence("m-0.1")
    assert groups.get("m-0.1") is None and groups.refuses(entry(1))
    assert GroupTable(groups.epochs, groups.fenced).refuses(entry(1))


def test_a_lease_ends_once() -> None:
    clock = Clock()
    groups = GroupTable({}, [], clock=clock)
    groups.renew(entry(1), 5.0)
    clock.now_s += 4.0
    assert groups.take_expired() == [] and groups.next_expiry_s() == 1.0
    clock.now_s += 1.0
    assert groups.take_expired() == [entry(1)] and groups.silent_s("m-0.1") == 5.0
    assert groups.take_expired() == [] and groups.entries == (entry(1),)


def test_gateways_and_their_queues_expire() -> None:
    clock = Clock()
    gateways = GatewayTable(clock=clock)
    gateways.renew(GatewayEntry(id="a", address="h:1"))
    gateways.renew(GatewayEntry(id="b", address="h:1"))  # the successor, at the same port
    gateways.renew(GatewayEntry(id="c", address="h:2"))
    assert [gateway.id for gateway in gateways.current()] == ["b", "c"]
    gateways.report_demand("b", {"m": (2, 1.5)})
    gateways.report_demand("c", {"m": (3, 0.5)})
    assert gateways.demand() == {"m": (5, 1.5)}
    clock.now_s += LEASE_S
    assert gateways.current() == () and gateways.demand() == {}


def test_a_ready_spare_takes_over_and_the_lost_seat_becomes_a_spare() -> None:
    clock = Clock()
    spares = SpareSeats({"m-1": ["m", 1], "n-1": ["n", 1]}, clock=clock)
    assert spares.take_over(entry(1)) is None  # no group has asked for its promotion
    spares.poll("m-1")
    assert spares.standby() == ("m-1",)
    assert spares.take_over(entry(1)) == "m-1"
    assert spares.promote("m-1") and not spares.promote("m-1")
    assert "m-0" in spares and spares.must_wait("m-0")
    assert spares.serves("m-1") == "m-0" and not spares.must_wait("m-0")
    spares.poll("m-0")
    clock.now_s += 2 * PROMOTION_POLL_S
    assert spares.standby() == ()
