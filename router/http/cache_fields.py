"""Fields that say which prompts will come again: `prompt_cache_key`, `cache_control` and the like.

They change no token; the blocks that they name stay in the cache longer. Knows the fields of the
APIs; knows nothing of the cache itself.
"""

from __future__ import annotations

import re
from typing import Annotated, ClassVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from arriero.router.http.fields import Body, hint

DEFAULT_TTL, EXPLICIT_TTL = "5m", "30m"
"""Time of a breakpoint in the APIs of Anthropic (`cache_control`) and OpenAI."""
_IN_MEMORY = frozenset({"in_memory", "in-memory"})
_DURATION = re.compile(r"(\d{1,6})([smhd])")
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86_400}
_MOST_S = 86_400


def seconds(ttl: str) -> int | None:
    """Seconds of a duration such as "5m"; None for the default time of a session."""
    if ttl in _IN_MEMORY:
        return None
    match = _DURATION.fullmatch(ttl)
    assert match is not None, "checked by `_check`"
    return int(match[1]) * _SECONDS[match[2]]


def _check(ttl: str) -> str:
    if ttl in _IN_MEMORY:
        return ttl
    if not _DURATION.fullmatch(ttl) or (seconds(ttl) or 0) > _MOST_S:
        raise ValueError('must be a number of s, m, h or d such as "5m", at most "24h"')
    return ttl


Ttl = Annotated[str, AfterValidator(_check)]
"""A time such as "5m", "1h" or "24h"."""


class CacheControl(BaseModel):
    """The end of a beginning that will come again."""

    model_config = ConfigDict(extra="ignore", strict=True)

    type: str = Field("ephemeral", description="Every type means the same.")
    ttl: Ttl = Field(DEFAULT_TTL, description='Time in the cache, such as "5m" or "1h".')


class CacheBreakpoint(BaseModel):
    """The same in the newer form of the OpenAI API; the time is `prompt_cache_options.ttl`."""

    model_config = ConfigDict(extra="ignore", strict=True)


class CacheOptions(Body):
    """How the prompt is kept in the cache."""

    others: ClassVar = {"scope": hint("a tenant's setting `private_cache` decides.")}
    mode: str | None = Field(
        None, description='"explicit" keeps the prompt up to its breakpoints, not as a whole.'
    )
    ttl: Ttl | None = Field(None, description='Time in the cache, such as "30m".')


class Breakpoints(Body):
    """Where a beginning that will come again ends: in a message, a part or a tool."""

    cache_control: CacheControl | None = Field(
        None, description="The conversation up to here stays in the cache for a time."
    )
    prompt_cache_breakpoint: CacheBreakpoint | None = Field(
        None, description="As `cache_control`, for `prompt_cache_options.ttl`."
    )


class SessionFields(Body):
    """Hints of a whole request."""

    prompt_cache_key: str | None = Field(
        None,
        description="Name of a session, at most 1024 bytes: its prompts go to the group that has "
        "their beginning, and stay in the cache through pauses. Changes no token.",
    )
    prompt_cache_retention: Ttl | None = Field(
        None,
        description='Time for which prompt and output stay in the cache: "in_memory" (10 minutes), '
        '"24h", or another time such as "30m".',
    )
    prompt_cache_options: CacheOptions | None = Field(
        None, description="`ttl` as `prompt_cache_retention`."
    )
