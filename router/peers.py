"""A leader's question to another: which blocks of a prompt may be copied from you.

The answer says where they lie in the other slices' memory; slices copy them from there (see
`shards/kv/peer`), and check each. Whoever does not answer in time has none. Knows links' addresses
and keys; knows nothing of who decides to ask.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from typing import Any

import grpc
import grpc.aio
import numpy as np

from arriero.router import frames
from arriero.router.directory.prefixes import CacheRoot
from arriero.router.link_names import CHANNEL_OPTIONS, KV_METHOD, TOKEN_KEY
from arriero.router.tls import LINK_NAME
from arriero.shards.engine.blocks import KEY_BYTES, chain_keys
from arriero.shards.kv.limits import PeerBlocks
from arriero.shards.kv.moves import Pool

log = logging.getLogger(__name__)

PATIENCE_S = 0.25
MAX_CHANNELS = 64


def link_channel(address: str, credentials: grpc.ChannelCredentials | None) -> grpc.aio.Channel:
    """A channel to a leader; None speaks in the clear."""
    if credentials is None:
        return grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS)
    options = [*CHANNEL_OPTIONS, ("grpc.ssl_target_name_override", LINK_NAME)]
    return grpc.aio.secure_channel(address, credentials, options=options)


async def call_kv(
    channel: grpc.aio.Channel, token: str, action: str, asked: Mapping[str, Any], timeout_s: float
) -> dict[str, Any]:
    """Ask a leader about its KV cache.

    Raises:
        grpc.aio.AioRpcError: it refused, is gone, or took too long.
    """
    unary: Any = channel.unary_unary  # its stubs ask for what is optional
    raw = await unary(KV_METHOD)(
        frames.pack([action, asked]), metadata=((TOKEN_KEY, token),), timeout=timeout_s
    )
    found: dict[str, Any] = frames.unpack(raw)
    return found


class Peers:
    """Other leaders.

    Args:
        credentials: of the links; None for links in the clear.
    """

    def __init__(self, credentials: grpc.ChannelCredentials | None = None) -> None:
        self._credentials = credentials
        self._channels: dict[str, grpc.aio.Channel] = {}

    async def blocks(
        self, peer: tuple[str, str], root: CacheRoot, prompt: tuple[int, ...]
    ) -> Mapping[Pool, PeerBlocks]:
        """What a peer has of a prompt's blocks, by pool; nothing if it does not say so in time.

        Args:
            peer: address and token of its leader.
            root: of the blocks' keys.
            prompt: token ids.
        """
        address, token = peer
        try:
            keys = await asyncio.to_thread(_keys, root, prompt)
            channel = await self._channel(address)
            found = await call_kv(channel, token, "shared", {"keys": keys}, PATIENCE_S)
            return {Pool(int(i)): PeerBlocks.from_wire(one) for i, one in found["pools"].items()}
        except grpc.aio.AioRpcError as error:
            log.info("peer %s: %s", address, error.details() or error.code().name)
        except Exception:  # whatever it answered: the request must go on without
            log.exception("peer %s: its answer cannot be used", address)
        return {}

    async def _channel(self, address: str) -> grpc.aio.Channel:
        if address not in self._channels:
            while len(self._channels) >= MAX_CHANNELS:
                await self._channels.pop(next(iter(self._channels))).close(None)
            self._channels[address] = link_channel(address, self._credentials)
        return self._channels[address]

    async def close(self) -> None:
        """Drop the channels."""
        for channel in self._channels.values():
            await channel.close(None)
        self._channels.clear()


def split_keys(keys: bytes) -> list[bytes]:
    """Keys that lie one after the other."""
    return [keys[i : i + KEY_BYTES] for i in range(0, len(keys), KEY_BYTES)]


def _keys(root: CacheRoot, prompt: tuple[int, ...]) -> bytes:
    tokens = np.asarray(prompt[:-1], dtype=np.int32)
    return b"".join(chain_keys(root.key, tokens, root.block_size))
