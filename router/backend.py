"""The gateway's view of the groups that compute: a small protocol over token ids."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol, Self

from arriero.router.directory.directory import Reach
from arriero.router.directory.prefixes import NOTHING
from arriero.router.text.model_card import ModelCard, ServedAdapter
from arriero.shards.engine.stats import EngineStats
from arriero.shards.engine.types import EngineRequest, SequenceOutput


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupLoad:
    """Load of a group.

    Attributes:
        outstanding_tokens: prompt and expected output tokens of this gateway's requests that the
            group has not computed yet.
        prefill_tokens: the part of `outstanding_tokens` in prompts.
        num_running, num_waiting: sequences of all gateways, as last reported by the leader.
        stalled_s: seconds for which the engine has had work but finished no step.
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
        group_id: id of the group.
        model: id of the model, for clients.
        card: the leader's facts about the model.
        load: load of the group.
        stats: load of the engine, as last sent by the leader.
        reach: cached prefix of the current prompt in the group, if it was looked up.
        peer_reach: cached prefix tokens in a peer, from which the group would copy missing blocks.
        peer_near: whether the peer is on the same node.
        role: the part of a request that suits the group; see `roles`.
        adapter: adapter of the group that the request asks for; None for the base model.
        adapter_in_slot: whether the request's adapter, if any, is on the group's device now.
        home: whether the request's session has its blocks in the group.
    """

    group_id: str
    model: str
    card: ModelCard
    load: GroupLoad
    stats: EngineStats = field(default_factory=EngineStats)
    reach: Reach = NOTHING
    peer_reach: int = 0
    peer_near: bool = False
    role: str = "both"
    home: bool = False
    adapter_in_slot: bool = True
    adapter: ServedAdapter | None = None

    @property
    def name(self) -> str:
        """Model id of the request: of the adapter, or of the base model."""
        return self.model if self.adapter is None else self.adapter.name


class Running(Protocol):
    """A request in a group; yields the outputs of a step, or of several steps to a slow reader."""

    def __aiter__(self) -> Self:
        """The iterator."""

    async def __anext__(self) -> list[SequenceOutput]:
        """Wait for outputs; returns all outputs since the last call."""

    async def aclose(self) -> None:
        """Stop reading; cancels a request that has not ended."""


class Backend(Protocol):
    """The groups that can take requests now."""

    def groups(self) -> Sequence[GroupView]:
        """The connected groups."""

    def generate(self, group_id: str, request: EngineRequest, source: str = "") -> Running:
        """Run a request until its end or until the iterator is closed.

        Args:
            group_id: group that runs the request.
            request: the request.
            source: group that has just computed the prompt, to copy blocks from; "" for none.

        Raises:
            InvalidRequest, Overloaded: the engine refused the request.
            Unavailable: the group is lost, draining or unknown; the text is the cause.
        """

    def cancel(self, group_id: str, request_id: str) -> None:
        """Cancel a request; does nothing for a request that does not run."""
