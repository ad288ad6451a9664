"""Tells leaders the roles of their groups: prefill, decode or both.

Knows the role that each leader has accepted; knows nothing of the choice of roles (router.roles).
"""

from __future__ import annotations

import logging
import ssl
from collections.abc import Collection, Sequence

from arriero.cluster.registry.snapshot import GroupEntry
from arriero.router.link.leader_rpc import GroupRole, ask_leader
from arriero.router.roles import Role, assign
from arriero.shards.errors import ArrieroError

log = logging.getLogger(__name__)

TIMEOUT_S = 2.0
"""Seconds within which a leader must accept a role; after that the next call tries again."""


class RoleAssigner:
    """The roles that leaders have accepted, by group; all groups start as "both"."""

    def __init__(self) -> None:
        self._roles: dict[str, Role] = {}

    def retain(self, group_ids: Collection[str]) -> None:
        """Forget all groups except `group_ids`."""
        self._roles = {name: role for name, role in self._roles.items() if name in group_ids}

    async def assign(
        self, groups: Sequence[GroupEntry], num_prefill: int, context: ssl.SSLContext | None
    ) -> list[tuple[str, Role]]:
        """Send the groups of a model their roles; a failed call is repeated at the next call.

        Args:
            groups: groups that serve.
            num_prefill: number of groups for prefill.
            context: of TLS links; None for links without TLS.

        Returns:
            Group id and role of each group that accepted a new role.
        """
        current = {group.group_id: self._roles.get(group.group_id, "both") for group in groups}
        wanted = assign(current, num_prefill)
        accepted = []
        for group in groups:
            role = wanted[group.group_id]
            if role == current[group.group_id]:
                continue
            leader = group.address, group.link_token
            try:
                await ask_leader(
                    leader, context, "role", GroupRole(role=role), GroupRole, TIMEOUT_S
                )
            except ArrieroError as error:
                log.warning("group %s did not accept role %s: %s", group.group_id, role, error)
                continue
            self._roles[group.group_id] = role
            accepted.append((group.group_id, role))
        return accepted
