"""The stream of an answer under a tenant's safety policy, the same for every API.

The input is judged beside the prefill: the requests to guard and Prompt Guard and the request
itself start together, and under "refuse" nothing is shown before the verdicts. Under "cut" the
output passes through `OutputWindows`. While a guard judges, the engine goes on; the group's outputs
wait meanwhile.

Knows messages, policies and judges; knows nothing of prompts, models and protocols.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from arriero.router.guards.conversation import Turn, with_output
from arriero.router.guards.policy import OutputWindows
from arriero.router.guards.verdict import GuardLost, Verdict
from arriero.router.proto.arriero.v1 import inference_pb2 as pb
from arriero.router.response import Message, TextDelta
from arriero.router.tenants.safety import InputAction, SafetyPolicy
from arriero.shards.errors import InvalidRequest, Unavailable

log = logging.getLogger(__name__)

FILTERED = pb.FINISH_REASON_CONTENT_FILTER
INPUT, INPUT_PROMPT_GUARD, OUTPUT = "input", "input_prompt_guard", "output"
"""Subjects of verdicts in an answer: the guard's two, and Prompt Guard's."""


class Judge(Protocol):
    """Judges the last turn of a conversation under a policy."""

    async def __call__(self, turns: Sequence[Turn]) -> Verdict:
        """The verdict.

        Raises:
            GuardLost: there is no verdict.
        """


@dataclass(frozen=True, kw_only=True, slots=True)
class Shown:
    """The parts of an output that the client asked for; the guard itself needs all.

    Attributes:
        text, token_ids: whether messages have text and token ids.
    """

    text: bool = True
    token_ids: bool = True


@dataclass(frozen=True, slots=True)
class _InputCheck:
    """A check of the input that runs beside the prefill.

    Attributes:
        subject: of the verdict in the answer.
        action: what follows from the verdict.
        verdict: task of the judgement; its result is as of `GuardedStream._ask`.
    """

    subject: str
    action: InputAction
    verdict: asyncio.Task[Verdict | None]


class GuardedStream:
    """One answer under a policy.

    Args:
        policy: of the tenant.
        judge: gives verdicts.
        turns: the conversation; the last turn is the input.
        num_samples: samples of the answer.
        shown: parts of the output that the client gets.
        longest_stop: characters of the longest stop string, which text may lag behind tokens.
        before: by sample, text that the client has already.
        find_injections: Prompt Guard's verdict on the input, for a policy that asks for one.
    """

    def __init__(
        self,
        policy: SafetyPolicy,
        judge: Judge,
        turns: Sequence[Turn],
        num_samples: int,
        *,
        shown: Shown | None = None,
        longest_stop: int = 0,
        before: Mapping[int, str] | None = None,
        find_injections: Callable[[], Awaitable[Verdict]] | None = None,
    ) -> None:
        self._policy, self._judge, self._turns = policy, judge, turns
        self._shown = shown or Shown()
        self._windows = [
            OutputWindows[pb.Output](
                window=policy.window,
                overlap=max(policy.overlap, longest_stop),
                before=(before or {}).get(index, ""),
            )
            for index in range(num_samples)
        ]
        self._find_injections = find_injections
        self._checks: list[_InputCheck] = []
        self._start: pb.Start | None = None
        self._sent_start = False
        self._usage: pb.Usage | None = None
        self._verdicts: list[pb.SafetyVerdict] = []

    async def run(self, stream: AsyncGenerator[Message]) -> AsyncGenerator[Message]:
        """The messages that may be shown; closing the iterator closes `stream`.

        Raises:
            InvalidRequest: the input is unsafe and the policy refuses such inputs.
            Unavailable: a verdict is missing and the policy needs it.
        """
        if self._policy.input != "off":
            self._check(INPUT, self._policy.input, partial(self._judge, self._turns))
        if self._find_injections is not None and self._policy.prompt_guard is not None:
            action = self._policy.prompt_guard.input
            self._check(INPUT_PROMPT_GUARD, action, self._find_injections)
        try:
            async with aclosing(stream), aclosing(self._after_input(stream)) as messages:
                async for message in messages:
                    for part in await self._take(message):
                        yield part
                    if self._done:
                        return
        finally:
            tasks = [check.verdict for check in self._checks]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def _check(
        self, subject: str, action: InputAction, judge: Callable[[], Awaitable[Verdict]]
    ) -> None:
        """Start a check of the input."""
        judging = asyncio.create_task(self._ask(judge, needed=action == "refuse"))
        self._checks.append(_InputCheck(subject, action, judging))

    @property
    def _done(self) -> bool:
        if self._policy.output == "off":
            return self._usage is not None
        return not any(window.open for window in self._windows)

    async def _after_input(self, stream: AsyncGenerator[Message]) -> AsyncGenerator[Message]:
        """The messages of `stream`; under "refuse" the verdicts on the input go first.

        An unsafe input ends the request at once, also while it waits or computes its prompt.
        """
        refusing = [check.verdict for check in self._checks if check.action == "refuse"]
        if refusing:
            first = asyncio.ensure_future(anext(stream, None))
            try:
                await asyncio.wait({first, *refusing}, return_when=asyncio.FIRST_COMPLETED)
                if first.done():
                    first.result()  # a refused request needs no verdict
                for judged in asyncio.as_completed(refusing):
                    self._refuse_unsafe(await judged)
                message = await first
            finally:
                first.cancel()
                await asyncio.gather(first, return_exceptions=True)
            if message is None:
                return
            yield message
        async for message in stream:
            yield message

    def _refuse_unsafe(self, verdict: Verdict | None) -> None:
        if verdict is None or not verdict.flagged:
            return
        codes = ", ".join(verdict.categories) or "no category named"
        raise InvalidRequest(
            "messages",
            f"the input was judged as unsafe ({codes}); change the input",
            "content_filter",
        )

    async def _ask(
        self, judge: Callable[[], Awaitable[Verdict]], *, needed: bool
    ) -> Verdict | None:
        """A verdict; None for a lost guard, under "open" or where no action needs the verdict.

        Raises:
            Unavailable: the guard is lost, under "closed", and an action needs the verdict.
        """
        try:
            return await judge()
        except (GuardLost, InvalidRequest) as error:
            log.warning("no verdict: %s", error)
            if self._policy.on_loss == "open" or not needed:
                return None
            raise Unavailable(f"the safety check gave no verdict: {error}") from error

    async def _take(self, message: Message) -> Sequence[Message]:
        """The messages to show for a message of the answer."""
        if self._policy.output == "off":
            if not isinstance(message, TextDelta) and message.HasField("usage"):
                self._usage = message.usage
                await self._annotate()
                message.safety.extend(self._verdicts)
            return [message]
        whole = message.to_wire() if isinstance(message, TextDelta) else message
        if whole.HasField("start"):
            self._start = whole.start
        if whole.HasField("usage"):
            self._usage = whole.usage
        outputs: list[pb.Output] = []
        if self._policy.output == "cut":
            for output in whole.outputs:
                outputs += await self._through_window(output)
        else:
            for output in whole.outputs:
                self._add(output)
                self._windows[output.index].accept()  # shown at once, nothing is held
                outputs.append(output)
        ended = self._done or self._usage is not None
        if ended:
            await self._annotate()
        return self._messages(outputs, ended=ended)

    async def _through_window(self, output: pb.Output) -> list[pb.Output]:
        window = self._windows[output.index]
        if not window.open:
            return []
        self._add(output)
        if not window.needs_judgement:
            return []
        verdict = await self._ask(self._of_output(window), needed=True)
        if verdict is None or not verdict.flagged:
            return window.accept()
        window.condemn()
        self._verdicts.append(_message(verdict, OUTPUT, output.index))
        return [pb.Output(index=output.index, finish_reason=FILTERED)]

    def _add(self, output: pb.Output) -> None:
        self._windows[output.index].add(
            output, _text(output), len(output.token_ids), final=bool(output.finish_reason)
        )

    async def _annotate(self) -> None:
        """Collect the verdicts for the last message."""
        inputs = []
        for check in self._checks:
            verdict = await check.verdict if check.action == "annotate" else None
            if verdict is not None:
                inputs.append(_message(verdict, check.subject, 0))
        self._verdicts[:0] = inputs
        if self._policy.output != "annotate":
            return
        for index, window in enumerate(self._windows):
            verdict = await self._ask(self._of_output(window), needed=False)
            if verdict is not None:
                self._verdicts.append(_message(verdict, OUTPUT, index))

    def _of_output(self, window: OutputWindows[pb.Output]) -> Callable[[], Awaitable[Verdict]]:
        """The judgement of an output so far."""
        return partial(self._judge, with_output(self._turns, window.text))

    def _messages(self, outputs: Sequence[pb.Output], *, ended: bool) -> list[pb.GenerateResponse]:
        """Messages with at most one output of a sample, with start and usage where they belong."""
        messages = []
        for output in outputs:
            if not self._shown.text:
                output.text = ""
            if not self._shown.token_ids:
                del output.token_ids[:]
            messages.append(pb.GenerateResponse(outputs=[output]))
        if ended and not messages:
            messages.append(pb.GenerateResponse())
        if messages and not self._sent_start and self._start is not None:
            self._sent_start = True
            messages[0].start.CopyFrom(self._start)
        if ended:
            messages[-1].usage.CopyFrom(self._usage or self._counted())
            messages[-1].safety.extend(self._verdicts)
        return messages

    def _counted(self) -> pb.Usage:
        """The usage of an answer that ended before its engine did."""
        start = self._start or pb.Start()
        return pb.Usage(
            prompt_tokens=start.prompt_tokens,
            cached_tokens=start.cached_tokens,
            written_tokens=start.written_tokens,
            completion_tokens=sum(window.num_tokens for window in self._windows),
        )


def _text(output: pb.Output) -> str:
    """What an output says: its text, and the calls of tools where they stand."""
    said, at = "", 0
    for call, end in zip(output.tool_calls, output.tool_call_offsets, strict=False):
        said += f"{output.text[at:end]}{call.name}({call.arguments})"
        at = end
    return said + output.text[at:] + output.truncated_tool_call


def _message(verdict: Verdict, subject: str, index: int) -> pb.SafetyVerdict:
    return pb.SafetyVerdict(
        subject=subject,
        index=index,
        flagged=verdict.flagged,
        categories=verdict.categories,
        score=verdict.score,
    )
