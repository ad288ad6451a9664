"""Frames over real sockets, cut anywhere, and strangers who knock at a leader's door."""

from __future__ import annotations

import asyncio
import logging
import socket
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from arriero.router.link import server as link_server
from arriero.router.link.framing import GREETING_BYTES, FramedConnection
from arriero.router.link.server import LinkServer
from arriero.shards.protocol import wire
from support.frontdoor import LLAMA3, FakeEngine, echo, make_card


def framed(frame: bytes) -> bytes:
    return len(frame).to_bytes(4, "little") + frame


class FakeTransport(asyncio.Transport):
    aborted = False

    def __init__(self, held: socket.socket) -> None:
        super().__init__({"socket": held, "peername": "someone"})

    def abort(self) -> None:
        self.aborted = True


async def closed(writer: asyncio.StreamWriter) -> None:
    writer.close()
    with suppress(ConnectionError):
        await writer.wait_closed()


@given(st.lists(st.binary(max_size=40), max_size=12), st.data())
def test_frames_are_whole_however_they_are_cut(sent: list[bytes], data: st.DataObject) -> None:
    got: list[bytes] = []
    wire = FramedConnection(got.append, lambda cause: None)
    with socket.socket() as held:
        transport = FakeTransport(held)
        wire.connection_made(transport)
    stream = b"".join(map(framed, sent))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=8)))
    for start, end in zip([0, *cuts], [*cuts, len(stream)], strict=True):
        wire.data_received(stream[start:end])
    assert got == sent and not transport.aborted


@pytest.mark.parametrize("knock", [
    b"GET / HTTP/1.1\r\nhost: x\r\n\r\n",
    framed(b"\xff" * 100),
    framed(wire.encode(["token"])),
    framed(wire.encode("token")),
    framed(b""),
    (GREETING_BYTES + 1).to_bytes(4, "little"),
    (1 << 31).to_bytes(4, "little"),
    framed(wire.encode(["token", "wrong"])),
    b"",
    b"\x05",
])  # fmt: skip
async def test_a_stranger_is_sent_away(
    llama_tokenizer: Tokenizer, knock: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(link_server, "GREETING_S", 0.2)
    engine = FakeEngine(echo)
    link = LinkServer(engine, make_card(llama_tokenizer, LLAMA3), token="right")
    address = await link.start()
    host, _, port = address.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(knock)
    with suppress(ConnectionError):
        said = await asyncio.wait_for(reader.read(), 2)
        assert b"hello" not in said
    await closed(writer)
    assert not link._links
    await link.stop(0)
    engine.close()


async def test_an_admitted_gateway_that_talks_nonsense_is_let_go(
    llama_tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    engine = FakeEngine(echo)
    link = LinkServer(engine, make_card(llama_tokenizer, LLAMA3))
    host, _, port = (await link.start()).rpartition(":")
    for nonsense in (b"\xc1", wire.encode(7), wire.encode([[]]), wire.encode(["submit"])):
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(framed(wire.encode(["token", ""])) + framed(nonsense))
        with caplog.at_level(logging.CRITICAL), suppress(ConnectionError):
            await asyncio.wait_for(reader.read(), 2)
        await closed(writer)
    assert not link._links and not link._owners
    await link.stop(0)
    engine.close()
