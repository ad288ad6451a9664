"""Adapters that come and go while groups serve: Admin's changes, and the update of every group.

An added adapter has two phases: all groups that serve load it, and only when each has loaded the
same content it is stored and shown. A group that refuses leaves nothing changed anywhere. Groups
that start later get the stored adapters in the operator's loop. Knows the desired state and
leaders; knows nothing of the files.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from pydantic import ValidationError
from ray.actor import ActorHandle

from arriero.cluster.control.admin_roles import caller_name
from arriero.cluster.control.desired_state import ModelState
from arriero.cluster.control.state_store import StateStore
from arriero.cluster.registry.registry import Registry
from arriero.cluster.registry.snapshot import GroupEntry, RegistrySnapshot
from arriero.cluster.replica.adapter_actions import (
    ACTION,
    AdapterArguments,
    AdapterReport,
    WantedAdapter,
)
from arriero.cluster.spec.adapters import AdapterSpec
from arriero.cluster.spec.model import ModelSpec
from arriero.router.link.leader_rpc import ask_leader
from arriero.router.proto.arriero.v1 import admin_pb2 as pb
from arriero.shards.adapters.root import check_root
from arriero.shards.errors import ArrieroError, CheckpointError, InvalidRequest, NotFound

log = logging.getLogger(__name__)

TIMEOUT_S = 25.0
"""Shorter than the timeout of Admin's clients; a leader continues a load that takes longer."""
RETRY_S = 15.0
"""Seconds until a group that could not serve all adapters is asked again."""


