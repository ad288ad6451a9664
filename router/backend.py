"""How the front door sees the groups that compute: one small protocol over token ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, Self

from arriero.router.directory.directory import Reach
from arriero.router.directory.prefixes import NOTHING
from arriero.router.text.model_card import ModelCard
from arriero.shards.engine.types import EngineRequest, SequenceOutput


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupLoad:
    """How busy a group is.

    Attributes:
        outstanding_tokens: prompt and expected output tokens that this gateway has given it and
            that are not out yet.
        prefill_tokens: of these, prompt tokens that have yet to be computed.
        num_running, num_waiting: sequences of all gateways, as the leader last said.
        stalled_s: how long its engine has had work and finished no step.
    """

    outstanding_tokens: int = 0
    prefill_tokens: int = 0
    num_running: int = 0
    num_waiting: int = 0
    stalled_s: float = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupView:
    """A connected group at one moment.

    Attributes:
        group_id: the group.
        model: the id under which clients ask for its model.
        card: what its leader says of the model.
        load: how busy it is.
        stats: `EngineStats` as the leader last sent it.
        reach: tokens of the prompt at hand that it has already, where that was asked.
        peer_reach: likewise of a peer, from whose memory the group would copy what it lacks.
        peer_near: whether the peer is on the same node.
        role: part of a request that it is for; see `roles`.
    """

    group_id: str
    model: str
    card: ModelCard
    load: GroupLoad
    stats: Mapping[str, Any] = field(default_factory=dict)
    reach: Reach = NOTHING
    peer_reach: int = 0
    peer_near: bool = False
    role: str = "both"


class Running(Protocol):
    """A request in a group: iterating gives what each step gave, or several if the reader lags."""

    def __aiter__(self) -> Self:
        """Itself."""

    async def __anext__(self) -> list[SequenceOutput]:
        """What has come since the last time, once something has."""

    async def aclose(self) -> None:
        """Want no more of it; cancels the request, unless all of it is out."""


class Backend(Protocol):
    """The groups that can be asked now."""

    def groups(self) -> Sequence[GroupView]:
        """The connected groups."""

    def generate(self, group_id: str, request: EngineRequest, source: str = "") -> Running:
        """Run a request, which goes on until it has ended or is closed.

        Args:
            group_id: who runs it.
            request: it.
            source: a group that has just computed its prompt, to copy it from; "" for none.

        Raises:
            InvalidRequest, Overloaded: the engine refused it.
            Unavailable: the group is lost, draining or unknown; the text is the cause.
        """

    def cancel(self, group_id: str, request_id: str) -> None:
        """Stop a request; does nothing when it is not running."""
