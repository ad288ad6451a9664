"""Decodes, prefills and admission, by themselves and in turn: no scheduler, slice or model."""

from __future__ import annotations

from typing import Any

from arriero.shards.config.priorities import BACKGROUND_CHUNK, BACKGROUND_PRIORITY
from arriero.shards.config.sampling_params import SamplingParams
from arriero.shards.engine.adapter_residency import AdapterResidency
from arriero.shards.engine.admission import Admission
from arriero.shards.engine.decodes import Decodes
from arriero.shards.engine.prefills import Prefills
from arriero.shards.engine.running import RunningSequences
from arriero.shards.engine.sequence import LiveRequest, Sequence
from arriero.shards.engine.sequence_blocks import SequenceBlocks
from arriero.shards.engine.step_choice import StepChoice
from arriero.shards.engine.types import EngineConfig, EngineRequest
from arriero.shards.engine.waiting import WaitingQueue


class Parts:
    """The objects that choose the rows of a step, over one set of blocks."""

    def __init__(self, **changes: Any) -> None:  # noqa: ANN401
        fields: dict[str, Any] = {
            "max_model_len": 64,
            "block_size": 4,
            "num_blocks": 16,
            "max_sequences": 4,
            "max_batch_tokens": 32,
            "vocab_size": 50,
        }
        self.config = EngineConfig(**fields | changes)
        self.blocks = SequenceBlocks(self.config, None)
        self.waiting = WaitingQueue(self.blocks, lambda: 0.0)
        adapters = AdapterResidency(None, (), 1)
        self.running = RunningSequences(self.config, self.blocks, self.waiting, adapters)
        self.decodes = Decodes(self.running, self.blocks)
        self.prefills = Prefills(self.running, self.blocks)
        self.admission = Admission(self.waiting, self.running, self.prefills, self.blocks, adapters)
        self.choice = StepChoice(
            self.config.max_batch_tokens,
            self.running,
            self.waiting,
            self.decodes,
            self.prefills,
            self.admission,
        )
        self.arrivals = 0

    def queue(
        self, num_tokens: int, *, priority: int = 0, tenant: str = "", adapter: str = ""
    ) -> Sequence:
        """A waiting sequence with a prompt of its own."""
        self.arrivals += 1
        request = EngineRequest(
            request_id=f"r{self.arrivals}",
            prompt=(self.arrivals,) * num_tokens,
            params=SamplingParams(seed=1, max_tokens=16),
            priority=priority,
            tenant=tenant,
            adapter=adapter,
        )
        live = LiveRequest(request, self.arrivals)
        sequence = Sequence.of(live, 0, self.blocks.new_owner())
        live.sequences[0] = sequence
        self.waiting.add(sequence)
        return sequence

    def step(self, number: int) -> tuple[list[Sequence], list[tuple[Sequence, int, int]]]:
        """Sequences that decode in a step, and the chunks; every decoding sequence gets a token."""
        rows, chunks = self.choice.take(number)
        decoding: list[Sequence] = self.running.slots.sequences[rows.slots].tolist()
        self.sample()
        return decoding, [(chunk.sequence, chunk.start, chunk.end) for chunk in chunks]

    def sample(self) -> None:
        """Every decoding sequence knows one more token."""
        for sequence in self.running.decoding.sequences:
            sequence.tokens.append(7)
            self.running.slots.known[sequence.slot] += 1


def test_admission_is_by_rank_and_within_the_budget() -> None:
    parts = Parts()
    late, early = parts.queue(6, priority=1), parts.queue(6)
    chunks = parts.admission.admit(8)
    assert [(chunk.sequence, chunk.start, chunk.end) for chunk in chunks] == [
        (early, 0, 6),
        (late, 0, 2),
    ]
    assert [chunk.final for chunk in chunks] == [True, False]
    assert parts.running.prefilling == [late] and parts.running.decoding.sequences == [early]
    assert parts.waiting.ready(0) is None


def test_admission_leaves_a_block_for_each_running_sequence() -> None:
    parts = Parts(num_blocks=4)
    first = parts.queue(8)
    assert [chunk.sequence for chunk in parts.admission.admit(32)] == [first]
    held_back, small = parts.queue(8), parts.queue(4)
    assert parts.admission.admit(32) == [], "two blocks are left, and one must stay"
    assert parts.waiting.ready(0) is held_back, "the sequence behind does not overtake"
    parts.running.release(first)
    admitted = [chunk.sequence for chunk in parts.admission.admit(32)]
    assert admitted == [held_back, small]


def test_admission_counts_prompts_by_tenant_and_once() -> None:
    parts = Parts()
    sequence = parts.queue(6, tenant="a")
    parts.queue(3, tenant="b")
    parts.admission.admit(32)
    parts.running.preempt(sequence)
    parts.admission.admit(32)
    assert parts.admission.prompt_tokens == 9
    assert {name: use.prompt_tokens for name, use in parts.admission.by_tenant.items()} == {
        "a": 6,
        "b": 3,
    }
    assert parts.running.num_preemptions == 1


