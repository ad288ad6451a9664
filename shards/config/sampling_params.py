"""Sampling parameters of a request, checked once on arrival.

Knows numbers and limits; knows nothing of text (the router has stop strings) or of tensors.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from arriero.shards.errors import InvalidRequest

MAX_N = 128
MAX_LOGPROBS = 20
MAX_BIAS = 1024
MAX_STOP_TOKENS = 64
MAX_GRAMMAR_BYTES = 256 * 1024
"""Longest grammar; a plan has the grammar once for each sequence that enters a slot."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingParams:
    """Sampling parameters of one request; the defaults are OpenAI's, which sample.

    Attributes:
        max_tokens: most output tokens; None means as many as the context allows.
        min_tokens: number of output tokens before which stop tokens are banned.
        temperature: 0 means greedy.
        top_k: keep the k most likely tokens; 0 means off.
        top_p: keep the smallest set of tokens with a total probability of p; 1 means off.
        min_p: drop tokens below p times the highest probability; 0 means off.
        repetition_penalty: Hugging Face's definition, over prompt and output; 1 means off;
            0.01 to 100, so that the divided logits stay float32.
        presence_penalty: subtracted once from tokens that occur in the output (OpenAI).
        frequency_penalty: subtracted for each occurrence in the output (OpenAI).
        logit_bias: number added to the logit of each token id.
        allowed_token_ids: only tokens that may be sampled, if set.
        banned_token_ids: tokens that are never sampled.
        seed: 0 .. 2**63 - 1. The same seed gives the same tokens. None: the router picks a seed.
        n: samples of the same prompt; each sample has its own stream derived from the seed.
        stop_token_ids: tokens that end the output; the stop token is in the output's ids. With a
            grammar, stop tokens may be sampled where the output may end.
        ignore_eos: whether to continue after the model's own end tokens.
        logprobs: number of alternatives besides the chosen token's log-probability; None for none.
        prompt_logprobs: same, for each prompt token except the first.
        grammar: grammar of the output's text (see `worker.grammar_masks`); "" for none. The
            model's end tokens are sampled only where the text may end.
    """

    max_tokens: int | None = None
    min_tokens: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    allowed_token_ids: tuple[int, ...] | None = None
    banned_token_ids: tuple[int, ...] = ()
    seed: int | None = None
    n: int = 1
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    grammar: str = ""

    def check(self, *, vocab_size: int) -> None:
        """Raise `InvalidRequest` for the first field that breaks a limit."""
        _integer("max_tokens", self.max_tokens, 1, None, optional=True)
        _integer("min_tokens", self.min_tokens, 0, self.max_tokens)
        _number("temperature", self.temperature, 0.0, 100.0)
        _integer("top_k", self.top_k, 0, None)
        _number("top_p", self.top_p, 0.0, 1.0, above_low=True)
        _number("min_p", self.min_p, 0.0, 1.0)
        _number("repetition_penalty", self.repetition_penalty, 0.01, 100.0)
        _number("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _number("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        _integer("seed", self.seed, 0, 2**63 - 1, optional=True)
        _integer("n", self.n, 1, MAX_N)
        _integer("logprobs", self.logprobs, 0, MAX_LOGPROBS, optional=True)
        _integer("prompt_logprobs", self.prompt_logprobs, 0, MAX_LOGPROBS, optional=True)
        self._check_grammar()
        _count("logit_bias", len(self.logit_bias), MAX_BIAS)
        for token, value in self.logit_bias.items():
            _number(f"logit_bias[{token}]", value, -100.0, 100.0)
        _tokens("logit_bias", self.logit_bias, vocab_size)
        _count("stop_token_ids", len(self.stop_token_ids), MAX_STOP_TOKENS)
        _tokens("stop_token_ids", self.stop_token_ids, vocab_size)
        _tokens("banned_token_ids", self.banned_token_ids, vocab_size)
        if self.allowed_token_ids is not None:
            _tokens("allowed_token_ids", self.allowed_token_ids, vocab_size)
            if not set(self.allowed_token_ids) - set(self.banned_token_ids):
                raise InvalidRequest(
                    "allowed_token_ids",
                    "`allowed_token_ids` leaves no token to sample once `banned_token_ids` are "
                    "removed; allow at least one",
                )

    def _check_grammar(self) -> None:
        if not self.grammar:
            return
        size = len(self.grammar.encode())
        if size > MAX_GRAMMAR_BYTES:
            raise InvalidRequest(
                "grammar",
                f"`grammar` has {size} bytes; the most is {MAX_GRAMMAR_BYTES}; make it shorter",
            )
        for name in ("ignore_eos", "min_tokens"):
            if getattr(self, name):
                raise InvalidRequest(
                    name,
                    f"`{name}` and structured output exclude each other: the grammar decides "
                    "where the output ends; leave one of the two out",
                )

    @property
    def has_penalties(self) -> bool:
        """Whether the sampler must count the tokens of a sequence."""
        return (
            self.repetition_penalty != 1.0
            or self.presence_penalty != 0.0
            or self.frequency_penalty != 0.0
        )


def _number(name: str, value: float, low: float, high: float, *, above_low: bool = False) -> None:
    if not math.isfinite(value) or value > high or value < low or (above_low and value == low):
        floor = f"above {low:g}" if above_low else f"at least {low:g}"
        raise InvalidRequest(name, f"`{name}`={value} must be {floor} and at most {high:g}")


def _integer(
    name: str, value: int | None, low: int, high: int | None, *, optional: bool = False
) -> None:
    if value is None and optional:
        return
    if value is None or value < low or (high is not None and value > high):
        ceiling = "" if high is None else f" and at most {high}"
        raise InvalidRequest(name, f"`{name}`={value} must be at least {low}{ceiling}")


def _count(name: str, count: int, limit: int) -> None:
    if count > limit:
        raise InvalidRequest(
            name, f"`{name}` has {count} entries; the limit is {limit}; remove some"
        )


def _tokens(name: str, tokens: Iterable[int], vocab_size: int) -> None:
    for token in tokens:
        if not 0 <= token < vocab_size:
            raise InvalidRequest(
                name, f"`{name}` holds token id {token}; ids run from 0 to {vocab_size - 1}"
            )
