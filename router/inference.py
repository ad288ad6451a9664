"""What the front door can do, whatever the client speaks: the gRPC servicer and HTTP share it.

A call's life: refuse it if it has no chance, check, tokenize, wait its turn, choose a group, run
it there, give one message a step. Leaving a stream early cancels it in the engine. Knows the order
of these steps, each of which is elsewhere; knows nothing of connections, statuses or JSON.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import cast

from arriero.router.backend import GroupView
from arriero.router.observability.observer import RequestObserver
from arriero.router.proto.arriero.v1 import inference_pb2 as pb
from arriero.router.requests import (
    OutputOptions,
    ToolOffer,
    check_room,
    check_tokens,
    defaults_to_wire,
    read_documents,
    read_messages,
    read_offer,
    read_options,
    read_resumed,
    read_sampling,
    read_tools,
    read_variables,
)
from arriero.router.response import Answer, Message, TextDelta
from arriero.router.resumable_streams import ResumableStreams
from arriero.router.routing import migration as relay
from arriero.router.routing.linked_groups import LinkedGroups
from arriero.router.routing.request_progress import RequestProgress
from arriero.router.tenants.admission_controller import AdmissionController, Caller
from arriero.router.tenants.admission_policy import QueuedRequest
from arriero.router.tenants.tenant import Tenant
from arriero.router.text.call_grammar import calls_or_form, strict_form
from arriero.router.text.constraints import Form, call_form, read_form
from arriero.router.text.images import PromptImage
from arriero.router.text.model_card import ModelCard
from arriero.router.text.text_model import TextModel
from arriero.shards.config.sampling_params import SamplingParams
from arriero.shards.engine.types import EngineRequest
from arriero.shards.errors import InvalidRequest, Unavailable
from arriero.shards.images.request import RequestImage

LOST_S = 120.0
_WAKE_POLL_S = 0.05

Stream = AsyncGenerator[Message]


@dataclass(slots=True)
class Aside:
    """What is told of one request beside its messages; of several calls, of all together.

    Attributes:
        num_calls: calls that have not had their turn yet.
        accepted: set once each call's turn has come: a group computes it now.
        not_enforced: what of a JSON Schema no mask can hold, each with its place.
    """

    num_calls: int = 1
    accepted: asyncio.Event = field(default_factory=asyncio.Event)
    not_enforced: list[str] = field(default_factory=list)

    def turn(self) -> None:
        """A call's turn has come."""
        self.num_calls -= 1
        if self.num_calls <= 0:
            self.accepted.set()


@dataclass(frozen=True, kw_only=True, slots=True)
class _Job:
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
    aside: Aside


