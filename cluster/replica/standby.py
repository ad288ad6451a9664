"""Standby of a spare group: code is loaded and slices are placed; device memory stays free.

Knows slices that run nothing yet; knows nothing of the start or the work of a group.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import ray
from ray.actor import ActorHandle

from arriero.cluster.registry.registry import Registry
from arriero.cluster.registry.spare_seats import PROMOTION_POLL_S
from arriero.shards.errors import GroupFailed


async def until_promoted(
    registry: ActorHandle[Registry],
    seat: str,
    slices: Sequence[Any],
    model_path: str,
    silence_s: float,
) -> None:
    """Load code and fill page caches, then wait until the registry promotes the group.

    Args:
        registry: of the cluster.
        seat: of the group.
        slices: handles of the group's `SliceActor`s, by rank.
        model_path: folder of the weights, on every node.
        silence_s: seconds within which a slice must answer a check.

    Raises:
        GroupFailed: a slice was lost during the wait.
    """
    await asyncio.gather(
        asyncio.to_thread(_load_code), *(actor.warm.remote(model_path) for actor in slices)
    )
    while not await _is_promoted(registry, seat):
        await _check(slices, silence_s)


async def _is_promoted(registry: ActorHandle[Registry], seat: str) -> bool:
    try:
        return bool(await registry.wait_for_promotion.remote(seat, PROMOTION_POLL_S))
    except ray.exceptions.RayError:  # the registry restarts, and then knows the spares again
        await asyncio.sleep(PROMOTION_POLL_S)
        return False


async def _check(slices: Sequence[Any], silence_s: float) -> None:
    """Check that all slices answer: a loss must show now, not at the promotion."""
    try:
        async with asyncio.timeout(silence_s):
            await asyncio.gather(*[actor.location.remote() for actor in slices])
    except (TimeoutError, ray.exceptions.RayError):
        raise GroupFailed(
            f"a slice of a spare group is gone, or gave no answer in {silence_s:g} s"
        ) from None


def _load_code() -> None:
    """Import the modules of a start, so that the promotion need not wait for imports."""
    import arriero.cluster.replica.canary
    import arriero.cluster.replica.kv_admin
    import arriero.router.link.server
    import arriero.shards.checkpoint.formats.describe
    import arriero.shards.layout.resolve  # noqa: F401
