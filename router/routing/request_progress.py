"""A request's course over groups: what is out already, and what to ask so that it goes on.

A stream whose group is lost goes on in another: prompt and emitted tokens are laid in again, and
the sampler's state (penalties, limits, the draw's seed and position) is a function of these, so
that the tokens to come are those that would have come. Each token is taken once, in order. Knows
tokens and samples; knows nothing of text, links or time.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from arriero.router.backend import GroupView
from arriero.router.requests import check_room
from arriero.router.roles import hands_over, suits
from arriero.router.routing.choose import order
from arriero.shards.config.sampling_params import SamplingParams
from arriero.shards.engine.sequence import sample_seed
from arriero.shards.engine.types import EngineRequest, SequenceOutput
from arriero.shards.errors import Unavailable


@dataclass(frozen=True, kw_only=True, slots=True)
class SubRequest:
    """One request to a group.

    Attributes:
        request: what the engine is asked.
        index: the sample that its sample 0 is, or None when its samples are the course's own.
        max_tokens: of each sample, in all groups together; where the group is asked for fewer, it
            hands over to another.
    """

    request: EngineRequest
    index: int | None = None
    max_tokens: int

    @property
    def hands_over(self) -> bool:
        """Whether another group is to go on with what this one leaves unfinished."""
        return self.request.params.max_tokens != self.max_tokens


@dataclass(slots=True)
class _Sample:
    tokens: list[int] = field(default_factory=list)
    finished: bool = False


class RequestProgress:
    """One request from its first token to its last, wherever they are computed.

    Args:
        request: as it is asked first; `max_tokens` None takes what the group's context holds.

    Attributes:
        digest: of the weights and how they are computed in, once a token is out: only groups of
            the same one may go on.
        layout: of the group that gave the last token; the same one sums in the same order.
        moves: how often it went on in another group because one was lost.
        source: a group that computed the prompt and handed over; "" for none.
    """

    def __init__(self, request: EngineRequest) -> None:
        self._request = request
        self._samples = [_Sample() for _ in range(request.params.n)]
        self._max_tokens = request.params.max_tokens
        self._told_prompt = False
        self._group: GroupView | None = None  # that gave the last token
        self.digest: str | None = None
        self.layout = ""
        self.moves = 0
        self.source = ""

    @property
    def request(self) -> EngineRequest:
        """As the caller asks."""
        return self._request

    @property
    def request_id(self) -> str:
        """The caller's name for it."""
        return self._request.request_id

    @property
    def started(self) -> bool:
        """Whether anything of it is out."""
        return any(sample.tokens or sample.finished for sample in self._samples)

    @property
    def finished(self) -> bool:
        """Whether every sample has ended."""
        return all(sample.finished for sample in self._samples)

    def given(self, index: int, tokens: Sequence[int], *, finished: bool) -> None:
        """Tokens of a sample that the client has from elsewhere; before the first ask."""
        sample = self._samples[index]
        sample.tokens += tokens
        sample.finished = finished

    def end(self, index: int) -> None:
        """A sample ended in its text (a stop string): nothing more of it is wanted."""
        self._samples[index].finished = True

    def choices(self, groups: Iterable[GroupView]) -> list[GroupView]:
        """The groups that may go on with it, the best first."""
        able = [one for one in groups if self.digest in (None, one.card.compat_key)]
        need = len(self._request.prompt) + (self._max_tokens or 1)
        ordered = order(able, num_prompt=len(self._request.prompt), num_tokens=need)
        return sorted(
            ordered,
            key=lambda group: (
                not suits(group, started=self.started),
                self.layout not in ("", group.card.layout),
            ),
        )

    def asks(self, group: GroupView, groups: Sequence[GroupView] = ()) -> list[SubRequest]:
        """What to ask a group; names are new, since an engine may still know the old ones.

        Args:
            group: who is asked.
            groups: those that could go on where its role is to begin only.

        Raises:
            InvalidRequest: prompt and `max_tokens` exceed its context.
        """
        base = self._request
        room = check_room(len(base.prompt), self._max_tokens, group.card.max_model_len)
        base = replace(base, params=replace(base.params, max_tokens=room))
        if not self.started:
            base = replace(base, request_id=_tailed(base.request_id))
            if hands_over(group, groups):
                base = replace(base, params=_first_token(base.params))
            return [SubRequest(request=base, max_tokens=room)]
        asks = []
        for index, sample in enumerate(self._samples):
            if sample.finished:
                continue
            assert base.params.seed is not None, "the edge draws a seed"
            params = replace(
                base.params,
                n=1,
                seed=sample_seed(base.params.seed, index),
                prompt_logprobs=None if self._told_prompt or index else base.params.prompt_logprobs,
            )
            request = replace(
                base,
                request_id=_tailed(base.request_id),
                params=params,
                resumed=tuple(sample.tokens),
            )
            asks.append(SubRequest(request=request, index=index, max_tokens=room))
        return asks

    def take(
        self, ask: SubRequest, group: GroupView, outputs: Sequence[SequenceOutput]
    ) -> list[SequenceOutput]:
        """What a group gave for an ask, as outputs of the course.

        Raises:
            Unavailable: the group has lost it; it may be asked elsewhere.
        """
        taken: list[SequenceOutput] = []
        for output in outputs:
            if output.finish_reason == "lost":
                if taken:  # what came before it counts; the loss is seen again
                    break
                raise Unavailable(output.error or "the group was lost")
            if ask.index is not None:
                output.index = ask.index
                if self.moves or self.source:  # the first group told the prompt's own hits
                    output.num_cached = 0
            if ask.hands_over:
                self.source = group.group_id
                if output.finish_reason == "length":
                    output.finish_reason = None
            sample = self._samples[output.index]
            sample.tokens += output.tokens
            sample.finished = output.finish_reason is not None
            if group is not self._group and output.tokens:
                self._group = group
                self._max_tokens = ask.max_tokens
                self.digest, self.layout = group.card.compat_key, group.card.layout
            if output.prompt_logprobs is not None:
                self._told_prompt = True
            taken.append(output)
        return taken


def _first_token(params: SamplingParams) -> SamplingParams:
    return replace(params, max_tokens=1, min_tokens=min(params.min_tokens, 1))


def _tailed(request_id: str) -> str:
    """Callers may use their names twice; an engine may not."""
    return f"{request_id}/{secrets.token_hex(4)}"
