"""Sampling parameters with the grammar of a structured output or of forced tool calls.

Knows the sampling message, tools and grammars; knows nothing of streams or groups.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from functools import partial

from arriero.router.calls.conversation import ToolOffer
from arriero.router.proto.arriero.v1 import inference_pb2 as pb
from arriero.router.requests import read_sampling
from arriero.router.text.call_grammar import calls_or_form, strict_form
from arriero.router.text.constraints import Form, call_form, read_form
from arriero.router.text.model_card import ModelCard
from arriero.router.text.text_model import TextModel
from arriero.shards.config.sampling_params import SamplingParams
from arriero.shards.errors import InvalidRequest


async def read_constrained_sampling(
    message: pb.SamplingParams, card: ModelCard, text: TextModel, offer: ToolOffer | None
) -> tuple[SamplingParams, Form | None]:
    """Checked sampling parameters, and the form that the output must fit.

    Args:
        message: as the client sent it.
        card: facts about the model.
        text: tokenizer and grammars of the model.
        offer: the tools on offer; None for none.

    Raises:
        InvalidRequest: a parameter, the form or a tool's schema breaks a limit.
    """
    params = read_sampling(message, card)
    form = await _form(message.structured, text, offer)
    if form is None:
        return params, None
    replace(params, grammar=form.grammar).check(vocab_size=card.vocab_size)
    form = await text.grammars.check(_field(message.structured), form)
    return replace(params, grammar=form.grammar), form


def _field(structured: pb.StructuredOutput) -> str:
    return structured.WhichOneof("form") or "tools"


async def _form(
    structured: pb.StructuredOutput, text: TextModel, offer: ToolOffer | None
) -> Form | None:
    if '"pattern' in structured.json_schema:  # checking a pattern compiles the pattern
        form = await asyncio.to_thread(read_form, structured)
    else:
        form = read_form(structured)
    if offer is None:
        return form
    make: Callable[[], Form] | None = None
    if offer.forced:
        field = _field(structured)
        if form is not None and not field.startswith("json"):
            raise InvalidRequest(
                field,
                f"`{field}` and a `tool_choice` that forces a call exclude each other: a call "
                "cannot fit the form; leave out one of the two",
            )
        make = partial(call_form, offer.forced, parallel=offer.parallel)
    elif form is not None:
        make = partial(calls_or_form, offer.tools, form, parallel=offer.parallel)
    elif offer.strict:
        make = partial(strict_form, offer.strict, tags=text.call_tags)
    return form if make is None else await asyncio.to_thread(make)
