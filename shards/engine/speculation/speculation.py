"""Which sequences draft, and what: the policy of speculative decoding in the engine.

A sequence whose next tokens nobody can guess stays in the pipeline: it is scheduled while its last
token is still in flight. When its proposer has a match that is likely to be right, the sequence
waits for its last token and then drafts; when drafts turn out wrong, it goes back.

Knows sequences, proposals and costs; knows nothing of plans, blocks or slices.
"""

from __future__ import annotations

from collections.abc import Sequence as Many
from dataclasses import dataclass

import numpy as np

from arriero.shards.config.speculation import SpeculationConfig
from arriero.shards.engine.sequence import Sequence
from arriero.shards.engine.slots import SlotTable
from arriero.shards.engine.speculation.corpus import Corpora
from arriero.shards.engine.speculation.draft_length import Acceptance, StepCost, choose_lengths
from arriero.shards.engine.speculation.match_proposer import MatchProposer
from arriero.shards.engine.speculation.model_proposer import ModelProposer
from arriero.shards.engine.speculation.proposer import Proposer, ProposerFactory
from arriero.shards.engine.stats import SpeculationStats
from arriero.shards.protocol.step_plan import Int32, StepResult

_WAIT_MARGIN = 0.04
"""A sequence that leaves the pipeline makes the slices wait for the leader: a share of a step."""
_DORMANT = 0.9
"""Probability above which no proposal is worth the search for it."""
_DRAIN = 8
"""All wait for the drafting sequences if these are at least this part of the decodes."""
_RETRY = 32
"""Tokens after which a model is asked for a draft again, although its last ones were wrong."""


@dataclass(slots=True)
class Drafting:
    """Speculation's view of a sequence."""

    proposer: Proposer
    acceptance: Acceptance
    expected: int = -1
    matched: int = 0
    since_draft: int = 0


