"""A request in a group, as the gateway's end of the link sees the request.

Knows outputs and token counts; knows nothing of frames or connections.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Self

from arriero.shards.engine.types import EngineRequest, SequenceOutput
from arriero.shards.errors import ArrieroError

EXPECTED_OUTPUT = 512
"""Largest number of output tokens expected of a request, for load only: a request without
`max_tokens` would otherwise weigh as much as the whole context."""


class Call:
    """A request in a group; iteration gives the outputs. See `Running`.

    Args:
        request: the request.
        num_cached: expected number of cached prompt tokens in the group.
        on_end: called when the reader has reached the end or has left.
    """

    __slots__ = ("_expected", "_on_end", "_outputs", "_prompt", "_waiter", "error", "unfinished")

    def __init__(
        self, request: EngineRequest, num_cached: int, on_end: Callable[[Call], None]
    ) -> None:
        self.unfinished = set(range(request.params.n))
        self.error: ArrieroError | None = None
        self._on_end = on_end
        self._outputs: list[SequenceOutput] = []
        self._waiter: asyncio.Future[None] | None = None
        self._prompt = max(1, len(request.prompt) + len(request.resumed) - num_cached)
        limit = min(request.params.max_tokens or EXPECTED_OUTPUT, EXPECTED_OUTPUT)
        self._expected = limit * request.params.n

    @property
    def running(self) -> bool:
        """Whether outputs are still to come or to be read."""
        return bool(self.unfinished or self._outputs)

    @property
    def prefill(self) -> int:
        """Prompt tokens still to compute; 0 from the first output on."""
        return self._prompt

    @property
    def outstanding(self) -> int:
        """Expected number of tokens still to compute."""
        return self._prompt + max(self._expected, 0)

    def put(self, output: SequenceOutput) -> None:
        """Add an output; the reader sees the output after `wake`."""
        if output.index not in self.unfinished:
            return  # output of a step that ran when the sample was cancelled
        self._outputs.append(output)
        self._expected -= len(output.tokens)
        self._prompt = 0
        if output.finish_reason is not None:
            self.unfinished.discard(output.index)

    def fail(self, error: ArrieroError) -> None:
        """End the call with an error; the reader gets earlier outputs first."""
        if self.error is None:
            self.error = error
        self.wake()

    def wake(self) -> None:
        """Wake the reader."""
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def __aiter__(self) -> Self:
        """The call itself."""
        return self

    async def __anext__(self) -> list[SequenceOutput]:
        """New outputs since the last read; outputs before a failure come before the error."""
        while not self._outputs:
            if not self.unfinished:
                self._on_end(self)
                raise StopAsyncIteration
            if self.error is not None:
                self._on_end(self)
                raise self.error
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        outputs, self._outputs = self._outputs, []
        return outputs

    async def aclose(self) -> None:
        """Stop reading; cancels the request unless all outputs were read."""
        self._on_end(self)
