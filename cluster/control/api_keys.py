"""The API keys of a deployment, changed in the key file of every node that runs a gateway.

Gateways read their file again within a second of a change; calls that a key began go on after it
is gone. Knows nodes and key files; knows nothing of gateways' insides.
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
class Changed:
    """What came of a change.

    Attributes:
        entry: the key that was made, or taken out.
        key: what its holder sends; "" where none was made. Kept nowhere.
    """

    entry: KeyEntry
    key: str = ""


class ApiKeyStore:
    """The keys in `path` on some nodes.

    Args:
        path: of the file, the same on each node; None where the deployment asks for no keys.
        node_ids: Ray's names of the nodes.
    """

    def __init__(self, path: Path | None, node_ids: Sequence[str]) -> None:
        self._path, self._nodes = path, tuple(dict.fromkeys(node_ids))

    async def entries(self) -> dict[str, KeyEntry]:
        """The keys of all the files, by id.

        Raises:
            SpecError: the deployment asks for no keys, or a file cannot be read.
            Unavailable: a node does not answer, or there is no gateway.
        """
        if self._path is None:
            raise SpecError("the deployment asks for no keys: its spec has no `gateway.keys`")
        if not self._nodes:
            raise Unavailable("no gateway runs, so it is not known where the key files are")
        found = await asyncio.gather(
            *(nodes.ask(one, read_keys, self._path) for one in self._nodes)
        )
        return {key_id: entry for one in found for key_id, entry in one.items()}

    async def add(self, tenant: str, note: str) -> Changed:
        """Make a key for a tenant; raises as `entries`."""
        await self.entries()
        key, entry = make_key(tenant, note)
        await self._apply([entry], [])
        return Changed(entry=entry, key=key)

    async def rotate(self, key_id: str, overlap_s: float) -> Changed:
        """Make a key in place of another, which is taken for `overlap_s` seconds more.

        Raises:
            NotFound: no key has the id.
            SpecError, Unavailable: as `entries`.
        """
        key, entry, old = rotated(self._one(await self.entries(), key_id), overlap_s)
        await self._apply([entry, *([] if old is None else [old])], [] if old else [key_id])
        return Changed(entry=entry, key=key)

    async def revoke(self, key_id: str) -> Changed:
        """Take a key out; raises as `rotate`."""
        entry = self._one(await self.entries(), key_id)
        await self._apply([], [key_id])
        return Changed(entry=entry)

    def _one(self, entries: dict[str, KeyEntry], key_id: str) -> KeyEntry:
        if key_id not in entries:
            raise NotFound(f"no key {key_id[:64]!r}; `arriero keys list` shows them")
        return entries[key_id]

    async def _apply(self, put: Sequence[KeyEntry], drop: Sequence[str]) -> None:
        done = await asyncio.gather(
            *(nodes.ask(one, change_keys, self._path, put, drop) for one in self._nodes),
            return_exceptions=True,
        )
        failed = {
            node: str(error)
            for node, error in zip(self._nodes, done, strict=True)
            if isinstance(error, BaseException)
        }
        if failed:
            told = "; ".join(f"on node {node[:12]}: {why}" for node, why in failed.items())
            raise Unavailable(
                f"{len(failed)} of {len(self._nodes)} key files were not changed, so their gateways"
                f" take the keys from before: {told}"
            )


def check_overlap(overlap_s: float) -> float:
    """Seconds for which what is replaced stays valid.

    Raises:
        InvalidRequest: no such time.
    """
    if not 0 <= overlap_s <= MAX_OVERLAP_S:
        raise InvalidRequest(
            "overlap_s", f"`overlap_s`={overlap_s:g} is not within 0 to {MAX_OVERLAP_S:g} (30 days)"
        )
    return overlap_s
