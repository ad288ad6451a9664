"""Questions to a leader about its KV cache: an operator's, or another leader's that lacks a prefix.

A leader asks which blocks of a prompt it may copy; the answer says where they lie in the other
slices' memory, and slices copy them from there (see `shards/kv/peer`) and check each. A peer that
does not answer in time has none. Knows the link's greeting and keys; knows nothing of who decides
to ask.
"""

from __future__ import annotations

import asyncio
import logging
import ssl
import time
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np

from arriero.router.directory.prefixes import CacheRoot
from arriero.router.link import messages as frames
from arriero.router.link.framing import FramedConnection
from arriero.router.tls import LINK_NAME
from arriero.shards.errors import InvalidRequest, Unavailable
from arriero.shards.kv.blocks import KEY_BYTES, chain_keys
from arriero.shards.kv.limits import PeerBlocks
from arriero.shards.kv.transfers import Pool

log = logging.getLogger(__name__)

PATIENCE_S = 0.25
"""Who does not answer in this time has nothing."""
HAND_OVER_S = 2.0
"""Likewise where it has just computed the prompt: it is there, or on its way to host memory."""
POLL_S = 0.005


async def ask_leader(
    leader: tuple[str, str],
    tls: ssl.SSLContext | None,
    action: str,
    asked: Mapping[str, Any],
    timeout_s: float,
) -> dict[str, Any]:
    """Ask a leader about its KV cache.

    Args:
        leader: its address and token.
        tls: of the links; None for links in the clear.
        action: see `KvDesk`.
        asked: the action's arguments.
        timeout_s: of it all.

    Raises:
        InvalidRequest: it refuses; the text is its own.
        Unavailable: it is gone, or took too long.
    """
    address, token = leader
    loop = asyncio.get_running_loop()
    answered: asyncio.Future[list[Any]] = loop.create_future()

    def on_frame(frame: bytes) -> None:
        if not answered.done():
            answered.set_result(frames.unpack(frame))

    def on_closed(cause: str) -> None:
        if not answered.done():
            answered.set_exception(Unavailable(f"leader at {address}: {cause or 'it closed'}"))

    wire = FramedConnection(on_frame, on_closed)
    host, _, port = address.rpartition(":")
    name = None if tls is None else LINK_NAME
    try:
        async with asyncio.timeout(timeout_s):
            await loop.create_connection(
                lambda: wire, host.strip("[]"), int(port), ssl=tls, server_hostname=name
            )
            wire.write(frames.pack(["ask", token]))
            wire.write(frames.pack([action, asked]))
            kind, found = await answered
    except TimeoutError:
        raise Unavailable(f"leader at {address} gave no answer in {timeout_s:g} s") from None
    except OSError as error:
        raise Unavailable(f"leader at {address}: {error}") from None
    finally:
        answered.cancel()
        wire.abort("")
    if kind != "answer":
        raise InvalidRequest("action", str(found))
    return dict(found)


class PeerGroups:
    """Other leaders.

    Args:
        tls: of the links; None for links in the clear.
    """

    def __init__(self, tls: ssl.SSLContext | None = None) -> None:
        self._tls = tls

    async def blocks(
        self,
        peer: tuple[str, str],
        root: CacheRoot,
        prompt: tuple[int, ...],
        patience_s: float = PATIENCE_S,
    ) -> Mapping[Pool, PeerBlocks]:
        """What a peer has of a prompt's blocks, by pool; nothing if it does not say so in time.

        Args:
            peer: address and token of its leader.
            root: of the blocks' keys.
            prompt: token ids.
            patience_s: how long its answer may take.
        """
        try:
            keys = await asyncio.to_thread(_keys, root, prompt)
            asked = {"keys": keys, "patience_s": patience_s}
            found = await ask_leader(peer, self._tls, "shared", asked, patience_s)
            return {Pool(int(i)): PeerBlocks.from_wire(one) for i, one in found["pools"].items()}
        except (Unavailable, InvalidRequest) as error:
            log.info("%s", error)
        except Exception:  # whatever it answered: the request must go on without
            log.exception("peer %s: its answer cannot be used", peer[0])
        return {}


class Shares(Protocol):
    """What a leader's engine must have for others to copy from it."""

    def shared(self, keys: list[bytes]) -> tuple[Mapping[Pool, PeerBlocks], bool]:
        """What may be copied of blocks, and whether more is on its way; from any thread."""


async def tell_shared(engine: Shares, asked: Mapping[str, Any]) -> dict[str, Any]:
    """Answer a leader that asks what of `keys` it may copy, once nothing more is on its way."""
    keys, patience_s = split_keys(asked["keys"]), min(float(asked["patience_s"]), HAND_OVER_S)
    deadline_s = time.monotonic() + patience_s / 2
    while True:
        found, more = engine.shared(keys)
        if not more or time.monotonic() > deadline_s:
            return {"pools": {int(pool): blocks.to_wire() for pool, blocks in found.items()}}
        await asyncio.sleep(POLL_S)


def split_keys(keys: bytes) -> list[bytes]:
    """Keys that lie one after the other."""
    return [keys[i : i + KEY_BYTES] for i in range(0, len(keys), KEY_BYTES)]


def _keys(root: CacheRoot, prompt: tuple[int, ...]) -> bytes:
    tokens = np.asarray(prompt[:-1], dtype=np.int32)
    return b"".join(chain_keys(root.key, tokens, root.block_size))
