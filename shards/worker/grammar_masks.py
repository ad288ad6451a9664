"""Grammars that an output must fit: their limits, and the matchers that turn them into masks.

A grammar is llguidance's text (Lark with `%json` and `%regex`), compiled by that library: Earley
parsing over derivatives of regular expressions, so that a mask is computed, never looked up in a
table that grows with the vocabulary. Compiling and each mask run on fuel, so neither time nor
memory depends on what a caller writes.

`GrammarRows` follows the sequences in slots from one thread of its own: compiling, replaying,
taking a token in and making the next mask happen while the model computes. Knows tokens and masks;
knows nothing of JSON or requests.

A tokenizer may have more tokens than the model has rows (an added [PAD]), or fewer (a padded
vocabulary): grammars are followed over the larger number, and masks cut to the model's rows.

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
"""Compiled grammars kept, the last used; a copy of one costs a microsecond."""


class _NoTokenizer(CheckpointError):
    """The file that should hold a tokenizer holds none."""


class Compiler:
    """Compiles grammars for one vocabulary; keeps the latest. For one thread at a time.

    Args:
        tokenizer: text of a `tokenizer.json`, or the path of one.
        vocab_size: token ids run below it.
        eos_token_ids: what may be drawn once the grammar is fulfilled.

    Attributes:
        stand_in: id that the library has for an end where the model has none with a text.
    """

    def __init__(
        self, tokenizer: str | Path, *, vocab_size: int, eos_token_ids: Sequence[int]
    ) -> None:
        self._source = (tokenizer, vocab_size, list(eos_token_ids))
        self._tokenizer: LLTokenizer | None = None
        self.stand_in: int | None = None
        self._compiled: OrderedDict[str, LLMatcher] = OrderedDict()

    def matcher(self, grammar: str) -> LLMatcher:
        """A matcher at the start of `grammar`; one that `is_error` when that cannot be compiled."""
        found = self._compiled.get(grammar)
        if found is None:
            found = self._compiled[grammar] = self._compile(grammar)
            if len(self._compiled) > MAX_COMPILED:
                self._compiled.popitem(last=False)
        self._compiled.move_to_end(grammar)
        return found.deep_copy()

    def warm(self) -> None:
        """Build what every grammar needs, which takes a second for 200,000 tokens.

        Raises:
            CheckpointError: the library cannot take the tokenizer.
            ImportError, OSError: the library or the tokenizer's file is not here.
        """
        try:
            matcher = self.matcher('start: "a"')
        except (ImportError, OSError, CheckpointError):
            raise
        except Exception as error:  # the library raises what its parts raise
            raise CheckpointError(f"tokenizer.json: grammars cannot use it: {error}") from error
        if matcher.is_error():
            raise CheckpointError(f"tokenizer.json: grammars cannot use it: {matcher.get_error()}")

    @property
    def num_mask_words(self) -> int:
        """32-bit words of a mask, once a grammar was compiled."""
        assert self._tokenizer is not None, "compile a grammar first"
        return -(-self._tokenizer.vocab_size // 32)

    def _compile(self, grammar: str) -> LLMatcher:
        # imported here: an engine runs without the library until a request brings a grammar
        from llguidance import LLMatcher, LLParserLimits

        if self._tokenizer is None:
            self._tokenizer = self._build()
        limits = LLParserLimits(
            max_grammar_size=100_000,  # symbols; about 0.2 s of compiling
            max_lexer_states=20_000,  # 2 kB each
            verbose_errors=False,  # which would quote the vocabulary
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
            raise _NoTokenizer(f"tokenizer.json: holds no tokenizer: {error!r}") from error
        ends = [token for token in ends if token < size]  # the library takes no end without text
        if not ends:  # and wants one: a token of our own, which masks leave out
            self.stand_in, ends = size, [size]
            spec["added_tokens"] = [*(spec.get("added_tokens") or []), _STAND_IN | {"id": size}]
            text, size = json.dumps(spec), size + 1
        return LLTokenizer(text, n_vocab=max(vocab_size, size), eos_token=ends)


def _num_tokens(spec: Mapping[str, Any]) -> int:
    """One more than the highest id of a parsed `tokenizer.json`."""
    vocabulary = spec["model"]["vocab"]
    ids = vocabulary.values() if isinstance(vocabulary, dict) else [len(vocabulary) - 1]
    return 1 + max([*ids, *(token["id"] for token in spec.get("added_tokens") or [])], default=-1)


class GrammarRows:
    """The matchers of one slice's sequences, by slot, and their next masks.

    Args:
        model_path: folder with `tokenizer.json`.
        vocab_size: token ids run below it.
        eos_token_ids: the model's own end tokens.
    """

    def __init__(self, model_path: str, *, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        self._compiler = Compiler(
            Path(model_path) / "tokenizer.json",
            vocab_size=vocab_size,
            eos_token_ids=eos_token_ids,
        )
        self._vocab_size = vocab_size
        self._followed: dict[int, _Followed] = {}
        self._thread: ThreadPoolExecutor | None = None
        self._warming: Future[None] | None = None

    def warm(self) -> None:
        """Make ready in the thread, so that a first grammar holds no step up."""
        self._warming = self._submit(self._compiler.warm)

    def check_warm(self) -> None:
        """Wait for `warm`; a slice that could follow no grammar does not start.

        Where the library or a tokenizer is not here, the first grammar says so: tokens are served
        all the same.

        Raises:
            CheckpointError: the tokenizer is here, and the library cannot take it.
        """
        if self._warming is None:
            return
        try:
            self._warming.result()
        except (ImportError, OSError, _NoTokenizer) as error:
            log.warning("no grammar can be followed: %s", error)

    def close(self) -> None:
        """Stop the thread; what it has begun it ends."""
        self._followed.clear()
        if self._thread is not None:
            self._thread.shutdown(cancel_futures=True)
            self._thread = None

    def __contains__(self, slot: int) -> bool:
        return slot in self._followed

    def __bool__(self) -> bool:
        return bool(self._followed)

    def enter(
        self, slot: int, grammar: str, output: Sequence[int], ends: Sequence[int] = ()
    ) -> None:
        """Follow the sequence in `slot`, which has said `output` so far.

        Args:
            slot: where it is.
            grammar: what its output must fit.
            output: its tokens so far.
            ends: tokens that end this sequence, beside the model's own: they may be drawn where
                the output may end.
        """
        one = self._followed[slot] = _Followed(-(-self._vocab_size // 32), ends)
        one.mask = self._submit(partial(one.begin, self._compiler, grammar, output))

    def leave(self, slot: int) -> None:
        """Forget the sequence in `slot`, if there is one."""
        self._followed.pop(slot, None)

    def take(self, slots: Sequence[int], tokens: Callable[[], Int32]) -> None:
        """Go on with the tokens that `slots` drew.

        Args:
            slots: of all sequences that drew; those without a grammar are left out.
            tokens: gives the tokens; called from the thread, where it may wait for the device.
        """
        rows = [(row, one) for row, slot in enumerate(slots) if (one := self._followed.get(slot))]
        if not rows:
            return
        drawn = self._submit(tokens)
        for row, one in rows:
            one.mask = self._submit(partial(one.take, drawn, row))

    def allow(self, slots: Sequence[int], allowed_RV: npt.NDArray[np.bool_]) -> None:
        """Take from each row of `allowed_RV` what the grammar of its slot does not allow.

        Waits for masks that are still being made.
        """
        for row, slot in enumerate(slots):
            one = self._followed.get(slot)
            if one is not None:
                assert one.mask is not None, "set as it entered"
                bits = np.unpackbits(one.mask.result().view(np.uint8), bitorder="little")
                allowed_RV[row] &= bits[: self._vocab_size].view(np.bool_)

    def _submit(self, work: Callable[[], Any]) -> Future[Any]:
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="grammar")
        return self._thread.submit(work)


class _Followed:
    """One sequence's matcher, touched by the thread alone, and its next mask, when it is made."""

    __slots__ = ("_ends", "_matcher", "_stand_in", "_words", "mask")

    def __init__(self, num_words: int, ends: Sequence[int]) -> None:
        self._matcher: LLMatcher | None = None
        self._words = num_words
        self._ends = np.asarray(ends, dtype=np.int64)
        self._stand_in: int | None = None
        self.mask: Future[Int32] | None = None

    def begin(self, compiler: Compiler, grammar: str, output: Sequence[int]) -> Int32:
        try:
            self._matcher = compiler.matcher(grammar)
            self._words, self._stand_in = compiler.num_mask_words, compiler.stand_in
        except Exception:
            # The library or the tokenizer is not here, though the gateway has both: the one request
            # finds nothing to draw and ends in an error; the group's others go on.
            log.exception("a grammar cannot be followed")
            return np.zeros(self._words, np.int32)
        if output:
            self._matcher.consume_tokens(list(output))
        return self._fill(self._matcher)

    def take(self, drawn: Future[Int32], row: int) -> Int32:
        token = int(drawn.result()[row])  # done: the one thread works in order
        if self._matcher is None:
            return np.zeros(self._words, np.int32)
        if token >= 0:  # -1 where nothing was left to draw
            self._matcher.consume_token(token)
        return self._fill(self._matcher)

    def _fill(self, matcher: LLMatcher) -> Int32:
        mask = np.zeros(self._words, np.int32)
        # Of a matcher in error the library allows the end, which would pass for a whole output.
        if not matcher.is_error():
            matcher.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
            if matcher.is_error():
                mask[:] = 0
            else:
                self._set_ends(mask.view(np.uint32), matcher)
        return mask

    def _set_ends(self, mask: npt.NDArray[np.uint32], matcher: LLMatcher) -> None:
        """Allow the sequence's own ends where the library allows the model's."""
        if self._stand_in is not None:
            mask[self._stand_in >> 5] &= ~np.uint32(1 << (self._stand_in & 31))
        if len(self._ends) and matcher.is_accepting():
            bits = np.uint32(1) << (self._ends & 31).astype(np.uint32)
            np.bitwise_or.at(mask, self._ends >> 5, bits)
