"""What the front door can do, whatever the client speaks: the gRPC servicer and HTTP share it.

A call's life: check, tokenize, choose a group, run it there, give one message a step. Leaving a
stream early cancels it in the engine. Knows the order of these steps, each of which is elsewhere;
knows nothing of connections, statuses or JSON.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import cast

from arriero.router.answer import Answer
from arriero.router.backend import GroupView
from arriero.router.card import ModelCard
from arriero.router.choose import order
from arriero.router.conversation import TextModel
from arriero.router.groups import LinkedGroups
from arriero.router.metrics import Metrics
from arriero.router.proto.arriero.v1 import inference_pb2 as pb
from arriero.router.requests import (
    OutputOptions,
    ToolOffer,
    check_room,
    check_tokens,
    defaults_to_wire,
    engine_request,
    read_messages,
    read_offer,
    read_options,
    read_sampling,
    read_tools,
)
from arriero.shards.errors import InvalidRequest, Overloaded, Unavailable
from arriero.shards.sampling import SamplingParams

log = logging.getLogger(__name__)

Stream = AsyncGenerator[pb.GenerateResponse]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Job:
    """A checked request."""

    request_id: str
    text: TextModel
    views: Sequence[GroupView]
    prompt: list[int]
    params: SamplingParams
    options: OutputOptions
    priority: int
    offer: ToolOffer | None = None


class Inference:
    """The calls of `arriero.v1.Inference`, on messages.

    Args:
        groups: the groups that compute.
        metrics: told of each request.
    """

    def __init__(self, groups: LinkedGroups, metrics: Metrics) -> None:
        self.groups = groups
        self.metrics = metrics

    async def generate(self, request: pb.GenerateRequest, request_id: str) -> Stream:
        """Check a request to continue a prompt; iterating the stream runs it.

        Raises:
            InvalidRequest, NotFound, Unavailable: as the message's comments say.
        """
        with self.metrics.failures():
            text, views = self.groups.find(request.model)
            options = read_options(request.options)
            params = await _sampling(request.sampling, views[0].card)
            if request.WhichOneof("prompt") == "text":
                prompt = await _encode(text, request)
            else:
                prompt = list(request.token_ids.ids)
            job = _Job(
                request_id=request_id,
                text=text,
                views=views,
                prompt=prompt,
                params=params,
                options=options,
                priority=request.options.priority,
            )
            return self._run(job, self._start(job))

    async def chat(self, request: pb.ChatRequest, request_id: str) -> Stream:
        """Check a conversation; iterating the stream answers it. Raises as `generate`."""
        with self.metrics.failures():
            text, views = self.groups.find(request.model)
            options = read_options(request.options)
            params = await _sampling(request.sampling, views[0].card)
            offer = await _offer(request)
            if offer is not None and offer.grammar is not None:
                params = replace(params, grammar=offer.grammar)
                params.check(vocab_size=views[0].card.vocab_size)
            if offer is not None and not options.include_text:
                raise InvalidRequest(
                    "include_text", "`tools` need text; leave `include_text` on or `tools` out"
                )
            job = _Job(
                request_id=request_id,
                text=text,
                views=views,
                prompt=await _layout(text, request, offer),
                params=params,
                options=options,
                priority=request.options.priority,
                offer=offer,
            )
            return self._run(job, self._start(job))

    async def tokenize(self, request: pb.TokenizeRequest) -> pb.TokenizeResponse:
        """Token ids as `generate` and `chat` would see them."""
        text, views = self.groups.find(request.model)
        if request.WhichOneof("input") == "conversation":
            tools = read_tools(request.conversation.tools)
            offer = ToolOffer(tools=tools) if tools else None
            tokens = await _layout(text, request.conversation, offer)
        else:
            tokens = await _encode(text, request)
        return pb.TokenizeResponse(
            token_ids=tokens, max_model_len=max(view.card.max_model_len for view in views)
        )

    async def detokenize(self, request: pb.DetokenizeRequest) -> pb.DetokenizeResponse:
        """Text of token ids."""
        text, views = self.groups.find(request.model)
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
        widest = max(job.views, key=lambda view: view.card.max_model_len)
        check_room(len(job.prompt), job.params.max_tokens, widest.card.max_model_len)
        check_tokens("prompt", job.prompt, widest.card)
        start = pb.Start(
            request_id=job.request_id, model=widest.model, seed=cast(int, job.params.seed)
        )
        if job.options.include_prompt_token_ids:
            start.prompt_token_ids.extend(job.prompt)
        return start

    async def _run(self, job: _Job, start: pb.Start) -> Stream:
        """Run on the best group, or on the next one while it has no output."""
        params = job.params
        answer = Answer(start, len(job.prompt), params.n, job.options, job.text, job.offer)
        ordered = order(job.views, num_tokens=len(job.prompt) + (params.max_tokens or 1))
        with self.metrics.request(start.model) as watch:
            for attempt, view in enumerate(ordered, 1):
                request = engine_request(
                    request_id=job.request_id,
                    prompt=job.prompt,
                    params=params,
                    priority=job.priority,
                    room=check_room(len(job.prompt), params.max_tokens, view.card.max_model_len),
                )
                try:
                    async with aclosing(self.groups.generate(view.group_id, request)) as steps:
                        async for outputs in steps:
                            watch.step(outputs)
                            message = answer.add(outputs)
                            if message is not None:
                                if answer.finished:
                                    watch.finish(message.usage)
                                yield message
                            if answer.finished:
                                return
                    raise Unavailable("the group ended the stream before the last token")
                except (Unavailable, Overloaded) as error:
                    if answer.started or attempt == len(ordered):
                        raise
                    log.info(
                        "%s: group %s: %s; trying the next", job.request_id, view.group_id, error
                    )


async def _sampling(message: pb.SamplingParams, card: ModelCard) -> SamplingParams:
    if message.HasField("grammar"):  # compiling may take half a second
        return await asyncio.to_thread(read_sampling, message, card)
    return read_sampling(message, card)


async def _offer(request: pb.ChatRequest) -> ToolOffer | None:
    if request.tool_name or request.tool_choice == pb.TOOL_CHOICE_REQUIRED:
        return await asyncio.to_thread(read_offer, request)
    return read_offer(request)


async def _encode(text: TextModel, request: pb.GenerateRequest | pb.TokenizeRequest) -> list[int]:
    if not request.text:
        raise InvalidRequest("prompt", "the prompt is empty; give `text` or `token_ids`")
    add = request.add_special_tokens if request.HasField("add_special_tokens") else True
    return await text.encode(request.text, add_special_tokens=add, trusted=request.parse_special)


async def _layout(
    text: TextModel, request: pb.ChatRequest | pb.Conversation, offer: ToolOffer | None
) -> list[int]:
    go_on = request.continue_final_message
    given = request.HasField("add_generation_prompt")
    return await text.encode_chat(
        read_messages(request.messages),
        add_generation_prompt=request.add_generation_prompt if given else not go_on,
        continue_final_message=go_on,
        tools=() if offer is None else offer.tools,
    )


def _model(name: str, views: Sequence[GroupView]) -> pb.Model:
    card: ModelCard = views[0].card
    return pb.Model(
        id=name,
        digest=card.digest,
        max_model_len=max(view.card.max_model_len for view in views),
        vocab_size=card.vocab_size,
        eos_token_ids=card.eos_token_ids,
        has_chat_template=card.chat_template is not None,
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
