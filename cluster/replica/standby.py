"""A spare group's wait: started as far as takes no memory of the devices, until it is its turn.

Knows slices that run nothing yet; knows nothing of how a group starts or serves.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import ray
from ray.actor import ActorHandle

from arriero.cluster.registry.registry import PROMOTION_POLL_S, Registry
from arriero.shards.errors import GroupFailed


async def until_turn(
    registry: ActorHandle[Registry],
    seat: str,
    slices: Sequence[Any],
    model_path: str,
    silence_s: float,
) -> None:
    """Warm code and page cache, and wait until the registry has the seat's group serve.

    Args:
        registry: the cluster's.
        seat: of this group.
        slices: handles of its `SliceActor`s, by rank.
        model_path: folder of the weights, on every node.
        silence_s: a slice that answers no sooner is lost.

    Raises:
        GroupFailed: a slice was lost meanwhile.
    """
    await asyncio.gather(
        asyncio.to_thread(_load_code), *(one.warm.remote(model_path) for one in slices)
    )
    while not await _is_turn(registry, seat):
        await _see(slices, silence_s)


async def _is_turn(registry: ActorHandle[Registry], seat: str) -> bool:
    try:
        return bool(await registry.wait_for_promotion.remote(seat, PROMOTION_POLL_S))
    except ray.exceptions.RayError:  # it is being restarted, and knows the spares again then
        await asyncio.sleep(PROMOTION_POLL_S)
        return False


async def _see(slices: Sequence[Any], silence_s: float) -> None:
    """A slice that is gone or stopped is found now, not when it is needed."""
    try:
        async with asyncio.timeout(silence_s):
            await asyncio.gather(*[one.location.remote() for one in slices])
    except (TimeoutError, ray.exceptions.RayError):
        raise GroupFailed("a slice that stood by is gone, or does not answer") from None


def _load_code() -> None:
    """Import what a start takes, so that it need not wait for that."""
    import arriero.cluster.replica.canary
    import arriero.cluster.replica.kv_admin
    import arriero.router.link.server
    import arriero.shards.checkpoint.formats.describe
    import arriero.shards.layout.resolve  # noqa: F401
