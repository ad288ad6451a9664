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
from arriero.router.text.model_card import ModelCard
from arriero.shards.engine.types import EngineRequest
from arriero.shards.kv.blocks import KEY_BYTES, chain_keys, salted_root

PAGE_BLOCKS = 128
"""Keys made in one go at first, then each time twice as many: hashing stops soon after the last
group's part of the chain has ended."""
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

    @classmethod
    def of(cls, card: ModelCard, request: EngineRequest) -> CacheRoot | None:
        """Of a request's blocks in a group; None where their keys are not to be made here.

        Those of images are not: they are of what the images hold.
        """
        if not card.cache_root or request.images:
            return None
        return cls(salted_root(card.cache_root, request.cache_salt), card.block_size)


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
    start, most = 0, PAGE_BLOCKS
    while page := b"".join(islice(keys, most)):
        blocks = len(page) // KEY_BYTES
        furthest = 0
        for group, reach in directory.lookup(fingerprints(page, KEY_BYTES)).items():
            before = found.get(group, NOTHING)
            if before.total != start * size:
                continue  # its part of the chain ended before this page
            near = reach.near if before.near == before.total else 0
            found[group] = Reach(before.near + near * size, before.total + reach.total * size)
            furthest = max(furthest, reach.total)
        start, most = start + blocks, 2 * most
        if furthest < blocks:
            break
    return found
