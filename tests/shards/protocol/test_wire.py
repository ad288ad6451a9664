"""The converter: values come back as they went, other versions are understood, bad bytes named."""

from __future__ import annotations

import random
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import pytest

from arriero.shards.config.sampling_params import SamplingParams
from arriero.shards.engine.stats import EngineStats
from arriero.shards.engine.types import EngineRequest
from arriero.shards.errors import WireError
from arriero.shards.images.request import RequestImage
from arriero.shards.kv.limits import PeerBlocks
from arriero.shards.kv.transfers import (
    NixlMemory,
    Pool,
    Segment,
    Tier,
    Transfer,
    TransferBatch,
    TransferResult,
)
from arriero.shards.protocol import wire
from arriero.shards.protocol.failure import Evidence, FirstCause, Kind
from arriero.shards.protocol.heartbeat import Heartbeat
from arriero.shards.protocol.messages import MessageKind, SliceFailure, SliceHello
from arriero.shards.protocol.step_plan import Logprobs, NewSequence, StepPlan, StepResult, int32

SEGMENT = Segment(
    pid=7,
    fd=3,
    name="m",
    host="h",
    layers=(0, 4),
    heads=(0, 2),
    block=(16, 64, 2),
    slots=9,
    token=b"t",
    nixl=NixlMemory(b"agent", 2**64 - 4096),
)
PARAMS = SamplingParams(
    max_tokens=5, seed=2**63 - 1, logit_bias={7: -1.5}, allowed_token_ids=(), stop_token_ids=(2,)
)
PLAN = StepPlan(
    step=4,
    freed=int32([9]),
    new=[NewSequence(slot=1, params=PARAMS, num_prompt=3, prompt=int32([1, 2, 3]), images=(b"x",))],
    block_slots=int32(),
    block_index=int32(),
    block_ids=int32(),
    slots=int32([1, 0]),
    starts=int32([0, 8]),
    counts=int32([3, 1]),
    tokens=int32([1, 2, 3, -1]),
    samples=int32([1, 1]),
    same_rows=True,
)
ROWS = Logprobs(
    chosen=np.array([-0.5, -1.0], np.float32),
    top_tokens=int32([[1, 2, 3], [4, 5, 6]]),
    top=np.zeros((2, 3), np.float32),
)
VALUES: list[Any] = [
    PLAN,
    StepResult(step=4, tokens=int32([5, 6]), logprobs=ROWS, elapsed_us=12),
    TransferBatch(
        Pool.LOCAL,
        [Transfer(1, b"k" * 16, Tier.DEVICE, 2, Tier.HOST, 3)],
        [(Tier.DISK, b"j" * 16)],
        (SEGMENT,),
        1,
    ),
    TransferResult(1, Pool.ALL, [1], [2], {Tier.DISK: [(b"k" * 16, True)]}, True, SEGMENT, 2),
    PeerBlocks((SEGMENT,), {b"k" * 16: 4}),
    EngineRequest(
        request_id="r",
        prompt=(1, 2),
        params=PARAMS,
        images=(RequestImage(data=b"x", num_features=2),),
    ),
    EngineStats(steps=3, step_us={"wait": 1.5}, expert_loads={"1": [2, 3]}),
    FirstCause(cause=Evidence(kind=Kind.STUCK, summary="s", rank=0, log=("a",)), folded=("b",)),
    SliceHello(host="h", port=0, pid=1),
    SliceFailure(phase="load", step=0, collective="", error="E: e", at="", log=("l",)),
]
"""A value of each type of message and of stored state."""


def equal(mine: object, yours: object) -> bool:
    """Equality, of arrays too."""
    if isinstance(mine, np.ndarray) and isinstance(yours, np.ndarray):
        return mine.dtype == yours.dtype and np.array_equal(mine, yours)
    if is_dataclass(mine) and type(mine) is type(yours):
        return all(equal(getattr(mine, f.name), getattr(yours, f.name)) for f in fields(mine))
    if isinstance(mine, list | tuple) and type(mine) is type(yours):
        return len(mine) == len(yours) and all(map(equal, mine, yours))
    return bool(mine == yours)


@pytest.mark.parametrize("value", VALUES, ids=lambda value: type(value).__name__)
def test_values_come_back(value: Any) -> None:  # noqa: ANN401
    assert equal(wire.decode(wire.encode(value), type(value)), value)


def test_pairs_and_arrays_by_key_come_back() -> None:
    beat = (3, Heartbeat(step=1, phase="plan", log=("a", "b"), at_s=2.5))
    assert wire.decode(wire.encode(beat), tuple[int, Heartbeat]) == beat
    loads = {5: np.array([1, 2**40], np.int64)}
    got = wire.decode(wire.encode(loads), dict[int, npt.NDArray[np.int64]])
    assert got.keys() == loads.keys() and equal(got[5], loads[5])