class Inference:
    """The calls of `arriero.v1.Inference`, on messages.

    Args:
        groups: the groups that compute.
        sight: told of each request.
        door: says whose turn it is.
        lost_s: how long a request whose group was lost waits for another.
        wake_s: models that have no group while nobody asks for them, and how long a request waits
            for its first.
    """

    def __init__(
        self,
        groups: LinkedGroups,
        sight: RequestObserver,
        door: AdmissionController,
        *,
        lost_s: float = LOST_S,
        wake_s: Mapping[str, float] | None = None,
    ) -> None:
        self.groups = groups
        self.sight = sight
        self.metrics = sight.metrics
        self.door = door
        self._lost_s = lost_s
        self._wake_s: Mapping[str, float] = wake_s or {}
        self._asleep: Counter[str] = Counter()
        self._kept = ResumableStreams()

    async def find(self, model: str) -> tuple[TextModel, list[GroupView]]:
        """`LinkedGroups.find`, after a wait for the first group of a model that sleeps."""
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
        """Take other settings, from the next request on; see the class."""
        self._lost_s, self._wake_s = lost_s, wake_s

    @property
    def may_sleep(self) -> frozenset[str]:
        """Models that have no group while nobody asks for them."""
        return frozenset(self._wake_s)

    def asleep(self) -> dict[str, int]:
        """Requests that wait for the first group of their model."""
        return {model: count for model, count in self._asleep.items() if count}

    async def generate(
        self, request: pb.GenerateRequest, caller: Caller, aside: Aside | None = None
    ) -> Stream:
        """Check a request to continue a prompt; iterating the stream runs it.

        Args:
            request: of the wire.
            caller: who asks.
            aside: is told what the messages do not tell.

        Raises:
            InvalidRequest, NotFound, Unavailable: as the message's comments say.
        """
        with self.metrics.failures():
            text, views = await self.find(request.model)
            self.door.refuse_early(views[0].model, caller, request.options.priority)
            options = read_options(request.options)
            aside = aside or Aside()
            params, form = await _constrained(request.sampling, views[0].card, text, None)
            _note(aside, form, caller)
            if request.WhichOneof("prompt") == "text":
                prompt = await _encode(text, request)
            else:
                prompt = list(request.token_ids.ids)
            weights, received = _resumed(request, params, views[0].card)
            job = _Job(
                caller=caller,
                weights=weights,
                received=received,
                text=text,
                views=views,
                prompt=prompt,
                params=params,
                options=options,
                priority=request.options.priority,
                aside=aside,
            )
            return self._begin(job)

    async def chat(
        self, request: pb.ChatRequest, caller: Caller, aside: Aside | None = None
    ) -> Stream:
        """Check a conversation; iterating the stream answers it. Raises as `generate`."""
        with self.metrics.failures():
            text, views = await self.find(request.model)
            self.door.refuse_early(views[0].model, caller, request.options.priority)
            options = read_options(request.options)
            offer = read_offer(request)
            aside = aside or Aside()
            params, form = await _constrained(request.sampling, views[0].card, text, offer)
            _note(aside, form, caller)
            if offer is not None and not options.include_text:
                raise InvalidRequest(
                    "include_text", "`tools` need text; leave `include_text` on or `tools` out"
                )
            weights, received = _resumed(request, params, views[0].card)
            prompt, images = await _layout(text, request, offer)
            job = _Job(
                caller=caller,
                weights=weights,
                received=received,
                text=text,
                views=views,
                prompt=prompt,
                images=tuple(one.image for one in images),
                params=params,
                options=options,
                priority=request.options.priority,
                offer=offer,
                prompt_field="messages",
                aside=aside,
            )
            return self._begin(job)

    async def tokenize(self, request: pb.TokenizeRequest) -> pb.TokenizeResponse:
        """Token ids as `generate` and `chat` would see them."""
        text, views = await self.find(request.model)
        if request.WhichOneof("input") == "conversation":
            tools = read_tools(request.conversation.tools)
            offer = ToolOffer(tools=tools) if tools else None
            tokens, _ = await _layout(text, request.conversation, offer)
        else:
            tokens = await _encode(text, request)
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
        """The models that some connected group serves, by id."""
        by_model: dict[str, list[GroupView]] = {}
        for view in self.groups.groups():
            by_model.setdefault(view.model, []).append(view)
        return [_model(name, views) for name, views in sorted(by_model.items())]

    def model(self, model: str) -> pb.Model:
        """One model."""
        _, views = self.groups.find(model)
        return _model(views[0].model, views)

    def _start(self, job: _Job) -> pb.Start:
        """The last checks, and the facts of the first message."""
        widest = _widest(job)
        most = job.params.max_tokens
        check_room(len(job.prompt), most, widest.card.max_model_len, field=job.prompt_field)
        check_tokens("prompt", job.prompt, widest.card)
        start = pb.Start(
            request_id=job.caller.request_id, model=widest.model, seed=cast(int, job.params.seed)
        )
        if job.options.include_prompt_token_ids:
            start.prompt_token_ids.extend(job.prompt)
        return start

    def resume(self, request: pb.ResumeRequest, caller: Caller) -> Stream:
        """The messages of a kept call from an offset on.

        Raises:
            NotFound: no such call is kept.
        """
        return self._kept.attach((caller.tenant.name, request.request_id), request.received)

    def _begin(self, job: _Job) -> Stream:
        stream = self._run(job, self._start(job))
        if not job.options.resumable_s:
            return stream
        return self._kept.keep(
            (job.caller.tenant.name, job.caller.request_id), stream, job.options.resumable_s
        )

    async def close(self) -> None:
        """Drop what is kept."""
        await self._kept.close()

    @contextmanager
    def _moves_counted(self, model: str, course: RequestProgress) -> Iterator[None]:
        try:
            yield
        finally:
            self.metrics.migrated(model, course.num_migrations)

    async def _run(self, job: _Job, start: pb.Start) -> Stream:
        """Wait for the request's turn, then run it to its end, in whichever groups that takes."""
        caller, params = job.caller, job.params
        answer = Answer(start, len(job.prompt), params.n, job.options, job.text, job.offer)
        most = params.max_tokens or _widest(job).card.max_model_len - len(job.prompt)
        ticket = QueuedRequest(
            tenant=caller.tenant,
            num_prompt=len(job.prompt),
            max_output=most * params.n,
            num_sequences=params.n,
            priority=job.priority,
            deadline_s=caller.deadline_s,
        )
        seen_as = self.sight.request(
            caller, start.model, len(job.prompt), partial(_prompt_text, job)
        )
        with seen_as as seen:
            async with self.door.place(start.model, ticket) as place:
                seen.admitted()
                job.aside.turn()
                course = self._course(job, answer, seen.traceparent)
                # there may be other groups then than when the request came
                sharing = partial(self.groups.sharing, start.model, job.text, course.request)
                running = relay.run(self.groups, course, sharing, self._lost_s)
                with self._moves_counted(start.model, course):
                    async with aclosing(running) as steps:
                        async for outputs in steps:
                            place.used(*seen.timer.step(outputs))
                            if not answer.started:
                                start.weights = course.digest or ""
                            message = answer.add(outputs)
                            if message is not None:
                                if not isinstance(message, TextDelta) and answer.finished:
                                    seen.timer.finish(message.usage)
                                    place.leave()
                                yield message
                            if answer.finished:
                                return
                            for index in answer.ended:
                                course.end(index)

    def _course(self, job: _Job, answer: Answer, trace: str) -> RequestProgress:
        """The request's course, with what the caller has of it already."""
        request = EngineRequest(
            request_id=job.caller.request_id,
            prompt=tuple(job.prompt),
            params=job.params,
            # Among tenants, nobody goes first for having said so.
            priority=job.priority if self.door.open else job.caller.tenant.priority,
            trace=trace,
            tenant=job.caller.tenant.name,
            cache_salt=_salt(job.caller.tenant, job.options.cache_salt),
            images=job.images,
        )
        course = RequestProgress(request)
        course.digest = job.weights or None
        for index, (tokens, ended) in job.received.items():
            course.given(index, tokens, finished=ended)
            answer.replay(index, tokens, finished=ended)
        return course