def test_prefills_go_on_by_rank_within_the_budget() -> None:
    parts = Parts()
    first, second = parts.queue(10), parts.queue(10)
    parts.admission.admit(4)
    parts.admission.admit(4)
    assert parts.running.prefilling == [first, second]
    chunks = parts.prefills.advance(8)
    assert [(chunk.sequence, chunk.start, chunk.end) for chunk in chunks] == [
        (first, 4, 10),
        (second, 4, 6),
    ]
    assert parts.running.prefilling == [second] and parts.running.decoding.sequences == [first]
    assert parts.prefills.advance(0) == []


def test_decodes_have_a_block_for_their_token() -> None:
    parts = Parts()
    sequence = parts.queue(4)
    parts.admission.admit(32)
    rows = parts.decodes.take(0, 16)
    slots, starts = rows.slots, rows.starts
    assert slots.tolist() == [sequence.slot] and starts.tolist() == [4]
    assert parts.running.slots.capacity[sequence.slot] == 8
    parts.sample()
    starts = parts.decodes.take(1, 16).starts
    assert starts.tolist() == [5] and parts.running.slots.capacity[sequence.slot] == 8


def test_a_decode_takes_the_block_of_the_last_in_rank() -> None:
    parts = Parts(num_blocks=4, prefix_cache=False)
    first = parts.queue(4)
    parts.admission.admit(32)
    last = parts.queue(8)
    parts.admission.admit(32)
    assert last.slot >= 0
    slots = parts.decodes.take(0, 16).slots  # both need a block, and one is left
    assert slots.tolist() == [first.slot]
    assert last.slot < 0 and parts.waiting.ready(0) is last
    assert parts.running.num_preemptions == 1


def test_background_prompts_are_cut_short_and_fill_a_step_together() -> None:
    parts = Parts(num_blocks=128, max_model_len=128)
    long, other = (parts.queue(100, priority=BACKGROUND_PRIORITY) for _ in range(2))
    chunks = parts.admission.admit(80)
    assert [(chunk.sequence, chunk.start, chunk.end) for chunk in chunks] == [
        (long, 0, BACKGROUND_CHUNK),
        (other, 0, BACKGROUND_CHUNK),
    ]
    interactive = parts.queue(60)
    chunks = parts.admission.admit(80)
    assert [(chunk.sequence, chunk.end) for chunk in chunks] == [(interactive, 60)]
    chunks = parts.prefills.advance(80)
    assert [(chunk.sequence, chunk.start, chunk.end) for chunk in chunks] == [
        (long, BACKGROUND_CHUNK, 2 * BACKGROUND_CHUNK),
        (other, BACKGROUND_CHUNK, 2 * BACKGROUND_CHUNK),
    ]


def test_background_waits_while_an_interactive_prompt_is_computed() -> None:
    parts = Parts(num_blocks=128, max_model_len=128)
    batch, other = (parts.queue(20, priority=BACKGROUND_PRIORITY) for _ in range(2))
    assert parts.step(0) == ([], [(batch, 0, 20), (other, 0, 12)])
    interactive = parts.queue(50)
    assert parts.step(1) == ([], [(interactive, 0, 32)])
    assert parts.step(2) == ([], [(interactive, 32, 50)])
    decoding, chunks = parts.step(3)
    assert decoding == [batch, interactive] and chunks == [(other, 12, 20)]


def test_an_interactive_prompt_takes_blocks_and_slots_of_the_batch() -> None:
    parts = Parts(num_blocks=9, max_sequences=2, prefix_cache=False)
    batch = [parts.queue(12, priority=BACKGROUND_PRIORITY) for _ in range(2)]
    parts.step(0)
    assert [sequence.slot >= 0 for sequence in batch] == [True, True]
    interactive = parts.queue(12)
    assert parts.step(1) == ([], [(interactive, 0, 12)]), "no slot was free"
    assert [sequence.slot >= 0 for sequence in batch] == [True, False], "the last of the batch left"
    long = parts.queue(16, priority=-1)
    assert parts.step(2) == ([interactive], [(long, 0, 16)]), "neither a slot nor blocks were free"
    assert [sequence.slot >= 0 for sequence in batch] == [False, False]
    assert parts.waiting.ready(0) is batch[0]


def test_a_prompt_without_room_does_not_stop_the_batch() -> None:
    parts = Parts(num_blocks=8, prefix_cache=False)
    interactive = parts.queue(12)
    parts.step(0)
    batch = parts.queue(4, priority=BACKGROUND_PRIORITY)
    parts.step(1)
    parts.queue(40)  # more blocks than the pool has beside the first
    assert parts.step(2) == ([interactive], []) and batch.slot < 0, "the batch made way in vain"
    for number in range(3, 8):
        assert parts.step(number) == ([interactive], []), "the machine goes on"


def test_a_prompt_whose_adapter_is_not_loaded_leaves_the_step_to_the_batch() -> None:
    parts = Parts(max_sequences=1)
    batch = parts.queue(4, priority=BACKGROUND_PRIORITY)
    parts.step(0)
    parts.queue(4, adapter="unknown")
    for number in range(1, 4):
        assert parts.step(number) == ([batch], [])
    assert not parts.running.num_preemptions
