"""Canary tokens: single tokens that pass through every slice, at the start and while idle.

Knows the engine's `submit` and outputs; knows nothing of slices. The caller decides about a token
that does not come.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Sequence

from arriero.shards.config.sampling_params import SamplingParams
from arriero.shards.engine.engine import Engine
from arriero.shards.engine.types import EngineRequest, SequenceOutput
from arriero.shards.errors import GroupFailed

_NAME = "canary/"
_PARAMS = SamplingParams(max_tokens=1, temperature=0.0, seed=0, ignore_eos=True)


class Canary:
    """Generates single tokens on an engine; for use in one event loop."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._loop = asyncio.get_running_loop()
        self._numbers = itertools.count()
        self._waiting: dict[str, asyncio.Future[SequenceOutput]] = {}

    async def draw(self, prompt: tuple[int, ...] = (0,)) -> SequenceOutput:
        """Generate one token after a prompt.

        Raises:
            GroupFailed: no token came; the text is the cause.
            InvalidRequest: the prompt is too long.
            Overloaded: the queue is full.
            Unavailable: the engine has failed or was stopped.
        """
        name = f"{_NAME}{next(self._numbers)}"
        waiting = self._waiting[name] = self._loop.create_future()
        try:
            self._engine.submit(EngineRequest(request_id=name, prompt=prompt, params=_PARAMS))
            output: SequenceOutput = await waiting
        finally:
            del self._waiting[name]
        if not output.tokens:
            raise GroupFailed(f"no token came: {output.error or output.finish_reason}")
        return output

    def take(self, outputs: Sequence[SequenceOutput]) -> None:
        """Pick canary tokens from the outputs of a step; called from the engine's thread."""
        for output in outputs:
            if output.request_id in self._waiting and output.finish_reason is not None:
                self._loop.call_soon_threadsafe(self._arrived, output)

    def give_up(self, error: Exception) -> None:
        """Raise `error` in all calls of `draw` that wait."""
        for waiting in self._waiting.values():
            if not waiting.done():
                waiting.set_exception(error)

    def _arrived(self, output: SequenceOutput) -> None:
        waiting = self._waiting.get(output.request_id)
        if waiting is not None and not waiting.done():
            waiting.set_result(output)