class AdapterAdmin:
    """Answers Admin's `Adapters`, and keeps the adapters of all groups up to date.

    Args:
        store: the desired state.
        registry: of the cluster.
    """

    def __init__(self, store: StateStore, registry: ActorHandle[Registry]) -> None:
        self._store, self._registry = store, registry
        self._lock = asyncio.Lock()
        self._accepted: dict[str, tuple[WantedAdapter, ...]] = {}  # by group
        self._retry_at: dict[str, float] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}

    async def adapters(self, request: pb.AdaptersRequest) -> pb.AdaptersResponse:
        """List, add or remove adapters.

        Raises:
            InvalidRequest: the action is unknown, the model takes no adapters, or a group cannot
                serve the adapter; nothing has changed.
            NotFound: no such model or adapter.
        """
        if request.action == "list":
            return await self._list(request.model)
        if request.action == "add":
            return await self._add(request)
        if request.action == "remove":
            return await self._remove(request)
        raise InvalidRequest(
            "action", f"`action`={request.action[:32]!r} is unknown; use list, add or remove"
        )

    # ---- the loop of the operator ----

    def assign(self, snapshot: RegistrySnapshot) -> None:
        """Send the stored adapters to groups that lack some; returns at once."""
        serving = {e.group_id: e for e in snapshot.groups if e.phase == "serving"}
        self._accepted = {g: a for g, a in self._accepted.items() if g in serving}
        if self._lock.locked():  # a change sends the adapters itself
            return
        for group_id, entry in serving.items():
            state = self._store.state.models.get(entry.model)
            if state is None or group_id in self._tasks:
                continue
            if self._store.settings(entry.model).adapter_slots is None:
                continue
            wanted = self._wanted(state)
            late = time.monotonic() >= self._retry_at.get(group_id, 0.0)
            if self._accepted.get(group_id) != wanted and late:
                self._tasks[group_id] = asyncio.create_task(self._assign(entry, wanted))

    async def _assign(self, entry: GroupEntry, wanted: tuple[WantedAdapter, ...]) -> None:
        group_id = entry.group_id
        try:
            report = await self._ask(entry, AdapterArguments(wanted=wanted))
            errors = [f"{a.name}: {a.error}" for a in report.adapters if a.error]
        except ArrieroError as error:
            errors = [str(error)]
        finally:
            del self._tasks[group_id]
        if not errors:
            self._accepted[group_id] = wanted
            self._retry_at.pop(group_id, None)
            return
        self._retry_at[group_id] = time.monotonic() + RETRY_S
        log.warning("group %s does not serve all adapters: %s", group_id, "; ".join(errors))

    # ---- changes ----

    async def _add(self, request: pb.AdaptersRequest) -> pb.AdaptersResponse:
        async with self._lock:
            model, settings, state = self._model(request.model)
            self._check_name(request.name, model, state, replace=request.replace)
            self._check_path(request, settings)
            version = state.adapter_version + 1
            adapter = WantedAdapter(name=request.name, path=request.path, version=version)
            entries = await self._prepare(model, adapter, self._wanted(state))
            state.adapters = {**state.adapters, adapter.name: adapter}
            state.adapter_version = version
            response = await self._commit(model, adapter, f"{model}: serves {adapter.name}")
            # a group that does not answer gets the change in the operator's loop
            await self._send(entries, self._wanted(state))
            return response

    async def _remove(self, request: pb.AdaptersRequest) -> pb.AdaptersResponse:
        async with self._lock:
            name = request.name
            owners = [m for m, state in self._store.state.models.items() if name in state.adapters]
            if not owners or request.model not in ("", owners[0]):
                listed = any(name == a.name for s in self._settings() for a in s.adapters)
                if listed:
                    raise InvalidRequest(
                        "name",
                        f"`name`={name!r} stands in the spec; remove it there, then "
                        "`arriero rollout SPEC`",
                    )
                raise NotFound(f"no adapter {name[:128]!r}; `arriero adapters list` shows them")
            model = owners[0]
            state = self._store.state.models[model]
            wanted = {other: a for other, a in state.adapters.items() if other != name}
            adapter, state.adapters = state.adapters[name], wanted
            # a group that does not answer gets the change in the operator's loop
            entries = await self._serving(model)
            await self._send(entries, self._wanted(state))
            return await self._commit(model, adapter, f"{model}: no longer serves {name}")

    async def _commit(self, model: str, adapter: WantedAdapter, text: str) -> pb.AdaptersResponse:
        """Store a change and record the event."""
        self._store.save()
        await self._registry.note.remote("adapters", model, text, caller_name())
        message = pb.Adapter(name=adapter.name, model=model, path=adapter.path)
        return pb.AdaptersResponse(adapters=[message], text=text)

    async def _prepare(
        self, model: str, adapter: WantedAdapter, before: tuple[WantedAdapter, ...]
    ) -> list[GroupEntry]:
        """Let all groups load an adapter that none shows yet; drop it where one cannot serve it.

        Args:
            model: the base model.
            adapter: the new adapter.
            before: the adapters that all groups serve.

        Returns:
            The groups.

        Raises:
            InvalidRequest: a group refuses, or groups have read other files; the text has the group
                and the cause.
        """
        # a message of the operator's loop that comes later would drop the adapter
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)
        entries = await self._serving(model)
        if not entries:
            raise InvalidRequest(
                "model", f"no group of {model!r} serves now, so that the adapter cannot be checked"
            )
        answers = await asyncio.gather(
            *(self._ask_one(entry, AdapterArguments(prepare=adapter)) for entry in entries)
        )
        errors = {
            entry.group_id: error
            for entry, answer in zip(entries, answers, strict=True)
            if (error := _error_of(answer, adapter.name))
        }
        if not errors:
            errors = _other_files(adapter.path, entries, answers)
        if errors:
            await self._send(entries, before)
            group_id, error = next(iter(errors.items()))
            raise InvalidRequest("path", f"group {group_id}: {error}")
        return entries

    async def _send(
        self, entries: Sequence[GroupEntry], wanted: tuple[WantedAdapter, ...]
    ) -> list[AdapterReport | ArrieroError]:
        """Send adapters to groups; the answer or the error of each."""

        async def send(entry: GroupEntry) -> AdapterReport | ArrieroError:
            answer = await self._ask_one(entry, AdapterArguments(wanted=wanted))
            if isinstance(answer, ArrieroError) or any(a.error for a in answer.adapters):
                self._accepted.pop(entry.group_id, None)
            else:
                self._accepted[entry.group_id] = wanted
            return answer

        return list(await asyncio.gather(*map(send, entries)))

    async def _ask_one(
        self, entry: GroupEntry, arguments: AdapterArguments
    ) -> AdapterReport | ArrieroError:
        """The answer of a group's leader, or its error."""
        try:
            return await self._ask(entry, arguments)
        except ArrieroError as error:
            return error

    async def _ask(self, entry: GroupEntry, arguments: AdapterArguments) -> AdapterReport:
        tls = self._store.spec.link_tls
        context = None if tls is None else tls.files().link_client("link_tls")
        leader = entry.address, entry.link_token
        return await ask_leader(leader, context, ACTION, arguments, AdapterReport, TIMEOUT_S)

    async def _serving(self, model: str) -> list[GroupEntry]:
        snapshot = await self._registry.snapshot.remote()
        return [e for e in snapshot.groups if e.model == model and e.phase == "serving"]

    # ---- checks ----

    def _settings(self) -> list[ModelSpec]:
        return self._store.current_settings()

    def _wanted(self, state: ModelState) -> tuple[WantedAdapter, ...]:
        """The adapters of a model beside the spec's; a later spec may take the name of one."""
        taken = {a.name for s in self._settings() for a in s.adapters} | {*self._store.state.models}
        adapters = [a for a in state.adapters.values() if a.name not in taken]
        return tuple(sorted(adapters, key=lambda adapter: adapter.version))

    def _model(self, name: str) -> tuple[str, ModelSpec, ModelState]:
        """The model of a request that takes adapters while it serves.

        Raises:
            InvalidRequest: no model or several models do, or this model does not.
            NotFound: no such model.
        """
        able = {s.name: s for s in self._settings() if s.adapter_slots is not None}
        if not name:
            if len(able) != 1:
                names = ", ".join(able) or "none"
                raise InvalidRequest(
                    "model", f"`--model` is missing; models with `adapter_slots`: {names}"
                )
            name = next(iter(able))
        state = self._store.state.model(name)
        if name not in able or able[name].adapter_root is None:
            field = "adapter_root" if name in able else "adapter_slots"
            raise InvalidRequest(
                "model",
                f"model {name!r} has no `{field}`; set it in the spec, then `arriero rollout SPEC`",
            )
        return name, able[name], state

    def _check_name(self, name: str, model: str, state: ModelState, *, replace: bool) -> None:
        try:
            AdapterSpec(name=name, path=Path("/"))
        except ValidationError:
            raise InvalidRequest(
                "name", f"`name`={name[:128]!r}: use letters, digits, dots, dashes and underscores"
            ) from None
        listed = {a.name for settings in self._settings() for a in settings.adapters}
        others = {a for m, s in self._store.state.models.items() if m != model for a in s.adapters}
        if name in listed | others | self._store.state.models.keys():
            raise InvalidRequest(
                "name", f"`name`={name!r} is a model or another adapter; choose another"
            )
        if name in state.adapters and not replace:
            raise InvalidRequest(
                "name", f"`name`={name!r} serves already; `--replace` reads its files again"
            )

    @staticmethod
    def _check_path(request: pb.AdaptersRequest, settings: ModelSpec) -> None:
        if not Path(request.path).is_absolute():
            raise InvalidRequest("path", f"`path`={request.path[:300]!r} is not absolute")
        try:
            check_root(Path(request.path), str(settings.adapter_root))
        except (CheckpointError, ValueError) as error:
            raise InvalidRequest("path", str(error)) from None

    # ---- the list ----

    async def _list(self, model: str) -> pb.AdaptersResponse:
        if model:
            self._store.state.model(model)  # an unknown name is an error
        messages = []
        for settings in self._settings():
            if model in ("", settings.name):
                messages += await self._list_model(settings)
        return pb.AdaptersResponse(adapters=messages)

    async def _list_model(self, settings: ModelSpec) -> list[pb.Adapter]:
        """The adapters of a model, with the groups that serve each."""
        model = settings.name
        messages = {
            adapter.name: pb.Adapter(
                name=adapter.name, model=model, path=str(adapter.path), listed=True
            )
            for adapter in settings.adapters
        }
        for added in self._store.state.models[model].adapters.values():
            messages[added.name] = pb.Adapter(name=added.name, model=model, path=added.path)
        entries = await self._serving(model) if messages else []
        answers = await asyncio.gather(
            *(self._ask_one(entry, AdapterArguments()) for entry in entries)
        )
        for entry, answer in zip(entries, answers, strict=True):
            if isinstance(answer, AdapterReport):
                _fill(messages, entry.group_id, answer)
        return list(messages.values())


