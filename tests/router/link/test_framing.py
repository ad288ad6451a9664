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

from arriero.router.link import messages as frames
from arriero.router.link import server as link_server
from arriero.router.link.framing import GREETING_BYTES, FramedConnection
from arriero.router.link.server import LinkServer
from arriero.shards.errors import WireError
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


async def read_frame(reader: asyncio.StreamReader) -> bytes:
    size = int.from_bytes(await reader.readexactly(4), "little")
    return await reader.readexactly(size)


@pytest.mark.parametrize("content", [
    None,
    7,
    {},
    {"request_id": "r", "prompt": "text", "params": {}},
    {"request_id": "r", "prompt": [1], "params": {"top_k": 1.5}},
    {"request_id": "r", "prompt": [1], "params": {}, "images": [{"data": "x"}]},
    {"request_id": "r", "prompt": [1], "params": {}, "peer": {0: {"segments": [], "slots": {}}}},
])  # fmt: skip
async def test_a_request_that_cannot_be_read_is_refused_alone(
    llama_tokenizer: Tokenizer, content: object
) -> None:
    engine = FakeEngine(echo)
    link = LinkServer(engine, make_card(llama_tokenizer, LLAMA3))
    engine.on_outputs = link.on_outputs
    host, _, port = (await link.start()).rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    good = {"request_id": "good", "prompt": [1, 2], "params": {"max_tokens": 2}, "later": [1]}
    writer.write(framed(wire.encode(["token", ""])))
    writer.write(framed(wire.encode([["submit", 1, content], ["submit", 2, good], ["cancel", 9]])))
    refused, tokens = None, 0
    async with asyncio.timeout(20):
        while refused is None or not tokens:
            message = wire.decode(await read_frame(reader), frames.LeaderMessage)
            if isinstance(message, frames.Refused):
                refused = message
            elif isinstance(message, frames.Step):
                tokens += sum(message.counts)
                assert set(message.handles) == {2}
    assert refused.handle == 1 and refused.kind == "Unavailable"
    assert "EngineRequest" in refused.text or "`peer`" in refused.text
    assert [request.request_id for request in engine.submitted] == ["good"]
    await closed(writer)
    await link.stop(0)
    engine.close()


@pytest.mark.parametrize("columns", [
    ([1], [0, 0], [1], b"\0" * 4),
    ([1], [0], [2], b"\0" * 4),
    ([1, 1], [0, 0], [-1, 2], b"\0" * 4),
    ([1], [0], [1], b"\0" * 3),
])  # fmt: skip
def test_a_step_whose_columns_do_not_match_is_refused(
    columns: tuple[list[int], list[int], list[int], bytes],
) -> None:
    with pytest.raises(WireError, match="of a step"):
        frames.Step(*columns, {}, {}).outputs({1: "r"})
