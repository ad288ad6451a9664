"""The calls of the API, for every protocol: the gRPC servicer and HTTP share them.

Life of a call: refuse a hopeless request, check, tokenize, wait for admission, choose a group, run
the request there, yield one message for each step. Closing the stream early cancels the request in
the engine. Knows the order of the steps, each of which has a module of its own; knows nothing of
connections, statuses or JSON.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping
from contextlib import aclosing, contextmanager
from functools import partial
from typing import Protocol, cast

from arriero.router.backend import GroupView
from arriero.router.calls import cache_hint
from arriero.router.calls.checked_request import CheckedRequest, received_before
from arriero.router.calls.constrained_sampling import read_constrained_sampling
from arriero.router.calls.conversation import ToolOffer, read_offer, read_tools
from arriero.router.calls.model_message import model_message
from arriero.router.calls.prompt import encode_conversation, encode_text
from arriero.router.calls.request_notes import RequestNotes
from arriero.router.gateway_config import LOST_S
from arriero.router.observability.observer import RequestObserver
from arriero.router.proto.arriero.v1 import inference_pb2 as pb
from arriero.router.requests import (
    check_room,
    check_tokens,
    fitted,
    read_options,
    read_prediction,
)
from arriero.router.response import Answer, Message, TextDelta
from arriero.router.resumable_streams import ResumableStreams
from arriero.router.routing import migration
from arriero.router.routing.linked_groups import LinkedGroups
from arriero.router.routing.request_progress import RequestProgress
from arriero.router.tenants import model_scope
from arriero.router.tenants.admission_controller import AdmissionController, Caller
from arriero.router.tenants.admission_policy import QueuedRequest
from arriero.router.text.text_model import TextModel
from arriero.shards.engine.types import EngineRequest
from arriero.shards.errors import InvalidRequest, Unavailable

_WAKE_POLL_S = 0.05

Stream = AsyncGenerator[Message]


class Protection(Protocol):
    """Puts the answers of tenants with a safety policy under judgement."""

    def protect(self, checked: CheckedRequest, run: Callable[[CheckedRequest], Stream]) -> Stream:
        """The messages that may be shown; `run` gives those of a checked request."""


class Inference:
    """The calls of `arriero.v1.Inference`, on messages.

    Args:
        groups: the groups that compute.
        observer: makes metrics, traces and logs of each request.
        admission: admits requests in turn.
        lost_s: seconds that a request waits for another group after the loss of its group.
        wake_s: models that have no group while idle, with the seconds that a request waits for
            the first group.

    Attributes:
        protection: of the answers; None for none.
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
        self._resumable = ResumableStreams[Message]()
        self.protection: Protection | None = None

    async def find(self, model: str) -> tuple[TextModel, list[GroupView]]:
        """As `LinkedGroups.find`, for models of the caller; waits for the group of an idle one."""
        model = model_scope.resolve(model, self.groups.names())
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
        self,
        request: pb.GenerateRequest,
        caller: Caller,
        notes: RequestNotes | None = None,
        *,
        fit_output: bool = False,
    ) -> Stream:
        """Check a request to continue a prompt; iterating the stream runs the request.

        Args:
            request: gRPC message.
            caller: sender of the request.
            notes: receives the facts that the messages do not carry.
            fit_output: lower `max_tokens` to the room that the prompt leaves, instead of refusing.

        Raises:
            InvalidRequest, NotFound, Unavailable: as `inference.proto` says.
        """
        with self.metrics.failures():
            text, views = await self.find(request.model)
            self.admission.refuse_early(views[0].model, caller, request.options.priority)
            options = read_options(request.options)
            wanted = cache_hint.read_wanted(request.options.cache, caller.cache_key)
            notes = notes or RequestNotes()
            params, form = await read_constrained_sampling(
                request.sampling, views[0].card, text, None
            )
            notes.add_form(form, strict=caller.strict_schema)
            if request.WhichOneof("prompt") == "text":
                prompt = await encode_text(text, request)
            else:
                prompt = list(request.token_ids.ids)
            weights, received = received_before(request, params, views[0].card)
            checked = CheckedRequest(
                caller=caller,
                weights=weights,
                received=received,
                text=text,
                views=views,
                prompt=prompt,
                params=fitted(params, [v.card for v in views], prompt) if fit_output else params,
                options=options,
                priority=request.options.priority,
                notes=notes,
                hint=cache_hint.of_prompt(wanted),
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
            wanted = cache_hint.read_wanted(request.options.cache, caller.cache_key)
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
            weights, received = received_before(request, params, views[0].card)
            prompt, images = await encode_conversation(text, request, offer)
            checked = CheckedRequest(
                caller=caller,
                weights=weights,
                received=received,
                text=text,
                views=views,
                prompt=prompt,
                images=tuple(image.image for image in images),
                params=fitted(params, [v.card for v in views], prompt) if fit_output else params,
                options=options,
                priority=request.options.priority,
                offer=offer,
                prompt_field="messages",
                messages=request.messages,
                notes=notes,
                hint=await cache_hint.of_conversation(wanted, text, request, offer, prompt),
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
        """The models and adapters that a group serves and the caller may use, by id."""
        by_model: dict[str, list[GroupView]] = {}
        for view in self.groups.groups():
            by_model.setdefault(view.model, []).append(view)
        by_model |= self.groups.adapters()
        by_model = {name: by_model[name] for name in filter(model_scope.allows, by_model)}
        return [model_message(name, views) for name, views in sorted(by_model.items())]

    def model(self, model: str) -> pb.Model:
        """Facts about a model."""
        _, views = self.groups.find(model_scope.resolve(model, self.groups.names()))
        return model_message(views[0].name, views)

    def _start(self, checked: CheckedRequest) -> pb.Start:
        """The last checks, and the `start` of the first message."""
        widest = checked.widest
        most = checked.params.max_tokens
        check_room(len(checked.prompt), most, widest.card.max_model_len, field=checked.prompt_field)
        check_tokens("prompt", checked.prompt, widest.card)
        start = pb.Start(
            request_id=checked.caller.request_id,
            model=widest.name,
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

    def run(self, checked: CheckedRequest) -> Stream:
        """The messages of a request, not under protection; iterating runs the request."""
        return self._run(checked, self._start(checked))

    def _stream(self, checked: CheckedRequest) -> Stream:
        start = self._start(checked)
        if self.protection is None or checked.caller.tenant.safety is None:
            stream = self._run(checked, start)
        else:
            stream = self.protection.protect(checked, lambda changed: self._run(changed, start))
        if not checked.options.resumable_s:
            return stream
        return self._resumable.keep(
            (checked.caller.tenant.name, checked.caller.request_id),
            stream,
            checked.options.resumable_s,
        )

    def release_session(self, key: str, caller: Caller) -> None:
        """End a session of the caller's tenant: its blocks stay in the cache no longer than others.

        Raises:
            InvalidRequest: the key is too long.
        """
        self.groups.release(caller.tenant.name, cache_hint.session_name(key))

    async def close(self) -> None:
        """Cancel all resumable streams."""
        await self._resumable.close()

    @contextmanager
    def _record(self, model: str, progress: RequestProgress) -> Iterator[None]:
        """Count migrations, and note the tokens of the request's blocks at its start and end."""
        prompt = self.groups.learn(model, progress.request)
        try:
            yield
        finally:
            self.metrics.migrated(model, progress.num_migrations)
            for output in progress.outputs:
                self.groups.learn(model, progress.request, output, prompt)

    async def _run(self, checked: CheckedRequest, start: pb.Start) -> Stream:
        """Wait for admission, then run the request to its end, over one group or several."""
        caller, params = checked.caller, checked.params
        num_prompt, card = len(checked.prompt), checked.widest.card
        answer = Answer(
            start,
            num_prompt,
            params.n,
            checked.options,
            checked.text,
            checked.offer,
            num_writable=cache_hint.num_writable(checked.hint, card, num_prompt),
        )
        most = params.max_tokens or card.max_model_len - num_prompt
        queued = QueuedRequest(
            tenant=caller.queue_tenant,
            num_prompt=num_prompt,
            max_output=most * params.n,
            num_sequences=params.n,
            priority=checked.priority,
            deadline_s=caller.deadline_s,
        )
        base = checked.views[0].model
        observation = self._observer.request(caller, base, num_prompt, checked.prompt_text)
        with observation as observed:
            async with self.admission.admit(base, queued) as admitted:
                observed.admitted()
                checked.notes.admitted()
                prediction = await read_prediction(checked.options, checked.text)
                progress = self._progress(checked, answer, observed.traceparent, prediction)
                # the groups may have changed since the request arrived
                sharing = partial(self.groups.sharing, base, checked.text, progress.request)
                running = migration.run(self.groups, progress, sharing, self._lost_s)
                with self._record(base, progress):
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

    def _progress(
        self, checked: CheckedRequest, answer: Answer, trace: str, prediction: tuple[int, ...]
    ) -> RequestProgress:
        """The progress of a request, tokens that the caller already has included."""
        request = EngineRequest(
            request_id=checked.caller.request_id,
            prompt=tuple(checked.prompt),
            params=checked.params,
            priority=self.admission.priority(checked.caller, checked.priority),
            trace=trace,
            tenant=checked.caller.tenant.name,
            cache_salt=checked.cache_salt,
            images=checked.images,
            adapter=checked.adapter,
            hint=checked.hint,
            speculation=checked.options.speculation,
            prediction=prediction,
        )
        progress = RequestProgress(request)
        progress.digest = checked.weights or None
        for index, (tokens, ended) in checked.received.items():
            progress.given(index, tokens, finished=ended)
            answer.replay(index, tokens, finished=ended)
        return progress
