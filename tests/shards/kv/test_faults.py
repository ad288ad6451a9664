"""Disks that fill, forget and flip bits; peers that die, stall and reuse their slots meanwhile."""

from __future__ import annotations

import errno
import random
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from multiprocessing.connection import Connection

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from arriero.shards.kv import nixl
from arriero.shards.kv import tcp as wire
from arriero.shards.kv.block_shards import BadBlock, BlockForm, BlockShard, Bytes
from arriero.shards.kv.checksums import block_sums
from arriero.shards.kv.files import BlockFiles
from arriero.shards.kv.host import HostPool
from arriero.shards.kv.peer import PeerPool
from arriero.shards.kv.tcp import BlockServer
from arriero.shards.kv.transfers import Segment
from support.processes import context

FORM = BlockForm(torch.float32, 4, 8)
WHOLE = BlockShard((0, 4), (0, 3))
LAYOUTS = (
    [WHOLE],
    [BlockShard((0, 4), (0, 2)), BlockShard((0, 4), (2, 3))],
    [BlockShard((0, 1), (0, 3)), BlockShard((1, 4), (0, 3))],
)


def key_of(number: int) -> bytes:
    return (number + 1).to_bytes(16, "little")  # all zeros is no key


def content(number: int, piece: BlockShard = WHOLE) -> torch.Tensor:
    """A block's numbers: each says which block, layer, head and so on it is of."""
    whole = torch.arange(FORM.nbytes(WHOLE) // 4, dtype=torch.float32).reshape(FORM.shape(WHOLE))
    layers, heads = piece.within(WHOLE)
    return (whole + 10_000 * number)[layers, :, heads]


class FaultyFolder:
    """A folder that does all that a disk may do."""

    def __init__(self, rng: random.Random, faults: float) -> None:
        self.rng, self.faults = rng, faults
        self.files: dict[str, bytearray] = {}

    def fails(self) -> bool:
        return self.rng.random() < self.faults

    def names(self) -> Iterator[tuple[str, int]]:
        yield from [(name, len(data)) for name, data in self.files.items()]

    def write(self, name: str, parts: list[memoryview]) -> None:
        if self.fails():
            raise OSError(errno.ENOSPC, "no space left on device")
        self.files[name] = bytearray(b"".join(parts))

    def read(self, name: str) -> Bytes:
        if self.fails():
            raise OSError(errno.EIO, "input/output error")
        if name not in self.files:
            raise FileNotFoundError(name)
        return np.frombuffer(bytearray(self.files[name]), dtype=np.uint8)

    def remove(self, name: str) -> None:
        if self.fails():
            raise OSError(errno.EROFS, "read-only file system")
        self.files.pop(name, None)

    def decay(self) -> None:
        """Something happens to a file."""
        left = [name for name, data in self.files.items() if data]
        if not left:
            return
        name = self.rng.choice(left)
        data = self.files[name]
        match self.rng.randrange(4):
            case 0:
                data[self.rng.randrange(len(data))] ^= 1 << self.rng.randrange(8)
            case 1:
                del data[self.rng.randrange(len(data)) :]
            case 2:
                del self.files[name]
            case 3:  # another block's bytes under its name
                self.files[name] = bytearray(self.rng.choice(list(self.files.values())))


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32), faults=st.sampled_from([0.0, 0.2]))
def test_a_file_gives_its_block_or_none(seed: int, faults: float) -> None:
    rng = random.Random(seed)
    folder = FaultyFolder(rng, faults)
    for _ in range(3):  # groups of other layouts, one after the other, on the same disk
        pieces = rng.choice(LAYOUTS)
        ranks = [BlockFiles(folder, FORM, piece, writes=True) for piece in pieces]
        for one in ranks:
            one.scan()
        for _ in range(20):
            number = rng.randrange(6)
            match rng.randrange(4):
                case 0:
                    for rank, piece in zip(ranks, pieces, strict=True):
                        with suppress(OSError):
                            rank.put(key_of(number), content(number, piece))
                case 1:
                    for rank in ranks:
                        rank.drop(key_of(number))
                case 2:
                    folder.decay()
            for rank, piece in zip(ranks, pieces, strict=True):
                into = torch.full(FORM.shape(piece), -1.0)
                with suppress(BadBlock):
                    rank.get(key_of(number), into)
                    assert torch.equal(into, content(number, piece))


