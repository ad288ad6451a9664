"""Asks a served guard model for a verdict.

Makes the guard's prompt, runs it as a request of its own tenant, and reads verdict and score. Knows
models, prompts and requests; knows nothing of policies and of what follows from a verdict.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from arriero.router.backend import GroupView
from arriero.router.calls.checked_request import CheckedRequest
from arriero.router.calls.request_notes import RequestNotes
from arriero.router.guards.categories import NAMES, default_codes, with_names
from arriero.router.guards.conversation import Turn
from arriero.router.guards.prompts import build_prompt, replace_categories
from arriero.router.guards.verdict import (
    MAX_TOKENS,
    GuardLost,
    Verdict,
    read_verdict,
    unsafe_score,
)
from arriero.router.inference import Inference
from arriero.router.proto.arriero.v1 import inference_pb2 as pb
from arriero.router.requests import OutputOptions, read_sampling
from arriero.router.response import TextDelta
from arriero.router.tenants import model_scope
from arriero.router.tenants.admission_controller import Caller
from arriero.router.tenants.tenant import Tenant
from arriero.router.text.guard_template import guard_kind, has_guard_template
from arriero.router.text.images import GivenImage, PromptImage, read_image
from arriero.router.text.model_card import ModelCard
from arriero.router.text.text_model import TextModel
from arriero.shards.errors import ArrieroError, InvalidRequest

GUARD_TENANT = Tenant(name="arriero-guard", priority=-1000)
"""Tenant of the guard's requests: they go before all others, since answers wait for them."""
_TOP = 20


@dataclass(frozen=True, kw_only=True, slots=True)
class GuardCall:
    """Settings of a judgement.

    Attributes:
        guard: id of the guard model.
        categories: names by code; empty for the guard's own.
        request_id: name of the guard's request in logs.
        cache_salt: keeps the prompts of a tenant apart in the guard's prefix cache.
        timeout_s: seconds after which the judgement counts as lost.
    """

    guard: str
    categories: Mapping[str, str] = field(default_factory=dict)
    request_id: str = ""
    cache_salt: str = ""
    timeout_s: float = 10.0


class ModelGuard:
    """Guards that the deployment serves; `inference` runs their requests."""

    def __init__(self, inference: Inference) -> None:
        self._inference = inference

    async def judge(self, turns: Sequence[Turn], call: GuardCall) -> Verdict:
        """The guard's verdict on the last turn.

        Raises:
            GuardLost: the guard cannot answer, or not in time.
            InvalidRequest: the model is no guard, or cannot judge these categories.
        """
        # in a task of its own: the scope of the caller's key does not hold for the guard
        judging = asyncio.create_task(self._judge(turns, call))
        try:
            return await asyncio.wait_for(judging, call.timeout_s)
        except TimeoutError:
            raise GuardLost(
                f"guard {call.guard!r} gave no verdict within {call.timeout_s:g} s; try again later"
            ) from None
        except (GuardLost, InvalidRequest):
            raise
        except ArrieroError as error:
            raise GuardLost(f"guard {call.guard!r}: {error}") from error

    async def _judge(self, turns: Sequence[Turn], call: GuardCall) -> Verdict:
        model_scope.enter(())
        text, views = await self._inference.find(call.guard)
        card = views[0].card
        kind = guard_kind(card.guard, card.chat_template)
        if not kind:
            raise InvalidRequest(
                "model",
                f"`model`={call.guard!r} is no guard: its chat template makes no guard's prompt; "
                "name its kind as `guard` of the model in the spec, or choose a guard",
            )
        categories = with_names(call.categories) or {
            code: NAMES[code] for code in default_codes(kind)
        }
        prompt, images = await _encode(text, card, turns, categories, own=not call.categories)
        checked = _checked(text, views, prompt, images, call)
        # a guard's own template lists its own categories, maybe more than those that we would list
        is_own = not call.categories and has_guard_template(card.chat_template)
        return await self._run(checked, text, tuple(NAMES if is_own else categories))

    async def _run(
        self, checked: CheckedRequest, text: TextModel, codes: tuple[str, ...]
    ) -> Verdict:
        answer = ""
        rows: list[pb.PositionLogprobs] = []
        async with aclosing(self._inference.run(checked)) as messages:
            async for message in messages:
                if isinstance(message, TextDelta):
                    answer += message.text
                    continue
                for output in message.outputs:
                    answer += output.text
                    rows += output.logprobs

        def text_of(token: int) -> str:
            return text.tokenizer.decode([token], skip_special=True)

        return read_verdict(answer, unsafe_score(rows, text_of), codes)


def _checked(
    text: TextModel,
    views: Sequence[GroupView],
    prompt: list[int],
    images: Sequence[PromptImage],
    call: GuardCall,
) -> CheckedRequest:
    """The guard's request: greedy, with log-probabilities."""
    card = max((view.card for view in views), key=lambda card: card.max_model_len)
    room = max(1, card.max_model_len - len(prompt))
    sampling = pb.SamplingParams(
        temperature=0.0, max_tokens=min(MAX_TOKENS, room), seed=0, logprobs=_TOP
    )
    return CheckedRequest(
        caller=Caller(request_id=call.request_id or "guard", tenant=GUARD_TENANT),
        text=text,
        views=views,
        prompt=prompt,
        images=tuple(image.image for image in images),
        params=read_sampling(sampling, card),
        options=OutputOptions(cache_salt=call.cache_salt),
        priority=0,
        notes=RequestNotes(),
    )


async def _encode(
    text: TextModel,
    card: ModelCard,
    turns: Sequence[Turn],
    categories: Mapping[str, str],
    *,
    own: bool,
) -> tuple[list[int], list[PromptImage]]:
    """Token ids and images of the guard's prompt; the chat template is applied once.

    Args:
        text: texts and tokens of the guard.
        card: of the guard.
        turns: the conversation.
        categories: names by code.
        own: the guard's own categories are wanted, as its template writes them.
    """
    with_images = card.image_tile > 0
    files = [
        read_image(f"messages[{number}].parts", image)
        for number, turn in enumerate(turns)
        for image in (turn.images if with_images else ())
    ]
    rewrite = None
    if has_guard_template(card.chat_template):
        messages = [_message(turn.role, turn.text, turn, with_images) for turn in turns]
        rewrite = None if own else partial(replace_categories, categories=categories)
    else:
        whole = build_prompt(turns, categories)
        messages = [{"role": "user", "content": _content(whole, len(files))}]
    images = await _lay_out(text, files)
    tokens = await text.encode_chat(
        messages,
        add_generation_prompt=True,
        continue_final_message=False,
        images=images,
        rewrite=rewrite,
    )
    return tokens, images


async def _lay_out(text: TextModel, files: Sequence[GivenImage]) -> list[PromptImage]:
    return await text.images.lay_out(files) if files else []


def _message(role: str, words: str, turn: Turn, with_images: bool) -> dict[str, Any]:
    num_images = len(turn.images) if with_images else 0
    return {"role": role, "content": _content(words, num_images)}


def _content(words: str, num_images: int) -> str | list[dict[str, str]]:
    if not num_images:
        return words
    return [{"type": "image"}] * num_images + [{"type": "text", "text": words}]
