"""Drafts by copying: what followed the last tokens where they occurred before.

The sources are the sequence's own text, a predicted output from the client, and earlier outputs of
the tenant. While the tokens go on as in the source, the proposer only moves a pointer.

Knows tokens; knows nothing of steps or costs.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence as Many

from arriero.shards.engine.speculation.corpus import Corpus
from arriero.shards.engine.speculation.token_index import END_OF_TEXT, LONG, SHORT, TokenIndex

_NEAR = 8
"""Tokens around a lost place in which the same text is expected to go on."""
_PREDICTED = 8
"""Strength of the start of a predicted output."""


class MatchProposer:
    """Copies from the place in the sources with the longest match.

    Args:
        tokens: known tokens of the sequence; the owner appends tokens.
        num_prompt: number of prompt tokens.
        prediction: what the client expects as output; may be empty.
        corpus: earlier outputs, or None.
    """

    def __init__(
        self,
        tokens: array[int],
        num_prompt: int = 0,
        prediction: Many[int] = (),
        corpus: Corpus | None = None,
    ) -> None:
        self._tokens, self._num_prompt, self._corpus = tokens, num_prompt, corpus
        self._own = TokenIndex(tokens)
        self._indices = [self._own]
        self._read = len(tokens)
        self._source: array[int] = tokens
        self._at, self.matched = -1, 0
        self._lost_at, self._lost_for = -1, 0
        if prediction:
            self._indices.append(TokenIndex(array("i", prediction)))
            self._indices[1].extend()
            self._source, self._at, self.matched = self._indices[1].tokens, 0, _PREDICTED
            self._read = num_prompt
        self.extend()

    @property
    def next(self) -> int:
        """The first proposed token; -1 without a proposal."""
        if self._at < 0 or self._at >= len(self._source):
            return -1
        token = self._source[self._at]
        return -1 if token == END_OF_TEXT else token

    def extend(self) -> None:
        """Follow the new tokens in the source; search where they differ."""
        tokens = self._tokens
        for position in range(self._read, len(tokens)):
            if self.next == tokens[position]:
                self._at += 1
                self.matched += 1
            elif self.matched:
                self._lost_at, self._lost_for = self._at, _NEAR
                self._at, self.matched = -1, 0
        self._read = len(tokens)
        if self.matched < LONG:
            self._search()

    def propose(self, most: int) -> list[int]:
        """The next tokens of the source; a text that ends in a repetition goes on repeating."""
        if self.next < 0:
            return []
        proposal = self._source[self._at : self._at + most].tolist()
        if self._source is self._tokens:
            period = len(self._tokens) - self._at
            while len(proposal) < most:
                proposal.append(proposal[len(proposal) - period])
        if END_OF_TEXT in proposal:
            del proposal[proposal.index(END_OF_TEXT) :]
        return proposal

    def _search(self) -> None:
        """Find the longest match; keeps a place that matches as well as any other."""
        if self._lost_for:
            self._lost_for -= 1
        self._own.extend(len(self._tokens) - 1)
        searches = [(index, self._tokens) for index in self._indices]
        if self._corpus is not None:
            searches.append((self._corpus.index, self._tokens))
            output = self._tokens[self._num_prompt : self._num_prompt + SHORT]
            if len(output) < SHORT:  # outputs that begin alike may go on alike
                searches.append((self._corpus.index, array("i", [END_OF_TEXT, *output])))
        for index, text in searches:
            at, matched = index.find(text)
            if matched > self.matched and at < len(index.tokens):
                self._source, self._at, self.matched = index.tokens, at, matched
        if not self.matched and self._lost_for:
            self._search_near()

    def _search_near(self) -> None:
        """Find the last two tokens near the place where the text last differed from the source."""
        last = self._tokens[-2:]
        first = max(2, self._lost_at - _NEAR // 2)
        for end in range(first, min(len(self._source), self._lost_at + _NEAR)):
            if self._source[end - 2 : end] == last and (
                self._source is not self._tokens or end < len(self._tokens)
            ):
                self._at, self.matched = end, 2
                return
