"""Grammars for outputs: limits, compilation, and the token masks of each step.

A grammar is llguidance's text (Lark with `%json` and `%regex`), compiled by that library: Earley
parsing over derivatives of regular expressions, so that a mask is computed and needs no table that
grows with the vocabulary. Compilation and each mask have a limit of work, so that neither time nor
memory depends on the client's grammar.

`GrammarRows` follows the sequences in a separate thread: compilation, replay of earlier tokens, new
tokens and the next masks, all rows of a step in one piece of work, happen while the model computes.
The library can also divide the rows among threads of its own; beside a model on all cores that took
as much CPU time and longer waits. Knows tokens and masks; knows nothing of
JSON or requests.

A tokenizer may have more tokens than the model has rows (an added [PAD]) or fewer (a padded
vocabulary): matchers use the larger number, and masks are cut to the model's rows.

Source: github.com/guidance-ai/llguidance; Brzozowski (1964), Earley (1970).
"""

from __future__ import annotations

import json
import logging
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from arriero.kernels.sizes import num_mask_words
from arriero.shards.errors import CheckpointError
from arriero.shards.protocol.step_plan import Int32

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

log = logging.getLogger(__name__)

_STAND_IN = {
    "content": "<|arriero: no end|>",
    "special": True,
    "single_word": False,
    "lstrip": False,
    "rstrip": False,
    "normalized": False,
}
MAX_COMPILED = 64
"""Number of cached compiled grammars, last used first; a copy takes a microsecond."""


def mask_of(token_ids: Sequence[int], vocab_size: int) -> Int32:
    """The mask that allows these tokens: `num_mask_words(vocab_size)` words."""
    bits = np.zeros(32 * num_mask_words(vocab_size), np.bool_)
    bits[list(token_ids)] = True
    return np.packbits(bits, bitorder="little").view(np.int32)


class _NoTokenizer(CheckpointError):
    """The tokenizer file contains no tokenizer."""


class Compiler:
    """Compiles grammars for a vocabulary and caches the latest; for one thread at a time.

    Args:
        tokenizer: text of a `tokenizer.json`, or path of such a file.
        vocab_size: number of token ids of the model.
        eos_token_ids: tokens that may follow a complete output.

    Attributes:
        stand_in: id of an artificial end token, for a model without an end token that has a text.
    """

    def __init__(
        self, tokenizer: str | Path, *, vocab_size: int, eos_token_ids: Sequence[int]
    ) -> None:
        self._source = (tokenizer, vocab_size, list(eos_token_ids))
        self._tokenizer: LLTokenizer | None = None
        self.stand_in: int | None = None
        self._compiled: OrderedDict[str, LLMatcher] = OrderedDict()

    def matcher(self, grammar: str) -> LLMatcher:
        """A matcher at the start of `grammar`; `is_error()` is true when compilation fails."""
        matcher = self._compiled.get(grammar)
        if matcher is None:
            matcher = self._compiled[grammar] = self._compile(grammar)
            if len(self._compiled) > MAX_COMPILED:
                self._compiled.popitem(last=False)
        self._compiled.move_to_end(grammar)
        return matcher.deep_copy()

    def warm(self) -> None:
        """Build the tables that all grammars share; takes a second for 200,000 tokens.

        Raises:
            CheckpointError: the library cannot use the tokenizer.
            ImportError, OSError: the library or the tokenizer's file is missing.
        """
        try:
            matcher = self.matcher('start: "a"')
        except (ImportError, OSError, CheckpointError):
            raise
        except Exception as error:  # the library's parts raise any type
            raise CheckpointError(f"tokenizer.json: grammars cannot use it: {error}") from error
        if matcher.is_error():
            raise CheckpointError(f"tokenizer.json: grammars cannot use it: {matcher.get_error()}")

    @property
    def num_mask_words(self) -> int:
        """Number of 32-bit words of a mask; needs a compiled grammar."""
        assert self._tokenizer is not None, "compile a grammar first"
        return num_mask_words(self._tokenizer.vocab_size)

    def _compile(self, grammar: str) -> LLMatcher:
        # imported here: an engine runs without the library until the first grammar
        from llguidance import LLMatcher, LLParserLimits

        if self._tokenizer is None:
            self._tokenizer = self._build()
        limits = LLParserLimits(
            max_grammar_size=100_000,  # symbols; about 0.2 s of compiling
            max_lexer_states=20_000,  # 2 kB each
            verbose_errors=False,  # verbose errors quote the vocabulary
        )
        return LLMatcher(self._tokenizer, grammar, log_level=0, limits=limits)

    def _build(self) -> LLTokenizer:
        from llguidance import LLTokenizer

        source, vocab_size, ends = self._source
        text = source.read_text(encoding="utf-8-sig") if isinstance(source, Path) else source
        try:
            spec = json.loads(text)
            size = _num_tokens(spec)
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            raise _NoTokenizer(f"tokenizer.json: contains no tokenizer: {error!r}") from error
        ends = [token for token in ends if token < size]  # the library needs a text for each end
        if not ends:  # the library needs an end: an artificial token, removed from masks
            self.stand_in, ends = size, [size]
            spec["added_tokens"] = [*(spec.get("added_tokens") or []), _STAND_IN | {"id": size}]
            text, size = json.dumps(spec), size + 1
        return LLTokenizer(text, n_vocab=max(vocab_size, size), eos_token=ends)


