"""Messages between leader and slices: step plans out, step results back.

A plan holds only what changed: the slices keep each sequence's block table, sampling parameters
and last sampled token in a *slot* (a small integer that the leader hands out). Arrays travel as
little-endian int32 bytes inside msgpack.

Knows the bytes of a message; knows nothing of how a plan is made or run.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import msgpack
import numpy as np
import numpy.typing as npt

Int32 = npt.NDArray[np.int32]

LAST_SAMPLED = -1
"""Value in `StepPlan.tokens`: the last sampled token of the slot, known to the slices alone."""


def int32(values: Any = ()) -> Int32:  # noqa: ANN401
    """An int32 array of `values`."""
    return np.asarray(values, dtype=np.int32)


@dataclass(kw_only=True, slots=True)
class NewSequence:
    """A sequence that enters a slot (for the first time, or again after pre-emption).

    Attributes:
        slot: slot of the sequence, free until now.
        params: `SamplingParams.to_wire()`, with `seed` always set, to the seed of this sample.
        stop_tokens: tokens banned before `min_tokens`: those of the request and of the model.
        prompt: tokens of the prompt; empty unless the sampler counts tokens (penalties).
        output: tokens emitted so far; empty unless the sampler counts tokens or a grammar is set.
        num_prompt: number of prompt tokens.
        num_output: output tokens emitted so far (not 0 after pre-emption or a resumed stream).
        images: image files, in order of the prompt.
        image_sizes: number of features of each image.
        image_positions: prompt positions that take the image features.
    """

    slot: int
    params: dict[str, Any]
    stop_tokens: tuple[int, ...] = ()
    prompt: Int32 = field(default_factory=int32)
    output: Int32 = field(default_factory=int32)
    num_prompt: int
    num_output: int = 0
    images: tuple[bytes, ...] = ()
    image_sizes: tuple[int, ...] = ()
    image_positions: Int32 = field(default_factory=int32)


@dataclass(kw_only=True, slots=True)
class StepPlan:
    """One step. S sequences take part, in this order; T is the total number of tokens.

    Attributes:
        step: step number, from 0.
        freed: slots that are free from now on (applied first).
        new: sequences that enter slots (applied second).
        block_slots, block_index, block_ids: three arrays of one length: entry `block_index` of
            the slot's block table becomes `block_ids` (applied third).
        slots: [S] slot of each sequence.
        starts: [S] position of each sequence's first token in this step.
        counts: [S] number of tokens of each sequence in this step.
        tokens: [T] token ids; `LAST_SAMPLED` where only the slices know the token.
        samples: [S] 1 where a token is sampled after the last position, else 0.
        prompt_rows: [S] 1 where log-probabilities of this step's prompt tokens are requested
            (predictions of positions starts + 1 .. starts + counts inside the prompt), else 0.
        prompt_next: [sum of counts over prompt_rows] the prompt token that follows each row, or
            -1 after the last prompt token.
        local_slots, local_index, local_ids: as `block_slots` and so on, for the table of the
            layers with chunked attention; entries before the chunk of a sequence's first
            token of this step are not used again.
        placement_layer: layer with a new expert placement before this step; -1 for none.
        placement: expert in each expert slot of that layer's stage, rank by rank.
        dp_rank: data-parallel rank that runs the plan; each rank has plans of its own, one a step.
        same_rows: whether the rows equal those of the rank's last plan, all decodes, each
            sequence one token further.
    """

    step: int
    freed: Int32
    new: list[NewSequence]
    block_slots: Int32
    block_index: Int32
    block_ids: Int32
    slots: Int32
    starts: Int32
    counts: Int32
    tokens: Int32
    samples: Int32
    prompt_rows: Int32 = field(default_factory=int32)
    prompt_next: Int32 = field(default_factory=int32)
    local_slots: Int32 = field(default_factory=int32)
    local_index: Int32 = field(default_factory=int32)
    local_ids: Int32 = field(default_factory=int32)
    placement_layer: int = -1
    placement: Int32 = field(default_factory=int32)
    dp_rank: int = 0
    same_rows: bool = False

    def to_bytes(self) -> bytes:
        """Bytes of the plan."""
        return _pack([_plain(self, name) for name in _names(StepPlan)])

    @classmethod
    def from_bytes(cls, data: bytes) -> StepPlan:
        """Undo `to_bytes`; the arrays are views of `data`."""
        plan = cls(**_fields(cls, _unpack(data)))
        plan.new = [NewSequence(**_fields(NewSequence, fields)) for fields in plan.new]
        return plan


@dataclass(kw_only=True, slots=True)
class Logprobs:
    """Log-probabilities of some rows; top lists are cut to the batch's largest request.

    Attributes:
        chosen: float32 [R].
        top_tokens: int32 [R, N], by falling log-probability.
        top: float32 [R, N].
    """

    chosen: npt.NDArray[np.float32]
    top_tokens: Int32
    top: npt.NDArray[np.float32]


@dataclass(kw_only=True, slots=True)
class StepResult:
    """Result of one step.

    Attributes:
        step: number of the step.
        tokens: [R] sampled tokens, one for each 1 in the plan's `samples`, in order.
        logprobs: log-probabilities of the sampled tokens; None without a request for them.
        prompt_logprobs: one row for each entry of `prompt_next`; None without a request for them.
        elapsed_us: microseconds that the sampling slice spent in the step.
        dp_rank: data-parallel rank of the plan.
    """

    step: int
    tokens: Int32
    logprobs: Logprobs | None = None
    prompt_logprobs: Logprobs | None = None
    elapsed_us: int = 0
    dp_rank: int = 0

    def to_bytes(self) -> bytes:
        """Bytes of the result."""
        return _pack([_plain(self, name) for name in _names(StepResult)])

    @classmethod
    def from_bytes(cls, data: bytes) -> StepResult:
        """Undo `to_bytes`."""
        result = cls(**_fields(cls, _unpack(data)))
        for name in ("logprobs", "prompt_logprobs"):
            rows = getattr(result, name)
            if rows is not None:
                setattr(result, name, Logprobs(**_fields(Logprobs, rows)))
        return result


_INT32, _FLOAT32 = 1, 2


def _names(record: type) -> tuple[str, ...]:
    names: tuple[str, ...] = record.__slots__  # type: ignore[attr-defined]
    return names


def _fields(record: type, values: Any) -> dict[str, Any]:  # noqa: ANN401
    return dict(zip(_names(record), values, strict=True))


def _plain(record: Any, name: str) -> Any:  # noqa: ANN401
    value = getattr(record, name)
    if isinstance(value, Logprobs):
        return [_plain(value, name) for name in _names(Logprobs)]
    if isinstance(value, list):
        return [[_plain(entry, name) for name in _names(type(entry))] for entry in value]
    return value


def _array(value: Any) -> msgpack.ExtType:  # noqa: ANN401
    if isinstance(value, np.ndarray):
        code = _FLOAT32 if value.dtype == np.float32 else _INT32
        head = bytes([value.ndim]) + np.asarray(value.shape, dtype="<i4").tobytes()
        return msgpack.ExtType(code, head + np.ascontiguousarray(value).tobytes())
    raise TypeError(f"{type(value).__name__} has no encoding in a plan")


def _unarray(code: int, data: bytes) -> Any:  # noqa: ANN401
    if code not in (_INT32, _FLOAT32):
        raise ValueError(f"unknown msgpack extension {code} in a plan; expected 1 or 2")
    shape = np.frombuffer(data, dtype="<i4", count=data[0], offset=1)
    kind = "<i4" if code == _INT32 else "<f4"
    return np.frombuffer(data, dtype=kind, offset=1 + 4 * data[0]).reshape(shape)


def _pack(values: list[Any]) -> bytes:
    packed: bytes = msgpack.packb(values, default=_array)
    return packed


def _unpack(data: bytes) -> list[Any]:
    values: list[Any] = msgpack.unpackb(
        data, ext_hook=_unarray, use_list=False, strict_map_key=False
    )
    return values
