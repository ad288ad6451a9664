"""Roles of groups: prefill, decode, or both.

A prefill group computes the first token of each sample and hands over; a decode group copies the
prompt's blocks from the prefill group's memory and continues. A role is a preference: every group
can prefill and decode, and does both when no group of the other role is left. Knows views of
groups; knows nothing of the copy of blocks or of the process that assigns roles.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, get_args

from arriero.router.backend import GroupView
from arriero.shards.errors import InvalidRequest

Role = Literal["prefill", "decode", "both"]
ROLES: tuple[Role, ...] = get_args(Role)


def suits(group: GroupView, *, started: bool) -> bool:
    """Whether a group's role suits the next part of a request.

    Args:
        group: the group.
        started: whether the first token is computed.
    """
    return group.role != ("prefill" if started else "decode")


def hands_over(group: GroupView, groups: Sequence[GroupView]) -> bool:
    """Whether a prefill group hands over after the first token, to another group of `groups`."""
    return group.role == "prefill" and any(
        suits(other, started=True) and other.card.compat_key == group.card.compat_key
        for other in groups
    )


def read(value: object) -> Role:
    """A role by its name.

    Raises:
        InvalidRequest: there is no role of this name.
    """
    for role in ROLES:
        if value == role:
            return role
    raise InvalidRequest("role", f"`role`={str(value)[:32]!r} must be one of {', '.join(ROLES)}")


def assign(groups: Mapping[str, Role], num_prefill: int) -> dict[str, Role]:
    """Roles for a model's groups: `num_prefill` prefill groups, the others decode.

    At least one group decodes; a single group does both. Prefill groups keep their role where
    possible.

    Args:
        groups: current roles, by group id.
        num_prefill: number of prefill groups; 0 for the role "both" everywhere.
    """
    if not num_prefill or len(groups) < 2:
        return dict.fromkeys(groups, "both")
    ordered = sorted(groups, key=lambda group: (groups[group] != "prefill", group))
    chosen = ordered[: min(num_prefill, len(groups) - 1)]
    return {group: "prefill" if group in chosen else "decode" for group in groups}
