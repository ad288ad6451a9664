"""The cached length of a prompt in each group: a lookup of the prompt's chain of block keys.

Knows the directory and how engines make keys; knows nothing of requests' owners or routing.
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
"""Keys in the first page of a lookup; each further page has twice as many. Hashing stops at the end
of the page in which the last group's chain ends."""
NOTHING = Reach(0, 0)


@dataclass(frozen=True, slots=True)
class CacheRoot:
    """The start of a chain of block keys.

    Attributes:
        key: parent key of first blocks; b"" for a group without a prefix cache.
        block_size: tokens in a block.
    """

    key: bytes
    block_size: int

    @classmethod
    def of(cls, card: ModelCard, request: EngineRequest) -> CacheRoot | None:
        """The root of a request's chain in a group; None when a gateway cannot compute the keys.

        Keys of image tokens depend on the image data, so requests with images have none here.
        """
        if not card.cache_root or request.images:
            return None
        return cls(salted_root(card.cache_root, request.key_salt), card.block_size)


def find(directory: Directory, root: CacheRoot, prompt: Sequence[int]) -> Mapping[str, Reach]:
    """Cached tokens of a prompt in full blocks, by group.

    Args:
        directory: directory of all groups.
        root: start of the chain.
        prompt: token ids.
    """
    size = root.block_size
    keys = chain_keys(root.key, np.asarray(prompt[:-1], dtype=np.int32), size)
    cached: dict[str, Reach] = {}
    start, count = 0, PAGE_BLOCKS
    while page := b"".join(islice(keys, count)):
        blocks = len(page) // KEY_BYTES
        furthest = 0
        for group, reach in directory.lookup(fingerprints(page, KEY_BYTES)).items():
            before = cached.get(group, NOTHING)
            if before.total != start * size:
                continue  # the group's chain ended before this page
            near = reach.near if before.near == before.total else 0
            cached[group] = Reach(before.near + near * size, before.total + reach.total * size)
            furthest = max(furthest, reach.total)
        start, count = start + blocks, 2 * count
        if furthest < blocks:
            break
    return cached
