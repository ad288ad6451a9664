"""Messages between leader and slices about KV blocks: transfers to make, and their results.

A transfer copies one block from one tier to another. The leader alone decides transfers, and two
transfers in flight never touch the same block, slot or file. So a slice may make transfers in any
order, beside its steps. Transfers travel on the channel of the plans: a slice starts them after
every plan that was sent before.

Knows the contents of a message; knows nothing of its bytes (see `protocol.wire`), of policy, or of
the bytes of a block.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum

KEY_BYTES = 16
"""Length of a block's key."""


class Pool(IntEnum):
    """Kind of blocks: a group has a pool for each kind of attention."""

    ALL = 0
    """Blocks of layers with full attention."""
    LOCAL = 1
    """Blocks of layers with chunked attention."""


class Tier(IntEnum):
    """Place of a block's bytes; a lower number is closer to the device."""

    DEVICE = 0
    HOST = 1
    DISK = 2
    SHARED = 3
    PEER = 4


@dataclass(frozen=True, slots=True)
class Transfer:
    """The copy of one block from one tier to another.

    Attributes:
        id: number of the transfer, unique in the group.
        key: key of the block.
        source, target: tiers.
        source_index, target_index: block id on the device, or slot in host memory (the group's
            own or the peer's); 0 in tiers that are addressed by key.
    """

    id: int
    key: bytes
    source: Tier
    source_index: int
    target: Tier
    target_index: int


@dataclass(frozen=True, slots=True)
class NixlMemory:
    """Host memory of one rank, as readers through NIXL need it.

    Attributes:
        agent: metadata of the rank's NIXL agent.
        address: address of the memory in the rank's process.
    """

    agent: bytes
    address: int


@dataclass(frozen=True, slots=True)
class Segment:
    """Host memory of one rank, readable by other groups.

    Attributes:
        pid, fd: process with the memory, and file descriptor in that process.
        name: unique name of the descriptor; guards against a reused process id.
        host: name of the node and id of its boot.
        layers, heads: half-open ranges of global layers and KV heads.
        block: (block size, head dimension or int8's canonical one, bytes of an element).
        slots: number of block slots.
        address, token: server of the rank, for readers on other nodes; "" and b"" for none.
        nixl: memory for readers through NIXL; None for no such readers.
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
    nixl: NixlMemory | None = None


@dataclass(slots=True)
class TransferBatch:
    """Transfers of one message.

    Attributes:
        pool: pool of the blocks.
        transfers: transfers to make.
        dropped: (tier, key) of files to remove.
        peer: source of PEER transfers, one segment for each rank of the peer.
        dp_rank: data-parallel rank whose slices make the transfers.
    """

    pool: Pool = Pool.ALL
    transfers: list[Transfer] = field(default_factory=list)
    dropped: list[tuple[Tier, bytes]] = field(default_factory=list)
    peer: tuple[Segment, ...] = ()
    dp_rank: int = 0


@dataclass(slots=True)
class TransferResult:
    """Results of transfers from one rank.

    Attributes:
        rank: rank that reports.
        pool: pool of the blocks.
        done: ids of transfers made.
        failed: ids of transfers that failed (no such file, wrong checksum, disk full).
        stored: keys in each tier at the start of the rank, oldest first; each with whether all
            bytes of the rank's shard are there. Only in a rank's first result.
        ready: whether the rank has opened its tiers; True only in the rank's first result.
        segment: host memory of the rank, if any; only in the rank's first result.
        dp_rank: data-parallel rank of the rank.
    """

    rank: int
    pool: Pool = Pool.ALL
    done: list[int] = field(default_factory=list)
    failed: list[int] = field(default_factory=list)
    stored: dict[Tier, list[tuple[bytes, bool]]] = field(default_factory=dict)
    ready: bool = False
    segment: Segment | None = None
    dp_rank: int = 0
