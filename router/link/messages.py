"""The frames between a gateway and a leader, in msgpack (see `wire`).

A frame from the gateway is a list of messages; a *handle* is a small integer that stands for a
request on one link. A frame from the leader is a single message; the frame of a step contains the
new tokens of all sequences, in columns rather than a mapping per token. A message is an array of
its kind and its fields. The first frame of a connection is a greeting, and a peer that greets with
`AskGreeting` calls an action of the leader (see `leader_rpc`).

Knows the contents of frames; knows nothing of streams or engines.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import msgspec

from arriero.router.directory.events import Batch, Snapshot
from arriero.router.text.model_card import ModelCard, ServedAdapter
from arriero.shards.engine.stats import EngineStats
from arriero.shards.engine.types import EngineRequest, SequenceOutput, TokenLogprobs
from arriero.shards.errors import (
    ArrieroError,
    ContextTooLong,
    InvalidRequest,
    Overloaded,
    Unavailable,
    WireError,
)
from arriero.shards.protocol import wire

VERSION = 7
"""Version of the link, part of the leader's hello; both ends must have the same version."""


class TokenGreeting(msgspec.Struct, frozen=True, array_like=True, tag="token"):
    """A gateway opens a link, with the secret of the leader."""

    token: str


class AskGreeting(msgspec.Struct, frozen=True, array_like=True, tag="ask"):
    """A peer opens a connection for one action, with the secret of the leader."""

    token: str


Greeting = TokenGreeting | AskGreeting


class Submit(msgspec.Struct, frozen=True, array_like=True, tag="submit"):
    """A gateway submits a request.

    Attributes:
        handle: handle of the request from now on.
        request: bytes of the `EngineRequest`; a request that cannot be read is refused alone.
        peer: address and token of a leader whose group has more cached tokens of the prompt.
    """

    handle: int
    request: msgspec.Raw
    peer: tuple[str, str] | None = None

    @classmethod
    def of(cls, handle: int, request: EngineRequest, peer: tuple[str, str] | None = None) -> Submit:
        """The message of a request."""
        return cls(handle, msgspec.Raw(wire.encode(request)), peer)

    def read(self) -> EngineRequest:
        """The request.

        Raises:
            WireError: the bytes are no request, or name a memory of another group to read.
        """
        request = wire.decode(memoryview(self.request), EngineRequest)
        if request.peer:
            raise WireError("`peer` of a request must be empty; the leader itself asks its peers")
        return request


class Cancel(msgspec.Struct, frozen=True, array_like=True, tag="cancel"):
    """A gateway cancels a request."""

    handle: int


class Release(msgspec.Struct, frozen=True, array_like=True, tag="release"):
    """A gateway ends a session: its blocks are no longer retained in the cache."""

    tenant: str
    session: str


GatewayMessage = Submit | Cancel | Release


class Hello(msgspec.Struct, frozen=True, array_like=True, tag="hello"):
    """A leader accepts a gateway: version of the link, and bytes of the `ModelCard`."""

    version: int
    card: msgspec.Raw

    @classmethod
    def of(cls, card: ModelCard) -> Hello:
        """The message of a leader with this card."""
        return cls(VERSION, msgspec.Raw(wire.encode(card)))

    def read(self) -> ModelCard:
        """The card of the leader.

        Raises:
            Unavailable: the leader has another version of the link.
            WireError: the bytes are no card.
        """
        if self.version != VERSION:
            raise Unavailable(f"link version {self.version} of the leader is not {VERSION}")
        return wire.decode(memoryview(self.card), ModelCard)


class Bye(msgspec.Struct, frozen=True, array_like=True, tag="bye"):
    """A leader closes the link, with the cause."""

    cause: str


class Stats(msgspec.Struct, frozen=True, array_like=True, tag="stats"):
    """Load of a group.

    Attributes:
        engine: load of the engine.
        draining: whether the group accepts no more requests.
        role: part of requests that the group computes.
    """

    engine: EngineStats
    draining: bool = False
    role: str = "both"


class Adapters(msgspec.Struct, frozen=True, array_like=True, tag="adapters"):
    """The adapters that a group serves from now on, in place of the model card's."""

    adapters: tuple[ServedAdapter, ...]


class Weights(msgspec.Struct, frozen=True, array_like=True, tag="weights"):
    """The weights that a group serves from now on, in place of the model card's.

    Comes after the last output of the weights before, and before the first of these.

    Attributes:
        digest: digest of the weights.
        cache_root: the model's part of the keys of KV blocks.
    """

    digest: str
    cache_root: bytes


class KvChanges(msgspec.Struct, frozen=True, array_like=True, tag="kv"):
    """Changed KV blocks of a group."""

    batch: Batch


class KvBlocks(msgspec.Struct, frozen=True, array_like=True, tag="kv_all"):
    """All KV blocks of a group."""

    snapshot: Snapshot


class Refused(msgspec.Struct, frozen=True, array_like=True, tag="refused"):
    """A leader refuses a request.

    Attributes:
        handle: handle of the request.
        kind: class of the error.
        text: text of the error.
        field: field at fault, of an `InvalidRequest`.
        retry_after_s: seconds until a new try, of an `Overloaded`.
    """

    handle: int
    kind: str
    text: str
    field: str = ""
    retry_after_s: float = 0.0

    @classmethod
    def of(cls, handle: int, error: ArrieroError) -> Refused:
        """The message of an error."""
        text = str(error)
        if isinstance(error, ContextTooLong):
            return cls(handle, "ContextTooLong", text, error.field)
        if isinstance(error, InvalidRequest):
            return cls(handle, "InvalidRequest", text, error.field)
        if isinstance(error, Overloaded):
            return cls(handle, "Overloaded", text, "", error.retry_after_s)
        return cls(handle, "Unavailable", text)

    def error(self) -> ArrieroError:
        """The error of the message."""
        if self.kind == "InvalidRequest":
            return InvalidRequest(self.field, self.text)
        if self.kind == "ContextTooLong":
            return ContextTooLong(self.field, self.text)
        if self.kind == "Overloaded":
            return Overloaded(self.text, self.retry_after_s)
        return Unavailable(self.text)