@contextmanager
def server(piece: BlockShard, count: int) -> Iterator[tuple[HostPool, Segment]]:
    """A rank that holds the first `count` blocks, for readers over TCP."""
    pool = HostPool(FORM, piece, count, pinned=False)
    for slot in range(count):
        pool.put([slot], [key_of(slot)], content(slot, piece)[None])
    served = BlockServer(pool, "127.0.0.1")
    try:
        yield pool, replace(pool.segment, host="", address=served.address, token=served.token)
    finally:
        served.close()
        pool.close()


@contextmanager
def bad_way(
    address: str, num_bytes: int, *, stall: bool = False, flips: bool = False
) -> Iterator[str]:
    """The way to a rank, which ends after so many bytes of its answers, or gives none further.

    Or it goes on, and one bit of the byte that comes then is another.
    """
    host, _, port = address.rpartition(":")
    listening = socket.create_server(("127.0.0.1", 0))
    opened: list[socket.socket] = [listening]

    def pass_on(source: socket.socket, target: socket.socket, most: int) -> None:
        with suppress(OSError):
            while most > 0 and (data := source.recv(min(4096, most))):
                target.sendall(data)
                most -= len(data)
                if flips and not most:
                    most = 1 << 30
                    target.sendall(bytes([source.recv(1)[0] ^ 1 << num_bytes % 8]))
            if not stall or most > 0:
                target.shutdown(socket.SHUT_WR)

    def accept() -> None:
        with suppress(OSError):
            while True:
                reader, _ = listening.accept()
                rank = socket.create_connection((host, int(port)))
                opened.extend((reader, rank))
                for one in ((reader, rank, 1 << 30), (rank, reader, num_bytes)):
                    threading.Thread(target=pass_on, args=one, daemon=True).start()

    accepting = threading.Thread(target=accept, daemon=True)
    accepting.start()
    try:
        yield f"127.0.0.1:{listening.getsockname()[1]}"
    finally:
        for one in opened:
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()
        accepting.join()


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_a_peer_that_dies_gives_whole_blocks_or_none(seed: int) -> None:
    rng, count = random.Random(seed), 8
    theirs, ours = rng.choice(LAYOUTS), rng.choice(rng.choice(LAYOUTS))
    with ExitStack() as ranks:
        segments = [ranks.enter_context(server(piece, count))[1] for piece in theirs]
        dying = rng.randrange(len(segments))
        after = rng.randrange(1, count * FORM.nbytes(theirs[dying]))
        with bad_way(segments[dying].address, after) as way:
            segments[dying] = replace(segments[dying], address=way)
            peer = PeerPool(segments, FORM, ours)
            # some are asked for where another block is now
            slots = [rng.choice([slot, slot, (slot + 1) % count]) for slot in range(count)]
            wanted = [(key_of(number), slot) for number, slot in enumerate(slots)]
            into = torch.full((count, *FORM.shape(ours)), -1.0)
            failed = peer.copy(wanted, into)
            for i, (key, slot) in enumerate(wanted):
                if key != key_of(slot):
                    assert i in failed
                if i not in failed:
                    assert torch.equal(into[i], content(i, ours))
            peer.close()


