"""The life of requests in the engine, a step at a time: continuous batching, sans-I/O.

`StepChoice` decides the rows of each step; the scheduler makes the plan, keeps it until its result
comes, and applies the result.

Plans are made ahead of results: up to `depth` plans are outstanding, and the slices run them in
order. So a plan may use all that an earlier plan computes or frees. A result may belong to a
sequence that has left its slot since; such results are discarded.

With one pipeline stage, a decoding sequence is scheduled while its last token is still in flight:
the slices know the token. If that token stops the sequence, later samples are discarded. With
several stages the first stage needs a token that the last stage samples, so a sequence takes part
in one outstanding plan at a time, and the decodes are spread over as many micro-batches as there
are stages.

A sequence is pre-empted when a sequence of higher precedence needs its blocks: the sequence leaves
its slot, and later computes prompt and output again. Samples in flight are dropped and sampled
again. Sampling depends on nothing but tokens, parameters, seed and position, so the same token
comes out.

Knows tokens, blocks and slots; knows nothing of models, processes or threads.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

from arriero.shards.engine.adapter_residency import AdapterResidency
from arriero.shards.engine.admission import Admission
from arriero.shards.engine.cache_calls import CacheCalls
from arriero.shards.engine.completion_rate import CompletionRate
from arriero.shards.engine.decodes import Decodes
from arriero.shards.engine.draft import Chunk, DecodeRows, InFlight, in_flight
from arriero.shards.engine.limits import WITHDRAWN, check_config, check_request
from arriero.shards.engine.prefills import Prefills
from arriero.shards.engine.results import Results
from arriero.shards.engine.running import RunningSequences
from arriero.shards.engine.sequence import LiveRequest, Sequence
from arriero.shards.engine.sequence_blocks import SequenceBlocks
from arriero.shards.engine.speculation.proposer import ProposerFactory
from arriero.shards.engine.speculation.speculation import Speculation
from arriero.shards.engine.stats import EngineStats, SpeculationStats
from arriero.shards.engine.step_choice import StepChoice
from arriero.shards.engine.types import EngineConfig, EngineRequest, SequenceOutput, ends_of
from arriero.shards.engine.waiting import WaitingQueue
from arriero.shards.errors import GroupFailed, InvalidRequest, Overloaded
from arriero.shards.kv.blocks import CacheListener
from arriero.shards.kv.transfers import Pool
from arriero.shards.protocol.adapters import AdapterResult
from arriero.shards.protocol.step_plan import Int32, StepPlan, StepResult, int32


class Scheduler(CacheCalls):
    """Takes requests and results; returns plans and tokens.

    Args:
        config: limits.
        on_event: callback for keys stored in and evicted from the prefix cache.
        clock: monotonic time in seconds, for the estimate in `Overloaded` and the wait for tiers.
        proposers: makes the sources of drafted tokens; None for those of the config.

    Raises:
        SpecError: a field of `config` is out of range.

    Attributes:
        depth: most outstanding plans; at least the number of stages.
        adapters: adapters in host memory and in slots of the device.
    """

    def __init__(
        self,
        config: EngineConfig,
        *,
        on_event: CacheListener | None = None,
        clock: Callable[[], float] = time.monotonic,
        proposers: ProposerFactory | None = None,
    ) -> None:
        check_config(config)
        self.config = config
        self.depth = max(config.pipeline_depth, config.num_stages)
        self._completion_rate = CompletionRate(clock)
        self._blocks = SequenceBlocks(config, on_event, clock)
        self._waiting = WaitingQueue(self._blocks, clock)
        listed = list(zip(config.adapters, config.adapter_paths, strict=True))
        self.adapters = AdapterResidency(config.adapter_slots, listed, config.num_ranks)
        self._running = RunningSequences(config, self._blocks, self._waiting, self.adapters)
        self._speculation: Speculation | None = None
        if config.speculation.enabled:
            self._speculation = Speculation(
                config.speculation, self._running.slots, config.num_dp_ranks, proposers
            )
        prefills = Prefills(self._running, self._blocks)
        self._admission = Admission(
            self._waiting, self._running, prefills, self._blocks, self.adapters
        )
        self._choice = StepChoice(
            config.max_batch_tokens,
            self._running,
            self._waiting,
            Decodes(self._running, self._blocks, self._speculation),
            prefills,
            self._admission,
        )
        self._results = Results(config, self._running.slots, self._blocks, self._speculation)

        self._requests: dict[str, LiveRequest] = {}
        self._arrivals = 0
        self._in_flight: deque[InFlight] = deque()
        self._repeated: Int32 | None = None  # ready slots, if the last plan has exactly these rows
        self._step = 0
        self._output_tokens = 0

    # ---- requests ----

    def add(self, request: EngineRequest) -> None:
        """Check and queue a request.

        Raises:
            InvalidRequest: the request could never run, or its id is in use.
            Overloaded: the queue is full.
        """
        check_request(self.config, request, self.adapters.offered)
        self.check_load(request.request_id)
        self.enqueue(request)

    def check_load(self, request_id: str, *, num_pending: int = 0) -> None:
        """Raise the errors of `add` that depend on the load; thread-safe.

        Args:
            request_id: id of the new request.
            num_pending: requests that passed this check and are not queued yet.
        """
        if request_id in self._requests:
            raise InvalidRequest(
                "request_id", f"`request_id`={request_id!r} runs already; choose another"
            )
        waiting = len(self._waiting) + num_pending
        if waiting >= self.config.max_queued:
            retry_after_s = self._completion_rate.estimate_s()
            raise Overloaded(
                f"{waiting} requests wait and `max_queued` is {self.config.max_queued}; "
                f"try again in {retry_after_s:.1f} s",
                retry_after_s,
            )

    def enqueue(self, request: EngineRequest) -> list[SequenceOutput]:
        """Queue a request that passed `check_request` and `check_load`.

        Returns:
            Nothing, or the end of a request whose adapter was withdrawn since the check.
        """
        if request.adapter and not self.adapters.begin(request.adapter):
            return ends_of(request.request_id, range(request.params.n), "error", WITHDRAWN)
        live = LiveRequest(request, self._arrivals)
        self._arrivals += 1
        self._requests[request.request_id] = live
        self._spawn(live, 0)
        return []

    def cancel(self, request_id: str) -> list[SequenceOutput]:
        """End a request now; the next plan may use its blocks. Unknown ids are ignored."""
        live = self._requests.get(request_id)
        return [] if live is None else self._end(live, "cancelled")

    def fail(self, cause: str) -> list[SequenceOutput]:
        """End every request with finish_reason "lost"; nothing is outstanding from now on."""
        self._in_flight.clear()
        ended = []
        for live in list(self._requests.values()):
            ended += self._end(live, "lost", cause)
        return ended

    @property
    def num_live(self) -> int:
        """Requests that have not ended."""
        return len(self._requests)

    @property
    def num_waiting(self) -> int:
        """Sequences that wait for a slot."""
        return len(self._waiting)

    def is_live(self, request_id: str) -> bool:
        """Whether a request has not ended."""
        return request_id in self._requests

    def cached_share(self, request: EngineRequest) -> float:
        """Share of a prompt, 0 to 1, in the prefix cache now."""
        return self._blocks.cached_share(request)

    @property
    def num_outstanding(self) -> int:
        """Plans without a result so far."""
        return len(self._in_flight)

    @property
    def stats(self) -> EngineStats:
        """A snapshot, without `step_us`; thread-safe."""
        pool, local = (self._blocks.pools.get(kind) for kind in Pool)
        assert pool is not None, "every engine has Pool.ALL"
        return EngineStats(
            num_waiting=len(self._waiting),
            num_running=self._running.count,
            blocks_used=pool.num_used,
            blocks_cached=pool.num_cached,
            blocks_total=pool.num_blocks,
            local_blocks_used=local.num_used if local else 0,
            local_blocks_total=local.num_blocks if local else 0,
            steps=self._step,
            prompt_tokens=self._admission.prompt_tokens,
            cached_tokens=self._admission.cached_tokens,
            output_tokens=self._output_tokens,
            preemptions=self._running.num_preemptions,
            tiers=self._blocks.tiers.counts(),
            speculation=self._drafts_so_far(),
            adapters=self.adapters.stats,
        )

    def _drafts_so_far(self) -> SpeculationStats:
        """A copy of the counts of drafts."""
        speculation = self._speculation
        return SpeculationStats.total([] if speculation is None else [speculation.counts])

    # ---- plans ----

    def schedule(self) -> StepPlan | None:
        """The next plan, or None when nothing can run before the next result."""
        if len(self._in_flight) >= self.depth:
            return None
        if self._in_flight and self._speculation is not None and self.config.num_stages == 1:
            if self._speculation.must_wait(self._running.decoding.all):
                return None
        self._waiting.start_loads(self._running.count)
        rows, chunks = self._choice.take(self._step)
        if not len(rows.slots) and not chunks:
            return None
        return self._plan(rows, chunks)

    def idle(self) -> StepPlan:
        """A plan without rows, for a step in which only other data-parallel ranks have rows."""
        running = self._running
        rows = DecodeRows(int32(), int32(), {})
        plan = running.draft.build(self._step, rows, None, [])
        self._repeated = None
        self._in_flight.append(in_flight(plan, rows, [], running.slots.generation))
        self._step += 1
        return plan

    def _plan(self, rows: DecodeRows, chunks: list[Chunk]) -> StepPlan:
        """The plan of these decode rows and chunks; in flight from now on."""
        table, draft = self._running.slots, self._running.draft
        # One stage: the slices know the last token, which may still be in flight.
        tokens = None if self.config.num_stages == 1 else table.last_token[rows.slots]
        plan = draft.build(self._step, rows, tokens, chunks)
        plan.adapters = self.adapters.take_changes()
        if tokens is None and not chunks and not rows.drafts and not rows.requests:
            # a prefilling sequence may have lost its slot meanwhile
            plan.same_rows = rows.slots is self._repeated and not len(plan.freed)
            self._repeated = rows.slots
        else:
            self._repeated = None
        self._in_flight.append(in_flight(plan, rows, chunks, table.generation))
        self._step += 1
        for chunk in chunks:
            self._after_chunk(chunk)
        return plan

    def _after_chunk(self, chunk: Chunk) -> None:
        """Store the chunk's blocks: only later plans may share them."""
        sequence, live = chunk.sequence, chunk.sequence.live
        self._blocks.store(sequence, chunk.end)
        if chunk.final and sequence.index == 0 and len(live.sequences) < len(live.live):
            self._blocks.anchor_prompt(sequence)
            for index in range(1, live.params.n):
                self._spawn(live, index)

    # ---- results ----

    def update(self, result: StepResult) -> list[SequenceOutput]:
        """Apply the result of the oldest outstanding plan; returns the new outputs.

        Raises:
            GroupFailed: the result does not belong to that plan.
        """
        if not self._in_flight:
            raise GroupFailed(f"a result of step {result.step} came and no plan is outstanding")
        step = self._results.take(self._in_flight.popleft(), result)
        self._output_tokens += step.num_tokens
        for sequence in step.ended:
            self._finish(sequence)
        return step.outputs

    # ---- adapters ----

    def apply_adapters(
        self, results: list[AdapterResult]
    ) -> tuple[list[SequenceOutput], dict[str, str]]:
        """Apply the ends of loads.

        Returns:
            Ends of the requests whose adapter cannot be loaded; and for each adapter whose load has
            ended on all ranks the error, or "".
        """
        outputs: list[SequenceOutput] = []
        loaded: dict[str, str] = {}
        for result in results:
            error = self.adapters.apply(result)
            if error is not None:
                loaded[result.digest] = error
        for live in list(self._requests.values()) if any(loaded.values()) else ():
            if error := loaded.get(live.request.adapter):
                outputs += self._end(live, "error", f"the adapter of `model`: {error}")
        return outputs, loaded

    # ---- pauses and changes of weights ----

    @property
    def num_started(self) -> int:
        """Requests that have begun to run, or that continue tokens from elsewhere."""
        return sum(live.started for live in self._requests.values())

    def withdraw_unstarted(self) -> list[EngineRequest]:
        """Take requests back that have not started, in order of arrival."""
        unstarted = [live for live in self._requests.values() if not live.started]
        for live in unstarted:
            self._end(live, "held")
        return [live.request for live in unstarted]

    def stop_all(self) -> None:
        """Put every running sequence back into the queue; later all tokens are computed again."""
        self._running.preempt_all()
        self._repeated = None

    def abort(self, cause: str) -> list[SequenceOutput]:
        """End every request with finish_reason "error"."""
        return [out for x in list(self._requests.values()) for out in self._end(x, "error", cause)]

    # ---- samples ----

    def _spawn(self, live: LiveRequest, index: int) -> None:
        """Queue a sample of a request."""
        sequence = Sequence.of(live, index, self._blocks.new_owner())
        live.sequences[index] = sequence
        self._waiting.add(sequence)

    def _finish(self, sequence: Sequence) -> None:
        """Remove an ended sequence, and the request after its last sequence."""
        if sequence.slot >= 0:
            self._running.release(sequence)
        else:
            self._waiting.remove(sequence)
        live = sequence.live
        del live.sequences[sequence.index]
        del live.live[sequence.index]
        if not live.live:
            self._close(live)

    def _end(
        self, live: LiveRequest, reason: str, error: str | None = None
    ) -> list[SequenceOutput]:
        """End all remaining samples of a request."""
        outputs = ends_of(live.request.request_id, live.live, reason, error)
        for sequence in list(live.sequences.values()):
            self._finish(sequence)
        if live.live:  # samples without a sequence so far
            live.live.clear()
            self._close(live)
        return outputs

    def _close(self, live: LiveRequest) -> None:
        self._blocks.drop_prompt(live)
        del self._requests[live.request.request_id]
        if live.request.adapter:
            self.adapters.end(live.request.adapter)
        self._completion_rate.note_end()