def _num_tokens(spec: Mapping[str, Any]) -> int:
    """The highest token id of a parsed `tokenizer.json`, plus 1."""
    vocabulary = spec["model"]["vocab"]
    ids = vocabulary.values() if isinstance(vocabulary, dict) else [len(vocabulary) - 1]
    return 1 + max([*ids, *(token["id"] for token in spec.get("added_tokens") or [])], default=-1)


class GrammarRows:
    """The matchers of a slice's sequences and the next masks, by slot.

    Args:
        model_path: folder with `tokenizer.json`.
        vocab_size: number of token ids of the model.
        eos_token_ids: end tokens of the model.
    """

    def __init__(self, model_path: str, *, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        self._compiler = Compiler(
            Path(model_path) / "tokenizer.json",
            vocab_size=vocab_size,
            eos_token_ids=eos_token_ids,
        )
        self._vocab_size = vocab_size
        self._sequences: dict[int, _GrammarSequence] = {}
        self._thread: ThreadPoolExecutor | None = None
        self._warming: Future[None] | None = None

    def warm(self) -> None:
        """Build shared tables in the thread, so that the first grammar delays no step."""
        self._warming = self._submit(self._compiler.warm)

    def check_warm(self) -> None:
        """Wait for `warm`; a slice with an unusable tokenizer must not start.

        Without the library or a tokenizer the slice serves requests that need no grammar; requests
        with a grammar fail.

        Raises:
            CheckpointError: the library cannot use the tokenizer.
        """
        if self._warming is None:
            return
        try:
            self._warming.result()
        except (ImportError, OSError, _NoTokenizer) as error:
            log.warning("grammars are not available: %s", error)

    def close(self) -> None:
        """Stop the thread after its current work."""
        self._sequences.clear()
        if self._thread is not None:
            self._thread.shutdown(cancel_futures=True)
            self._thread = None

    def __contains__(self, slot: int) -> bool:
        return slot in self._sequences

    def __bool__(self) -> bool:
        return bool(self._sequences)

    def enter(
        self, slot: int, grammar: str, output: Sequence[int], ends: Sequence[int] = ()
    ) -> None:
        """Add a sequence.

        Args:
            slot: slot of the sequence.
            grammar: grammar of the output.
            output: output tokens so far.
            ends: end tokens of the sequence beside the model's; allowed where the output may end.
        """
        sequence = self._sequences[slot] = _GrammarSequence(num_mask_words(self._vocab_size), ends)
        sequence.ready = self._submit(partial(sequence.begin, self._compiler, grammar, output))

    def leave(self, slot: int) -> None:
        """Remove the sequence in `slot`; does nothing for an empty slot."""
        self._sequences.pop(slot, None)

    def draft(self, drafts: Mapping[int, Sequence[int]]) -> None:
        """Compute the masks after drafted tokens, by slot; the matchers do not advance."""
        for slot, tokens in drafts.items():
            sequence = self._sequences.get(slot)
            if sequence is not None:
                sequence.ahead = self._submit(partial(sequence.look_ahead, tokens))

    def advance(self, slots: Sequence[int], tokens: Callable[[], Sequence[Sequence[int]]]) -> None:
        """Advance the matchers by the drawn tokens.

        Args:
            slots: slots of all sequences that drew tokens, with or without a grammar.
            tokens: gives the tokens of each slot; called in the thread, where it may wait for the
                device.
        """
        rows = [
            (row, sequence)
            for row, slot in enumerate(slots)
            if (sequence := self._sequences.get(slot))
        ]
        if not rows:
            return
        ready = self._submit(partial(_advance, rows, tokens))
        for _, sequence in rows:
            sequence.ready, sequence.ahead = ready, None

    def allow(
        self,
        slots: Sequence[int],
        allowed_RW: Int32,
        depths: Sequence[int] | None = None,
    ) -> None:
        """Clear the bits of each row of `allowed_RW` that the slot's grammar does not allow.

        Waits for unfinished masks.

        Args:
            slots: slot of each row.
            allowed_RW: the rows' masks; see `SamplingRows`.
            depths: number of drafted tokens before each row, see `draft`; None for none.
        """
        for row, slot in enumerate(slots):
            sequence = self._sequences.get(slot)
            if sequence is not None:
                depth = 0 if depths is None else depths[row]
                allowed_RW[row] &= sequence.mask_at(depth)[: allowed_RW.shape[1]]

    def _submit(self, work: Callable[[], Any]) -> Future[Any]:
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="grammar")
        return self._thread.submit(work)


