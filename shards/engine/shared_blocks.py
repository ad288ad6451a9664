"""Blocks that a sequence finds in the cache, and blocks that a pin keeps there.

Knows lists of blocks; knows nothing of pools.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class SharedBlocks:
    """Existing blocks with a sequence's first tokens.

    Attributes:
        blocks: blocks of all these tokens, of layers with full attention.
        local: blocks that the next token sees, of layers with chunked or windowed attention.
    """

    blocks: list[int] = field(default_factory=list)
    local: list[int] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Pin:
    """A prefix whose blocks stay on the device.

    Attributes:
        owner: owner of the pin's block table.
        num_tokens: tokens of the prefix that were on the device at the time of pinning.
    """

    owner: int
    num_tokens: int
