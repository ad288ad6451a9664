"""The API keys of a deployment: changes the key file on every node that runs a gateway.

Gateways read their key file again within a second of a change; a call that a key opened continues
after the key is revoked. Knows nodes and key files; knows nothing of the inside of gateways.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from arriero.cluster.hosts import nodes
from arriero.router.tenants.keys import KeyEntry, change_keys, make_key, read_keys, rotated
from arriero.shards.errors import InvalidRequest, NotFound, SpecError, Unavailable

MAX_OVERLAP_S = 30 * 86_400.0


@dataclass(frozen=True, kw_only=True, slots=True)
class KeyChange:
    """Result of a change.

    Attributes:
        entry: the new key, or the revoked key.
        key: secret that callers send; "" when no key was made. No file contains the secret.
    """

    entry: KeyEntry
    key: str = ""


class ApiKeyStore:
    """The key file on some nodes.

    Args:
        path: of the key file, the same on each node; None when the deployment has no API keys.
        node_ids: Ray's ids of the nodes.
    """

    def __init__(self, path: Path | None, node_ids: Sequence[str]) -> None:
        self._path, self._nodes = path, tuple(dict.fromkeys(node_ids))

    async def entries(self) -> dict[str, KeyEntry]:
        """The keys of all key files, by id.

        Raises:
            SpecError: the deployment has no API keys, or a key file cannot be read.
            Unavailable: a node does not answer, or no gateway runs.
        """
        if self._path is None:
            raise SpecError(
                "the deployment has no API keys; set `gateway.keys` in the spec to a key file"
            )
        if not self._nodes:
            raise Unavailable("no gateway runs, so the nodes with the key files are unknown")
        files = await asyncio.gather(
            *(nodes.run_on(node, read_keys, self._path) for node in self._nodes)
        )
        return {key_id: entry for entries in files for key_id, entry in entries.items()}

    async def add(self, tenant: str, note: str, models: Sequence[str] = ()) -> KeyChange:
        """Make a key for a tenant, for some models or for all; raises as `entries`."""
        await self.entries()
        key, entry = make_key(tenant, note, models)
        await self._apply([entry], [])
        return KeyChange(entry=entry, key=key)

    async def rotate(self, key_id: str, overlap_s: float) -> KeyChange:
        """Make a key in place of an old key, which stays valid for `overlap_s` seconds.

        Raises:
            NotFound: no key has the id.
            SpecError, Unavailable: as `entries`.
        """
        key, entry, old = rotated(self._entry(await self.entries(), key_id), overlap_s)
        await self._apply([entry, *([] if old is None else [old])], [] if old else [key_id])
        return KeyChange(entry=entry, key=key)

    async def revoke(self, key_id: str) -> KeyChange:
        """Remove a key; raises as `rotate`."""
        entry = self._entry(await self.entries(), key_id)
        await self._apply([], [key_id])
        return KeyChange(entry=entry)

    def _entry(self, entries: dict[str, KeyEntry], key_id: str) -> KeyEntry:
        if key_id not in entries:
            raise NotFound(f"no key {key_id[:64]!r}; `arriero keys list` shows all keys")
        return entries[key_id]

    async def _apply(self, put: Sequence[KeyEntry], drop: Sequence[str]) -> None:
        results = await asyncio.gather(
            *(nodes.run_on(node, change_keys, self._path, put, drop) for node in self._nodes),
            return_exceptions=True,
        )
        failed = {
            node: str(error)
            for node, error in zip(self._nodes, results, strict=True)
            if isinstance(error, BaseException)
        }
        if failed:
            causes = "; ".join(f"on node {node[:12]}: {why}" for node, why in failed.items())
            raise Unavailable(
                f"{len(failed)} of {len(self._nodes)} key files were not changed, so the gateways"
                f" of these nodes accept the keys from before: {causes}"
            )


def check_overlap(overlap_s: float) -> float:
    """Seconds for which a replaced key or token stays valid.

    Raises:
        InvalidRequest: the number is outside 0 to 30 days.
    """
    if not 0 <= overlap_s <= MAX_OVERLAP_S:
        raise InvalidRequest(
            "overlap_s", f"`overlap_s`={overlap_s:g} is not within 0 to {MAX_OVERLAP_S:g} (30 days)"
        )
    return overlap_s
