"""The stored responses of `/v1/responses` for all gateways, in an actor on the head node.

A response that one gateway has answered can be continued at another, also after the loss of the
first. Bounded by bytes, number and age; the oldest go first. Knows bytes by tenant and id; knows
nothing of their contents.
"""

from __future__ import annotations

import contextlib
import time
from collections import OrderedDict

import ray
from ray.actor import ActorHandle

from arriero.cluster.hosts import nodes
from arriero.cluster.registry.registry import NAMESPACE
from arriero.router.http.responses_api.store import MAX_AGE_S, MAX_RESPONSES, Key

NAME = "response_archive"
MAX_BYTES = 1024 * 1024 * 1024


class ResponseArchive:
    """The actor."""

    def __init__(self) -> None:
        self._values: OrderedDict[Key, tuple[float, bytes]] = OrderedDict()
        self._num_bytes = 0

    def put(self, key: Key, value: bytes) -> None:
        """Keep a response."""
        self.delete(key)
        self._values[key] = (time.monotonic(), value)
        self._num_bytes += len(value)
        limit_s = time.monotonic() - MAX_AGE_S
        while self._values:
            oldest, (born_s, _) = next(iter(self._values.items()))
            full = self._num_bytes > MAX_BYTES or len(self._values) > MAX_RESPONSES
            if born_s >= limit_s and not full:
                return
            self.delete(oldest)

    def get(self, key: Key) -> bytes | None:
        """A response; None when it is not kept."""
        born_s, value = self._values.get(key, (0.0, None))
        return value if time.monotonic() - born_s < MAX_AGE_S else None

    def delete(self, key: Key) -> None:
        """Forget a response; does nothing when it is not kept."""
        _, value = self._values.pop(key, (0.0, b""))
        self._num_bytes -= len(value)


class RemoteArchive:
    """The archive of a gateway: calls the actor. An actor that is away keeps and knows nothing."""

    def __init__(self) -> None:
        self._actor: ActorHandle[ResponseArchive] = (
            ray.remote(ResponseArchive)
            .options(  # type: ignore[assignment]
                name=NAME,
                namespace=NAMESPACE,
                lifetime="detached",
                get_if_exists=True,
                num_cpus=0,
                resources=nodes.ON_HEAD,
                max_restarts=-1,
            )
            .remote()
        )

    async def put(self, key: Key, value: bytes) -> None:
        """Keep a response."""
        with contextlib.suppress(ray.exceptions.RayError):
            await self._actor.put.remote(key, value)

    async def get(self, key: Key) -> bytes | None:
        """A response; None when it is not kept."""
        with contextlib.suppress(ray.exceptions.RayError):
            value: bytes | None = await self._actor.get.remote(key)
            return value
        return None

    async def delete(self, key: Key) -> None:
        """Forget a response."""
        with contextlib.suppress(ray.exceptions.RayError):
            await self._actor.delete.remote(key)