class Speculation:
    """Decides on drafts.

    Args:
        config: kind and limits.
        table: numbers of each slot; `waits` is written here.
        num_ranks: data-parallel ranks, which divide the memory for earlier outputs.
        factory: makes proposers in tests; None for those of `config`.

    Attributes:
        counts: counters.
    """

    def __init__(
        self,
        config: SpeculationConfig,
        table: SlotTable,
        num_ranks: int = 1,
        factory: ProposerFactory | None = None,
    ) -> None:
        self._config, self._table = config, table
        self._corpora = Corpora(config.corpus_bytes // num_ranks)
        self._factory = self._proposer if factory is None else factory
        self._cost = StepCost()
        self._least = 0.0
        self.counts = SpeculationStats()

    def _proposer(self, sequence: Sequence) -> Proposer | None:
        """The proposer of a sequence, as the group's settings and the request say."""
        request = sequence.live.request
        if request.speculation == "off":
            return None
        if self._config.in_slices:
            return ModelProposer(sequence.tokens)
        corpus = None
        if self._config.kind == "suffix" and request.speculation != "ngram":
            corpus = self._corpora.of(_tenant_of(sequence))
        return MatchProposer(sequence.tokens, sequence.num_prompt, request.prediction, corpus)

    def observe(self, rows: int, result: StepResult) -> None:
        """Take the time of a step of decodes."""
        self._cost.observe(rows, result.elapsed_us - result.draft_us)
        if result.drafts is not None and result.drafts.size:
            self._cost.observe_draft(result.drafts.shape[1], result.draft_us)

    # ---- before a step ----

    def must_wait(self, slots: Int32) -> bool:
        """Whether no plan should be made before the result of the outstanding plan.

        Args:
            slots: all slots that decode.
        """
        table = self._table
        waiting = table.waits[slots] & (table.scheduled[slots] >= table.known[slots])
        return int(waiting.sum()) * _DRAIN >= max(1, len(slots))

    def lengths(self, slots: Int32) -> dict[int, int]:
        """Most tokens to draft for the rows of a step that may draft, by row; 0 is left out."""
        table = self._table
        self._least = self._cost.share(len(slots), len(slots))
        rows = np.flatnonzero(table.waits[slots]).tolist()
        if not rows:
            return {}
        sequences = table.sequences[slots[rows]].tolist()
        rates = [_rate(sequence) for sequence in sequences]
        lengths = choose_lengths(rates, len(slots), self._config.max_tokens, self._cost)
        return {row: length for row, length in zip(rows, lengths, strict=True) if length}

    def requests(self, slots: Int32) -> dict[int, int]:
        """Tokens that the slices shall draft after a step's rows, by row, for the step after.

        Sequences with a draft on its way wait for it.
        """
        if not self._config.in_slices or not len(slots):
            return {}
        table = self._table
        rows, rates = [], []
        for row, slot in enumerate(slots.tolist()):
            sequence = table.sequences[slot]
            drafting: Drafting | None = sequence.drafting
            if drafting is not None and int(table.known[slot]) + 2 < sequence.limit:
                rows.append(row)
                retry = drafting.since_draft >= _RETRY
                rates.append(1.0 if retry else _rate(sequence))
        most = self._config.max_tokens
        lengths = choose_lengths(rates, len(slots), most, self._cost, in_slices=True)
        requests: dict[int, int] = {}
        for row, length in zip(rows, lengths, strict=True):
            sequence = table.sequences[slots[row]]
            if length:
                retry = sequence.drafting.since_draft >= _RETRY
                requests[row] = 1 if retry else length
                sequence.drafting.since_draft = 0
                table.waits[slots[row]] = True
        return requests

    def draft(self, sequence: Sequence, most: int) -> list[int]:
        """At most `most` drafted tokens of a sequence whose tokens are all known."""
        drafting = sequence.drafting
        if drafting is None or most < 1:
            return []
        drafting.matched = drafting.proposer.matched
        return drafting.proposer.propose(most)

    # ---- after a step ----

    def take(self, sequence: Sequence, draft: Many[int]) -> None:
        """Keep what the slices drafted after a sequence's new tokens; `follow` comes before."""
        drafting = sequence.drafting
        if drafting is not None and isinstance(drafting.proposer, ModelProposer):
            drafting.proposer.take(draft)
            drafting.expected = drafting.proposer.next
            self._table.waits[sequence.slot] = drafting.expected >= 0

    def follow(self, sequence: Sequence, num_drafted: int, num_new: int) -> None:
        """Take notice of a sequence's new tokens, and decide whether it drafts next.

        Args:
            sequence: a sequence in a slot that goes on.
            num_drafted: drafted tokens of its row in the step.
            num_new: tokens that the step gave the sequence.
        """
        drafting = sequence.drafting
        if drafting is None:
            if sequence.drafts_off or self._least > _DORMANT:
                return
            proposer = self._factory(sequence)
            if proposer is None:
                sequence.drafts_off = True
                return
            drafting = sequence.drafting = Drafting(proposer, self._acceptance(sequence))
        else:
            self._learn(drafting, sequence, num_drafted, num_new)
            if self._least > _DORMANT:
                self._table.waits[sequence.slot] = False
                drafting.expected = -1
                return
            drafting.proposer.extend()
        drafting.since_draft += num_new
        proposer = drafting.proposer
        drafting.expected, drafting.matched = proposer.next, proposer.matched
        if self._config.in_slices:  # waits while a draft is on its way
            slot = sequence.slot
            if self._table.scheduled[slot] < self._table.known[slot]:
                self._table.waits[slot] = False
            return
        likely = _rate(sequence) >= self._least + _WAIT_MARGIN
        self._table.waits[sequence.slot] = likely and proposer.matched > 0

    def _learn(
        self, drafting: Drafting, sequence: Sequence, num_drafted: int, num_new: int
    ) -> None:
        """Count the right and the wrong tokens of a draft, or of a proposal that was not used."""
        if num_drafted:
            right = num_new - 1
            drafting.acceptance.note(drafting.matched, right, int(right < num_drafted))
        elif drafting.expected >= 0 and num_new == 1:
            right = int(drafting.expected == sequence.tokens[-1])
            drafting.acceptance.note(drafting.matched, right, 1 - right)

    def end(self, sequence: Sequence) -> None:
        """Keep the output of an ended sequence for later ones of its tenant."""
        if self._config.kind != "suffix" or sequence.live.request.speculation == "off":
            return
        output: Many[int] = sequence.tokens[sequence.num_prompt :]
        if output and output[-1] < 0:  # no token was left to draw
            output = output[:-1]
        tenant = _tenant_of(sequence)
        self._corpora.add(tenant, output)
        drafting: Drafting | None = sequence.drafting
        if drafting is not None:
            self._corpora.of(tenant).acceptance.learn(drafting.acceptance)

    def _acceptance(self, sequence: Sequence) -> Acceptance:
        """How often a sequence's drafts may be right: as those of its tenant, with `suffix`."""
        if self._config.kind != "suffix":
            return Acceptance()
        return Acceptance(self._corpora.of(_tenant_of(sequence)).acceptance)


def _tenant_of(sequence: Sequence) -> tuple[str, bytes]:
    """Whose outputs may be drafted from; as for KV blocks, a salt separates requests."""
    return sequence.live.request.tenant, sequence.live.request.cache_salt


def _rate(sequence: Sequence) -> float:
    """Probability that the next proposed token of a sequence is right."""
    drafting: Drafting | None = sequence.drafting
    if drafting is None:
        return 0.0
    return drafting.acceptance.rate(drafting.proposer.matched)