TopTokens = tuple[tuple[int, float], ...]
LogprobRows = tuple[tuple[int, float, TopTokens], ...]
"""Of each token: the token, its log-probability, and the most likely alternatives."""


class End(NamedTuple):
    """End of a sample: `finish_reason`, `stop_token` and `error` of its output."""

    reason: str | None = None
    stop_token: int | None = None
    error: str | None = None


class Extras(NamedTuple):
    """Rare fields of an output."""

    num_cached: int = 0
    logprobs: LogprobRows | None = None
    prompt_logprobs: LogprobRows | None = None
    num_drafted: int = 0
    num_accepted: int = 0


class Step(msgspec.Struct, frozen=True, array_like=True, tag="step"):
    """Outputs of a step.

    Attributes:
        handles, indexes, counts: per output: handle of the request, sample, number of new tokens.
        tokens: tokens of all outputs, little-endian int32 bytes.
        ends: ends of samples, by position of the output.
        extras: rare fields, by position of the output, if any is set.
    """

    handles: list[int]
    indexes: list[int]
    counts: list[int]
    tokens: bytes
    ends: dict[int, End]
    extras: dict[int, Extras]

    @classmethod
    def of(cls, outputs: Iterable[tuple[int, SequenceOutput]]) -> Step:
        """The message of pairs of handle and output."""
        step = cls([], [], [], b"", {}, {})
        tokens = array("i")
        for position, (handle, output) in enumerate(outputs):
            step.handles.append(handle)
            step.indexes.append(output.index)
            step.counts.append(len(output.tokens))
            tokens.extend(output.tokens)
            if output.finish_reason is not None:
                step.ends[position] = End(output.finish_reason, output.stop_token, output.error)
            logprobs, prompt_logprobs = output.logprobs, output.prompt_logprobs
            drafted, rows = output.num_drafted, logprobs is not None or prompt_logprobs is not None
            if output.num_cached or drafted or rows:
                step.extras[position] = Extras(
                    output.num_cached,
                    _rows(logprobs),
                    _rows(prompt_logprobs),
                    drafted,
                    output.num_accepted,
                )
        return msgspec.structs.replace(step, tokens=tokens.tobytes())

    def outputs(self, request_ids: Mapping[int, str]) -> list[tuple[int, SequenceOutput]]:
        """The pairs of handle and output, without pairs whose handle is not in `request_ids`.

        Args:
            request_ids: request ids by handle.

        Raises:
            WireError: the columns do not match.
        """
        counts, num_bytes = self.counts, len(self.tokens)
        if len({len(self.handles), len(self.indexes), len(counts)}) > 1:
            raise WireError("the columns of a step have unequal lengths")
        if min(counts, default=0) < 0 or 4 * sum(counts) != num_bytes:
            raise WireError(f"{sum(counts)} tokens of a step have {num_bytes} bytes")
        tokens = tuple(array("i", self.tokens))
        ends, extras = self.ends, self.extras
        outputs = []
        at = 0
        for position, (handle, index, count) in enumerate(
            zip(self.handles, self.indexes, counts, strict=True)
        ):
            request_id = request_ids.get(handle)
            start, at = at, at + count
            if request_id is None:
                continue
            output = SequenceOutput(request_id=request_id, index=index, tokens=tokens[start:at])
            if position in ends:
                output.finish_reason, output.stop_token, output.error = ends[position]
            if position in extras:
                rare = extras[position]
                output.num_cached = rare.num_cached
                output.num_drafted, output.num_accepted = rare.num_drafted, rare.num_accepted
                output.logprobs = _logprobs(rare.logprobs)
                output.prompt_logprobs = _logprobs(rare.prompt_logprobs)
            outputs.append((handle, output))
        return outputs


LeaderMessage = Step | Stats | KvChanges | KvBlocks | Adapters | Weights | Refused | Hello | Bye


class Action(msgspec.Struct, frozen=True, array_like=True):
    """A call of an action: its name, and bytes of its arguments (see `leader_rpc`)."""

    name: str
    arguments: msgspec.Raw

    @classmethod
    def of(cls, name: str, arguments: object) -> Action:
        """The message of a call."""
        return cls(name, msgspec.Raw(wire.encode(arguments)))


class ActionAnswer(msgspec.Struct, frozen=True, array_like=True, tag="answer"):
    """Bytes of an action's answer."""

    answer: msgspec.Raw

    @classmethod
    def of(cls, answer: object) -> ActionAnswer:
        """The message of an answer."""
        return cls(msgspec.Raw(wire.encode(answer)))


class ActionRefused(msgspec.Struct, frozen=True, array_like=True, tag="refused"):
    """Why a leader refuses an action."""

    text: str


ActionMessage = ActionAnswer | ActionRefused | Bye


def _rows(rows: Sequence[TokenLogprobs] | None) -> LogprobRows | None:
    return None if rows is None else tuple((row.token, row.logprob, row.top) for row in rows)


def _logprobs(rows: LogprobRows | None) -> tuple[TokenLogprobs, ...] | None:
    if rows is None:
        return None
    return tuple(TokenLogprobs(token=token, logprob=value, top=top) for token, value, top in rows)
