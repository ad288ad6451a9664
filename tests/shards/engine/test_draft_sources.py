"""Sources of drafts, and how many tokens are drafted: policy objects without an engine."""

from __future__ import annotations

from array import array

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from arriero.shards.engine.speculation.corpus import BYTES_PER_TOKEN, Corpora, Corpus
from arriero.shards.engine.speculation.draft_length import Acceptance, StepCost, choose_lengths
from arriero.shards.engine.speculation.match_proposer import MatchProposer
from arriero.shards.engine.speculation.token_index import LENGTHS, LONG, TokenIndex

texts = st.lists(st.integers(0, 3), max_size=60)


def longest_match(text: list[int]) -> int:
    """Length of the longest suffix of an indexed length that occurs before; 0 without one."""
    for length in LENGTHS:
        tail = text[len(text) - length :]
        for start in range(len(text) - length):
            if len(tail) == length and text[start : start + length] == tail:
                return length
    return 0


@settings(max_examples=300, deadline=None)
@given(text=texts, steps=st.lists(st.integers(1, 5), min_size=60, max_size=60))
def test_the_index_finds_what_a_search_finds(text: list[int], steps: list[int]) -> None:
    tokens = array("i")
    index = TokenIndex(tokens)
    for step in steps:
        piece, text = text[:step], text[step:]
        if not piece:
            break
        tokens.extend(piece)
        index.extend(len(tokens) - 1)
        position, matched = index.find(tokens)
        assert min(matched, LONG) >= longest_match(tokens.tolist())
        if matched:
            assert tokens[position - matched : position] == tokens[len(tokens) - matched :]
        else:
            assert position == -1 and not longest_match(tokens.tolist())


def test_a_long_text_is_indexed_in_one_sort() -> None:
    tokens = array("i", [i * i % 4999 for i in range(9000)])
    index = TokenIndex(tokens)
    index.extend()
    tail = array("i", tokens[3000:3010])
    position, matched = index.find(tail)
    assert tokens[position - 10 : position] == tail and matched == 10


@settings(max_examples=200, deadline=None)
@given(text=texts, prompt=st.integers(1, 20), most=st.integers(1, 12))
def test_a_proposal_is_never_longer_and_never_from_elsewhere(
    text: list[int], prompt: int, most: int
) -> None:
    tokens = array("i", text[:prompt])
    proposer = MatchProposer(tokens)
    for token in text[prompt:]:
        tokens.append(token)
        proposer.extend()
        proposal = proposer.propose(most)
        assert len(proposal) <= most
        assert (proposer.next >= 0) == bool(proposal)
        assert set(proposal) <= set(tokens)


def test_a_copied_text_is_proposed() -> None:
    passage = [7, 1, 8, 2, 9, 3, 10, 4, 11]
    tokens = array("i", [*passage, 50, *passage[:3]])
    proposer = MatchProposer(tokens)
    assert proposer.propose(4) == passage[3:7]
    tokens.extend(passage[3:5])
    proposer.extend()
    assert (proposer.propose(2), proposer.matched) == (passage[5:7], 5)


def test_a_copy_goes_on_after_a_replaced_token() -> None:
    passage = [7, 1, 8, 2, 9, 3, 10, 4, 11]
    tokens = array("i", [*passage, 50, *passage[:4]])
    proposer = MatchProposer(tokens)
    for token in (60, 3, 10):  # 9 became 60
        tokens.append(token)
        proposer.extend()
    assert proposer.propose(2) == [4, 11]


def test_a_repetition_goes_on() -> None:
    proposer = MatchProposer(array("i", [1, 2, 3] * 3))
    assert proposer.propose(7) == [1, 2, 3, 1, 2, 3, 1]


def test_a_prediction_is_proposed_from_its_start() -> None:
    tokens = array("i", [5, 6, 20])
    proposer = MatchProposer(tokens, 2, [20, 21, 22, 23])
    assert proposer.propose(8) == [21, 22, 23]
    tokens.append(30)
    proposer.extend()
    assert proposer.propose(8) == []


