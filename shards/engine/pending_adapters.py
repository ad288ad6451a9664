"""Adapters that were added and wait for the end of their first load.

Knows futures; knows nothing of the engine.
"""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass


@dataclass(slots=True)
class _Pending:
    """Futures of an adapter, data-parallel ranks that still load, and the first error."""

    futures: list[Future[str]]
    num_loads: int
    error: str = ""


class PendingAdapters:
    """The futures of added adapters, by digest."""

    def __init__(self) -> None:
        self._pending: dict[str, _Pending] = {}

    def add(self, digest: str, future: Future[str], num_loads: int) -> None:
        """Wait for an adapter.

        Args:
            digest: adapter.
            future: gets the error, or "" for success.
            num_loads: data-parallel ranks that load the adapter; 0 sets the future at once.
        """
        if not num_loads:
            future.set_result("")
            return
        pending = self._pending.setdefault(digest, _Pending([], num_loads))
        pending.futures.append(future)

    def ended(self, digest: str, error: str) -> bool:
        """A load has ended; whether the adapter is to be withdrawn, since a rank cannot load it."""
        pending = self._pending.get(digest)
        if pending is None:
            return False
        pending.error = pending.error or error
        pending.num_loads -= 1
        if pending.num_loads:
            return False
        del self._pending[digest]
        for future in pending.futures:
            future.set_result(pending.error)
        return bool(pending.error)

    def fail(self, cause: Exception) -> None:
        """The engine ends: all futures fail."""
        pending, self._pending = self._pending, {}
        for adapter in pending.values():
            for future in adapter.futures:
                future.set_exception(cause)
