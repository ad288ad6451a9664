"""Block shards: the layers and KV heads of a block on a rank, and their bytes in a file.

A block of the model is addressed by (layer, KV head), whatever the layout. A rank's part of a block
is a shard: a range of layers times a range of heads. A file has one shard of one block; a rank of
another layout builds its own shard from all files that overlap the shard.

Knows geometry and the format of a file; knows nothing of folders, tiers or devices.

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

from arriero.kernels.kv_cache import KVCacheSpec
from arriero.shards.config.kv_tiers import SCALE_BYTES

_HEADER = struct.Struct("<8s8sIIIIQI20x")
_MAGIC = b"ARRIERO1"
_NAME = re.compile(r"([0-9a-f]{32})-(\d+)\.(\d+)-(\d+)\.(\d+)\.kv")

Bytes = npt.NDArray[np.uint8]


class BadBlock(Exception):
    """The bytes are not the expected block: short, of another format, or changed."""


@dataclass(frozen=True, slots=True)
class BlockShard:
    """Half-open ranges of global layers and KV heads."""

    layers: tuple[int, int]
    heads: tuple[int, int]

    def overlap(self, other: BlockShard) -> BlockShard | None:
        """The common part of both shards, if any."""
        layers = (max(self.layers[0], other.layers[0]), min(self.layers[1], other.layers[1]))
        heads = (max(self.heads[0], other.heads[0]), min(self.heads[1], other.heads[1]))
        if layers[0] >= layers[1] or heads[0] >= heads[1]:
            return None
        return BlockShard(layers, heads)

    def within(self, outer: BlockShard) -> tuple[slice, slice]:
        """Index of this shard in an array of `outer`: (layers, heads)."""
        first_layer, first_head = outer.layers[0], outer.heads[0]
        return (
            slice(self.layers[0] - first_layer, self.layers[1] - first_layer),
            slice(self.heads[0] - first_head, self.heads[1] - first_head),
        )

    def covered_by(self, shards: Iterable[BlockShard]) -> bool:
        """Whether the shards together cover this shard."""
        left = np.ones(
            (self.layers[1] - self.layers[0], self.heads[1] - self.heads[0]), dtype=np.bool_
        )
        for shard in shards:
            part = shard.overlap(self)
            if part is not None:
                left[part.within(self)] = False
        return not left.any()

    def file_name(self, key: bytes) -> str:
        """Name of the file with this shard of a block."""
        (l0, l1), (h0, h1) = self.layers, self.heads
        return f"{key.hex()}-{l0}.{l1}-{h0}.{h1}.kv"


def parse_name(name: str) -> tuple[bytes, BlockShard] | None:
    """Undo `file_name`; None for other files."""
    match = _NAME.fullmatch(name)
    if match is None:
        return None
    l0, l1, h0, h1 = (int(number) for number in match.groups()[1:])
    return bytes.fromhex(match[1]), BlockShard((l0, l1), (h0, h1))


@dataclass(frozen=True, slots=True)
class BlockForm:
    """Format of a block shard in memory: [L, 2 (k, v), K, P, D] of `dtype`."""

    dtype: torch.dtype
    positions: int
    dim: int

    @classmethod
    def of(cls, spec: KVCacheSpec, *, packed: bool = False) -> BlockForm:
        """Format of a cache's canonical layout, or of its rows packed by `packed_rows`."""
        if packed:
            return cls(torch.int8, spec.block_size, spec.canonical_dim + SCALE_BYTES)
        return cls(spec.dtype, spec.block_size, spec.canonical_dim)

    def shape(self, shard: BlockShard) -> tuple[int, int, int, int, int]:
        """Shape of a shard's array."""
        num_layers = shard.layers[1] - shard.layers[0]
        num_heads = shard.heads[1] - shard.heads[0]
        return (num_layers, 2, num_heads, self.positions, self.dim)

    def nbytes(self, shard: BlockShard) -> int:
        """Bytes of a shard's array."""
        return int(np.prod(self.shape(shard))) * self.dtype.itemsize

    def file_bytes(self, shard: BlockShard) -> int:
        """Bytes of a shard's file."""
        return _HEADER.size + self.nbytes(shard)

    def pack(self, key: bytes, shard: BlockShard, data: Tensor) -> list[memoryview]:
        """Content of the file: a header with the key and a checksum, and the bytes."""
        payload: Bytes = data.contiguous().reshape(-1).view(torch.uint8).numpy()
        check = zlib.crc32(payload.data, zlib.crc32(key))
        return [memoryview(self.header(shard, check)), payload.data]

    def unpack(self, key: bytes, shard: BlockShard, data: Bytes) -> Tensor:
        """Undo `pack`; the array is a view of `data`.

        Raises:
            BadBlock: the bytes are not those packed under this key.
        """
        if data.nbytes != self.file_bytes(shard):
            raise BadBlock(f"{data.nbytes} bytes, expected {self.file_bytes(shard)}")
        payload = data[_HEADER.size :]
        expected_header = self.header(shard, zlib.crc32(payload.data, zlib.crc32(key)))
        if data[: _HEADER.size].tobytes() != expected_header:
            raise BadBlock("header or checksum belong to another block")
        return torch.from_numpy(payload).view(self.dtype).reshape(self.shape(shard))

    def header(self, shard: BlockShard, check: int) -> bytes:
        """Header of a shard's file, given the checksum of key and bytes."""
        layers, _, heads, _, _ = self.shape(shard)
        dtype = str(self.dtype).removeprefix("torch.").encode()[:8]
        return _HEADER.pack(
            _MAGIC, dtype, layers, heads, self.positions, self.dim, self.nbytes(shard), check
        )
