"""The decodes of a step: which slots compute a token, each with a block for it, and their drafts.

Knows slots, positions and blocks; knows nothing of prompts, the queue or plans. A slot without room
for its token takes a block, if need be from a sequence of lower precedence. Drafted tokens take
only blocks that nobody needs soon: a draft is cut rather than another sequence pre-empted.
"""

from __future__ import annotations

from arriero.shards.engine.draft import DecodeRows
from arriero.shards.engine.running import RunningSequences, by_rank
from arriero.shards.engine.sequence import Sequence
from arriero.shards.engine.sequence_blocks import SequenceBlocks
from arriero.shards.engine.speculation.speculation import Speculation
from arriero.shards.protocol.step_plan import Int32


class Decodes:
    """Chooses the decodes of each step.

    Args:
        running: sequences in slots.
        blocks: blocks of sequences.
        speculation: decides on drafts; None without.
    """

    def __init__(
        self,
        running: RunningSequences,
        blocks: SequenceBlocks,
        speculation: Speculation | None = None,
    ) -> None:
        self._running, self._blocks = running, blocks
        self._speculation = speculation

    def take(self, step: int, most: int, *, hold_background: bool = False) -> DecodeRows:
        """Slots that decode in this step and their positions; each has a block for its token.

        Args:
            step: number of the step.
            most: most tokens of the step.
            hold_background: leave background sequences out of the step.
        """
        running, table = self._running, self._running.slots
        while True:
            slots = running.decoding.ready(hold_background=hold_background)
            starts = table.scheduled[slots]
            running.pass_blocks(slots, starts)
            short = starts >= table.capacity[slots]
            if not short.any():
                break
            self._grow(table.sequences[slots[short]].tolist())
        drafts = self._drafts(slots, starts, most - len(slots))
        table.scheduled[slots] = starts + 1
        table.last_step[slots] = step
        return DecodeRows(slots, starts, drafts, self._requests(slots, starts, drafts))

    def _requests(
        self, slots: Int32, starts: Int32, drafts: dict[int, list[int]]
    ) -> dict[int, int]:
        """Tokens that the slices shall draft after rows, with blocks for the slices' rows."""
        if self._speculation is None:
            return {}
        requests = self._speculation.requests(slots)
        for row, length in requests.items():
            end = int(starts[row]) + 1 + len(drafts.get(row, ())) + length
            sequence = self._running.slots.sequences[slots[row]]
            self._running.reach(sequence, min(end, sequence.limit - 1))
        return requests

    def _drafts(self, slots: Int32, starts: Int32, budget: int) -> dict[int, list[int]]:
        """Drafted tokens by row, at most `budget` in all."""
        if self._speculation is None or not len(slots):
            return {}
        table, drafts = self._running.slots, {}
        for row, length in self._speculation.lengths(slots).items():
            sequence, start = table.sequences[slots[row]], int(starts[row])
            # the last token of a sequence is drawn and never computed
            length = min(length, budget, sequence.limit - start - 2)
            draft = self._speculation.draft(sequence, length)
            if draft:
                end = self._running.reach(sequence, start + 1 + len(draft))
                draft = draft[: end - start - 1]
            if draft:
                drafts[row] = draft
                budget -= len(draft)
        return drafts

    def _grow(self, sequences: list[Sequence]) -> None:
        """Give each sequence a new block, pre-empting sequences of low precedence if need be.

        In order of rank: a pre-empted sequence comes after all that have their block by then.
        """
        for sequence in sorted(sequences, key=by_rank):
            while sequence.slot >= 0 and not self._blocks.can_grow:
                self._running.reclaim()
            if sequence.slot >= 0:
                self._running.grow(sequence)
