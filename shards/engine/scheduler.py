"""Decides the rows of each step and applies step results: continuous batching, sans-I/O.

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
from bisect import insort
from collections import defaultdict, deque
from collections.abc import Callable
from operator import attrgetter

import numpy as np

from arriero.shards.engine.cache_report import CacheReport, TenantUse, TierUse
from arriero.shards.engine.completion_rate import CompletionRate
from arriero.shards.engine.decode_slots import DecodeSlots
from arriero.shards.engine.draft import Chunk, InFlight, PlanDraft, in_flight
from arriero.shards.engine.limits import check_config, check_request
from arriero.shards.engine.results import Results
from arriero.shards.engine.sequence import LiveRequest, Sequence
from arriero.shards.engine.sequence_blocks import SequenceBlocks
from arriero.shards.engine.slots import SlotTable
from arriero.shards.engine.types import EngineConfig, EngineRequest, EngineStats, SequenceOutput
from arriero.shards.engine.waiting import WaitingQueue
from arriero.shards.errors import GroupFailed, InvalidRequest, Overloaded
from arriero.shards.kv.blocks import CacheListener
from arriero.shards.kv.limits import PeerBlocks
from arriero.shards.kv.transfers import Pool, TransferBatch, TransferResult
from arriero.shards.protocol.step_plan import Int32, StepPlan, StepResult, int32

_rank = attrgetter("rank")


class Scheduler:
    """Takes requests and results; returns plans and tokens.

    Args:
        config: limits.
        on_event: callback for keys stored in and evicted from the prefix cache.
        clock: monotonic time in seconds, for the estimate in `Overloaded` and the wait for tiers.

    Raises:
        SpecError: a field of `config` is out of range.

    Attributes:
        depth: most outstanding plans; at least the number of stages.
    """

    def __init__(
        self,
        config: EngineConfig,
        *,
        on_event: CacheListener | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        check_config(config)
        self.config = config
        self.depth = max(config.pipeline_depth, config.num_stages)
        self._blocks = SequenceBlocks(config, on_event)
        self._slots = SlotTable(config.max_sequences)
        self._draft = PlanDraft(config.max_sequences)
        # With a window, every layer has the window: its blocks are the only blocks of the slices.
        windowed = config.attention_window > 0
        self._add_local = self._draft.add_blocks if windowed else self._draft.add_local
        self._pass_every = config.block_size if windowed else config.attention_chunk
        self._completion_rate = CompletionRate(clock)
        self._results = Results(config, self._slots, self._blocks)

        self._requests: dict[str, LiveRequest] = {}
        self._waiting = WaitingQueue(self._blocks, clock)
        self._prefilling: list[Sequence] = []  # by rank
        self._decoding = DecodeSlots(config, self._slots)
        self._repeated: Int32 | None = None  # ready slots, if the last plan has exactly these rows
        self._in_flight: deque[InFlight] = deque()
        self._blocked: tuple[int, ...] = ()

        self._step = 0
        self._arrivals = 0
        self._prompt_tokens = 0
        self._cached_tokens = 0
        self._by_tenant: dict[str, TenantUse] = defaultdict(TenantUse)
        self._output_tokens = 0
        self._preemptions = 0

    # ---- requests ----

    def add(self, request: EngineRequest) -> None:
        """Check and queue a request.

        Raises:
            InvalidRequest: the request could never run, or its id is in use.
            Overloaded: the queue is full.
        """
        check_request(self.config, request)
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

    def enqueue(self, request: EngineRequest) -> None:
        """Queue a request that passed `check_request` and `check_load`."""
        live = LiveRequest(request, self._arrivals)
        self._arrivals += 1
        self._requests[request.request_id] = live
        self._spawn(live, 0)

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
            num_running=self._num_running,
            blocks_used=pool.num_used,
            blocks_cached=pool.num_cached,
            blocks_total=pool.num_blocks,
            local_blocks_used=local.num_used if local else 0,
            local_blocks_total=local.num_blocks if local else 0,
            steps=self._step,
            prompt_tokens=self._prompt_tokens,
            cached_tokens=self._cached_tokens,
            output_tokens=self._output_tokens,
            preemptions=self._preemptions,
            tiers=self._blocks.tiers.counts(),
        )

    # ---- plans ----

    def schedule(self) -> StepPlan | None:
        """The next plan, or None when nothing can run before the next result."""
        if len(self._in_flight) >= self.depth:
            return None
        self._waiting.start_loads(self._num_running)
        slots, starts = self._take_decodes()
        budget = self.config.max_batch_tokens - len(slots)
        chunks = self._continue_prefills(budget)
        self._admit(chunks, budget - sum(chunk.end - chunk.start for chunk in chunks))
        if not len(slots) and not chunks:
            return None
        # One stage: the slices know the last token, which may still be in flight.
        tokens = None if self.config.num_stages == 1 else self._slots.last_token[slots]
        plan = self._draft.build(self._step, slots, starts, tokens, chunks)
        if tokens is None and not chunks:
            # a prefilling sequence may have lost its slot meanwhile
            plan.same_rows = slots is self._repeated and not len(plan.freed)
            self._repeated = slots
        else:
            self._repeated = None
        self._in_flight.append(in_flight(plan, slots, chunks, self._slots.generation))
        self._step += 1
        for chunk in chunks:
            self._after_chunk(chunk)
        return plan

    def idle(self) -> StepPlan:
        """A plan without rows, for a step in which only other data-parallel ranks have rows."""
        plan = self._draft.build(self._step, int32(), int32(), None, [])
        self._repeated = None
        self._in_flight.append(in_flight(plan, plan.slots, [], self._slots.generation))
        self._step += 1
        return plan

    def _take_decodes(self) -> tuple[Int32, Int32]:
        """Slots that decode in this step and their positions; each has a block for its token."""
        table = self._slots
        while True:
            slots = self._decoding.ready()
            starts = table.scheduled[slots]
            self._pass_blocks(slots, starts)
            short = starts >= table.capacity[slots]
            if not short.any():
                break
            self._grow(table.sequences[slots[short]].tolist())
        table.scheduled[slots] = starts + 1
        table.last_step[slots] = self._step
        return slots, starts

    def _pass_blocks(self, slots: Int32, starts: Int32) -> None:
        """Free blocks that sequences no longer see: of a past chunk, or behind a window."""
        size, table = self._pass_every, self._slots
        if not size:
            return
        passed = starts // size
        for row in np.flatnonzero(passed != table.passed[slots]):
            self._blocks.pass_to(table.sequences[slots[row]], int(starts[row]))
        table.passed[slots] = passed

    def _grow(self, sequences: list[Sequence]) -> None:
        """Give each sequence a new block, pre-empting sequences of low precedence if need be.

        In order of rank: a pre-empted sequence comes after all that have their block by then.
        """
        for sequence in sorted(sequences, key=_rank):
            while sequence.slot >= 0 and not self._blocks.can_grow:
                self._reclaim()
            if sequence.slot >= 0:
                slot = sequence.slot
                self._draft.add_blocks(slot, self._blocks.grow(sequence))
                self._slots.capacity[slot] += self.config.block_size
                end = int(self._slots.scheduled[slot]) + 1
                self._add_local(slot, self._blocks.extend_local(sequence, end))

    def _reclaim(self) -> None:
        """Free some blocks: those of the newest anchor, else those of the last sequence."""
        if self._blocks.num_anchors:
            self._blocks.drop_latest_prompt()
            return
        running = self._decoding.sequences + self._prefilling
        self._preempt(max(running, key=_rank))

    def _preempt(self, victim: Sequence) -> None:
        self._release(victim)
        victim.prompt_rows.clear()
        self._waiting.add(victim)
        self._preemptions += 1

    def _continue_prefills(self, budget: int) -> list[Chunk]:
        chunks = []
        for sequence in list(self._prefilling):
            if budget <= 0 or sequence.slot < 0:  # pre-empted by a sequence of higher precedence
                break
            slot = int32([sequence.slot])
            self._pass_blocks(slot, self._slots.scheduled[slot])
            chunk = self._take_chunk(sequence, budget)
            if chunk.end == chunk.start:  # blocks come back when other sequences end
                break
            chunks.append(chunk)
            budget -= chunk.end - chunk.start
        self._prefilling = [seq for seq in self._prefilling if seq.slot not in self._decoding]
        return chunks

    def _admit(self, chunks: list[Chunk], budget: int) -> None:
        """Give slots to waiting sequences, strictly by rank, and add their first chunks."""
        while budget > 0 and self._slots.num_free:
            sequence = self._waiting.first
            if sequence is None or not self._enter(sequence):
                break
            self._waiting.remove(sequence)
            chunk = self._take_chunk(sequence, budget)
            if not chunk.final:
                insort(self._prefilling, sequence, key=_rank)
            chunks.append(chunk)
            budget -= chunk.end - chunk.start

    def _take_chunk(self, sequence: Sequence, budget: int) -> Chunk:
        """Known tokens within the budget and the chunk-local blocks; maybe none."""
        slot, known = sequence.slot, len(sequence.tokens)
        start = int(self._slots.scheduled[slot])
        end = self._reach(sequence, start, min(known, start + budget))
        self._add_local(slot, self._blocks.extend_local(sequence, end))
        self._slots.scheduled[slot] = end
        if end == known:
            self._decoding.add(slot)
        return Chunk(sequence, start, end, end == known)

    def _reach(self, sequence: Sequence, start: int, end: int) -> int:
        """End of the next chunk, at most `end`; pre-empts later prefills rather than stay."""
        blocks = self._blocks
        while True:
            reach = blocks.local_reach(sequence, start, end, self._num_running)
            if reach > start:
                return reach
            if blocks.num_anchors:
                blocks.drop_latest_prompt()
            elif self._prefilling and self._prefilling[-1].rank > sequence.rank:
                self._preempt(self._prefilling[-1])
            else:
                return start

    def _enter(self, sequence: Sequence) -> bool:
        """Put a waiting sequence into a slot with blocks for all its tokens, if there is room."""
        blocks = self._blocks
        state = (sequence.owner, *blocks.room(), self._num_running, blocks.num_anchors)
        if state == self._blocked:  # same state as at the last refusal: skip the search
            return False
        shared = blocks.find_shared(sequence)
        # Every running sequence will need a block soon. Leave a block for each, or the new
        # sequence would be pre-empted within a few steps.
        if not blocks.has_room(sequence, shared, self._num_running):
            if self._num_running:
                self._blocked = state
                return False
            while blocks.num_anchors:
                blocks.drop_latest_prompt()
            shared = blocks.find_shared(sequence)
            if not blocks.has_room(sequence, shared, 0):
                blocks.drop_pins()
                shared = blocks.find_shared(sequence)
            if not blocks.has_room(sequence, shared, 0):
                return False  # the other blocks are in use by transfers
        table = blocks.open(sequence, shared)
        size = self.config.block_size
        cached = len(shared.blocks) * size
        capacity = blocks.count(sequence) * size
        self._slots.enter(sequence, scheduled=cached, capacity=capacity)
        self._draft.enter(
            sequence.to_new(self.config.eos_token_ids, self.config.image_token), table
        )
        self._add_local(sequence.slot, blocks.indexed(shared))
        if not sequence.has_entered:
            self._begin(sequence, min(cached, sequence.num_prompt))
        return True

    def _begin(self, sequence: Sequence, num_cached: int) -> None:
        """Count a sequence's first entry into a slot."""
        sequence.has_entered = True
        live = sequence.live
        live.num_not_entered -= 1
        if not live.num_not_entered:
            self._blocks.drop_prompt(live)
        if sequence.index == 0:  # other samples share the prompt; sharing is no cache hit
            sequence.num_cached = num_cached
            self._prompt_tokens += sequence.num_prompt
            self._cached_tokens += num_cached
            use = self._by_tenant[live.request.tenant]
            use.prompt_tokens += sequence.num_prompt
            use.cached_tokens += num_cached

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
        self._output_tokens += len(step.outputs)
        for sequence in step.ended:
            self._finish(sequence)
        return step.outputs

    # ---- tiers below the device ----

    @property
    def num_transfers(self) -> int:
        """Transfers of blocks in flight or waiting."""
        return self._blocks.tiers.num_transfers

    def take_transfers(self) -> list[TransferBatch]:
        """Transfers of blocks, to be sent after all plans so far."""
        return self._blocks.tiers.take_transfers()

    def apply_results(self, results: list[TransferResult]) -> None:
        """Apply transfer results, maybe none."""
        for result in results:
            self._blocks.tiers.apply(result)
        self._waiting.finish_loads()

    def cache(self) -> CacheReport:
        """Contents of the KV cache by tier and tenant."""
        blocks, pools = self._blocks, self._blocks.pools.values()
        device = TierUse(
            sum(pool.num_used + pool.num_cached for pool in pools),
            sum(pool.num_blocks for pool in pools),
        )
        counts, most = blocks.tiers.counts(), blocks.tiers.capacities()
        below = {
            tier: TierUse(counts.get(tier, 0), most.get(tier, 0))
            for tier in ("host", "disk", "shared")
            if most.get(tier) or counts.get(tier)
        }
        return CacheReport(
            tiers={"device": device, **below},
            tenants=dict(self._by_tenant),
            tenant_blocks=blocks.tiers.tenants(),
            pins=blocks.pins,
        )

    def pin(self, name: str, tokens: tuple[int, ...]) -> int:
        """Keep a prefix on the device, as far as it is there; see `SequenceBlocks.pin`."""
        return self._blocks.pin(name, tokens)

    def unpin(self, name: str) -> bool:
        """Remove a pin; False without a pin of this name."""
        return self._blocks.unpin(name)

    def is_saving(self, keys: list[bytes]) -> bool:
        """Whether a transfer of any of these blocks to host memory is in flight; thread-safe."""
        return self._blocks.tiers.is_saving(keys)

    def shared(self, keys: list[bytes]) -> dict[Pool, PeerBlocks]:
        """Blocks of these keys that another group may copy, by pool; thread-safe."""
        return self._blocks.tiers.shared(keys)

    def flush(self) -> int:
        """Drop every unused block, on the device and below; returns the number of blocks."""
        return self._blocks.flush()

    # ---- helpers of both ----

    @property
    def _num_running(self) -> int:
        return self.config.max_sequences - self._slots.num_free

    def _spawn(self, live: LiveRequest, index: int) -> None:
        """Queue a sample of a request."""
        sequence = Sequence.of(live, index, self._blocks.new_owner())
        live.sequences[index] = sequence
        self._waiting.add(sequence)

    def _release(self, sequence: Sequence) -> None:
        """Take a sequence out of its slot and free its blocks."""
        slot = sequence.slot
        self._draft.free(slot)
        self._slots.leave(sequence)
        self._blocks.close(sequence)
        if slot in self._decoding:
            self._decoding.remove(slot)
        else:
            self._prefilling.remove(sequence)

    def _finish(self, sequence: Sequence) -> None:
        """Remove an ended sequence, and the request after its last sequence."""
        if sequence.slot >= 0:
            self._release(sequence)
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
        outputs = [
            SequenceOutput(
                request_id=live.request.request_id,
                index=index,
                finish_reason=reason,
                error=error,
            )
            for index in live.live
        ]
        for sequence in list(live.sequences.values()):
            self._finish(sequence)
        if live.live:  # samples without a sequence so far
            live.live.clear()
            self._close(live)
        return outputs

    def _close(self, live: LiveRequest) -> None:
        self._blocks.drop_prompt(live)
        del self._requests[live.request.request_id]
        self._completion_rate.note_end()
