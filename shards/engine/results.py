"""From a step's result to outputs: the sequence of each token, and whether the sequence ends.

Knows rows, tokens and stops; writes the new tokens into the slots and the prefix cache. Knows
nothing of scheduling: ended sequences are returned to the scheduler.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from arriero.shards.engine.draft import InFlight
from arriero.shards.engine.sequence import Sequence
from arriero.shards.engine.sequence_blocks import SequenceBlocks
from arriero.shards.engine.slots import SlotTable
from arriero.shards.engine.speculation.speculation import Speculation
from arriero.shards.engine.types import EngineConfig, SequenceOutput, TokenLogprobs
from arriero.shards.errors import GroupFailed
from arriero.shards.protocol.step_plan import Int32, Logprobs, StepResult
from arriero.shards.protocol.verification import num_emitted, ranges

Ints = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]
NO_TOKEN = -1
"""Token id for logits without a possible token: all banned, or not numbers."""
NOTHING_LEFT = (
    "no token is left to sample: `allowed_token_ids`, `banned_token_ids`, `logit_bias` and "
    "`min_tokens` together ban all of them, those that the grammar leaves included, or the "
    "grammar is too complex to go on, or the model's logits are not numbers"
)


@dataclass(frozen=True, slots=True)
class StepOutputs:
    """Outputs of a step, one for each sequence with new tokens, and the sequences that ended."""

    outputs: list[SequenceOutput]
    ended: list[Sequence]
    num_tokens: int


@dataclass(frozen=True, slots=True)
class _Draws:
    """The draws of a step that count.

    Attributes:
        rows: [S'] row of each sequence in the record.
        slots: [S'] slot of each sequence.
        first: [S'] index of each sequence's first draw in the result.
        counts: [S'] number of draws that count.
        drafted: [S'] number of drafted tokens in the sequence's row.
        right: [S'] number of those that were drawn.
        tokens: [sum of counts] drawn tokens.
        stopped, void, ended: [S'] whether the last draw is a stop, no token, or an end.
    """

    rows: Ints
    slots: Int32
    first: Ints
    counts: Ints
    drafted: Ints
    right: Ints
    tokens: Int32
    stopped: Flags = field(default_factory=lambda: np.zeros(0, np.bool_))
    void: Flags = field(default_factory=lambda: np.zeros(0, np.bool_))
    ended: Flags = field(default_factory=lambda: np.zeros(0, np.bool_))


class Results:
    """Applies results, oldest first."""

    def __init__(
        self,
        config: EngineConfig,
        slots: SlotTable,
        blocks: SequenceBlocks,
        speculation: Speculation | None = None,
    ) -> None:
        self._config = config
        self._speculation = speculation
        self._slots = slots
        self._blocks = blocks
        self._is_eos = np.zeros(config.vocab_size, dtype=np.bool_)
        self._is_eos[list(config.eos_token_ids)] = True

    def take(self, record: InFlight, result: StepResult) -> StepOutputs:
        """Give the draws that count to their sequences; those of sequences that left are discarded.

        Raises:
            GroupFailed: the result does not belong to `record`.
        """
        self._check(record, result)
        self._take_prompt_rows(record, result)
        if self._speculation is not None and record.num_decoded:
            self._speculation.observe(record.num_decoded, result)
        draws = self._without_late(self._draws(record, result))
        table, slots = self._slots, draws.slots
        before = table.known[slots]
        known = before + draws.counts
        table.known[slots] = known
        table.last_token[slots] = draws.tokens[np.cumsum(draws.counts) - 1]
        # drafted positions count as computed once their tokens are known to be right
        table.scheduled[slots] = np.maximum(table.scheduled[slots], known - 1)

        sequences: list[Sequence] = table.sequences[slots].tolist()
        outputs = []
        tokens, row_end = draws.tokens.tolist(), 0
        for sequence, count in zip(sequences, draws.counts.tolist(), strict=True):
            row_start, row_end = row_end, row_end + count
            new = tokens[row_start:row_end]
            sequence.tokens.extend(new)
            outputs.append(
                SequenceOutput(
                    request_id=sequence.request_id, index=sequence.index, tokens=tuple(new)
                )
            )
        if self._config.prefix_cache:
            # The step computed every position except the last token's.
            size = self._config.block_size
            for row in np.flatnonzero((known - 1) // size > (before - 1) // size).tolist():
                self._blocks.store(sequences[row], int(known[row]) - 1)
        for row in np.flatnonzero(table.reports[slots]).tolist():
            self._report(sequences[row], outputs[row], result, int(draws.first[row]))
        self._finish(draws, outputs)
        if self._speculation is not None:
            self._follow(self._speculation, draws, sequences, outputs)
            if result.drafts is not None:
                if len(result.drafts) != len(record.slots):
                    raise GroupFailed(
                        f"the result of step {result.step} has drafts of {len(result.drafts)} of "
                        f"{len(record.slots)} sequences"
                    )
                for row, sequence in enumerate(sequences):
                    if not draws.ended[row]:
                        self._speculation.take(sequence, result.drafts[draws.rows[row]].tolist())
        ended = [sequences[row] for row in np.flatnonzero(draws.ended)]
        return StepOutputs(outputs, ended, len(tokens))

    def _draws(self, record: InFlight, result: StepResult) -> _Draws:
        """The draws that count, of sequences that are still in their slots."""
        slots = record.slots
        rows = np.flatnonzero(self._slots.generation[slots] == record.generation)
        if record.samples is None:
            first: Ints = rows
            counts: Ints = np.ones(len(rows), dtype=np.int64)
            drafted: Ints = np.zeros(len(rows), dtype=np.int64)
            right = drafted
            tokens = result.tokens[rows]
        else:
            emitted = num_emitted(record.samples, record.tokens, result.tokens)
            first = (np.cumsum(record.samples) - record.samples)[rows]
            counts = emitted[rows].astype(np.int64)
            drafted = record.samples[rows].astype(np.int64) - 1
            right, tokens = counts - 1, result.tokens[ranges(first, counts)]
        return _Draws(rows, slots[rows], first, counts, drafted, right, tokens)

    def _without_late(self, draws: _Draws) -> _Draws:
        """Find stops and limits, and drop what was drawn after them."""
        table, tokens = self._slots, draws.tokens
        slots, known = draws.slots, table.known[draws.slots] + 1
        starts = np.cumsum(draws.counts) - draws.counts
        several = len(tokens) > len(slots)
        if several:
            owner = np.repeat(np.arange(len(slots)), draws.counts)
            slots, known = slots[owner], known[owner] + np.arange(len(tokens)) - starts[owner]
        stopped = self._is_eos[np.maximum(tokens, 0)] & table.stops_at_eos[slots]
        for draw in np.flatnonzero(table.own_stops[slots]):
            stops = table.sequences[slots[draw]].live.stop_tokens
            stopped[draw] |= int(tokens[draw]) in stops
        stopped &= known > table.min_known[slots]
        void = tokens == NO_TOKEN
        ends = stopped | void | (known >= table.limit[slots])
        if several:
            earlier = np.cumsum(ends) - ends
            kept = earlier == earlier[starts][owner]
            if not kept.all():
                counts = np.bincount(owner[kept], minlength=len(draws.slots))
                draws = replace(draws, counts=counts, tokens=tokens[kept])
                stopped, void, ends = stopped[kept], void[kept], ends[kept]
        last = np.cumsum(draws.counts) - 1
        return replace(draws, stopped=stopped[last], void=void[last], ended=ends[last])

    def _finish(self, draws: _Draws, outputs: list[SequenceOutput]) -> None:
        """Say why sequences ended."""
        for row in np.flatnonzero(draws.ended):
            output = outputs[row]
            output.finish_reason = "stop" if draws.stopped[row] else "length"
            output.stop_token = output.tokens[-1] if draws.stopped[row] else None
            if draws.void[row]:
                output.tokens = output.tokens[:-1]
                output.logprobs = output.logprobs[:-1] or None if output.logprobs else None
                output.finish_reason, output.error = "error", NOTHING_LEFT

    def _follow(
        self,
        speculation: Speculation,
        draws: _Draws,
        sequences: list[Sequence],
        outputs: list[SequenceOutput],
    ) -> None:
        """Count drafts, and let sequences that go on decide on their next."""
        drafted, ended = draws.drafted.tolist(), draws.ended.tolist()
        for row, sequence in enumerate(sequences):
            num_drafted, num_new = drafted[row], len(outputs[row].tokens)
            if num_drafted:
                num_accepted = min(int(draws.right[row]), num_new)
                outputs[row].num_drafted, outputs[row].num_accepted = num_drafted, num_accepted
                speculation.counts.add(num_drafted, num_accepted)
            if ended[row]:
                speculation.end(sequence)
            else:
                speculation.follow(sequence, num_drafted, num_new)

    def _check(self, record: InFlight, result: StepResult) -> None:
        tokens = result.tokens
        num_draws = len(record.slots) if record.samples is None else int(record.samples.sum())
        if result.step != record.step or len(tokens) != num_draws:
            raise GroupFailed(
                f"a result of step {result.step} with {len(tokens)} tokens came where "
                f"step {record.step} with {num_draws} was expected"
            )
        if len(tokens) and not NO_TOKEN <= tokens.min() <= tokens.max() < self._config.vocab_size:
            raise GroupFailed(
                f"step {result.step} sampled a token outside 0 .. {self._config.vocab_size - 1}"
            )

    def _take_prompt_rows(self, record: InFlight, result: StepResult) -> None:
        if not record.prompt_rows:
            return
        num_rows = sum(len(prompt_rows.following) for prompt_rows in record.prompt_rows)
        rows = _rows(result, "prompt_logprobs", num_rows)
        row = 0
        for prompt_rows in record.prompt_rows:
            sequence = prompt_rows.sequence
            if self._slots.generation[prompt_rows.slot] == prompt_rows.generation:
                num_top = sequence.live.params.prompt_logprobs or 0
                sequence.prompt_rows += (
                    _token_logprobs(rows, row + i, token, num_top)
                    for i, token in enumerate(prompt_rows.following)
                    if token >= 0
                )
            row += len(prompt_rows.following)

    def _report(
        self, sequence: Sequence, output: SequenceOutput, result: StepResult, row: int
    ) -> None:
        """Add log-probabilities, from row `row` on, and first-output fields to an output."""
        params = sequence.live.params
        if params.logprobs is not None:
            rows = _rows(result, "logprobs", len(result.tokens))
            output.logprobs = tuple(
                _token_logprobs(rows, row + i, token, params.logprobs)
                for i, token in enumerate(output.tokens)
            )
        if not sequence.has_output:
            output.num_cached = sequence.num_cached
            if sequence.wants_prompt_rows:
                output.prompt_logprobs = tuple(sequence.prompt_rows)
                sequence.prompt_rows.clear()
            sequence.has_output = True
            self._slots.reports[sequence.slot] = params.logprobs is not None


def _rows(result: StepResult, name: str, num_rows: int) -> Logprobs:
    rows: Logprobs | None = getattr(result, name)
    if rows is None or len(rows.chosen) != num_rows:
        num_found = "none" if rows is None else str(len(rows.chosen))
        raise GroupFailed(
            f"the result of step {result.step} has {num_found} of the {num_rows} rows of `{name}`"
        )
    return rows


def _token_logprobs(rows: Logprobs, row: int, token: int, num_top: int) -> TokenLogprobs:
    """Row `row` for `token`, with its `num_top` likeliest alternatives."""
    tokens = rows.top_tokens[row, :num_top].tolist()
    values = rows.top[row, :num_top].tolist()
    return TokenLogprobs(
        token=token,
        logprob=float(rows.chosen[row]),
        top=tuple(zip(tokens, values, strict=True)),
    )
