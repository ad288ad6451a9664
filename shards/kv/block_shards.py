"""Pieces of blocks: which layers and KV heads of a block a rank holds, and their bytes in a file.

A block of the model is addressed by (layer, KV head), whatever the layout. A rank's part of it is
a piece: a range of layers times a range of heads. A file holds one piece of one block; a rank of
another layout puts its own piece together from all files that overlap it.

Knows geometry and the file's form; knows nothing of folders, tiers or devices.

Shape legend: L layers, K KV heads, P positions of a block, D head dimension (canonical).
"""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from arriero.kernels.ops import KVCacheSpec
from arriero.shards.config.kv_tiers import SCALE_BYTES

_HEADER = struct.Struct("<8s8sIIIIQI20x")
_MAGIC = b"ARRIERO1"
_NAME = re.compile(r"([0-9a-f]{32})-(\d+)\.(\d+)-(\d+)\.(\d+)\.kv")

Bytes = npt.NDArray[np.uint8]


class BadBlock(Exception):
    """Bytes that are not the block they should be: short, of another form, or changed."""


@dataclass(frozen=True, slots=True)
class BlockShard:
    """Half-open ranges of global layers and KV heads."""

    layers: tuple[int, int]
    heads: tuple[int, int]

    def overlap(self, other: BlockShard) -> BlockShard | None:
        """What both hold."""
        layers = (max(self.layers[0], other.layers[0]), min(self.layers[1], other.layers[1]))
        heads = (max(self.heads[0], other.heads[0]), min(self.heads[1], other.heads[1]))
        if layers[0] >= layers[1] or heads[0] >= heads[1]:
            return None
        return BlockShard(layers, heads)

    def within(self, outer: BlockShard) -> tuple[slice, slice]:
        """Where it lies in an array of `outer`: (layers, heads)."""
        first_layer, first_head = outer.layers[0], outer.heads[0]
        return (
            slice(self.layers[0] - first_layer, self.layers[1] - first_layer),
            slice(self.heads[0] - first_head, self.heads[1] - first_head),
        )

    def covered_by(self, pieces: Iterable[BlockShard]) -> bool:
        """Whether the pieces together hold all of it."""
        left = np.ones(
            (self.layers[1] - self.layers[0], self.heads[1] - self.heads[0]), dtype=np.bool_
        )
        for piece in pieces:
            part = piece.overlap(self)
            if part is not None:
                left[part.within(self)] = False
        return not left.any()

    def file_name(self, key: bytes) -> str:
        """Name of the file that holds this piece of a block."""
        (l0, l1), (h0, h1) = self.layers, self.heads
        return f"{key.hex()}-{l0}.{l1}-{h0}.{h1}.kv"


def parse_name(name: str) -> tuple[bytes, BlockShard] | None:
    """Undo `file_name`; None for other files."""
    found = _NAME.fullmatch(name)
    if found is None:
        return None
    l0, l1, h0, h1 = (int(one) for one in found.groups()[1:])
    return bytes.fromhex(found[1]), BlockShard((l0, l1), (h0, h1))


@dataclass(frozen=True, slots=True)
class BlockForm:
    """What a piece of a block looks like in memory: [L, 2 (k, v), K, P, D] of `dtype`."""

    dtype: torch.dtype
    positions: int
    dim: int

    @classmethod
    def of(cls, spec: KVCacheSpec, *, packed: bool = False) -> BlockForm:
        """As a cache's canonical layout has it, or as `rows` packs that."""
        if packed:
            return cls(torch.int8, spec.block_size, spec.canonical_dim + SCALE_BYTES)
        return cls(spec.dtype, spec.block_size, spec.canonical_dim)

    def shape(self, piece: BlockShard) -> tuple[int, int, int, int, int]:
        """Of a piece's array."""
        num_layers = piece.layers[1] - piece.layers[0]
        num_heads = piece.heads[1] - piece.heads[0]
        return (num_layers, 2, num_heads, self.positions, self.dim)

    def nbytes(self, piece: BlockShard) -> int:
        """Of a piece's array."""
        return int(np.prod(self.shape(piece))) * self.dtype.itemsize

    def file_bytes(self, piece: BlockShard) -> int:
        """Of a piece's file."""
        return _HEADER.size + self.nbytes(piece)

    def pack(self, key: bytes, piece: BlockShard, data: Tensor) -> list[memoryview]:
        """The file's contents: a header with the key and a checksum, and the bytes."""
        payload: Bytes = data.contiguous().reshape(-1).view(torch.uint8).numpy()
        check = zlib.crc32(payload.data, zlib.crc32(key))
        return [memoryview(self.header(piece, check)), payload.data]

    def unpack(self, key: bytes, piece: BlockShard, data: Bytes) -> Tensor:
        """Undo `pack`; the array is a view of `data`.

        Raises:
            BadBlock: the bytes are not what was packed under this key.
        """
        if data.nbytes != self.file_bytes(piece):
            raise BadBlock(f"{data.nbytes} bytes where {self.file_bytes(piece)} are due")
        payload = data[_HEADER.size :]
        wanted = self.header(piece, zlib.crc32(payload.data, zlib.crc32(key)))
        if data[: _HEADER.size].tobytes() != wanted:
            raise BadBlock("the header or the checksum is not this block's")
        return torch.from_numpy(payload).view(self.dtype).reshape(self.shape(piece))

    def header(self, piece: BlockShard, check: int) -> bytes:
        """The header of a piece's file, given the checksum of key and bytes."""
        layers, _, heads, _, _ = self.shape(piece)
        dtype = str(self.dtype).removeprefix("torch.").encode()[:8]
        return _HEADER.pack(
            _MAGIC, dtype, layers, heads, self.positions, self.dim, self.nbytes(piece), check
        )