def test_the_first_frame_of_a_message_is_the_name_of_its_kind() -> None:
    assert [MessageKind.of_frame(kind.frame) for kind in MessageKind] == [*MessageKind]
    for frame in (b"", b"H", b"\xff\xfe", b"nonsense" * 1000):
        with pytest.raises(WireError, match="unknown kind"):
            MessageKind.of_frame(frame)


@pytest.mark.parametrize("value", VALUES, ids=lambda value: type(value).__name__)
def test_bad_bytes_raise_the_one_error(value: Any) -> None:  # noqa: ANN401
    """Cut anywhere, changed anywhere, or of another type: a `WireError`, or still a value."""
    data, rng = wire.encode(value), random.Random(0)
    for end in range(len(data)):
        with pytest.raises(WireError):
            wire.decode(data[:end], type(value))
    with pytest.raises(WireError, match="trailing"):
        wire.decode(data + b"\x00", type(value))
    for _ in range(500):
        changed = bytearray(data)
        for _ in range(rng.randrange(1, 4)):
            changed[rng.randrange(len(data))] = rng.randrange(256)
        try:
            wire.decode(bytes(changed), type(value))
        except WireError:
            pass
    for other in (None, 1, "x", b"x", [], [1, 2], {}, {1: 2}, {"step": "x"}, {"": []}):
        try:
            wire.decode(wire.encode(other), type(value))
        except WireError:
            continue
        # every field has a default, and unknown keys are ignored
        assert isinstance(other, dict) and type(value) in (EngineStats, TransferBatch), other


@dataclass(frozen=True)
class Older:
    """A message of an older version."""

    name: str
    count: int = 3


@dataclass(frozen=True)
class Newer:
    """The same message of a newer version."""

    name: str
    count: int = 3
    extra: list[dict[str, int]] = field(default_factory=list)


def test_versions_understand_each_other() -> None:
    newer = Newer("n", 4, [{"a": 1}])
    assert wire.decode(wire.encode(newer), Older) == Older("n", 4)
    assert wire.decode(wire.encode(Older("n", 4)), Newer) == Newer("n", 4)
    assert wire.decode(wire.encode({"name": "n"}), Newer) == Newer("n")
    stored = wire.to_builtins(newer)
    assert wire.from_builtins(stored, Older) == Older("n", 4)
    assert wire.from_builtins({"name": "n", "later": None}, Newer) == Newer("n")


def test_an_error_names_the_field() -> None:
    with pytest.raises(WireError, match=r"unreadable Older: .*missing required field `name`"):
        wire.decode(wire.encode({"count": 1}), Older)
    with pytest.raises(WireError, match=r"Expected `int`, got `str` - at `\$\.count`"):
        wire.decode(wire.encode({"name": "n", "count": "x"}), Older)
    with pytest.raises(WireError, match=r"`\$\.extra\[1\]"):
        wire.from_builtins({"name": "n", "extra": [{}, {"a": "x"}]}, Newer)
    with pytest.raises(WireError, match=r"'nonsense' - at `\$\.kind`"):
        wire.from_builtins({"kind": "nonsense", "summary": ""}, Evidence)


@dataclass(frozen=True)
class Column:
    """A message with an array."""

    tokens: npt.NDArray[np.int32]


@pytest.mark.parametrize("bad", [
    [1, 2, 3],
    b"\0\0\0\0",
    np.zeros(2, np.float32),
    np.zeros(2, np.int64),
    [[3, 3], int32([1, 2])],
    [[2**70 - 1 >> 10, 2], int32([1, 2])],
    ["x", int32([1, 2])],
    [{"a": 1}, int32([1, 2])],
    [int32([1]), int32([1, 2])],
    msgspec.msgpack.Ext(1, b"123"),
    msgspec.msgpack.Ext(99, b"1234"),
    msgspec.msgpack.Ext(-1, b"1234"),
    None,
])  # fmt: skip
def test_an_array_of_another_type_is_refused(bad: object) -> None:
    with pytest.raises(WireError, match="unreadable Column"):
        wire.decode(wire.encode({"tokens": bad}), Column)


def test_deep_nesting_and_false_lengths_are_refused() -> None:
    for data in (b"\x91" * 100_000, b"\xdd\xff\xff\xff\xff", b"\xdf\xff\xff\xff\xff", b"\xc1", b""):
        for kind in (list[Any], dict[str, Any], StepPlan, tuple[int, Heartbeat]):
            with pytest.raises(WireError):
                wire.decode(data, kind)  # type: ignore[arg-type]


def test_what_has_no_encoding_says_so() -> None:
    with pytest.raises(TypeError, match="object has no encoding"):
        wire.encode({"a": object()})
    with pytest.raises(TypeError, match="float64 has no encoding; use int32, float32"):
        wire.encode(np.zeros(2))
    assert wire.decode(wire.encode({"a": np.float64(1.5)}), dict[str, float]) == {"a": 1.5}
