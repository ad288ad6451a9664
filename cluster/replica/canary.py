"""A token drawn through every slice: at the start, and now and then while a group is idle.

Knows the engine's `submit` and outputs; knows nothing of slices. What a token that does not come
means, its caller decides.
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
    """Draws single tokens on one engine; used from one event loop."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._loop = asyncio.get_running_loop()
        self._numbers = itertools.count()
        self._due: dict[str, asyncio.Future[SequenceOutput]] = {}

    async def draw(self, prompt: tuple[int, ...] = (0,)) -> SequenceOutput:
        """Wait for one token after a prompt.

        Raises:
            GroupFailed: it did not come; the text is the cause.
            InvalidRequest: the prompt is too long.
            Overloaded: as many requests wait as may.
            Unavailable: the engine has failed or was stopped.
        """
        name = f"{_NAME}{next(self._numbers)}"
        due = self._due[name] = self._loop.create_future()
        try:
            self._engine.submit(EngineRequest(request_id=name, prompt=prompt, params=_PARAMS))
            first: SequenceOutput = await due
        finally:
            del self._due[name]
        if not first.tokens:
            raise GroupFailed(f"no token came: {first.error or first.finish_reason}")
        return first

    def take(self, outputs: Sequence[SequenceOutput]) -> None:
        """Look through a step's outputs; called from the engine's thread."""
        for output in outputs:
            if output.request_id in self._due and output.finish_reason is not None:
                self._loop.call_soon_threadsafe(self._arrived, output)

    def give_up(self, error: Exception) -> None:
        """Whoever waits for a token gets `error` instead."""
        for due in self._due.values():
            if not due.done():
                due.set_exception(error)

    def _arrived(self, output: SequenceOutput) -> None:
        due = self._due.get(output.request_id)
        if due is not None and not due.done():
            due.set_result(output)