def test_a_peer_that_stalls_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "SILENCE_S", 0.3)
    with server(WHOLE, 4) as (_, segment), bad_way(segment.address, 5000, stall=True) as way:
        peer = PeerPool([replace(segment, address=way)], FORM, WHOLE)
        into = torch.empty(4, *FORM.shape(WHOLE))
        begun = time.monotonic()
        wanted = [(key_of(slot), slot) for slot in range(4)]
        assert peer.copy(wanted, into) == {0, 1, 2, 3}
        assert 0.2 < time.monotonic() - begun < 3
        begun = time.monotonic()
        assert peer.copy(wanted, into) == {0, 1, 2, 3}  # and not waited for again so soon
        assert time.monotonic() - begun < 0.1
        peer.close()


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_a_bit_that_flips_on_the_way_costs_its_block(seed: int) -> None:
    rng, count = random.Random(seed), 6
    theirs, ours = rng.choice(LAYOUTS), rng.choice(rng.choice(LAYOUTS))
    with ExitStack() as ranks, pytest.MonkeyPatch.context() as patch:
        patch.setattr(wire, "SILENCE_S", 0.2)
        segments = [ranks.enter_context(server(piece, count))[1] for piece in theirs]
        at = rng.randrange(len(segments))
        after = rng.randrange(1, count * FORM.nbytes(theirs[at]))
        with bad_way(segments[at].address, after, flips=True) as way:
            segments[at] = replace(segments[at], address=way)
            peer = PeerPool(segments, FORM, ours)
            into = torch.full((count, *FORM.shape(ours)), -1.0)
            failed = peer.copy([(key_of(slot), slot) for slot in range(count)], into)
            for slot in set(range(count)) - failed:
                assert torch.equal(into[slot], content(slot, ours))
            peer.close()


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_a_bit_that_flips_in_host_memory_costs_its_block(seed: int) -> None:
    """Whoever reads it, and whichever part: its owner, a rank of this node, one over TCP."""
    rng, count = random.Random(seed), 6
    theirs, ours = rng.choice(LAYOUTS), rng.choice(rng.choice(LAYOUTS))
    with ExitStack() as ranks:
        pools = [ranks.enter_context(server(piece, count)) for piece in theirs]
        pool, piece = rng.choice([(one[0], p) for one, p in zip(pools, theirs, strict=True)])
        spoilt = rng.sample(range(count), 2)
        for slot in spoilt:
            words = pool.data[slot].view(torch.int32)
            for _ in range(rng.choice([1, 1, 3])):
                layer, part, head, row, word = (rng.randrange(size) for size in words.shape)
                words[layer, part, head, row, word] ^= 1 << rng.randrange(31)
        for slot in range(count):
            own = torch.empty(FORM.shape(piece))
            if slot not in spoilt:
                pool.get(key_of(slot), slot, own)
                assert torch.equal(own, content(slot, piece))
            else:
                with pytest.raises(BadBlock, match="checksum"):
                    pool.get(key_of(slot), slot, own)
        ways = [[told for _, told in pools], [one.segment for one, _ in pools]]
        for segments in ways:
            peer = PeerPool(segments, FORM, ours)
            into = torch.full((count, *FORM.shape(ours)), -1.0)
            failed = peer.copy([(key_of(slot), slot) for slot in range(count)], into)
            assert failed <= set(spoilt)
            for slot in set(range(count)) - failed:
                assert torch.equal(into[slot], content(slot, ours))
            peer.close()


def hold(pieces: list[BlockShard], count: int, pipe: Connection) -> None:
    """Ranks that others read through NIXL, in a process of their own."""
    with ExitStack() as ranks:
        pools, told = [], []
        for piece in pieces:
            pool, segment = ranks.enter_context(server(piece, count))
            pools.append(pool)
            told.append(replace(segment, nixl=nixl.NixlServer(pool).metadata, address=""))
        pipe.send(told)
        pipe.recv()
        pools[-1].data[2, 0, 0, -1] += 1
        pipe.send(None)
        pipe.recv()


