"""The guards of a gateway: protection of answers, and moderation of texts.

Joins policies, judges and requests. Knows tenants' policies and the default guard; knows nothing of
protocols and JSON.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

from arriero.router.calls.checked_request import CheckedRequest
from arriero.router.guards.categories import with_names
from arriero.router.guards.conversation import Turn, outside_texts, read_turns
from arriero.router.guards.guarded_stream import INPUT_PROMPT_GUARD, GuardedStream, Shown
from arriero.router.guards.injections import PROMPT_GUARD, InjectionGuard, ScoreTexts
from arriero.router.guards.model_guard import GuardCall, ModelGuard
from arriero.router.guards.verdict import Verdict
from arriero.router.inference import Inference, Stream
from arriero.router.observability.guard_metrics import GuardMetrics, Outcome
from arriero.router.proto.arriero.v1 import inference_pb2 as pb
from arriero.router.tenants import model_scope
from arriero.router.tenants.admission_controller import Caller
from arriero.router.tenants.safety import SafetyPolicy
from arriero.shards.errors import InvalidRequest

MAX_INPUTS = 128
MODERATION_TIMEOUT_S = 120.0
_FOREIGN = ("omni-moderation-", "text-moderation-")
"""Beginnings of OpenAI's model names, which its clients send by default."""


class Guards:
    """The guards behind one `Inference`.

    Args:
        inference: runs the guards' requests.
        default: id of the guard model for moderations that name none; "" for none.
        score_texts: Prompt Guard of the deployment; None for none.
    """

    def __init__(
        self, inference: Inference, default: str = "", score_texts: ScoreTexts | None = None
    ) -> None:
        self._guard = ModelGuard(inference)
        self._injections = InjectionGuard(score_texts)
        self._inference = inference
        self._default = default

    def protect(self, checked: CheckedRequest, run: Callable[[CheckedRequest], Stream]) -> Stream:
        """The messages of a request that its tenant's policy lets through."""
        policy = checked.caller.tenant.safety
        if policy is None or not policy.checks:
            return run(checked)
        shown = Shown(
            text=checked.options.include_text, token_ids=checked.options.include_token_ids
        )
        if policy.output != "off":  # the guard reads text and counts tokens
            options = replace(checked.options, include_text=True, include_token_ids=True)
            checked = replace(checked, options=options)
        decode = checked.text.tokenizer.decode
        turns = _turns(checked)
        guarded = GuardedStream(
            policy,
            self._judge(checked.caller, policy, turns),
            turns,
            checked.params.n,
            shown=shown,
            longest_stop=max(map(len, checked.options.stop), default=0),
            before={
                index: decode(tokens, skip_special=True)
                for index, (tokens, _) in checked.received.items()
            },
            find_injections=self._injection_check(checked, policy),
        )
        return guarded.run(run(checked))

    def _injection_check(
        self, checked: CheckedRequest, policy: SafetyPolicy
    ) -> Callable[[], Awaitable[Verdict]] | None:
        """Prompt Guard's judgement of a request; None where the policy asks for none."""
        if policy.prompt_guard is None or not policy.checks_injections:
            return None
        texts = outside_texts(checked.messages) if checked.messages else (_words(checked),)
        judge = partial(
            self._injections.judge,
            texts,
            tenant=checked.caller.tenant.name,
            threshold=policy.prompt_guard.threshold,
            timeout_s=policy.timeout_s,
        )
        counted = self._counted(checked.caller, PROMPT_GUARD, INPUT_PROMPT_GUARD)
        return lambda: _count(judge(), counted)

    def _judge(self, caller: Caller, policy: SafetyPolicy, turns: Sequence[Turn]) -> _PolicyJudge:
        salt = caller.tenant.name if caller.tenant.private_cache else ""
        call = GuardCall(
            guard=policy.guard,
            categories=policy.categories,
            request_id=f"{caller.request_id}/guard"[:128],
            cache_salt=salt,
            timeout_s=policy.timeout_s,
        )

        def count(given: Sequence[Turn]) -> _Counted:
            name = f"input_{policy.input}" if given is turns else f"output_{policy.output}"
            return self._counted(caller, policy.guard, name)

        return _PolicyJudge(self._guard, call, count)

    def _counted(self, caller: Caller, guard: str, policy: str) -> _Counted:
        return _Counted(self._inference.metrics.guards, caller.tenant.name, guard, policy)

    async def moderate(self, request: pb.ModerateRequest, caller: Caller) -> pb.ModerateResponse:
        """Verdicts on the inputs of a request.

        Raises:
            InvalidRequest: a field breaks its limit, or the model is no guard.
            NotFound, Unavailable: the guard is not served, or gave no verdict.
        """
        if not 1 <= len(request.inputs) <= MAX_INPUTS:
            raise InvalidRequest(
                "input",
                f"`input` has {len(request.inputs)} entries; give 1 to {MAX_INPUTS}",
            )
        guard = self._model(request.model)
        if guard != self._default:
            await self._inference.find(
                guard
            )  # an unknown name is the caller's error, no lost guard
        categories = with_names(request.categories)
        call = GuardCall(
            guard=guard,
            categories=categories,
            request_id=f"{caller.request_id}/guard"[:128],
            cache_salt=caller.tenant.name if caller.tenant.private_cache else "",
            timeout_s=MODERATION_TIMEOUT_S,
        )
        inputs = [_input(entry) for entry in request.inputs]
        counted = None
        if guard in self._inference.groups.names():  # a caller's invention makes no new label
            counted = self._counted(caller, guard, "moderation")
        judging = [
            _count(self._guard.judge(turns, call), counted, uncounted=(InvalidRequest,))
            for turns in inputs
        ]
        response = pb.ModerateResponse(model=guard)
        for verdict in await asyncio.gather(*judging):
            response.verdicts.append(_message(verdict))
        return response

    def _model(self, model: str) -> str:
        foreign = model.startswith(_FOREIGN) and model not in self._inference.groups.names()
        if self._default and (not model or foreign):
            return self._default
        if not model:
            raise InvalidRequest(
                "model",
                "`model` is empty and the gateway has no default guard; name a guard, or set "
                "`gateway.guard` in the spec",
            )
        return model_scope.resolve(model, self._inference.groups.names())


