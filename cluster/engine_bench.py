"""Measured cells: N requests at once, each of P prompt tokens and O output tokens.

Knows the definition, the clock and the figures of a cell, and drives an engine in this process;
knows nothing of the terminal.
"""

from __future__ import annotations

import hashlib
import queue
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np

from arriero.shards.config.sampling_params import SamplingParams
from arriero.shards.errors import GroupFailed

if TYPE_CHECKING:
    from arriero.shards.config.group import GroupConfig
    from arriero.shards.engine.types import SequenceOutput
    from arriero.shards.leader.loading import Loading
    from arriero.shards.leader.local_executor import LocalExecutor
    from arriero.shards.leader.remote_executor import RemoteExecutor

START_LIMIT_S = 600.0
PERCENTILES = (50, 90, 99)


@dataclass(frozen=True, kw_only=True, slots=True)
class Cell:
    """The load of a measurement.

    Attributes:
        requests: number of requests, all submitted at once.
        prompt: prompt tokens of each request.
        output: output tokens of each request.
    """

    requests: int
    prompt: int
    output: int

    def prompts(self) -> list[list[int]]:
        """Token ids of each prompt; no two prompts share a prefix."""
        return [
            [(7 * i + 13 * j) % 40000 + 100 for j in range(self.prompt)]
            for i in range(self.requests)
        ]

    def blocks(self, block_size: int = 16) -> int:
        """KV blocks that hold all sequences of the cell at once."""
        blocks_each = -(-(self.prompt + self.output + 1) // block_size)
        return max(64, self.requests * (blocks_each + 1))


WARM_UP = Cell(requests=1, prompt=16, output=16)
"""Runs first; not measured."""


def params(output: int) -> SamplingParams:
    """Sampling parameters of a request: greedy, exactly `output` tokens without a stop."""
    return SamplingParams(temperature=0.0, max_tokens=output, ignore_eos=True, seed=0)


class Clock:
    """Arrival times of the tokens of each request; call `start`, then `record` at each arrival.

    Args:
        requests: number of requests.
        output: output tokens of each request.
        exact: whether each request must give all of these tokens.
    """

    def __init__(self, requests: int, output: int, exact: bool = True) -> None:
        self._output, self._exact = output, exact
        self._arrivals: list[list[float]] = [[] for _ in range(requests)]
        self._start_s = 0.0

    def start(self) -> None:
        """Start the clock, just before the first request is submitted."""
        self._start_s = time.perf_counter()

    def record(self, request: int, num_tokens: int) -> None:
        """Record that `num_tokens` tokens of request number `request` arrive now."""
        now_s = time.perf_counter()
        self._arrivals[request].extend([now_s] * num_tokens)

    def figures(self) -> Figures:
        """The figures of the cell; call after the last token."""
        short = [i for i, times in enumerate(self._arrivals) if len(times) != self._output]
        assert not (self._exact and short), f"requests {short} did not give {self._output} tokens"
        elapsed_s = max(times[-1] for times in self._arrivals) - self._start_s
        first = [times[0] - self._start_s for times in self._arrivals]
        gaps = [gap for times in self._arrivals for gap in np.diff(times)]
        return Figures(
            elapsed_s=round(elapsed_s, 3),
            output_tok_s=round(sum(map(len, self._arrivals)) / elapsed_s, 1),
            ttft_ms=_percentiles(first),
            itl_ms=_percentiles(gaps),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Figures:
    """The result of a cell.

    Attributes:
        elapsed_s: seconds from the submission of the first request to the last token.
        output_tok_s: output tokens per second over the whole cell, prefill included.
        ttft_ms: time to first token; percentiles over requests.
        itl_ms: time between tokens; percentiles over all gaps; empty for a single output token.
        tokens_digest: SHA-256 of all output tokens, in order of the requests; "" if not recorded.
        mean_accepted_length: tokens of a step with drafts, mean; 1 without speculation.
    """

    elapsed_s: float
    output_tok_s: float
    ttft_ms: dict[str, float]
    itl_ms: dict[str, float]
    tokens_digest: str = ""
    mean_accepted_length: float = 1.0

    def as_dict(self) -> dict[str, Any]:
        """The figures for JSON."""
        return asdict(self)


def digest(outputs: Sequence[Sequence[int]]) -> str:
    """SHA-256 of token ids, request by request."""
    total = hashlib.sha256()
    for tokens in outputs:
        total.update(np.asarray([len(tokens), *tokens], dtype="<i4").tobytes())
    return total.hexdigest()


def _percentiles(seconds: Sequence[float]) -> dict[str, float]:
    if not seconds:
        return {}
    return {f"p{p}": round(float(np.percentile(seconds, p)) * 1000, 2) for p in PERCENTILES}


class EngineBench:
    """An engine in this process, ready for measurements; a context manager.

    A single slice runs in a thread of this process; several slices run as child processes.
    """

    def __init__(
        self, config: GroupConfig, on_loaded: Callable[[Loading], None] = lambda loading: None
    ) -> None:
        """Load the model and run the warm-up.

        Args:
            config: settings of the group.
            on_loaded: called with the progress of loading.
        """
        from arriero.cluster.planner.kv_room import needs_room, with_kv_blocks
        from arriero.shards.checkpoint.formats.describe import describe
        from arriero.shards.checkpoint.reader import Checkpoint
        from arriero.shards.engine.config import engine_config
        from arriero.shards.engine.engine import Engine
        from arriero.shards.layout.resolve import resolve
        from arriero.shards.leader.local_executor import LocalExecutor
        from arriero.shards.leader.spawned_group import spawn_group
        from arriero.shards.worker.cuda.device import free_bytes_of

        folder = Path(config.model_path)
        model, scheme = describe(folder)
        if needs_room(config):
            config = with_kv_blocks(config, model, scheme, free_bytes_of(config.world_size))
        resolved = resolve(config, model)
        limits = engine_config(resolved, model, Checkpoint.open(folder).digest)
        self._arrived: queue.SimpleQueue[Sequence[SequenceOutput] | Exception]
        self._arrived = queue.SimpleQueue()
        self._executor: LocalExecutor | RemoteExecutor
        if resolved.world_size == 1:
            self._executor = LocalExecutor(resolved)
        else:
            self._executor = spawn_group(resolved)
            try:
                self._executor.wait_ready(START_LIMIT_S, on_loaded)
            except BaseException:
                self._executor.close()
                raise
        put = self._arrived.put
        self._engine = Engine(limits, self._executor, put, on_failure=put)
        self._engine.start()
        self._num_requests = 0
        try:
            self.run(WARM_UP.prompts(), WARM_UP.output)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> EngineBench:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def run(
        self,
        prompts: Sequence[Sequence[int]],
        output: int,
        sampling: SamplingParams | None = None,
        adapters: Sequence[str] = (),
    ) -> Figures:
        """Generate `output` tokens for each prompt, all at once; greedily without `sampling`.

        Args:
            prompts: token ids of each prompt.
            output: tokens of each answer.
            sampling: parameters of all requests.
            adapters: digest of each request's adapter, "" for the base model; empty for none.

        Raises:
            GroupFailed: a request or the group failed; the text is the cause.
        """
        return self.answers(prompts, output, sampling, adapters=adapters)[0]

    def answers(
        self,
        prompts: Sequence[Sequence[int]],
        output: int,
        sampling: SamplingParams | None = None,
        cache_salt: bytes = b"",
        adapters: Sequence[str] = (),
    ) -> tuple[Figures, list[list[int]]]:
        """As `run`, with the output tokens of each request.

        With a `sampling` that does not ignore end tokens, an output may be shorter. Requests of
        another `cache_salt` share no cache and no source of drafts.

        Raises:
            GroupFailed: a request or the group failed; the text is the cause.
        """
        exact = sampling is None or sampling.ignore_eos
        clock = Clock(len(prompts), output, exact)
        tokens: list[list[int]] = [[] for _ in prompts]
        before = self._engine.stats().speculation
        clock.start()
        outputs = self._outputs(prompts, sampling or params(output), cache_salt, adapters)
        for number, sequence in outputs:
            clock.record(number, len(sequence.tokens))
            tokens[number] += sequence.tokens
        after = self._engine.stats().speculation
        drafts, accepted = after.drafts - before.drafts, after.accepted - before.accepted
        figures = replace(
            clock.figures(),
            tokens_digest=digest(tokens),
            mean_accepted_length=round(1 + accepted / drafts, 3) if drafts else 1.0,
        )
        return figures, tokens

    @property
    def adapters(self) -> tuple[str, ...]:
        """Digests of the group's listed adapters."""
        return self._engine.config.adapters

    def greedy(
        self, prompts: Sequence[Sequence[int]], output: int, banned: tuple[int, ...] = ()
    ) -> list[list[int]]:
        """Tokens of `output` greedy steps from each prompt, without the `banned` token ids."""
        tokens: list[list[int]] = [[] for _ in prompts]
        sampling = replace(params(output), banned_token_ids=banned)
        for number, sequence in self._outputs(prompts, sampling):
            tokens[number] += sequence.tokens
        return tokens

    def prompt_logprobs(self, prompts: Sequence[Sequence[int]]) -> list[list[float]]:
        """Log-probability of each prompt token after the first, given the tokens before."""
        scores: list[list[float]] = [[] for _ in prompts]
        for number, sequence in self._outputs(prompts, replace(params(1), prompt_logprobs=0)):
            scores[number] += [token.logprob for token in sequence.prompt_logprobs or ()]
        return scores

    def _outputs(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: SamplingParams,
        cache_salt: bytes = b"",
        adapters: Sequence[str] = (),
    ) -> Iterator[tuple[int, SequenceOutput]]:
        """Submit all prompts at once; gives (number of the prompt, output) at each arrival.

        Raises:
            GroupFailed: a request or the group failed; the text is the cause.
        """
        from arriero.shards.engine.types import EngineRequest

        first = self._num_requests
        self._num_requests += len(prompts)
        for i, prompt in enumerate(prompts):
            self._engine.submit(
                EngineRequest(
                    request_id=str(first + i),
                    prompt=tuple(prompt),
                    params=sampling,
                    cache_salt=cache_salt,
                    adapter=adapters[i] if adapters else "",
                )
            )
        left = len(prompts)
        while left:
            outputs = self._arrived.get()
            if isinstance(outputs, Exception):
                raise outputs
            for output in outputs:
                if output.finish_reason in ("error", "lost"):
                    raise GroupFailed(f"request {output.request_id}: {output.error}")
                left -= output.finish_reason is not None
                yield int(output.request_id) - first, output

    def close(self) -> None:
        """Stop the engine and its slices; safe to call twice."""
        self._engine.stop()
        self._executor.close()
