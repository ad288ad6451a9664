"""The groups that a gateway is linked to, and the text models for them.

Implements `Backend` over links. A group counts as connected after the hello of its leader, once
the tokenizer is built. Knows links and cards; knows nothing of the requests of clients.
"""

from __future__ import annotations

import asyncio
import logging
import math
import ssl
import time
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial

from arriero.router.backend import GroupView, Running
from arriero.router.directory import prefixes
from arriero.router.directory.directory import Directory, Reach
from arriero.router.directory.events import Batch, Snapshot
from arriero.router.directory.prefixes import NOTHING, CacheRoot
from arriero.router.kv_events.known_blocks import ChainPoint
from arriero.router.kv_events.stream import KvEventStream
from arriero.router.link.client import LinkClient
from arriero.router.routing.adapters import serves, with_adapter
from arriero.router.routing.linked_group import GroupAddress, LinkedGroup
from arriero.router.routing.session_homes import SessionHomes
from arriero.router.text.model_card import ModelCard
from arriero.router.text.text_model import TextModel
from arriero.shards.engine.types import EngineRequest
from arriero.shards.errors import ArrieroError, InvalidRequest, NotFound, Unavailable

log = logging.getLogger(__name__)

__all__ = ["GroupAddress", "LinkedGroups"]

MIN_PULL_TOKENS = 64
"""Smallest number of tokens worth a copy from a peer; computing fewer takes less time."""


