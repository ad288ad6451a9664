"""The frames between a gateway and a leader: msgpack, in columns rather than a mapping per token.

A frame from the gateway is a list of messages, `[kind, handle, ...]`; a *handle* is a small
integer that stands for a request on one link. A frame from the leader is a single message,
`[kind, ...]`; the frame of a step contains the new tokens of all sequences:

    ["step", handles, indexes, counts, tokens, ends, extras]
     handles, indexes, counts   per output: handle of the request, sample, number of new tokens
     tokens                     tokens of all outputs, little-endian int32 bytes
     ends                       {position: [finish reason, stop token, error]}
     extras                     {position: [num_cached, logprobs, prompt_logprobs]} if any is set

Knows bytes; knows nothing of streams or engines.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from typing import Any

import msgpack
import numpy as np

from arriero.shards.config.sampling_params import SamplingParams
from arriero.shards.engine.types import EngineRequest, SequenceOutput, TokenLogprobs
from arriero.shards.images.request import RequestImage

VERSION = 4
"""Version of the link, part of the leader's hello; both ends must have the same version."""


def pack(value: Any) -> bytes:  # noqa: ANN401
    """Bytes of a frame."""
    packed: bytes = msgpack.packb(value)
    return packed


def unpack(frame: bytes) -> Any:  # noqa: ANN401
    """Content of a frame; the inverse of `pack`."""
    return msgpack.unpackb(frame, strict_map_key=False)


def submit_message(
    handle: int, request: EngineRequest, peer: tuple[str, str] | None = None
) -> list[Any]:
    """The message that submits `request` under `handle`.

    `peer` is address and token of a leader whose group has more cached tokens of the prompt.
    """
    return [
        "submit",
        handle,
        request.request_id,
        _int32(request.prompt),
        request.params.to_wire(),
        request.priority,
        _int32(request.resumed),
        request.cache_salt,
        request.trace,
        request.tenant,
        [(image.data, image.num_features) for image in request.images],
        peer,
    ]


def read_submit(message: Sequence[Any]) -> EngineRequest:
    """The request of a `submit_message`."""
    _, _, request_id, prompt, params, priority, resumed, salt, trace, tenant, images, _ = message
    return EngineRequest(
        request_id=request_id,
        prompt=_tuple(prompt),
        params=SamplingParams.from_wire(params),
        priority=priority,
        resumed=_tuple(resumed),
        cache_salt=salt,
        trace=trace,
        tenant=tenant,
        images=tuple(RequestImage(data=data, num_features=size) for data, size in images),
    )


def read_peer(message: Sequence[Any]) -> tuple[str, str] | None:
    """The peer of a `submit_message`."""
    return None if message[-1] is None else (message[-1][0], message[-1][1])


def step_frame(outputs: Iterable[tuple[int, SequenceOutput]]) -> list[Any]:
    """Frame of a step, from pairs of handle and output."""
    handles: list[int] = []
    indexes: list[int] = []
    counts: list[int] = []
    tokens = array("i")
    ends: dict[int, list[Any]] = {}
    extras: dict[int, list[Any]] = {}
    for position, (handle, output) in enumerate(outputs):
        handles.append(handle)
        indexes.append(output.index)
        counts.append(len(output.tokens))
        tokens.extend(output.tokens)
        if output.finish_reason is not None:
            ends[position] = [output.finish_reason, output.stop_token, output.error]
        if output.num_cached or output.logprobs is not None or output.prompt_logprobs is not None:
            extras[position] = [
                output.num_cached,
                _logprobs_out(output.logprobs),
                _logprobs_out(output.prompt_logprobs),
            ]
    return ["step", handles, indexes, counts, tokens.tobytes(), ends, extras]


def read_step(
    frame: Sequence[Any], request_ids: dict[int, str]
) -> list[tuple[int, SequenceOutput]]:
    """The pairs of a `step_frame`, without pairs whose handle is not in `request_ids`.

    Args:
        frame: the unpacked frame.
        request_ids: request ids by handle.
    """
    _, handles, indexes, counts, packed, ends, extras = frame
    tokens = tuple(array("i", packed))
    outputs = []
    at = 0
    for position, (handle, index, count) in enumerate(zip(handles, indexes, counts, strict=True)):
        request_id = request_ids.get(handle)
        start, at = at, at + count
        if request_id is None:
            continue
        if position not in ends and position not in extras:  # the usual case
            output = SequenceOutput(request_id=request_id, index=index, tokens=tokens[start:at])
            outputs.append((handle, output))
            continue
        reason, stop_token, error = ends.get(position, _NO_END)
        num_cached, logprobs, prompt_logprobs = extras.get(position, _NO_EXTRAS)
        output = SequenceOutput(
            request_id=request_id,
            index=index,
            tokens=tokens[start:at],
            logprobs=_logprobs_in(logprobs),
            prompt_logprobs=_logprobs_in(prompt_logprobs),
            finish_reason=reason,
            stop_token=stop_token,
            error=error,
            num_cached=num_cached,
        )
        outputs.append((handle, output))
    return outputs


_NO_END = (None, None, None)
_NO_EXTRAS = (0, None, None)


def _int32(values: Sequence[int]) -> bytes:
    return np.asarray(values, dtype="<i4").tobytes()


def _tuple(packed: bytes) -> tuple[int, ...]:
    return tuple(np.frombuffer(packed, dtype="<i4").tolist())


def _logprobs_out(rows: Sequence[TokenLogprobs] | None) -> list[Any] | None:
    if rows is None:
        return None
    return [(row.token, row.logprob, row.top) for row in rows]


def _logprobs_in(rows: Sequence[Any] | None) -> tuple[TokenLogprobs, ...] | None:
    if rows is None:
        return None
    return tuple(
        TokenLogprobs(token=token, logprob=logprob, top=tuple((i, p) for i, p in top))
        for token, logprob, top in rows
    )