def _fill(messages: Mapping[str, pb.Adapter], group_id: str, report: AdapterReport) -> None:
    """Add what a group reports to the messages of the adapters."""
    for adapter in report.adapters:
        message = messages.get(adapter.name)
        if message is None:
            continue
        if adapter.digest:
            message.digest = adapter.digest
            message.groups.append(group_id)
        if adapter.in_slot:
            message.in_slots.append(group_id)
        if adapter.error:
            message.errors.append(f"{group_id}: {adapter.error}")


def _error_of(report: AdapterReport | ArrieroError, name: str) -> str:
    """Why a group does not serve an adapter; "" where it does."""
    if isinstance(report, ArrieroError):
        return str(report)
    errors: Iterable[str] = (adapter.error for adapter in report.adapters if adapter.name == name)
    return next(iter(errors), f"the group does not report {name!r}")


def _other_files(
    path: str, entries: Sequence[GroupEntry], answers: Sequence[AdapterReport | ArrieroError]
) -> dict[str, str]:
    """By group, an error for groups whose files differ from those of the first group."""
    digests = [
        answer.adapters[0].digest if isinstance(answer, AdapterReport) else "" for answer in answers
    ]
    return {
        entry.group_id: f"the files in {path} are not those of group {entries[0].group_id}; copy "
        "the same files to every node"
        for entry, digest in zip(entries, digests, strict=True)
        if digest != digests[0]
    }
