"""What a sequence may still say: a grammar's state, and the tokens it allows next.

A mask is made in a thread of its own, from the moment the last token is known until the logits
are, so that it costs the step little. A grammar travels as text in the form of the llguidance
library (JSON), checked and bounded at the edge; state is rebuilt by replaying output tokens.

Knows grammars and token ids; knows nothing of requests, batches or logits.

Shape legend: V vocabulary.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLParserLimits, LLTokenizer

log = logging.getLogger(__name__)

MAX_KEPT = 64
"""Compiled grammars kept for requests to come."""
MAX_LEXER_STATES = 50_000
MAX_GRAMMAR_ITEMS = 100_000
MAX_FUEL = 500_000
"""Work that building a grammar's lexer may take; a bomb is refused within about half a second."""


def limits() -> LLParserLimits:
    """Bounds on time and memory of one grammar, the same at the edge and on the slices."""
    from llguidance import LLParserLimits

    return LLParserLimits(
        initial_lexer_fuel=MAX_FUEL,
        step_lexer_fuel=MAX_FUEL,
        max_lexer_states=MAX_LEXER_STATES,
        max_grammar_size=MAX_GRAMMAR_ITEMS,
        verbose_errors=False,
    )


class Grammars:
    """The grammars of one slice.

    Args:
        folder: the checkpoint's, with tokenizer.json; read when the first grammar comes.
        vocab_size: token ids run below it.
        eos_token_ids: what ends an output that the grammar lets end.
    """

    def __init__(self, folder: str | Path, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        self._folder, self._vocab_size = Path(folder), vocab_size
        self._eos_token_ids = list(eos_token_ids)
        self._tokenizer: LLTokenizer | None = None
        self._kept: OrderedDict[str, LLMatcher] = OrderedDict()
        self._thread = ThreadPoolExecutor(1, "grammar")

    def begin(self, grammar: str, output: Sequence[int]) -> GrammarState:
        """The state after `output`; compiling goes on in the background."""
        return GrammarState(self, self._thread, grammar, output)

    def open(self, grammar: str) -> LLMatcher:
        """A matcher at the grammar's start; from the grammar thread only."""
        from llguidance import LLMatcher

        found = self._kept.get(grammar)
        if found is None:
            found = LLMatcher(self._read_tokenizer(), grammar, log_level=0, limits=limits())
            self._kept[grammar] = found
            if len(self._kept) > MAX_KEPT:
                self._kept.popitem(last=False)
        self._kept.move_to_end(grammar)
        return found.deep_copy()

    def mask(self, matcher: LLMatcher) -> npt.NDArray[np.bool_]:
        """What may come next, bool [V]; nothing, when the grammar has failed."""
        allowed = np.zeros(self._vocab_size, np.bool_)
        if matcher.is_error():
            log.warning("a grammar failed: %s", matcher.get_error()[:200])
            return allowed
        bits = np.frombuffer(matcher.compute_bitmask(), np.uint8)
        if matcher.is_error():
            log.warning("a grammar failed: %s", matcher.get_error()[:200])
            return allowed
        found = np.unpackbits(bits, bitorder="little")[: self._vocab_size]
        allowed[: len(found)] = found
        return allowed

    def _read_tokenizer(self) -> LLTokenizer:
        from llguidance import LLTokenizer

        if self._tokenizer is None:
            text = (self._folder / "tokenizer.json").read_text(encoding="utf-8")
            self._tokenizer = LLTokenizer(
                text, n_vocab=self._vocab_size, eos_token=self._eos_token_ids or None
            )
        return self._tokenizer


class GrammarState:
    """One sequence's state. Its methods return at once, but for `allowed`, which may wait.

    Args:
        grammars: of the slice.
        thread: runs what is asked, in order.
        grammar: its text.
        output: tokens said so far.
    """

    def __init__(
        self,
        grammars: Grammars,
        thread: ThreadPoolExecutor,
        grammar: str,
        output: Sequence[int],
    ) -> None:
        self._grammars, self._thread = grammars, thread
        self._matcher: LLMatcher | None = None
        self._mask: Future[npt.NDArray[np.bool_]] = thread.submit(
            self._begin, grammar, list(output)
        )

    def add(self, token: int) -> None:
        """Take a token in, and begin the next mask."""
        self._mask = self._thread.submit(self._add, token)

    def allowed(self) -> npt.NDArray[np.bool_]:
        """What may come next, bool [V]; nothing, when the grammar has failed."""
        return self._mask.result()

    def _begin(self, grammar: str, output: list[int]) -> npt.NDArray[np.bool_]:
        matcher = self._matcher = self._grammars.open(grammar)
        matcher.consume_tokens(output)
        return self._grammars.mask(matcher)

    def _add(self, token: int) -> npt.NDArray[np.bool_]:
        assert self._matcher is not None, "opened before"
        # past the end a draw that is under way is discarded by the leader: any mask will do
        if not self._matcher.is_stopped() and token >= 0:
            self._matcher.consume_token(token)
        return self._grammars.mask(self._matcher)
