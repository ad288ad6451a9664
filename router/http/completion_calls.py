"""The calls of a completion's body, and the encoder of its answer.

Knows the bodies of `/v1/chat/completions` and `/v1/completions`; knows nothing of sending and of
resumption.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fastapi import Request

from arriero.router.calls.request_notes import RequestNotes
from arriero.router.http import responses, translate
from arriero.router.http.hosted_tools import check as check_hosted
from arriero.router.http.request_schemas import ChatBody, CompletionBody, Sampling
from arriero.router.http.stream import until_disconnect
from arriero.router.http.text_completion import TextCompletion
from arriero.router.http.token_fields import TokenFields
from arriero.router.inference import Inference, Stream
from arriero.router.proto.arriero.v1 import inference_pb2 as pb
from arriero.router.tenants.admission_controller import Caller
from arriero.router.text.text_model import TextModel

Json = dict[str, Any]
Call = pb.ChatRequest | pb.GenerateRequest


@dataclass(frozen=True, kw_only=True, slots=True)
class CompletionCalls:
    """The calls of one body.

    Attributes:
        calls: a call for each prompt.
        encoder: makes the JSON of the answer.
        n: samples of each call; sample k of call p is choice p * n + k.
        text: texts and tokens of the model.
    """

    calls: Sequence[Call]
    encoder: responses.ChatCompletion | TextCompletion
    n: int
    text: TextModel


async def chat_calls(
    body: ChatBody, request: Request, inference: Inference, head: Json | None = None
) -> CompletionCalls:
    """The call of a conversation.

    Args:
        body: of the request.
        request: ends the wait for a model when its client disconnects.
        inference: knows the models.
        head: common fields of the chunks; None for a new answer.

    Raises:
        ArrieroError: as `Inference.find` and `translate.chat_request`.
    """
    check_hosted(request, body.tools, "function")
    call = translate.chat_request(body)
    text, views = await until_disconnect(request, inference.find(call.model))
    encoder = responses.ChatCompletion(
        views[0].name,
        text.tokenizer,
        with_usage=_with_usage(body),
        head=head,
        tokens=TokenFields.of(body),
    )
    return CompletionCalls(calls=[call], encoder=encoder, n=body.n or 1, text=text)


async def text_calls(
    body: CompletionBody, request: Request, inference: Inference, head: Json | None = None
) -> CompletionCalls:
    """The calls of one prompt or several; arguments and errors as of `chat_calls`."""
    calls = translate.generate_requests(body)
    text, views = await until_disconnect(request, inference.find(calls[0].model))
    encoder = TextCompletion(
        views[0].name,
        text.tokenizer,
        n=body.n or 1,
        echo=[call.text for call in calls] if body.echo else None,
        skip_special=body.skip_special_tokens is not False,
        prompt_only=body.prompt_only,
        with_usage=_with_usage(body),
        head=head,
        tokens=TokenFields.of(body),
    )
    return CompletionCalls(calls=calls, encoder=encoder, n=body.n or 1, text=text)


async def begin(inference: Inference, call: Call, caller: Caller, notes: RequestNotes) -> Stream:
    """The stream of a call; errors as of `Inference.chat` and `Inference.generate`."""
    if isinstance(call, pb.ChatRequest):
        return await inference.chat(call, caller, notes)
    return await inference.generate(call, caller, notes)


def _with_usage(body: Sampling) -> bool:
    return body.stream_options is not None and body.stream_options.include_usage
