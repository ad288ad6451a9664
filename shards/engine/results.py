"""From a step's result to outputs: the sequence of each token, and whether the sequence ends.

Knows rows, tokens and stops; writes the new tokens into the slots and the prefix cache. Knows
nothing of scheduling: ended sequences are returned to the scheduler.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from arriero.shards.engine.draft import InFlight
from arriero.shards.engine.sequence import Sequence
from arriero.shards.engine.sequence_blocks import SequenceBlocks
from arriero.shards.engine.slots import SlotTable
from arriero.shards.engine.types import EngineConfig, SequenceOutput, TokenLogprobs
from arriero.shards.errors import GroupFailed
from arriero.shards.protocol.step_plan import Logprobs, StepResult

NO_TOKEN = -1
"""Token id for logits without a possible token: all banned, or not numbers."""
NOTHING_LEFT = (
    "no token is left to sample: `allowed_token_ids`, `banned_token_ids`, `logit_bias` and "
    "`min_tokens` together ban all of them, those that the grammar leaves included, or the "
    "grammar is too complex to go on, or the model's logits are not numbers"
)


@dataclass(frozen=True, slots=True)
class StepOutputs:
    """Outputs of a step, one for each sequence with a new token, and the sequences that ended."""

    outputs: list[SequenceOutput]
    ended: list[Sequence]


class Results:
    """Applies results, oldest first."""

    def __init__(self, config: EngineConfig, slots: SlotTable, blocks: SequenceBlocks) -> None:
        self._config = config
        self._slots = slots
        self._blocks = blocks
        self._is_eos = np.zeros(config.vocab_size, dtype=np.bool_)
        self._is_eos[list(config.eos_token_ids)] = True

    def take(self, record: InFlight, result: StepResult) -> StepOutputs:
        """Give each token to its sequence; tokens of sequences that left are discarded.

        Raises:
            GroupFailed: the result does not belong to `record`.
        """
        self._check(record, result)
        self._take_prompt_rows(record, result)
        table = self._slots
        slots, tokens = record.slots, result.tokens
        rows = np.flatnonzero(table.generation[slots] == record.generation)
        if len(rows) < len(slots):
            slots, tokens = slots[rows], tokens[rows]

        known = table.known[slots] + 1
        table.known[slots] = known
        table.last_token[slots] = tokens
        stopped = self._is_eos[np.maximum(tokens, 0)] & table.stops_at_eos[slots]
        for row in np.flatnonzero(table.own_stops[slots]):
            stopped[row] |= int(tokens[row]) in table.sequences[slots[row]].live.stop_tokens
        stopped &= known > table.min_known[slots]
        void = tokens == NO_TOKEN
        ended = np.flatnonzero(stopped | void | (known >= table.limit[slots]))

        sequences: list[Sequence] = table.sequences[slots].tolist()
        outputs = []
        for sequence, token in zip(sequences, tokens.tolist(), strict=True):
            sequence.tokens.append(token)
            outputs.append(
                SequenceOutput(
                    request_id=sequence.request_id, index=sequence.index, tokens=(token,)
                )
            )
        if self._config.prefix_cache:
            # The step computed every position except the new token's.
            for row in np.flatnonzero((known - 1) % self._config.block_size == 0):
                self._blocks.store(sequences[row], int(known[row]) - 1)
        for row in np.flatnonzero(table.reports[slots]):
            self._report(sequences[row], outputs[row], result, int(rows[row]))
        for row in ended:
            outputs[row].finish_reason = "stop" if stopped[row] else "length"
            outputs[row].stop_token = int(tokens[row]) if stopped[row] else None
            if void[row]:
                outputs[row].tokens, outputs[row].logprobs = (), None
                outputs[row].finish_reason, outputs[row].error = "error", NOTHING_LEFT
        return StepOutputs(outputs, [sequences[row] for row in ended])

    def _check(self, record: InFlight, result: StepResult) -> None:
        tokens = result.tokens
        if result.step != record.step or len(tokens) != len(record.slots):
            raise GroupFailed(
                f"a result of step {result.step} with {len(tokens)} tokens came where "
                f"step {record.step} with {len(record.slots)} was expected"
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
        """Add log-probabilities and first-output fields to an output."""
        params = sequence.live.params
        if params.logprobs is not None:
            rows = _rows(result, "logprobs", len(result.tokens))
            (token,) = output.tokens
            output.logprobs = (_token_logprobs(rows, row, token, params.logprobs),)
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
