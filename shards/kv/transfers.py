"""What leader and slices say to each other of KV blocks: copies to make, and what came of them.

A move copies one block from one tier to another. The leader alone decides moves, and never lets
two that are under way touch the same block, slot or file; so a slice may do them in any order,
beside its steps. Moves travel on the plans' own channel: a slice takes them up after every plan
that was sent before.

Knows the wire; knows nothing of policy or of bytes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

import msgpack

KEY_BYTES = 16
"""Of a block's key."""


class Pool(IntEnum):
    """Which blocks: a group has a pool for each kind of attention."""

    ALL = 0
    """Of layers that see every token."""
    LOCAL = 1
    """Of layers that attend within their chunk only."""


class Tier(IntEnum):
    """Where a block's bytes are; a lower number is nearer to the device."""

    DEVICE = 0
    HOST = 1
    DISK = 2
    SHARED = 3
    PEER = 4


@dataclass(frozen=True, slots=True)
class Transfer:
    """Copy a block.

    Attributes:
        id: unique among the moves of a group.
        key: of the block.
        source, target: tiers.
        source_at, target_at: block id on the device, slot in host memory (ours or the peer's); 0
            in tiers that go by key.
    """

    id: int
    key: bytes
    source: Tier
    source_at: int
    target: Tier
    target_at: int


@dataclass(frozen=True, slots=True)
class Segment:
    """The host memory of one rank of some group, for other groups to read.

    Attributes:
        pid, fd: the process that holds it, and its descriptor there.
        name: of the descriptor, unique; guards against a process id used again.
        host: the node's name, with the id of its boot.
        layers, heads: half-open ranges of global layers and KV heads that it holds.
        block: (block size, head dimension or int8's canonical one, bytes of an element).
        slots: how many blocks there is room for.
        address, token: of the rank's server, for readers on other nodes; "" and b"" for none.
        nixl: what readers must know to fetch from it through NIXL; b"" where it has none.
    """

    pid: int
    fd: int
    name: str
    host: str
    layers: tuple[int, int]
    heads: tuple[int, int]
    block: tuple[int, int, int]
    slots: int
    address: str = ""
    token: bytes = b""
    nixl: bytes = b""

    @classmethod
    def from_wire(cls, values: list[Any]) -> Segment:
        """Undo what msgpack makes of `astuple`."""
        pid, fd, name, host, layers, heads, block, slots, *served = values
        where = (pid, fd, name, host, _pair(layers), _pair(heads), tuple(block))
        return cls(*where, slots, *served)

    def to_wire(self) -> list[Any]:
        """As msgpack can carry it."""
        return [
            *(self.pid, self.fd, self.name, self.host),
            *(self.layers, self.heads, self.block, self.slots),
            *(self.address, self.token, self.nixl),
        ]


def _pair(values: list[int]) -> tuple[int, int]:
    first, last = values
    return first, last


@dataclass(slots=True)
class TransferBatch:
    """Moves of one message.

    Attributes:
        pool: whose blocks they are.
        moves: to be made.
        dropped: (tier, key) of files that are to go.
        peer: where the blocks of PEER moves are, one segment for each rank of the peer.
        lane: data-parallel rank whose slices are to make them.
    """

    pool: Pool = Pool.ALL
    moves: list[Transfer] = field(default_factory=list)
    dropped: list[tuple[Tier, bytes]] = field(default_factory=list)
    peer: tuple[Segment, ...] = ()
    dp_rank: int = 0

    def to_bytes(self) -> bytes:
        """Pack for the wire."""
        moves = [
            (one.id, one.key, int(one.source), one.source_at, int(one.target), one.target_at)
            for one in self.moves
        ]
        dropped = [(int(tier), key) for tier, key in self.dropped]
        packed: bytes = msgpack.packb(
            [int(self.pool), moves, dropped, [one.to_wire() for one in self.peer], self.dp_rank]
        )
        return packed

    @classmethod
    def from_bytes(cls, data: bytes) -> TransferBatch:
        """Undo `to_bytes`."""
        pool, moves, dropped, peer, dp_rank = msgpack.unpackb(data)
        return cls(
            Pool(pool),
            [
                Transfer(move_id, key, Tier(source), source_at, Tier(target), target_at)
                for move_id, key, source, source_at, target, target_at in moves
            ],
            [(Tier(tier), key) for tier, key in dropped],
            tuple(Segment.from_wire(one) for one in peer),
            dp_rank,
        )


@dataclass(slots=True)
class TransferResult:
    """What one rank has to say.

    Attributes:
        rank: who says it.
        pool: whose blocks they are.
        done, failed: ids of moves that were made, and of those that could not be (no such file,
            wrong checksum, disk full).
        found: keys that a tier held when the rank began, oldest first; each with whether every
            byte that the rank needs of it is there. Empty but in a rank's first word.
        ready: the rank's tiers are open: its first word.
        segment: its host memory, in its first word, if it has any.
        lane: the rank's data-parallel rank.
    """

    rank: int
    pool: Pool = Pool.ALL
    done: list[int] = field(default_factory=list)
    failed: list[int] = field(default_factory=list)
    found: dict[Tier, list[tuple[bytes, bool]]] = field(default_factory=dict)
    ready: bool = False
    segment: Segment | None = None
    dp_rank: int = 0

    def to_bytes(self) -> bytes:
        """Pack for the wire."""
        found = {
            int(tier): [b"".join(key for key, _ in keys), bytes(whole for _, whole in keys)]
            for tier, keys in self.found.items()
        }
        segment = None if self.segment is None else self.segment.to_wire()
        packed: bytes = msgpack.packb(
            [
                *(self.rank, int(self.pool), self.done, self.failed),
                *(found, self.ready, segment, self.dp_rank),
            ]
        )
        return packed

    @classmethod
    def from_bytes(cls, data: bytes) -> TransferResult:
        """Undo `to_bytes`."""
        rank, pool, done, failed, found, ready, segment, dp_rank = msgpack.unpackb(
            data, strict_map_key=False
        )
        listed = {
            Tier(tier): [(keys[16 * i : 16 * i + 16], bool(whole[i])) for i in range(len(whole))]
            for tier, (keys, whole) in found.items()
        }
        return cls(
            rank,
            Pool(pool),
            done,
            failed,
            listed,
            ready,
            None if segment is None else Segment.from_wire(segment),
            dp_rank,
        )