class _PolicyJudge:
    """A judge with the settings of a policy.

    Args:
        guard: gives verdicts.
        call: the settings.
        count: gives the labels under which the judgement of some turns is counted.
    """

    def __init__(
        self, guard: ModelGuard, call: GuardCall, count: Callable[[Sequence[Turn]], _Counted]
    ) -> None:
        self._guard, self._call, self._count = guard, call, count

    async def __call__(self, turns: Sequence[Turn]) -> Verdict:
        return await _count(self._guard.judge(turns, self._call), self._count(turns))


@dataclass(frozen=True, slots=True)
class _Counted:
    """The labels of a judgement.

    Attributes:
        metrics: count the judgement.
        tenant, guard, policy: as in `GuardMetrics.judged`.
    """

    metrics: GuardMetrics
    tenant: str
    guard: str
    policy: str


async def _count(
    judging: Awaitable[Verdict],
    counted: _Counted | None,
    *,
    uncounted: tuple[type[Exception], ...] = (),
) -> Verdict:
    """A verdict, counted; a judgement that is cancelled counts for nothing.

    Args:
        judging: the judgement.
        counted: labels; None to count nothing.
        uncounted: errors that count for nothing, since the caller made them.
    """
    if counted is None:
        return await judging
    start_s = time.monotonic()
    outcome: Outcome = "lost"
    try:
        verdict = await judging
        outcome = "unsafe" if verdict.flagged else "safe"
    except BaseException as error:
        if isinstance(error, (asyncio.CancelledError, *uncounted)):
            counted = None
        raise
    finally:
        if counted is not None:
            counted.metrics.judged(
                tenant=counted.tenant,
                guard=counted.guard,
                policy=counted.policy,
                outcome=outcome,
                elapsed_s=time.monotonic() - start_s,
            )
    return verdict


def _turns(checked: CheckedRequest) -> tuple[Turn, ...]:
    """The conversation of a request; a prompt counts as the user's words."""
    turns = read_turns(checked.messages)
    if turns:
        return turns
    return (Turn(role="user", text=_words(checked)),)


def _words(checked: CheckedRequest) -> str:
    """The text of a prompt."""
    return checked.text.tokenizer.decode(checked.prompt, skip_special=True)


def _input(entry: pb.ModerateInput) -> tuple[Turn, ...]:
    turns = read_turns(entry.messages)
    if not turns:
        raise InvalidRequest(
            "input", "an input has no message of a user or an assistant; give at least one"
        )
    return turns


def _message(verdict: Verdict) -> pb.SafetyVerdict:
    return pb.SafetyVerdict(
        subject="input",
        flagged=verdict.flagged,
        categories=verdict.categories,
        score=verdict.score,
    )