def test_outputs_that_begin_alike_go_on_alike() -> None:
    corpora = Corpora(1 << 20)
    tenant = ("a", b"")
    corpora.add(tenant, [8, 1, 2, 3])
    corpora.add(tenant, [9, 8, 5, 6])
    tokens = array("i", [40, 41, 8])  # the prompt, and the first token of the output
    proposer = MatchProposer(tokens, 2, (), corpora.of(tenant))
    assert (proposer.propose(3), proposer.matched) == ([1, 2, 3], 2), "not the later 8, 5, 6"
    assert MatchProposer(tokens, 3, (), corpora.of(tenant)).propose(3) == [5, 6]


def test_a_sequence_starts_with_its_tenants_rates() -> None:
    ended = Acceptance()
    for _ in range(40):
        ended.note(1, 1, 0)
    tenant = Acceptance()
    tenant.learn(ended)
    started = Acceptance(tenant)
    assert Acceptance().rate(1) < started.rate(1) == tenant.rate(1) < ended.rate(1)
    started.note(1, 0, 1)
    assert started.rate(1) < tenant.rate(1), "a copy"


def test_tenants_do_not_share_a_corpus() -> None:
    corpora = Corpora(1 << 20)
    corpora.add(("a", b""), [1, 2, 3, 4, 5])
    tokens = array("i", [1, 2, 3])
    assert MatchProposer(tokens, 3, (), corpora.of(("a", b""))).propose(3) == [4, 5]
    for other in (("b", b""), ("a", b"salt")):
        assert MatchProposer(tokens, 3, (), corpora.of(other)).propose(3) == []


def test_a_corpus_keeps_its_newest_outputs() -> None:
    corpus = Corpus(100)
    for first in range(1, 300, 10):
        corpus.add(range(first, first + 9))
        assert len(corpus) <= 100
    assert MatchProposer(array("i", [291, 292, 293]), 3, (), corpus).propose(2) == [294, 295]
    assert MatchProposer(array("i", [1, 2, 3]), 3, (), corpus).propose(2) == []


def test_idle_tenants_lose_their_corpus_first() -> None:
    corpora = Corpora(100 * BYTES_PER_TOKEN)
    for tenant in "abc":
        corpora.add((tenant, b""), range(40))
    assert corpora.num_tokens <= 100
    assert not len(corpora.of(("a", b""))) and len(corpora.of(("c", b"")))


def observed(base_us: float, row_us: float, rows: list[int]) -> StepCost:
    cost = StepCost()
    for count in rows * 20:
        cost.observe(count, base_us + row_us * count)
    return cost


@pytest.mark.parametrize(("base_us", "row_us"), [(10_000, 500), (1_000, 1_000), (20_000, 150)])
def test_the_cost_of_a_row_is_measured(base_us: float, row_us: float) -> None:
    cost = observed(base_us, row_us, [1, 1, 9, 17, 5])
    share = 1 * row_us / (base_us + row_us)
    assert cost.share(1, 1) == pytest.approx(share, rel=0.2)


def test_a_full_batch_drafts_nothing_that_is_not_sure() -> None:
    full = observed(5_000, 1_000, [32, 32, 31])  # each row costs about what it brings
    assert choose_lengths([0.6] * 4, 32, 16, full) == [0] * 4
    alone = observed(10_000, 300, [1, 8, 1, 4])
    assert choose_lengths([0.9], 1, 16, alone)[0] >= 6
    assert choose_lengths([0.3], 1, 16, alone)[0] <= 2


@given(rates=st.lists(st.floats(0, 1), max_size=8), most=st.integers(1, 64))
def test_lengths_follow_the_rates(rates: list[float], most: int) -> None:
    lengths = choose_lengths(rates, max(1, len(rates)), most, StepCost())
    assert all(0 <= length <= most for length in lengths)
    by_rate = [length for _, length in sorted(zip(rates, lengths, strict=True))]
    assert by_rate == sorted(by_rate)


def test_rates_follow_the_outcomes() -> None:
    acceptance = Acceptance()
    for _ in range(30):
        acceptance.note(3, 0, 1)
    assert acceptance.rate(3) < 0.1 and acceptance.rate(20) == pytest.approx(0.9)
    for _ in range(30):
        acceptance.note(3, 1, 0)
    assert acceptance.rate(4) > 0.9