def _salt(tenant: Tenant, given: str) -> bytes:
    """What keeps the request's blocks apart: its tenant, and what it asks for itself."""
    if not given:
        return tenant.cache_salt
    return hashlib.sha256(tenant.cache_salt + b"\0" + given.encode()).digest()


def _prompt_text(job: _Job) -> str:
    return job.text.tokenizer.decode(job.prompt, skip_special=False)


def _widest(job: _Job) -> GroupView:
    return max(job.views, key=lambda view: view.card.max_model_len)


def _resumed(
    request: pb.GenerateRequest | pb.ChatRequest, params: SamplingParams, card: ModelCard
) -> tuple[str, Mapping[int, tuple[list[int], bool]]]:
    if not request.HasField("resumed"):
        return "", {}
    return read_resumed(request.resumed, request.sampling, params, card)


async def _constrained(
    message: pb.SamplingParams, card: ModelCard, text: TextModel, offer: ToolOffer | None
) -> tuple[SamplingParams, Form | None]:
    """Checked sampling parameters, with the grammar that a form or forced calls ask for."""
    params = read_sampling(message, card)
    if '"pattern' in message.structured.json_schema:  # each is compiled to see whether it can be
        form = await asyncio.to_thread(read_form, message.structured)
    else:
        form = read_form(message.structured)
    field = message.structured.WhichOneof("form") or "tools"
    if offer is not None:
        make: Callable[[], Form] | None = None
        if offer.forced:
            if form is not None and not field.startswith("json"):  # a form for what is no call
                raise InvalidRequest(
                    field,
                    f"`{field}` and a `tool_choice` that forces a call exclude each other: a call "
                    "would not fit the form; leave one of them out",
                )
            make = partial(call_form, offer.forced, parallel=offer.parallel)
        elif form is not None:
            make = partial(calls_or_form, offer.tools, form, parallel=offer.parallel)
        elif offer.strict:
            make = partial(strict_form, offer.strict, tags=text.call_tags)
        if make is not None:
            form = await asyncio.to_thread(make)
    if form is None:
        return params, None
    replace(params, grammar=form.grammar).check(vocab_size=card.vocab_size)
    form = await text.grammars.check(field, form)
    return replace(params, grammar=form.grammar), form


def _note(aside: Aside, form: Form | None, caller: Caller) -> None:
    """Tell what of a form is not enforced.

    Raises:
        InvalidRequest: the caller wants it enforced to the last word.
    """
    if form is None or not form.not_enforced:
        return
    if caller.strict_schema:
        raise InvalidRequest(
            form.field,
            f"`{form.field}` cannot be enforced at {'; '.join(form.not_enforced)[:1000]}; leave "
            "these words out, or the header `x-strict-schema`",
        )
    aside.not_enforced += form.not_enforced


async def _encode(text: TextModel, request: pb.GenerateRequest | pb.TokenizeRequest) -> list[int]:
    if not request.text:
        raise InvalidRequest("prompt", "the prompt is empty; give `text` or `token_ids`")
    add = request.add_special_tokens if request.HasField("add_special_tokens") else True
    return await text.encode(request.text, add_special_tokens=add, trusted=request.parse_special)


async def _layout(
    text: TextModel, request: pb.ChatRequest | pb.Conversation, offer: ToolOffer | None
) -> tuple[list[int], list[PromptImage]]:
    messages, given_images = read_messages(request.messages)
    images = await text.images.lay_out(given_images)
    go_on = request.continue_final_message
    given = request.HasField("add_generation_prompt")
    tokens = await text.encode_chat(
        messages,
        add_generation_prompt=request.add_generation_prompt if given else not go_on,
        continue_final_message=go_on,
        tools=() if offer is None else offer.tools,
        documents=read_documents(request.documents),
        variables=read_variables(request.template_variables),
        images=images,
    )
    return tokens, images


def _model(name: str, views: Sequence[GroupView]) -> pb.Model:
    card: ModelCard = views[0].card
    return pb.Model(
        id=name,
        digest=card.digest,
        max_model_len=max(view.card.max_model_len for view in views),
        vocab_size=card.vocab_size,
        eos_token_ids=card.eos_token_ids,
        has_chat_template=card.chat_template is not None,
        reads_images=card.image_tile > 0,
        created=card.created,
        groups=[
            pb.Group(
                id=view.group_id,
                layout=view.card.layout,
                running=view.load.num_running,
                waiting=view.load.num_waiting,
            )
            for view in views
        ],
        generation_defaults=defaults_to_wire(card.generation_defaults),
    )
