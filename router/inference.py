"""The calls of the API, for every protocol: the gRPC servicer and HTTP share them.

Life of a call: refuse a hopeless request, check, tokenize, wait for admission, choose a group, run
the request there, yield one message for each step. Closing the stream early cancels the request in
the engine. Knows the order of the steps, each of which has a module of its own; knows nothing of
connections, statuses or JSON.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections import Counter
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import cast

from arriero.router.backend import GroupView
from arriero.router.calls.constrained_sampling import read_constrained_sampling
from arriero.router.calls.conversation import ToolOffer, read_offer, read_tools
from arriero.router.calls.model_message import model_message
from arriero.router.calls.prompt import encode_conversation, encode_text
from arriero.router.calls.request_notes import RequestNotes
from arriero.router.observability.observer import RequestObserver
from arriero.router.proto.arriero.v1 import inference_pb2 as pb
from arriero.router.requests import (
    OutputOptions,
    check_room,
    check_tokens,
    read_options,
    read_resumed,
)
from arriero.router.response import Answer, Message, TextDelta
from arriero.router.resumable_streams import ResumableStreams
from arriero.router.routing import migration
from arriero.router.routing.linked_groups import LinkedGroups
from arriero.router.routing.request_progress import RequestProgress
from arriero.router.tenants.admission_controller import AdmissionController, Caller
from arriero.router.tenants.admission_policy import QueuedRequest
from arriero.router.tenants.tenant import Tenant
from arriero.router.text.model_card import ModelCard
from arriero.router.text.text_model import TextModel
from arriero.shards.config.sampling_params import SamplingParams
from arriero.shards.engine.types import EngineRequest
from arriero.shards.errors import InvalidRequest, Unavailable
from arriero.shards.images.request import RequestImage

LOST_S = 120.0
_WAKE_POLL_S = 0.05

Stream = AsyncGenerator[Message]


@dataclass(frozen=True, kw_only=True, slots=True)
class _CheckedRequest:
    """A checked request."""

    caller: Caller
    text: TextModel
    views: Sequence[GroupView]
    prompt: list[int]
    params: SamplingParams
    options: OutputOptions
    priority: int
    offer: ToolOffer | None = None
    prompt_field: str = "prompt"
    weights: str = ""
    received: Mapping[int, tuple[list[int], bool]] = field(default_factory=dict)
    images: tuple[RequestImage, ...] = ()
    notes: RequestNotes


class Inference:
    """The calls of `arriero.v1.Inference`, on messages.

    Args:
        groups: the groups that compute.
        observer: makes metrics, traces and logs of each request.
        admission: admits requests in turn.
        lost_s: seconds that a request waits for another group after the loss of its group.
        wake_s: models that have no group while idle, with the seconds that a request waits for
            the first group.
    """

    def __init__(
        self,
        groups: LinkedGroups,
        observer: RequestObserver,
        admission: AdmissionController,
        *,
        lost_s: float = LOST_S,
        wake_s: Mapping[str, float] | None = None,
    ) -> None:
        self.groups = groups
        self.metrics = observer.metrics
        self.admission = admission
        self._observer = observer
        self._lost_s = lost_s
        self._wake_s: Mapping[str, float] = wake_s or {}
        self._asleep: Counter[str] = Counter()
        self._resumable = ResumableStreams()

    async def find(self, model: str) -> tuple[TextModel, list[GroupView]]:
        """As `LinkedGroups.find`; waits for the first group of an idle model."""
        model = model or self.groups.only
        wake_s = self._wake_s.get(model)
        if wake_s is None:
            return self.groups.find(model)
        deadline_s = time.monotonic() + wake_s
        self._asleep[model] += 1
        try:
            while True:
                try:
                    return self.groups.find(model)
                except Unavailable:
                    if time.monotonic() > deadline_s:
                        raise
                await asyncio.sleep(_WAKE_POLL_S)
        finally:
            self._asleep[model] -= 1

    def reload(self, *, lost_s: float, wake_s: Mapping[str, float]) -> None:
        """Use other settings for later requests; arguments as of the class."""
        self._lost_s, self._wake_s = lost_s, wake_s

    @property
    def may_sleep(self) -> frozenset[str]:
        """Models that have no group while idle."""
        return frozenset(self._wake_s)

    def asleep(self) -> dict[str, int]:
        """By model, number of requests that wait for the first group."""
        return {model: count for model, count in self._asleep.items() if count}

    async def generate(
        self, request: pb.GenerateRequest, caller: Caller, notes: RequestNotes | None = None
    ) -> Stream:
        """Check a request to continue a prompt; iterating the stream runs the request.

        Args:
            request: gRPC message.
            caller: sender of the request.
            notes: receives the facts that the messages do not carry.

        Raises:
            InvalidRequest, NotFound, Unavailable: as `inference.proto` says.
        """
        with self.metrics.failures():
            text, views = await self.find(request.model)
            self.admission.refuse_early(views[0].model, caller, request.options.priority)
            options = read_options(request.options)
            notes = notes or RequestNotes()
            params, form = await read_constrained_sampling(
                request.sampling, views[0].card, text, None
            )
            notes.add_form(form, strict=caller.strict_schema)
            if request.WhichOneof("prompt") == "text":
                prompt = await encode_text(text, request)
            else:
                prompt = list(request.token_ids.ids)
            weights, received = _resumed(request, params, views[0].card)
            checked = _CheckedRequest(
                caller=caller,
                weights=weights,
                received=received,
                text=text,
                views=views,
                prompt=prompt,
                params=params,
                options=options,
                priority=request.options.priority,
                notes=notes,
            )
            return self._stream(checked)

    async def chat(
        self,
        request: pb.ChatRequest,
        caller: Caller,
        notes: RequestNotes | None = None,
        *,
        fit_output: bool = False,
    ) -> Stream:
        """As `generate`, for a conversation.

        Args:
            request: gRPC message.
            caller: sender of the request.
            notes: receives the facts that the messages do not carry.
            fit_output: lower `max_tokens` to the room that the prompt leaves, instead of refusing.
        """
        with self.metrics.failures():
            text, views = await self.find(request.model)
            self.admission.refuse_early(views[0].model, caller, request.options.priority)
            options = read_options(request.options)
            offer = read_offer(request)
            notes = notes or RequestNotes()
            params, form = await read_constrained_sampling(
                request.sampling, views[0].card, text, offer
            )
            notes.add_form(form, strict=caller.strict_schema)
            if offer is not None and not options.include_text:
                raise InvalidRequest(
                    "include_text", "`tools` need text; set `include_text` or leave out `tools`"
                )
            weights, received = _resumed(request, params, views[0].card)
            prompt, images = await encode_conversation(text, request, offer)
            if fit_output and params.max_tokens is not None:
                room = max(view.card.max_model_len for view in views) - len(prompt)
                params = replace(params, max_tokens=max(1, min(params.max_tokens, room)))
            checked = _CheckedRequest(
                caller=caller,
                weights=weights,
                received=received,
                text=text,
                views=views,
                prompt=prompt,
                images=tuple(image.image for image in images),
                params=params,
                options=options,
                priority=request.options.priority,
                offer=offer,
                prompt_field="messages",
                notes=notes,
            )
            return self._stream(checked)

    async def tokenize(self, request: pb.TokenizeRequest) -> pb.TokenizeResponse:
        """Token ids as in `generate` and `chat`."""
        text, views = await self.find(request.model)
        if request.WhichOneof("input") == "conversation":
            tools = read_tools(request.conversation.tools)
            offer = ToolOffer(tools=tools) if tools else None
            tokens, _ = await encode_conversation(text, request.conversation, offer)
        else:
            tokens = await encode_text(text, request)
        return pb.TokenizeResponse(
            token_ids=tokens, max_model_len=max(view.card.max_model_len for view in views)
        )

    async def detokenize(self, request: pb.DetokenizeRequest) -> pb.DetokenizeResponse:
        """Text of token ids."""
        text, views = await self.find(request.model)
        check_tokens("token_ids", request.token_ids, views[0].card)
        joined = text.tokenizer.decode(request.token_ids, skip_special=request.skip_special_tokens)
        return pb.DetokenizeResponse(text=joined)

    def models(self) -> list[pb.Model]:
        """The models that a connected group serves, by id."""
        by_model: dict[str, list[GroupView]] = {}
        for view in self.groups.groups():
            by_model.setdefault(view.model, []).append(view)
        return [model_message(name, views) for name, views in sorted(by_model.items())]

    def model(self, model: str) -> pb.Model:
        """Facts about a model."""
        _, views = self.groups.find(model)
        return model_message(views[0].model, views)

    def _start(self, checked: _CheckedRequest) -> pb.Start:
        """The last checks, and the `start` of the first message."""
        widest = _widest(checked)
        most = checked.params.max_tokens
        check_room(len(checked.prompt), most, widest.card.max_model_len, field=checked.prompt_field)
        check_tokens("prompt", checked.prompt, widest.card)
        start = pb.Start(
            request_id=checked.caller.request_id,
            model=widest.model,
            seed=cast(int, checked.params.seed),
        )
        if checked.options.include_prompt_token_ids:
            start.prompt_token_ids.extend(checked.prompt)
        return start

    def resume(self, request: pb.ResumeRequest, caller: Caller) -> Stream:
        """The messages of a resumable call from an offset on.

        Raises:
            NotFound: the gateway holds no such call.
        """
        return self._resumable.attach((caller.tenant.name, request.request_id), request.received)

    def _stream(self, checked: _CheckedRequest) -> Stream:
        stream = self._run(checked, self._start(checked))
        if not checked.options.resumable_s:
            return stream
        return self._resumable.keep(
            (checked.caller.tenant.name, checked.caller.request_id),
            stream,
            checked.options.resumable_s,
        )

    async def close(self) -> None:
        """Cancel all resumable streams."""
        await self._resumable.close()

    @contextmanager
    def _count_migrations(self, model: str, progress: RequestProgress) -> Iterator[None]:
        try:
            yield
        finally:
            self.metrics.migrated(model, progress.num_migrations)

    async def _run(self, checked: _CheckedRequest, start: pb.Start) -> Stream:
        """Wait for admission, then run the request to its end, over one group or several."""
        caller, params = checked.caller, checked.params
        answer = Answer(
            start, len(checked.prompt), params.n, checked.options, checked.text, checked.offer
        )
        most = params.max_tokens or _widest(checked).card.max_model_len - len(checked.prompt)
        queued = QueuedRequest(
            tenant=caller.tenant,
            num_prompt=len(checked.prompt),
            max_output=most * params.n,
            num_sequences=params.n,
            priority=checked.priority,
            deadline_s=caller.deadline_s,
        )
        observation = self._observer.request(
            caller, start.model, len(checked.prompt), partial(_prompt_text, checked)
        )
        with observation as observed:
            async with self.admission.admit(start.model, queued) as admitted:
                observed.admitted()
                checked.notes.admitted()
                progress = self._progress(checked, answer, observed.traceparent)
                # the groups may have changed since the request arrived
                sharing = partial(self.groups.sharing, start.model, checked.text, progress.request)
                running = migration.run(self.groups, progress, sharing, self._lost_s)
                with self._count_migrations(start.model, progress):
                    async with aclosing(running) as steps:
                        async for outputs in steps:
                            admitted.count_output(*observed.timer.step(outputs))
                            if not answer.started:
                                start.weights = progress.digest or ""
                            message = answer.add(outputs)
                            if message is not None:
                                if not isinstance(message, TextDelta) and answer.finished:
                                    observed.timer.finish(message.usage)
                                    admitted.release()
                                yield message
                            if answer.finished:
                                return
                            for index in answer.ended:
                                progress.end(index)

    def _progress(self, checked: _CheckedRequest, answer: Answer, trace: str) -> RequestProgress:
        """The progress of a request, tokens that the caller already has included."""
        request = EngineRequest(
            request_id=checked.caller.request_id,
            prompt=tuple(checked.prompt),
            params=checked.params,
            # With several tenants, the tenant's priority counts, not the caller's wish.
            priority=checked.priority if self.admission.open else checked.caller.tenant.priority,
            trace=trace,
            tenant=checked.caller.tenant.name,
            cache_salt=_salt(checked.caller.tenant, checked.options.cache_salt),
            images=checked.images,
        )
        progress = RequestProgress(request)
        progress.digest = checked.weights or None
        for index, (tokens, ended) in checked.received.items():
            progress.given(index, tokens, finished=ended)
            answer.replay(index, tokens, finished=ended)
        return progress


def _salt(tenant: Tenant, cache_salt: str) -> bytes:
    """Salt of the request's KV block keys, from its tenant and its `cache_salt`."""
    if not cache_salt:
        return tenant.cache_salt
    return hashlib.sha256(tenant.cache_salt + b"\0" + cache_salt.encode()).digest()


def _prompt_text(checked: _CheckedRequest) -> str:
    return checked.text.tokenizer.decode(checked.prompt, skip_special=False)


def _widest(checked: _CheckedRequest) -> GroupView:
    return max(checked.views, key=lambda view: view.card.max_model_len)


def _resumed(
    request: pb.GenerateRequest | pb.ChatRequest, params: SamplingParams, card: ModelCard
) -> tuple[str, Mapping[int, tuple[list[int], bool]]]:
    if not request.HasField("resumed"):
        return "", {}
    return read_resumed(request.resumed, request.sampling, params, card)
