"""The choice of a step's rows: decodes, then prompts that go on, then prompts that begin.

The steps of an interactive prompt are the time to its first token. Background sequences take no
part in these steps, since their rows would make the steps longer; a prompt that finds no room holds
them back for one step alone.

Knows the order of the choice and who takes part; knows nothing of plans and results.
"""

from __future__ import annotations

from arriero.shards.engine.admission import Admission
from arriero.shards.engine.decodes import Decodes
from arriero.shards.engine.draft import Chunk, DecodeRows
from arriero.shards.engine.prefills import Prefills
from arriero.shards.engine.running import RunningSequences
from arriero.shards.engine.sequence import Sequence
from arriero.shards.engine.waiting import WaitingQueue

_NOBODY = -1


class StepChoice:
    """Chooses the decodes and the chunks of each step.

    Args:
        max_tokens: most tokens of a step.
        running: sequences in slots.
        waiting: the queue.
        decodes: chooses the decodes.
        prefills: cuts the chunks of sequences in slots.
        admission: gives slots to waiting sequences.
    """

    def __init__(
        self,
        max_tokens: int,
        running: RunningSequences,
        waiting: WaitingQueue,
        decodes: Decodes,
        prefills: Prefills,
        admission: Admission,
    ) -> None:
        self._max_tokens = max_tokens
        self._running, self._waiting = running, waiting
        self._decodes, self._prefills, self._admission = decodes, prefills, admission
        self._held_in_vain = _NOBODY  # owner of a prompt that found no room

    def take(self, step: int) -> tuple[DecodeRows, list[Chunk]]:
        """The decodes and the chunks of a step; both are empty when nothing can run.

        Args:
            step: number of the step.
        """
        first = self._first_interactive_prompt()
        if first is None or first.owner == self._held_in_vain:
            rows, chunks = self._take(step, hold_background=False)
        else:
            rows, chunks = self._take(step, hold_background=True)
            if not chunks:
                self._held_in_vain = first.owner
                if not len(rows.slots):
                    rows, chunks = self._take(step, hold_background=False)
        if any(not chunk.sequence.is_background for chunk in chunks):
            self._held_in_vain = _NOBODY
        return rows, chunks

    def _first_interactive_prompt(self) -> Sequence | None:
        """The interactive sequence whose prompt comes first; None without any."""
        for sequence in (*self._running.prefilling[:1], self._waiting.ready(0)):
            if sequence is not None and not sequence.is_background:
                return sequence
        return None

    def _take(self, step: int, *, hold_background: bool) -> tuple[DecodeRows, list[Chunk]]:
        rows = self._decodes.take(step, self._max_tokens, hold_background=hold_background)
        budget = self._max_tokens - rows.num_tokens
        chunks = self._prefills.advance(budget, hold_background=hold_background)
        budget -= sum(chunk.end - chunk.start for chunk in chunks)
        return rows, chunks + self._admission.admit(budget, hold_background=hold_background)
