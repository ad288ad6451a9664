"""Joins the hashes of tensors that several ranks computed to the digest of a model.

Knows hashes; knows nothing of files, and needs no torch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

from arriero.shards.errors import CheckpointError

DIGEST_BYTES = 16


def join_hashes(shape: str, parts: Sequence[Mapping[int, bytes]]) -> str:
    """The digest of a model, 32 hex digits.

    Args:
        shape: `shape_digest` of the model, equal on all ranks.
        parts: hashes of each rank; together every tensor once.

    Raises:
        CheckpointError: a tensor is missing, or is in two parts.
    """
    places = sorted(place for part in parts for place in part)
    if places != list(range(len(places))):
        raise CheckpointError("the ranks did not hash every tensor exactly once")
    hashes = {place: value for part in parts for place, value in part.items()}
    digest = hashlib.blake2b(shape.encode(), digest_size=DIGEST_BYTES)
    for place in places:
        digest.update(hashes[place])
    return digest.hexdigest()
