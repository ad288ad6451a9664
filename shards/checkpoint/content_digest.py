"""A digest of every byte of a model's tensors, made by several ranks together.

Training changes few bits of a tensor, which a sample may miss: so pushed weights are named by all
their bytes. Each rank hashes every n-th tensor and looks for numbers that are not finite; the
leader joins the hashes. The digest does not depend on how tensors are divided among files or ranks.
Knows bytes and names; knows nothing of what the tensors are for.
"""

from __future__ import annotations

import hashlib
import json

from arriero.shards.checkpoint.joined_digest import DIGEST_BYTES, join_hashes
from arriero.shards.checkpoint.tensor_folder import TensorFolder
from arriero.shards.checkpoint.verify import count_non_finite
from arriero.shards.errors import CheckpointError
from arriero.shards.files.json_file import read_json_object

_PIECE_BYTES = 8 << 20


def tensor_hashes(folder: TensorFolder, rank: int, num_ranks: int) -> dict[int, bytes]:
    """Hashes of every `num_ranks`-th tensor, from tensor `rank` on, by place in the sorted names.

    Raises:
        CheckpointError: a number is not finite; the message names the tensor and its file.
    """
    return {
        place: _hash(folder, name)
        for place, name in enumerate(folder.names)
        if place % num_ranks == rank
    }


def shape_digest(folder: TensorFolder) -> str:
    """Digest of config.json and of name, dtype and shape of each tensor."""
    settings = read_json_object(folder.path / "config.json")
    digest = hashlib.blake2b(
        json.dumps(settings, sort_keys=True).encode(), digest_size=DIGEST_BYTES
    )
    for name, tensor in folder.stored.items():
        entry = [name, str(tensor.dtype), list(tensor.shape)]
        digest.update(json.dumps(entry).encode())
    return digest.hexdigest()


def content_digest(folder: TensorFolder) -> str:
    """The digest of a model, computed by one process; see `join_hashes`."""
    return join_hashes(shape_digest(folder), [tensor_hashes(folder, 0, 1)])


def _hash(folder: TensorFolder, name: str) -> bytes:
    tensor = folder.stored[name]
    folder.need(tensor.file, tensor.start, tensor.stop)
    data = folder.data(tensor.file)
    digest = hashlib.blake2b(digest_size=DIGEST_BYTES)
    num_bad = 0
    for start in range(tensor.start, tensor.stop, _PIECE_BYTES):
        piece = data[start : min(start + _PIECE_BYTES, tensor.stop)]
        digest.update(piece.numpy().data)
        num_bad += count_non_finite(piece, tensor.dtype)
    if num_bad:
        raise CheckpointError(
            f"{tensor.file}: tensor {name!r} of shape {list(tensor.shape)} holds {num_bad} values "
            "that are infinite or not a number; push another checkpoint"
        )
    return digest.digest()