def _advance(
    rows: Sequence[tuple[int, _GrammarSequence]], tokens: Callable[[], Sequence[Sequence[int]]]
) -> None:
    """Advance sequences by the tokens of their rows."""
    drawn = tokens()
    for row, sequence in rows:
        sequence.advance(drawn[row])


class _GrammarSequence:
    """The matcher and the masks of a sequence; only the thread writes, until the futures are done.

    Attributes:
        ready: done when the mask of the next token is.
        ahead: masks after each token of a draft; None without a draft.
    """

    __slots__ = ("_ends", "_mask", "_matcher", "_stand_in", "ahead", "ready")

    def __init__(self, num_words: int, ends: Sequence[int]) -> None:
        self._matcher: LLMatcher | None = None
        self._mask = np.zeros(num_words, np.int32)
        self._ends = np.asarray(ends, dtype=np.int64)
        self._stand_in: int | None = None
        self.ready: Future[None] | None = None
        self.ahead: Future[list[Int32]] | None = None

    def mask_at(self, depth: int) -> Int32:
        """The mask after `depth` drafted tokens."""
        if not depth:
            assert self.ready is not None, "set by `enter`"
            self.ready.result()
            return self._mask
        assert self.ahead is not None, "`draft` comes before the step"
        return self.ahead.result()[depth - 1]

    def look_ahead(self, tokens: Sequence[int]) -> list[Int32]:
        """Masks after each of the drafted tokens, of a copy: a wrong draft leaves no trace.

        After a token that the grammar rejects, masks are empty: no draw there counts.
        """
        masks = [np.zeros_like(self._mask) for _ in tokens]
        if self._matcher is None:
            return masks
        matcher = self._matcher.deep_copy()
        for depth, token in enumerate(tokens):
            if not matcher.consume_token(token):
                break
            self._fill(masks[depth], matcher)
        return masks

    def begin(self, compiler: Compiler, grammar: str, output: Sequence[int]) -> None:
        """Compile the grammar and compute the mask after `output`."""
        try:
            self._matcher = compiler.matcher(grammar)
        except Exception:
            # Library or tokenizer is missing here, though the gateway has both: with an empty mask
            # this request ends with an error; the other requests of the group go on.
            log.exception("a grammar cannot be compiled")
            return
        self._mask = np.zeros(compiler.num_mask_words, np.int32)
        self._stand_in = compiler.stand_in
        if output:
            self._matcher.consume_tokens(list(output))
        self._fill(self._mask, self._matcher)

    def advance(self, tokens: Sequence[int]) -> None:
        """Compute the mask after further tokens of the output."""
        if self._matcher is None:
            return
        for token in tokens:
            if token >= 0:  # -1: no token was allowed
                self._matcher.consume_token(token)
        self._fill(self._mask, self._matcher)

    def _fill(self, mask: Int32, matcher: LLMatcher) -> None:
        # A matcher in error allows the end, which would look like a complete output.
        if not matcher.is_error():
            matcher.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
            if not matcher.is_error():
                self._set_ends(mask.view(np.uint32), matcher)
                return
        mask[:] = 0

    def _set_ends(self, mask: npt.NDArray[np.uint32], matcher: LLMatcher) -> None:
        """Allow the sequence's end tokens where the output may end."""
        if self._stand_in is not None:
            mask[self._stand_in >> 5] &= ~np.uint32(1 << (self._stand_in & 31))
        if len(self._ends) and matcher.is_accepting():
            bits = np.uint32(1) << (self._ends & 31).astype(np.uint32)
            np.bitwise_or.at(mask, self._ends >> 5, bits)
