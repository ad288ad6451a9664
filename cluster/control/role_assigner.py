"""Telling leaders what part of requests their groups are for.

Knows which role each has taken; knows nothing of why a group should have one (router.roles).
"""

from __future__ import annotations

import logging
import ssl
from collections.abc import Collection, Sequence

from arriero.cluster.registry.snapshot import GroupEntry
from arriero.router.link.leader_rpc import ask_leader
from arriero.router.roles import Role, assign
from arriero.shards.errors import ArrieroError

log = logging.getLogger(__name__)

ROLE_S = 2.0
"""A leader that takes no role within this time is told again."""


class Roles:
    """The roles that leaders have taken, by group; all begin as "both"."""

    def __init__(self) -> None:
        self._taken: dict[str, Role] = {}

    def forget_but(self, group_ids: Collection[str]) -> None:
        """Only these groups are there any more."""
        self._taken = {one: role for one, role in self._taken.items() if one in group_ids}

    async def tell(
        self, groups: Sequence[GroupEntry], num_prefill: int, context: ssl.SSLContext | None
    ) -> list[tuple[str, Role]]:
        """Give a model's groups their roles; one that does not hear is told again next time.

        Args:
            groups: those that serve.
            num_prefill: how many are to be for prompts.
            context: of TLS links; None for links in the clear.

        Returns:
            Groups that have taken another role, and which.
        """
        now = {one.group_id: self._taken.get(one.group_id, "both") for one in groups}
        wanted = assign(now, num_prefill)
        told = []
        for entry in groups:
            role = wanted[entry.group_id]
            if role == now[entry.group_id]:
                continue
            leader = entry.address, entry.link_token
            try:
                await ask_leader(leader, context, "role", {"role": role}, ROLE_S)
            except ArrieroError as error:
                log.warning("group %s is not told its role: %s", entry.group_id, error)
                continue
            self._taken[entry.group_id] = role
            told.append((entry.group_id, role))
        return told