class LinkedGroups:
    """Links to a changing set of groups.

    Args:
        on_change: called on the event loop when a group becomes connected or disconnected.
        models: ids of deployed models, with or without a group.
        tls: TLS of the links; None for links in the clear.
        on_lost: called on the event loop with group id and cause when a link is lost.
        kv_events: receives the changes of KV blocks for routers outside; None for no such routers.
    """

    def __init__(
        self,
        on_change: Callable[[], None],
        models: Iterable[str] = (),
        tls: ssl.SSLContext | None = None,
        *,
        on_lost: Callable[[str, str], None] = lambda group_id, cause: None,
        kv_events: KvEventStream | None = None,
    ) -> None:
        self._on_change = on_change
        self._tls = tls
        self._on_lost = on_lost
        self._kv_events = kv_events
        self._models = frozenset(models)
        self._groups: dict[str, LinkedGroup] = {}
        self._texts: dict[str, asyncio.Task[TextModel]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._homes = SessionHomes()
        # no leases: a lost link drops its group from the directory at once
        self._directory = Directory(lease_s=math.inf)

    def set_models(self, models: Iterable[str]) -> None:
        """Replace the ids of deployed models."""
        self._models = frozenset(models)

    async def set_groups(
        self, addresses: Iterable[GroupAddress], *, fenced: Container[str] | None = None
    ) -> None:
        """Link to these groups; groups already linked keep their streams.

        Args:
            addresses: the groups.
            fenced: ids of groups to drop. None drops every group outside `addresses`. Otherwise a
                group in neither list stays while its link is up, since a registry that has
                restarted may not list the group yet.
        """
        wanted = {address.group_id: address for address in addresses}
        gone = [
            group_id
            for group_id, group in self._groups.items()
            if wanted.get(group_id) != group.address
            and (group_id in wanted or fenced is None or group_id in fenced or not group.link.up)
        ]
        closing = [self._groups.pop(group_id) for group_id in gone]
        for group_id, address in wanted.items():
            if group_id not in self._groups:
                group = LinkedGroup(address)
                group.link = LinkClient(
                    address.address,
                    partial(self._changed, group),
                    token=address.token,
                    tls=self._tls,
                    group_id=group_id,
                    on_kv=partial(self._on_kv, group_id),
                )
                self._groups[group_id] = group
                group.link.start()
        await asyncio.gather(*(group.link.close() for group in closing))
        for group_id in gone:
            self._drop_blocks(group_id)
        used = {group.text_key for group in self._groups.values()}
        self._texts = {key: task for key, task in self._texts.items() if key in used}
        self._on_change()

    async def close(self) -> None:
        """Close all links."""
        await self.set_groups([])
        for task in [*self._tasks, *self._texts.values()]:
            task.cancel()

    def groups(self) -> list[GroupView]:
        """The connected groups."""
        return [
            GroupView(
                group_id=group_id,
                model=group.address.model,
                card=group.link.card,
                load=group.link.load,
                stats=group.link.stats,
                role=group.link.role,
            )
            for group_id, group in self._groups.items()
            if group.ready
        ]

    def faults(self) -> dict[str, str]:
        """Why groups cannot be used although their links are up, by group id."""
        return {name: group.fault for name, group in self._groups.items() if group.fault}

    def models(self) -> set[str]:
        """Ids of all models that are deployed or that a linked group serves."""
        return {*self._models} | {group.address.model for group in self._groups.values()}

    @property
    def only(self) -> str:
        """The id of the only model; "" when there is no model or more than one."""
        known = self.models()
        return next(iter(known)) if len(known) == 1 else ""

    def generate(self, group_id: str, request: EngineRequest, source: str = "") -> Running:
        """Run a request; see `Backend`."""
        group = self._groups.get(group_id)
        if group is None:
            raise Unavailable(f"group {group_id!r} was removed")
        self._homes.note(request, group_id)
        if len(self._groups) < 2:  # no peer to copy from
            return group.link.generate(request)
        reach = self._reach(group.link.card, request)
        num_cached = reach.get(group_id, NOTHING).total
        if source not in ("", group_id) and CacheRoot.of(group.link.card, request) is not None:
            # the directory may not list the blocks that the source has just computed
            reach = {**reach, source: Reach(0, len(request.prompt))}
        peer = self._peer(group_id, reach)
        if peer is None or reach[peer].total - num_cached < MIN_PULL_TOKENS:
            return group.link.generate(request, num_cached)
        address = self._groups[peer].address
        return group.link.generate(request, reach[peer].total, (address.address, address.token))

    def cancel(self, group_id: str, request_id: str) -> None:
        """Stop a request; see `Backend`."""
        group = self._groups.get(group_id)
        if group is not None:
            group.link.cancel(request_id)

    def release(self, tenant: str, session: str) -> None:
        """End a tenant's session in every group."""
        self._homes.forget(tenant, session)
        for group in self._groups.values():
            group.link.release(tenant, session)

    def find(self, model: str) -> tuple[TextModel, list[GroupView]]:
        """The text model of a model, and the connected groups with the same text model.

        Args:
            model: id of the model or of an adapter; "" stands for the only model.

        Raises:
            InvalidRequest: `model` is "" and several models are served.
            NotFound: the model is not deployed.
            Unavailable: no group of the model is connected.
        """
        known = sorted(self.models())
        if not model:
            if len(known) > 1:
                raise InvalidRequest(
                    "model", f"`model` is empty; set it to one of: {', '.join(known)[:500]}"
                )
            if not known:
                raise Unavailable("no model is served yet; try again later")
            model = known[0]
        own = [] if model in known else with_adapter(self.groups(), model)
        if model not in known and not own:
            names = [*known, *sorted(self.adapters())]
            raise NotFound(
                f"`model`={model[:128]!r} is not served; available models: "
                f"{', '.join(names)[:500] or 'none yet'}"
            )
        views = own or [view for view in self.groups() if view.model == model]
        if not views:
            causes = {
                group.cause for group in self._groups.values() if group.address.model == model
            }
            if not causes:
                raise Unavailable(
                    f"model {model!r} has no group that serves now; "
                    "its groups are starting or being replaced"
                )
            raise Unavailable(f"no group of {model!r} is ready: {'; '.join(sorted(causes))[:500]}")
        # During an update, groups may have different tokenizers: the newest group's counts.
        newest = max(views, key=lambda view: (view.card.created, view.group_id))
        key = self._groups[newest.group_id].text_key
        return (
            self._texts[key].result(),
            [view for view in views if self._groups[view.group_id].text_key == key],
        )

    def names(self) -> set[str]:
        """Ids of all models and adapters."""
        return self.models() | self.adapters().keys()

    def adapters(self) -> dict[str, list[GroupView]]:
        """By name, the adapters that a connected group serves, and the groups that serve each."""
        names = {adapter.name for view in self.groups() for adapter in view.card.adapters}
        return {name: with_adapter(self.groups(), name) for name in names}

    def sharing(self, model: str, text: TextModel, request: EngineRequest) -> list[GroupView]:
        """The connected groups of a model with the text model `text`, a result of `find`.

        The views contain the cached length of the request's prompt (`reach`).
        """
        views = [
            view
            for view in self.groups()
            if view.model == model
            and self._groups[view.group_id].text_key == text.key
            and serves(view.card, request.adapter)
        ]
        if len(views) < 2:
            return views
        roots = {view.card.cache_root: view.card for view in views}
        reach = {root: self._reach(card, request) for root, card in roots.items()}
        result = []
        for view in views:
            by_group = reach[view.card.cache_root]
            own, peer = by_group.get(view.group_id, NOTHING), self._peer(view.group_id, by_group)
            in_slot = not request.adapter or request.adapter in view.stats.adapters.in_slots
            view = replace(view, reach=own, adapter_in_slot=in_slot)
            if peer is not None:
                near = self._groups[peer].link.card.memory == view.card.memory
                view = replace(view, peer_reach=by_group[peer].total, peer_near=near)
            result.append(view)
        home = self._homes.of(request, result)
        return [replace(view, home=view.group_id == home) for view in result]

    def _peer(self, group_id: str, reach: Mapping[str, Reach]) -> str | None:
        """The group to copy a prompt's blocks from: most blocks first, then the same node."""
        memory = self._groups[group_id].link.card.memory
        if not memory:  # a group without a host memory tier cannot copy blocks into it
            return None
        able = {}
        for other in reach.keys() - {group_id}:
            group = self._groups.get(other)
            if group is not None and group.ready and group.link.card.memory:
                able[other] = (reach[other].total, group.link.card.memory == memory, other)
        return max(able, key=able.__getitem__, default=None)

    def _reach(self, card: ModelCard, request: EngineRequest) -> Mapping[str, Reach]:
        """Cached tokens of a prompt, by group."""
        root = CacheRoot.of(card, request)
        return {} if root is None else prefixes.find(self._directory, root, request.prompt)

    def _on_kv(self, group_id: str, update: Batch | Snapshot) -> None:
        now_s = time.monotonic()
        if isinstance(update, Snapshot):
            self._directory.snapshot(group_id, update, now_s)
        else:
            self._directory.apply(group_id, update, now_s)
        self._directory.sweep()
        if self._kv_events is not None:
            self._kv_events.update(group_id, update)

    def learn(
        self,
        model: str,
        request: EngineRequest,
        output: Sequence[int] = (),
        after: Mapping[CacheRoot, ChainPoint] | None = None,
    ) -> Mapping[CacheRoot, ChainPoint]:
        """Note the tokens of a request's blocks for the KV events.

        Blocks of a private prefix are left out: no router outside may learn of them.

        Args:
            model: id of the model.
            request: the request.
            output: tokens of a sample so far.
            after: last block of the prompt, by root, as this method gave it.

        Returns:
            The last full block, by root.
        """
        points: dict[CacheRoot, ChainPoint] = {}
        if self._kv_events is None or request.cache_salt:
            return points
        groups = [group for group in self._groups.values() if group.ready]
        cards = [group.link.card for group in groups if group.address.model == model]
        roots = {CacheRoot.of(card, request) for card in cards}
        for root in roots - {None}:
            assert root is not None, "without None"
            tokens = (*request.prompt, *output) if output else request.prompt
            point = None if after is None else after.get(root)
            points[root] = self._kv_events.learn(root, tokens, self._directory.holders, point)
        return points

    def _drop_blocks(self, group_id: str) -> None:
        self._directory.drop(group_id)
        if self._kv_events is not None:
            self._kv_events.drop(group_id)

    def _changed(self, group: LinkedGroup) -> None:
        if group.link.connected:
            task = asyncio.create_task(self._prepare(group))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        else:
            group.prepared = False
            self._drop_blocks(group.address.group_id)
            self._on_change()
            if not group.link.up and group.address.group_id in self._groups:
                self._on_lost(group.address.group_id, group.link.cause)

    def _warm(self, built: asyncio.Task[TextModel]) -> None:
        """Prepare the tokenizer for grammars while other requests are served."""
        if built.cancelled() or built.exception() is not None:
            return
        warming = asyncio.create_task(self._warm_grammars(built.result()))
        self._tasks.add(warming)
        warming.add_done_callback(self._tasks.discard)

    async def _warm_grammars(self, text: TextModel) -> None:
        """Prepare for grammars; a tokenizer that cannot follow any makes its groups unusable."""
        try:
            await asyncio.to_thread(text.grammars.warm)
        except ArrieroError as error:
            for group_id, group in self._groups.items():
                if group.text_key == text.key:
                    group.fault, group.prepared = str(error), False
                    log.error("group %s cannot be used: %s", group_id, error)
            self._on_change()

    async def _prepare(self, group: LinkedGroup) -> None:
        """Build the text model in a thread (1 s for 200,000 tokens), once for each tokenizer."""
        card = group.link.card
        key = group.text_key = card.text_key
        if key not in self._texts:
            build = partial(TextModel, card, warm=False)
            self._texts[key] = asyncio.create_task(asyncio.to_thread(build))
            self._texts[key].add_done_callback(self._warm)
        try:
            await asyncio.shield(self._texts[key])
        except ArrieroError as error:
            group.fault = str(error)
            log.error("group %s cannot be used: %s", group.address.group_id, error)
            return
        group.prepared = True
        self._on_change()
