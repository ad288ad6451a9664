"""Configurations and requests that an engine accepts, whatever its load.

Pure functions of their arguments, so thread-safe. Knows limits; knows no load.
"""

from __future__ import annotations

from array import array
from collections.abc import Container

import numpy as np

from arriero.shards.engine.types import EngineConfig, EngineRequest
from arriero.shards.errors import ContextTooLong, InvalidRequest, SpecError
from arriero.shards.images.request import check_images

WITHDRAWN = "the adapter of `model` is not on this group any more; send the request again"
"""Text for a request whose adapter was removed."""


def check_config(config: EngineConfig) -> None:
    """Raise `SpecError` for the first field of `config` out of range."""
    for name in (
        "max_model_len", "block_size", "num_blocks", "max_sequences", "max_batch_tokens",
        "max_queued", "pipeline_depth", "num_stages", "num_dp_ranks", "vocab_size",
    ):  # fmt: skip
        value = getattr(config, name)
        if value < 1:
            raise SpecError(f"`{name}`={value} must be at least 1")
    _check_chunk(config)
    _check_window(config)
    for token in config.eos_token_ids:
        if not 0 <= token < config.vocab_size:
            raise SpecError(
                f"`eos_token_ids` holds {token}; ids run from 0 to {config.vocab_size - 1}"
            )


def _check_chunk(config: EngineConfig) -> None:
    chunk, size = config.attention_chunk, config.block_size
    if not chunk:
        return
    if chunk < 0 or chunk % size:
        raise SpecError(f"`attention_chunk`={chunk} must be a multiple of `block_size`={size}")
    longest = min(chunk, config.max_model_len, config.num_blocks * size)
    if config.num_local_blocks * size < longest:
        raise SpecError(
            f"`num_local_blocks`={config.num_local_blocks} blocks of {size} tokens hold less than "
            f"a sequence's chunk; give at least {-(-longest // size)}"
        )


def _check_window(config: EngineConfig) -> None:
    window, sinks = config.attention_window, config.attention_sinks
    if min(window, sinks) < 0 or (sinks and not window) or (window and config.attention_chunk):
        raise SpecError(
            f"`attention_window`={window} and `attention_sinks`={sinks} (with `attention_chunk`="
            f"{config.attention_chunk}) must be 0 or more; sinks need a window, and a window "
            "cannot be beside chunks"
        )
    if not window:
        return
    least = config.seen_blocks.most(config.max_model_len)
    if config.num_blocks < least:
        raise SpecError(
            f"`num_blocks`={config.num_blocks} blocks of {config.block_size} tokens hold less than "
            f"one sequence's window of {window} and {sinks} sinks; give at least {least}"
        )


def check_request(
    config: EngineConfig, request: EngineRequest, adapters: Container[str] = ()
) -> None:
    """Raise `InvalidRequest` for a request that could never run, however light the load.

    Args:
        config: limits.
        request: the request.
        adapters: digests of the adapters that the group serves.
    """
    params = request.params
    params.check(vocab_size=config.vocab_size)
    if params.seed is None:
        raise InvalidRequest(
            "seed", "`seed` is not set; the router must set a seed for each request"
        )
    if params.max_tokens is None:
        raise InvalidRequest("max_tokens", "`max_tokens` is not set; the router must set a limit")
    if not request.prompt:
        raise InvalidRequest("prompt", "`prompt` is empty; give at least one token")
    _check_tokens("prompt", request.prompt, config.vocab_size)
    if request.adapter and request.adapter not in adapters:
        raise InvalidRequest("model", WITHDRAWN)
    _check_tokens("prediction", request.prediction, config.vocab_size)
    check_images(request.prompt, request.images, config.image_token, config.max_images)
    _check_resumed(config, request, params.max_tokens)
    _check_length(config, len(request.prompt), params.max_tokens)


def _check_tokens(name: str, tokens: tuple[int, ...], vocab_size: int) -> None:
    try:
        ids = np.frombuffer(array("i", tokens), dtype=np.intc)
    except (OverflowError, TypeError) as error:
        raise InvalidRequest(name, f"`{name}` must hold token ids: {error}") from None
    wrong = np.flatnonzero((ids < 0) | (ids >= vocab_size))
    if len(wrong):
        raise InvalidRequest(
            name,
            f"`{name}` holds token id {ids[wrong[0]]} at {wrong[0]}; "
            f"ids run from 0 to {vocab_size - 1}",
        )


def _check_resumed(config: EngineConfig, request: EngineRequest, max_tokens: int) -> None:
    if not request.resumed:
        return
    _check_tokens("resumed", request.resumed, config.vocab_size)
    if request.params.n != 1:
        raise InvalidRequest("n", f"`n`={request.params.n} with `resumed`; resume one sample")
    if len(request.resumed) >= max_tokens:
        raise InvalidRequest(
            "resumed",
            f"`resumed` has {len(request.resumed)} of `max_tokens`={max_tokens} tokens; "
            "nothing is left to generate",
        )


def _check_length(config: EngineConfig, num_prompt: int, max_tokens: int) -> None:
    limits = [("max_model_len", config.max_model_len)]
    if not config.attention_window:
        # The last token is sampled and never fed back, so it needs no room in the pool.
        limits.append(("the KV pool's tokens", config.num_blocks * config.block_size + 1))
    name, limit = min(limits, key=lambda pair: pair[1])
    if num_prompt >= limit:
        raise ContextTooLong(
            "prompt",
            f"`prompt` has {num_prompt} tokens; {name} = {limit} leave room for at most "
            f"{limit - 1} and one output token; shorten it",
        )
    if num_prompt + max_tokens > limit:
        raise ContextTooLong(
            "max_tokens",
            f"`max_tokens`={max_tokens} exceeds {limit} ({name}) - {num_prompt} prompt tokens; "
            f"lower it to {limit - num_prompt} or less",
        )
