"""Weights that a trainer broadcasts to all groups of a model: join, announce, receive, finish.

All slices of all groups are ranks of one broadcast group. What they receive is a folder in the
memory of their nodes, which a push then names. Knows leaders and paths; knows nothing of tensors.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from arriero.cluster.control import received_folders
from arriero.cluster.control.weight_admin import WeightAdmin
from arriero.cluster.registry.snapshot import GroupEntry
from arriero.cluster.replica.weight_actions import WeightReport
from arriero.router.http.weight_bodies import InitInfo, UpdateInfo
from arriero.shards.checkpoint.sources import MOST_SOURCES
from arriero.shards.engine.holds import Change, Kind
from arriero.shards.errors import CheckpointError, InvalidRequest
from arriero.shards.protocol.trainer import AnnouncedTensor, TrainerAddress

ACTIONS = ("join", "start", "announce", "receive", "finish")
_INIT = "call /init_weight_transfer_engine"


@dataclass(slots=True)
class _Update:
    """The broadcast group of a model, and its update.

    Attributes:
        groups: replica groups whose slices have joined.
        folder: on every node, of the running update; None before its start.
        num_files: received files.
        whole: the folder holds every tensor of the model.
    """

    groups: tuple[str, ...]
    folder: Path | None = None
    num_files: int = 0
    whole: bool = False


class TrainerUpdates:
    """Runs the updates of trainers, one for each model.

    Args:
        weights: makes the changes of groups.
    """

    def __init__(self, weights: WeightAdmin) -> None:
        self._weights = weights
        self._updates: dict[str, _Update] = {}

    async def run(self, action: str, fields: Mapping[str, str | int]) -> str:
        """Run an action; gives a text for people.

        Args:
            action: one of `ACTIONS`.
            fields: `model`; `info`, JSON of `InitInfo` (join) or `UpdateInfo` (announce, receive);
                `weight_version` (finish).

        Raises:
            InvalidRequest: an action before has not been called, its numbers do not fit, or a slice
                refuses the announced tensors.
            NotFound: no such model.
            CheckpointError: a slice did not join, or the broadcast broke off. What serves stays.
        """
        model = self._weights.model_name(str(fields.get("model", "")))
        info = str(fields.get("info", ""))
        if action == "join":
            return await self._join(model, InitInfo.model_validate_json(info))
        entries = await self._joined(model)
        update = self._updates[model]
        if action == "start":
            versions = received_folders.folder_of(model, self._weights.path(model))
            update.folder = versions / secrets.token_hex(6)
            update.num_files, update.whole = 0, False
            return f"{model}: an update has begun"
        if update.folder is None:
            raise InvalidRequest("model", "no update has begun; call /start_weight_update")
        if action == "finish":
            return await self._finish(model, update, str(fields.get("weight_version", "")))
        tensors = UpdateInfo.model_validate_json(info)
        return await self._transfer(model, update, Kind(action), tensors, entries)

    async def _join(self, model: str, info: InitInfo) -> str:
        entries = await self._serving(model)
        num_slices = sum(len(entry.slice_pids) for entry in entries)
        if not entries or info.rank_offset + num_slices > info.world_size:
            raise InvalidRequest(
                "init_info",
                f"{model}: {num_slices} slices from rank_offset={info.rank_offset} on exceed "
                f"world_size={info.world_size}; /get_world_size counts the slices",
            )
        self._updates.pop(model, None)
        changes, first_rank = [], info.rank_offset
        for entry in entries:
            address = TrainerAddress(
                host=info.master_address,
                port=info.master_port,
                first_rank=first_rank,
                world_size=info.world_size,
                timeout_s=info.timeout_s,
            )
            changes.append(Change(kind=Kind.JOIN, trainer=address))
            first_rank += len(entry.slice_pids)
        await self._all(entries, changes)
        self._updates[model] = _Update(tuple(entry.group_id for entry in entries))
        return f"{model}: {num_slices} slices have joined"

    async def _transfer(
        self,
        model: str,
        update: _Update,
        kind: Kind,
        info: UpdateInfo,
        entries: Sequence[GroupEntry],
    ) -> str:
        """Announce tensors to all groups, or let all receive them."""
        assert update.folder is not None, "after the start"
        columns = zip(info.names, info.dtype_names, info.shapes, strict=True)
        tensors = tuple(
            AnnouncedTensor(name=name, dtype=dtype, shape=tuple(shape))
            for name, dtype, shape in columns
        )
        wanted = self._weights.wanted(model)
        number = update.num_files + 1
        change = Change(
            kind=kind,
            sources=() if wanted is None else wanted.sources,
            tensors=tensors,
            file=str(update.folder / f"part-{number}.safetensors"),
        )
        try:
            reports = await self._all(entries, [change] * len(entries))
        except CheckpointError as error:
            if kind is Kind.ANNOUNCE:
                raise InvalidRequest("update_info", str(error)) from None
            self._updates.pop(model, None)  # some slices may have left the broadcast group
            raise
        if kind is Kind.RECEIVE:
            update.num_files = number
            update.whole = all(report.status.whole for report in reports)
        return f"{model}: {len(tensors)} tensors: {kind}"

    async def _finish(self, model: str, update: _Update, label: str) -> str:
        """Push what was received."""
        if not update.num_files:
            raise InvalidRequest("model", "no tensor has come; call /update_weights")
        wanted = self._weights.wanted(model)
        before = () if wanted is None or update.whole else wanted.sources
        sources = (*before, str(update.folder))
        if len(sources) > MOST_SOURCES:
            raise InvalidRequest(
                "model", f"{len(sources)} deltas exceed {MOST_SOURCES}; send every tensor once"
            )
        update.folder = None
        return await self._weights.begin_push(model, sources, label)

    async def _joined(self, model: str) -> list[GroupEntry]:
        """The groups that serve, which have all joined.

        Raises:
            InvalidRequest: a group has not.
        """
        update = self._updates.get(model)
        if update is None:
            raise InvalidRequest("model", f"{model}: no group of a trainer; {_INIT}")
        entries = await self._serving(model)
        if tuple(entry.group_id for entry in entries) != update.groups:
            self._updates.pop(model, None)
            raise InvalidRequest(
                "model", f"{model}: groups have started or ended since they joined; {_INIT} again"
            )
        return entries

    async def _serving(self, model: str) -> list[GroupEntry]:
        entries = await self._weights.serving(model)
        return sorted(entries, key=lambda entry: entry.group_id)

    async def _all(
        self, entries: Sequence[GroupEntry], changes: Sequence[Change]
    ) -> list[WeightReport]:
        """Make the changes of all groups at the same time.

        Raises:
            CheckpointError: a group refuses; the text names the first one.
        """
        answers = await asyncio.gather(
            *map(self._weights.until_done, entries, changes), return_exceptions=True
        )
        reports = []
        for entry, answer in zip(entries, answers, strict=True):
            error = answer.error if isinstance(answer, WeightReport) else str(answer)
            if error or not isinstance(answer, WeightReport):
                raise CheckpointError(f"group {entry.group_id}: {error}")
            reports.append(answer)
        return reports
