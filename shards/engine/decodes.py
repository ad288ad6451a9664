"""The decodes of a step: which slots compute a token, each with a block for it.

Knows slots, positions and blocks; knows nothing of prompts, the queue or plans. A slot without room
for its token takes a block, if need be from a sequence of lower precedence.
"""

from __future__ import annotations

from arriero.shards.engine.running import RunningSequences, by_rank
from arriero.shards.engine.sequence import Sequence
from arriero.shards.engine.sequence_blocks import SequenceBlocks
from arriero.shards.protocol.step_plan import Int32


class Decodes:
    """Chooses the decodes of each step.

    Args:
        running: sequences in slots.
        blocks: blocks of sequences.
    """

    def __init__(self, running: RunningSequences, blocks: SequenceBlocks) -> None:
        self._running, self._blocks = running, blocks

    def take(self, step: int) -> tuple[Int32, Int32]:
        """Slots that decode in this step and their positions; each has a block for its token.

        Args:
            step: number of the step.
        """
        running, table = self._running, self._running.slots
        while True:
            slots = running.decoding.ready()
            starts = table.scheduled[slots]
            running.pass_blocks(slots, starts)
            short = starts >= table.capacity[slots]
            if not short.any():
                break
            self._grow(table.sequences[slots[short]].tolist())
        table.scheduled[slots] = starts + 1
        table.last_step[slots] = step
        return slots, starts

    def _grow(self, sequences: list[Sequence]) -> None:
        """Give each sequence a new block, pre-empting sequences of low precedence if need be.

        In order of rank: a pre-empted sequence comes after all that have their block by then.
        """
        for sequence in sorted(sequences, key=by_rank):
            while sequence.slot >= 0 and not self._blocks.can_grow:
                self._running.reclaim()
            if sequence.slot >= 0:
                self._running.grow(sequence)
