"""What is kept of failures and events, and how a failure is told."""

from __future__ import annotations

import json

from arriero.cluster.registry.history import (
    KEEP_EVENTS,
    KEEP_FAILURES,
    Failure,
    History,
    StoredHistory,
)
from arriero.shards.protocol import wire
from arriero.shards.protocol.failure import Evidence, FirstCause, Kind


def failure(who: str, seat: str = "m-0", cause: str = "slice 1 died") -> Failure:
    evidence = Evidence(kind=Kind.CRASH, summary=cause, rank=1, pid=7, log=("last words",))
    record = FirstCause(cause=evidence, folded=("slice 0 broke off",))
    return Failure(who=who, kind="GroupFailed", cause=cause, at=100.0, seat=seat, record=record)


def test_the_first_word_of_a_failure_counts() -> None:
    history = History()
    assert history.failed(failure("m-0.1"))
    assert not history.failed(failure("m-0.1", cause="its leader is gone"))
    assert [one.cause for one in history.failures] == ["slice 1 died"]
    assert [one.kind for one in history.events] == ["lost"]


def test_a_failure_knows_when_its_slot_served_again() -> None:
    history = History()
    history.failed(failure("m-0.1"))
    history.serving(101.0, "m-1", "m-1.1")
    assert history.failures[0].recovered_s is None
    history.serving(104.5, "m-0", "m-0.2")
    assert history.failures[0].recovered_s == 4.5
    lines = "\n".join(history.failures[0].words())
    for said in ("slice 1 died", "crash", "last words", "slice 0 broke off", "after 4.5 s"):
        assert said in lines


def test_why_takes_groups_slots_and_models() -> None:
    history = History()
    history.failed(failure("m-0.1"))
    history.failed(failure("m-1.1", seat="m-1"))
    for name, who in (("m-0.1", "m-0.1"), ("m-0", "m-0.1"), ("m", "m-1.1"), ("", "m-1.1")):
        found = history.why(name)
        assert found is not None and found.who == who
    assert history.why("other") is None


def test_a_group_that_a_gateway_cannot_use_may_yet_be_lost() -> None:
    history = History()
    assert history.failed(failure("m-0.1 at gateway 1a2b", cause="the template is broken"))
    for name in ("m-0.1", "m-0", "m"):
        found = history.why(name)
        assert found is not None and found.cause == "the template is broken"
    assert history.failed(failure("m-0.1"))
    found = history.why("m-0.1")
    assert found is not None and found.cause == "slice 1 died"


def test_it_outlives_a_restart_and_stays_small() -> None:
    history = History()
    for number in range(2 * KEEP_EVENTS):
        history.failed(failure(f"m-0.{number}"))
    assert (len(history.events), len(history.failures)) == (KEEP_EVENTS, KEEP_FAILURES)
    again = History(
        wire.from_builtins(json.loads(json.dumps(wire.to_builtins(history.stored))), StoredHistory)
    )
    assert again.events == history.events
    assert [one.who for one in again.failures] == [one.who for one in history.failures]
    assert again.failures[-1].words() == history.failures[-1].words()


def test_the_history_of_an_earlier_version_is_read() -> None:
    cause = {"kind": "silent", "summary": "s", "rank": 1, "pid": 7, "log": ["last words"]}
    failed = {"who": "m-0.1", "kind": "GroupFailed", "cause": "s", "at": 2, "seat": "m-0"}
    stored = {
        "events": [{"at": 1.5, "kind": "lost", "who": "m-0.1", "text": "s", "later": [1]}],
        "failures": [
            failed | {"record": {"cause": cause, "folded": ["f"]}, "recovered_s": None},
            failed | {"who": "gateway", "record": None},
        ],
        "later": {"a": 1},
    }
    history = History(wire.from_builtins(json.loads(json.dumps(stored)), StoredHistory))
    evidence = Evidence(kind=Kind.SILENT, summary="s", rank=1, pid=7, log=("last words",))
    assert [event.who for event in history.events] == ["m-0.1"]
    assert history.failures[0].record == FirstCause(cause=evidence, folded=("f",))
    assert history.failures[1].record is None
    assert wire.to_builtins(history.failures[0].record) == {
        "cause": {
            "kind": "silent",
            "summary": "s",
            "rank": 1,
            "node": "",
            "pid": 7,
            "step": -1,
            "phase": "",
            "collective": "",
            "exception": "",
            "log": ("last words",),
            "after_s": 0.0,
        },
        "folded": ("f",),
    }
