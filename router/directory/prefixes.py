"""How much of a prompt each group has: the prompt's chain of keys, as far as anybody has it.

Knows how keys are made (as engines make them) and the directory; knows nothing of who asks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np

from arriero.router.directory.directory import Directory, Reach
from arriero.router.directory.table import fingerprints
from arriero.shards.engine.blocks import KEY_BYTES, chain_keys

PAGE_BLOCKS = 128
"""Keys made in one go: hashing stops soon after the last group's part of the chain has ended."""
NOTHING = Reach(0, 0)


@dataclass(frozen=True, slots=True)
class CacheRoot:
    """What the keys of a group's blocks begin with.

    Attributes:
        key: parent of first blocks; b"" for a group that has no prefix cache.
        block_size: tokens in a block.
    """

    key: bytes
    block_size: int


def find(directory: Directory, root: CacheRoot, prompt: Sequence[int]) -> Mapping[str, Reach]:
    """Tokens of a prompt that each group has, in blocks that are full; groups of any root.

    Args:
        directory: of all groups.
        root: of the groups that are meant.
        prompt: token ids.
    """
    size = root.block_size
    keys = chain_keys(root.key, np.asarray(prompt[:-1], dtype=np.int32), size)
    found: dict[str, Reach] = {}
    start = 0
    while page := b"".join(islice(keys, PAGE_BLOCKS)):
        blocks = len(page) // KEY_BYTES
        furthest = 0
        for group, reach in directory.lookup(fingerprints(page, KEY_BYTES)).items():
            before = found.get(group, NOTHING)
            if before.total != start * size:
                continue  # its part of the chain ended before this page
            near = reach.near if before.near == before.total else 0
            found[group] = Reach(before.near + near * size, before.total + reach.total * size)
            furthest = max(furthest, reach.total)
        start += blocks
        if furthest < blocks:
            break
    return found
