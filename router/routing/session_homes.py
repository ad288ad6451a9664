"""The group of each session: where its blocks are. Sans-I/O.

The directory of KV blocks says which group has how much of a prompt. For the time until it does,
and for prompts that gateways cannot look up, a gateway remembers the last group of each session.

Knows sessions and groups; knows nothing of loads or time.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from arriero.router.backend import GroupView
from arriero.shards.engine.types import EngineRequest

MAX_SESSIONS = 10_000
"""Sessions that a gateway remembers; the least recently used is forgotten first."""


class SessionHomes:
    """The last group of each session."""

    def __init__(self) -> None:
        self._groups: OrderedDict[tuple[str, str], str] = OrderedDict()

    def note(self, request: EngineRequest, group_id: str) -> None:
        """Note the group of a request; requests without a session are ignored."""
        if request.hint is None or not request.hint.session:
            return
        key = (request.tenant, request.hint.session)
        self._groups[key] = group_id
        self._groups.move_to_end(key)
        if len(self._groups) > MAX_SESSIONS:
            self._groups.popitem(last=False)

    def forget(self, tenant: str, session: str) -> None:
        """Forget a session; does nothing for an unknown session."""
        self._groups.pop((tenant, session), None)

    def of(self, request: EngineRequest, groups: Sequence[GroupView]) -> str:
        """Id of the group of a request's session; "" for none.

        Args:
            request: the request.
            groups: the connected groups, with their `reach` of the prompt.
        """
        if request.hint is None or not request.hint.session:
            return ""
        if not groups:
            return ""
        best = max(groups, key=lambda group: group.reach.total)
        noted = self._groups.get((request.tenant, request.hint.session), "")
        for group in groups:
            if group.group_id == noted and 3 * group.reach.total >= 2 * best.reach.total:
                return noted
        return best.group_id if best.reach.total else ""
