"""Calls to a leader about its KV cache, by an operator or by a leader that lacks a prefix.

A leader asks a peer for the blocks of a prompt. The answer gives the locations of the blocks in the
memory of the peer's slices; slices copy the blocks from there (see `shards/kv/peer`) and check each
block. A peer that does not answer in time counts as having none. Knows the link's greeting, the
arguments of actions and block keys; knows nothing of the choice of a peer.
"""

from __future__ import annotations

import asyncio
import logging
import ssl
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np

from arriero.router.directory.prefixes import CacheRoot
from arriero.router.link import messages as frames
from arriero.router.link.framing import FramedConnection
from arriero.router.tls import LINK_NAME
from arriero.shards.errors import InvalidRequest, Unavailable, WireError
from arriero.shards.kv.blocks import KEY_BYTES, chain_keys
from arriero.shards.kv.limits import PeerBlocks
from arriero.shards.kv.transfers import Pool
from arriero.shards.protocol import wire

log = logging.getLogger(__name__)

PEER_TIMEOUT_S = 0.25
"""Seconds after which a peer without an answer counts as having no blocks."""
HAND_OVER_TIMEOUT_S = 2.0
"""The same for a peer that has just computed the prompt and may still save blocks."""
_POLL_S = 0.005
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupRole:
    """Arguments and answer of the action "role": the part of requests that the group computes."""

    role: str


@dataclass(frozen=True, kw_only=True, slots=True)
class SharedQuestion:
    """Arguments of the action "shared": the blocks of `keys` that another group may copy.

    Attributes:
        keys: keys of blocks, one behind the other.
        patience_s: timeout of the caller in seconds.
    """

    keys: bytes
    patience_s: float


@dataclass(frozen=True, kw_only=True, slots=True)
class SharedBlocks:
    """Answer of the action "shared": the blocks of each pool."""

    pools: Mapping[Pool, PeerBlocks]


async def ask_leader(
    leader: tuple[str, str],
    tls: ssl.SSLContext | None,
    action: str,
    arguments: object,
    kind: type[T],
    timeout_s: float,
) -> T:
    """Call an action of a leader and return the answer.

    Args:
        leader: address and token.
        tls: TLS of the links; None for links in the clear.
        action: see `KvAdminHandler`.
        arguments: arguments of the action, of the action's type.
        kind: type of the answer.
        timeout_s: limit for connection and answer in seconds.

    Raises:
        InvalidRequest: the leader refuses; the text comes from the leader.
        Unavailable: the leader is gone, or did not answer in time.
        WireError: the answer is of another type, as from a leader of another version.
    """
    address, token = leader
    loop = asyncio.get_running_loop()
    answered: asyncio.Future[bytes] = loop.create_future()

    def on_frame(frame: bytes) -> None:
        if not answered.done():
            answered.set_result(frame)

    def on_closed(cause: str) -> None:
        if not answered.done():
            answered.set_exception(
                Unavailable(f"leader at {address}: {cause or 'closed the connection'}")
            )

    connection = FramedConnection(on_frame, on_closed)
    host, _, port = address.rpartition(":")
    name = None if tls is None else LINK_NAME
    try:
        async with asyncio.timeout(timeout_s):
            await loop.create_connection(
                lambda: connection, host.strip("[]"), int(port), ssl=tls, server_hostname=name
            )
            connection.write(wire.encode(frames.AskGreeting(token)))
            connection.write(wire.encode(frames.Action.of(action, arguments)))
            frame = await answered
    except TimeoutError:
        raise Unavailable(f"leader at {address} did not answer within {timeout_s:g} s") from None
    except OSError as error:
        raise Unavailable(f"leader at {address}: {error}") from None
    finally:
        answered.cancel()
        connection.abort("")
    return _read_answer(frame, kind)


def _read_answer(frame: bytes, kind: type[T]) -> T:
    message = wire.decode(frame, frames.ActionMessage)
    if isinstance(message, frames.ActionAnswer):
        return wire.decode(memoryview(message.answer), kind)
    if isinstance(message, frames.ActionRefused):
        raise InvalidRequest("action", message.text)
    assert isinstance(message, frames.Bye), "an answer, a refusal or a bye"
    raise InvalidRequest("action", message.cause)


class PeerGroups:
    """The leaders of other groups, as sources of KV blocks.

    Args:
        tls: TLS of the links; None for links in the clear.
    """

    def __init__(self, tls: ssl.SSLContext | None = None) -> None:
        self._tls = tls

    async def blocks(
        self,
        peer: tuple[str, str],
        root: CacheRoot,
        prompt: tuple[int, ...],
        timeout_s: float = PEER_TIMEOUT_S,
    ) -> Mapping[Pool, PeerBlocks]:
        """A peer's blocks of a prompt, by pool; empty when the peer does not answer in time.

        Args:
            peer: address and token of the peer's leader.
            root: start of the prompt's chain of keys.
            prompt: token ids.
            timeout_s: limit for the answer in seconds.
        """
        try:
            keys = await asyncio.to_thread(_keys, root, prompt)
            question = SharedQuestion(keys=keys, patience_s=timeout_s)
            answer = await ask_leader(peer, self._tls, "shared", question, SharedBlocks, timeout_s)
            return answer.pools
        except (Unavailable, InvalidRequest) as error:
            log.info("%s", error)
        except WireError as error:
            log.warning("peer %s: %s", peer[0], error)
        except Exception:  # the request goes on without the peer's blocks
            log.exception("peer %s: no blocks", peer[0])
        return {}


class BlockSource(Protocol):
    """The engine of a leader, as a source of KV blocks for other groups."""

    def shared(self, keys: list[bytes]) -> tuple[Mapping[Pool, PeerBlocks], bool]:
        """Blocks that may be copied, and whether more will be; callable from any thread."""


async def tell_shared(engine: BlockSource, arguments: memoryview) -> SharedBlocks:
    """Answer the action "shared" from the bytes of a `SharedQuestion`.

    Waits while more blocks become available, up to half of the caller's timeout.

    Raises:
        WireError: the bytes are no `SharedQuestion`.
    """
    question = wire.decode(arguments, SharedQuestion)
    keys = split_keys(question.keys)
    deadline_s = time.monotonic() + min(question.patience_s, HAND_OVER_TIMEOUT_S) / 2
    while True:
        pools, more = engine.shared(keys)
        if not more or time.monotonic() > deadline_s:
            return SharedBlocks(pools=pools)
        await asyncio.sleep(_POLL_S)


def split_keys(keys: bytes) -> list[bytes]:
    """The keys in a concatenation of keys."""
    return [keys[i : i + KEY_BYTES] for i in range(0, len(keys), KEY_BYTES)]


def _keys(root: CacheRoot, prompt: tuple[int, ...]) -> bytes:
    tokens = np.asarray(prompt[:-1], dtype=np.int32)
    return b"".join(chain_keys(root.key, tokens, root.block_size))
