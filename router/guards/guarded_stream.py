"""The stream of an answer under a tenant's safety policy, the same for every API.

The input is judged beside the prefill: the guard's request and the request itself start together,
and under "refuse" nothing is shown before the verdict. Under "cut" the output passes through
`OutputWindows`. While a guard judges, the engine goes on; the group's outputs wait meanwhile.

Knows messages, policies and judges; knows nothing of prompts, models and protocols.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Protocol

from arriero.router.guards.conversation import Turn, with_output
from arriero.router.guards.policy import OutputWindows
from arriero.router.guards.verdict import GuardLost, Verdict
from arriero.router.proto.arriero.v1 import inference_pb2 as pb
from arriero.router.response import Message, TextDelta
from arriero.router.tenants.safety import SafetyPolicy
from arriero.shards.errors import InvalidRequest, Unavailable

log = logging.getLogger(__name__)

FILTERED = pb.FINISH_REASON_CONTENT_FILTER


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
        self._input: asyncio.Task[Verdict | None] | None = None
        self._input_passed = policy.input != "refuse"
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
            needed = self._policy.input == "refuse"
            self._input = asyncio.create_task(self._ask(self._turns, needed=needed))
        try:
            async with aclosing(stream), aclosing(self._after_input(stream)) as messages:
                async for message in messages:
                    for part in await self._take(message):
                        yield part
                    if self._done:
                        return
        finally:
            if self._input is not None:
                self._input.cancel()
                await asyncio.gather(self._input, return_exceptions=True)

    @property
    def _done(self) -> bool:
        if self._policy.output == "off":
            return self._usage is not None
        return not any(window.open for window in self._windows)

    async def _after_input(self, stream: AsyncGenerator[Message]) -> AsyncGenerator[Message]:
        """The messages of `stream`; under "refuse" the verdict on the input goes first.

        An unsafe input ends the request at once, also while it waits or computes its prompt.
        """
        if not self._input_passed:
            first = asyncio.ensure_future(anext(stream, None))
            assert self._input is not None, "the input is judged"
            try:
                await asyncio.wait({first, self._input}, return_when=asyncio.FIRST_COMPLETED)
                if first.done():
                    first.result()  # a refused request needs no verdict
                self._check_input(await self._input)
                message = await first
            finally:
                first.cancel()
                await asyncio.gather(first, return_exceptions=True)
            self._input_passed = True
            if message is None:
                return
            yield message
        async for message in stream:
            yield message

    def _check_input(self, verdict: Verdict | None) -> None:
        if verdict is None or not verdict.flagged:
            return
        codes = ", ".join(verdict.categories) or "no category named"
        raise InvalidRequest(
            "messages",
            f"the input was judged as unsafe ({codes}); change the input",
            "content_filter",
        )

    async def _ask(self, turns: Sequence[Turn], *, needed: bool) -> Verdict | None:
        """A verdict; None for a lost guard, under "open" or where no action needs the verdict.

        Raises:
            Unavailable: the guard is lost, under "closed", and an action needs the verdict.
        """
        try:
            return await self._judge(turns)
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
        verdict = await self._ask(with_output(self._turns, window.text), needed=True)
        if verdict is None or not verdict.flagged:
            return window.accept()
        window.condemn()
        self._verdicts.append(_message(verdict, "output", output.index))
        return [pb.Output(index=output.index, finish_reason=FILTERED)]

    def _add(self, output: pb.Output) -> None:
        self._windows[output.index].add(
            output, _text(output), len(output.token_ids), final=bool(output.finish_reason)
        )

    async def _annotate(self) -> None:
        """Collect the verdicts for the last message."""
        if self._policy.input == "annotate":
            assert self._input is not None, "the input is judged"
            verdict = await self._input
            if verdict is not None:
                self._verdicts.insert(0, _message(verdict, "input", 0))
        if self._policy.output != "annotate":
            return
        for index, window in enumerate(self._windows):
            verdict = await self._ask(with_output(self._turns, window.text), needed=False)
            if verdict is not None:
                self._verdicts.append(_message(verdict, "output", index))

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