@pytest.mark.parametrize("theirs", [LAYOUTS[1], pytest.param(LAYOUTS[2], marks=pytest.mark.slow)])
def test_a_peer_is_read_through_nixl_until_it_dies(theirs: list[BlockShard]) -> None:
    pytest.importorskip("nixl", reason="needs the extra arriero[nixl]")
    assert nixl.enabled("nixl") and not nixl.enabled("tcp")
    count = 8
    pipe, their_pipe = context.Pipe()
    other = context.Process(target=hold, args=(theirs, count, their_pipe), daemon=True)
    other.start()
    try:
        assert pipe.poll(60)
        segments = [Segment.from_wire(one.to_wire()) for one in pipe.recv()]
        reader = nixl.NixlReader()
        for ours in (
            WHOLE,
            BlockShard((0, 4), (1, 3)),
            BlockShard((1, 3), (0, 3)),
            BlockShard((1, 3), (2, 3)),
        ):
            peer = PeerPool(segments, FORM, ours, reader)
            into = torch.full((count, *FORM.shape(ours)), -1.0)
            # the third is not where it is said to be, and the last beyond all slots
            slots = [0, 1, 3, 3, 4, 5, 6, 1 << 20]
            failed = peer.copy([(key_of(n), slot) for n, slot in enumerate(slots)], into)
            assert failed == {2, 7}
            for i in set(range(count)) - failed:
                assert torch.equal(into[i], content(i, ours))
            peer.close()
        pipe.send(None)  # some bits of the third block change
        assert pipe.poll(60)
        peer = PeerPool(segments, FORM, WHOLE, reader)
        wanted = [(key_of(number), number) for number in range(count)]
        into = torch.full((count, *FORM.shape(WHOLE)), -1.0)
        assert peer.copy(wanted, into) == {2}
        killing = threading.Timer(0.1, other.kill)
        killing.start()
        failed, deadline_s = set(), time.monotonic() + 30
        while len(failed) < count:
            assert time.monotonic() < deadline_s
            into.fill_(-1.0)
            failed = peer.copy(wanted, into)
            for i in set(range(count)) - failed:
                assert torch.equal(into[i], content(i))
        killing.join()
        begun = time.monotonic()
        assert peer.copy(wanted, into) == set(range(count))  # and not asked again so soon
        assert time.monotonic() - begun < 0.1
        peer.close()
    finally:
        other.kill()
        other.join()


@pytest.mark.parametrize(
    ("dtype", "positions", "dim"),
    [(torch.bfloat16, 16, 64), (torch.int8, 16, 68), (torch.int8, 3, 17), (torch.float32, 1, 6)],
    ids=str,
)
def test_sums_tell_changes_and_go_by_head(dtype: torch.dtype, positions: int, dim: int) -> None:
    form, piece = BlockForm(dtype, positions, dim), BlockShard((0, 3), (0, 4))
    generator = torch.Generator().manual_seed(0)
    nbytes = form.nbytes(piece)
    bits = torch.randint(0, 256, (5 * nbytes,), dtype=torch.uint8, generator=generator)
    blocks = bits.view(dtype).reshape(5, *form.shape(piece))
    sums = block_sums(blocks)
    assert sums.shape == (5, 3, 2, 4)
    if (positions, dim) != (3, 17):  # sums of 51 bytes have few values
        assert len(sums.flatten().unique()) == 120
    part = blocks[:, 1:, :, 1:3]
    assert torch.equal(block_sums(part), sums[:, 1:, :, 1:3])
    rng = random.Random(0)
    for _ in range(300):
        changed = blocks[0].clone().reshape(-1).view(torch.uint8)
        for _ in range(rng.choice([1, 9])):
            changed[rng.randrange(nbytes)] ^= 1 << rng.randrange(8)
        if not torch.equal(changed, bits[:nbytes]):
            assert not torch.equal(
                block_sums(changed.view(dtype).reshape(blocks[0].shape)), sums[0]
            )


@pytest.mark.parametrize("remote", [False, True])
def test_slots_that_are_used_again_meanwhile(remote: bool) -> None:
    """The owner writes other blocks into its slots while they are read: each copy is whole."""
    count = 16
    with server(WHOLE, count) as (pool, segment):
        told = segment if remote else pool.segment
        peer = PeerPool([told], FORM, WHOLE)
        ended = threading.Event()

        def reuse() -> None:
            rng = random.Random(0)
            while not ended.is_set():
                slot, number = rng.randrange(count), rng.randrange(3 * count)
                pool.put([slot], [key_of(number)], content(number)[None])

        owner = threading.Thread(target=reuse)
        owner.start()
        try:
            whole = 0
            for _ in range(500):
                numbers = [slot + count * random.randrange(3) for slot in range(count)]
                into = torch.full((count, *FORM.shape(WHOLE)), -1.0)
                asked = [(key_of(n), slot) for slot, n in enumerate(numbers)]
                failed = peer.copy(asked, into)
                for slot in set(range(count)) - failed:
                    whole += 1
                    assert torch.equal(into[slot], content(numbers[slot]))
            assert whole or remote
        finally:
            ended.set()
            owner.join()
            peer.close()
