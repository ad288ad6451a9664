"""Progress of a request over groups: the tokens so far, and the sub-requests that continue it.

A stream whose group is lost goes on in another group. That group computes prompt and emitted
tokens again; the sampler's state (penalties, limits, seed and position of the draw) is a function
of these tokens, so that the next tokens are the same as without the loss. Each token is accepted
once, in order. Knows tokens and samples; knows nothing of text, links or time.
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
    """A request to a group.

    Attributes:
        request: the request for the engine.
        index: sample of the client's request that sample 0 of `request` continues; None when
            `request` computes all samples.
        max_tokens: limit of each sample over all groups; a group with a lower limit in `request`
            hands over to another group.
    """

    request: EngineRequest
    index: int | None = None
    max_tokens: int

    @property
    def hands_over(self) -> bool:
        """Whether another group continues the request after this sub-request."""
        return self.request.params.max_tokens != self.max_tokens


@dataclass(slots=True)
class _Sample:
    tokens: list[int] = field(default_factory=list)
    finished: bool = False


class RequestProgress:
    """A request from the first token to the last, over all groups that compute tokens.

    Args:
        request: the client's request; `max_tokens` None stands for the rest of the group's context.

    Attributes:
        digest: digest of weights and numerics, set with the first token; only groups with the same
            digest may continue the request.
        layout: layout of the group that gave the last token; groups of the same layout sum in the
            same order.
        num_migrations: number of times that another group continued the request after a loss.
        source: id of the group that computed the prompt and handed over; "" for none.
    """

    def __init__(self, request: EngineRequest) -> None:
        self._request = request
        self._samples = [_Sample() for _ in range(request.params.n)]
        self._max_tokens = request.params.max_tokens
        self._sent_prompt_logprobs = False
        self._group: GroupView | None = None  # the group that gave the last token
        self.digest: str | None = None
        self.layout = ""
        self.num_migrations = 0
        self.source = ""

    @property
    def request(self) -> EngineRequest:
        """The client's request."""
        return self._request

    @property
    def request_id(self) -> str:
        """The id that the client gave the request."""
        return self._request.request_id

    @property
    def outputs(self) -> list[Sequence[int]]:
        """Tokens so far, by sample."""
        return [sample.tokens for sample in self._samples]

    @property
    def started(self) -> bool:
        """Whether any output was accepted."""
        return any(sample.tokens or sample.finished for sample in self._samples)

    @property
    def finished(self) -> bool:
        """Whether every sample has ended."""
        return all(sample.finished for sample in self._samples)

    def given(self, index: int, tokens: Sequence[int], *, finished: bool) -> None:
        """Add tokens of a sample that the client has already; before the first sub-request."""
        sample = self._samples[index]
        sample.tokens += tokens
        sample.finished = finished

    def end(self, index: int) -> None:
        """End a sample whose text has ended (a stop string)."""
        self._samples[index].finished = True

    def choices(self, groups: Iterable[GroupView]) -> list[GroupView]:
        """The groups that may continue the request, best group first."""
        able = [group for group in groups if self.digest in (None, group.card.compat_key)]
        need = len(self._request.prompt) + (self._max_tokens or 1)
        ordered = order(able, num_prompt=len(self._request.prompt), num_tokens=need)
        return sorted(
            ordered,
            key=lambda group: (
                not suits(group, started=self.started),
                self.layout not in ("", group.card.layout),
            ),
        )

    def sub_requests(self, group: GroupView, groups: Sequence[GroupView] = ()) -> list[SubRequest]:
        """The sub-requests for a group, with new ids: an engine may still know the old ids.

        Args:
            group: the group that continues the request.
            groups: groups that could continue after a group whose role is prefill.

        Raises:
            InvalidRequest: prompt and `max_tokens` exceed the context of the group.
        """
        base = self._request
        room = check_room(len(base.prompt), self._max_tokens, group.card.max_model_len)
        base = replace(base, params=replace(base.params, max_tokens=room))
        if not self.started:
            base = replace(base, request_id=_unique(base.request_id))
            if hands_over(group, groups):
                base = replace(base, params=_first_token(base.params))
            return [SubRequest(request=base, max_tokens=room)]
        sub_requests = []
        for index, sample in enumerate(self._samples):
            if sample.finished:
                continue
            assert base.params.seed is not None, "the gateway draws a seed"
            params = replace(
                base.params,
                n=1,
                seed=sample_seed(base.params.seed, index),
                prompt_logprobs=(
                    None if self._sent_prompt_logprobs or index else base.params.prompt_logprobs
                ),
            )
            request = replace(
                base,
                request_id=_unique(base.request_id),
                params=params,
                resumed=tuple(sample.tokens),
                weights=(self.digest or "").partition(" ")[0],
            )
            sub_requests.append(SubRequest(request=request, index=index, max_tokens=room))
        return sub_requests

    def accept(
        self, sub_request: SubRequest, group: GroupView, outputs: Sequence[SequenceOutput]
    ) -> list[SequenceOutput]:
        """Record the outputs of a sub-request; gives them as outputs of the client's request.

        Raises:
            Unavailable: the group has lost the request; another group may continue it.
        """
        accepted: list[SequenceOutput] = []
        for output in outputs:
            if output.finish_reason == "lost":
                if accepted:  # outputs before the loss count; the stream's end shows the loss
                    break
                raise Unavailable(output.error or "the group was lost")
            if sub_request.index is not None:
                output.index = sub_request.index
                if self.num_migrations or self.source:  # the first group's hits were reported
                    output.num_cached = 0
            if sub_request.hands_over:
                self.source = group.group_id
                if output.finish_reason == "length":
                    output.finish_reason = None
            sample = self._samples[output.index]
            sample.tokens += output.tokens
            sample.finished = output.finish_reason is not None
            if group is not self._group and output.tokens:
                self._group = group
                self._max_tokens = sub_request.max_tokens
                # the group may have got other weights while the request waited there
                self.digest = output.weights or group.card.compat_key
                self.layout = group.card.layout
            if output.prompt_logprobs is not None:
                self._sent_prompt_logprobs = True
            accepted.append(output)
        return accepted


def _first_token(params: SamplingParams) -> SamplingParams:
    return replace(params, max_tokens=1, min_tokens=min(params.min_tokens, 1))


def _unique(request_id: str) -> str:
    """An id for the engine, where no two requests may share an id; a client may repeat ids."""
    return f"{request_id}/{secrets.token_hex(4)}"
