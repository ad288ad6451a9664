"""The adapters of a group that come and go: opened, loaded by every slice, shown to gateways.

An adapter is shown to gateways once every slice has loaded it. So that several groups show an
adapter together or not at all, each may *prepare* it first: load it and not show it. A removed
adapter is hidden from gateways first; its running requests end as usual. Knows the group's own
adapters; knows nothing of callers and of other groups.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from arriero.cluster.replica.adapter_actions import (
    AdapterArguments,
    AdapterReport,
    GroupAdapter,
    WantedAdapter,
)
from arriero.router.text.model_card import ServedAdapter
from arriero.shards.adapters.reader import AdapterReader
from arriero.shards.engine.engine import Engine
from arriero.shards.errors import ArrieroError, InvalidRequest
from arriero.shards.protocol import wire


@dataclass(frozen=True, kw_only=True, slots=True)
class _Served:
    """An adapter that the group took while serving, or the error of the attempt."""

    wanted: WantedAdapter
    digest: str = ""
    error: str = ""


class AdapterAdminHandler:
    """Changes the adapters of a group, one change after another.

    Args:
        engine: of the group.
        reader: opens adapters; None in a group whose slots do not change.
        has_root: whether the group has a folder of adapters; without it none is added.
        listed: the listed adapters.
        publish: shows adapters to gateways.
    """

    def __init__(
        self,
        engine: Engine,
        reader: AdapterReader | None,
        *,
        has_root: bool,
        listed: Sequence[ServedAdapter],
        publish: Callable[[tuple[ServedAdapter, ...]], None],
    ) -> None:
        self._engine, self._reader, self._has_root = engine, reader, has_root
        self._listed, self._publish = tuple(listed), publish
        self._served: dict[str, _Served] = {}
        self._prepared: _Served | None = None
        self._lock = asyncio.Lock()

    async def answer(self, arguments: memoryview) -> AdapterReport:
        """Serve the wanted adapters and no others; the report has each adapter's error.

        Args:
            arguments: bytes of `AdapterArguments`.

        Raises:
            InvalidRequest: the group takes no adapters while it serves.
            WireError: the arguments are of another type.
        """
        decoded = wire.decode(arguments, AdapterArguments)
        if decoded.prepare is not None:
            async with self._lock:
                return await self._prepare(decoded.prepare)
        if decoded.wanted is not None:
            async with self._lock:
                await self._change(decoded.wanted)
                await self._drop_prepared()
        return self._report()

    async def _prepare(self, adapter: WantedAdapter) -> AdapterReport:
        """Load an adapter without showing it, in place of one that was prepared before."""
        self._check_able()
        await self._drop_prepared()
        loaded = await self._add(adapter)
        if not loaded.error:
            self._prepared = loaded
        entry = GroupAdapter(name=adapter.name, digest=loaded.digest, error=loaded.error)
        return AdapterReport(adapters=(entry,))

    async def _drop_prepared(self) -> None:
        prepared, self._prepared = self._prepared, None
        if prepared is not None:
            await self._release(prepared.digest)

    def _check_able(self) -> None:
        if self._reader is None or not self._has_root:
            name = "adapter_slots" if self._reader is None else "adapter_root"
            raise InvalidRequest("name", f"the model has no `{name}`; set it in the spec")

    async def _change(self, wanted: Sequence[WantedAdapter]) -> None:
        if wanted:
            self._check_able()
        names = {adapter.name for adapter in wanted}
        for name in [name for name in self._served if name not in names]:
            removed = self._served.pop(name)
            self._show()
            await self._release(removed.digest)
        for adapter in wanted:
            before = self._served.get(adapter.name)
            if before is not None and before.wanted == adapter and before.digest:
                self._served[adapter.name] = replace(before, error="")
                continue
            if self._prepared is not None and self._prepared.wanted == adapter:
                after = self._prepared
            else:
                after = await self._add(adapter)
            if after.error and before is not None and before.digest:
                after = replace(before, error=after.error)  # the content before serves on
            self._served[adapter.name] = after
            self._show()
            if before is not None and before.digest != after.digest:
                await self._release(before.digest)

    async def _add(self, adapter: WantedAdapter) -> _Served:
        """Open an adapter and let every slice load it."""
        assert self._reader is not None, "checked by the caller"
        try:
            opened = await asyncio.to_thread(self._reader.open, adapter.path)
            loaded = self._engine.add_adapter(opened.digest, adapter.path)
            error = await asyncio.wrap_future(loaded)
        except (ArrieroError, OSError) as failure:
            return _Served(wanted=adapter, error=str(failure))
        return _Served(wanted=adapter, digest="" if error else opened.digest, error=error)

    async def _release(self, digest: str) -> None:
        """Withdraw an adapter that has no name any more."""
        names = [adapter.digest for adapter in self._listed]
        names += [served.digest for served in self._served.values()]
        names += [] if self._prepared is None else [self._prepared.digest]
        if digest and digest not in names:
            await asyncio.wrap_future(self._engine.remove_adapter(digest))

    def _show(self) -> None:
        added = [
            ServedAdapter(name=name, digest=served.digest, version=served.wanted.version)
            for name, served in self._served.items()
            if served.digest
        ]
        self._publish((*self._listed, *added))

    def _report(self) -> AdapterReport:
        in_slots = set(self._engine.stats().adapters.in_slots)
        adapters = [
            GroupAdapter(name=listed.name, digest=listed.digest, in_slot=listed.digest in in_slots)
            for listed in self._listed
        ]
        for name, served in self._served.items():
            adapters.append(
                GroupAdapter(
                    name=name,
                    digest=served.digest,
                    in_slot=served.digest in in_slots,
                    error=served.error,
                )
            )
        return AdapterReport(adapters=tuple(adapters))
