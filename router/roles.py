"""Which part of a request a group is for: its prompt, what follows, or both.

A group that is for prompts gives the first token of each sample and hands over: one that is for
what follows copies the prompt's blocks from its memory and goes on. A role is a preference, no
more: every group can do everything, and does when the other side is gone. Knows views of groups;
knows nothing of how blocks travel, or of who assigns roles.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, get_args

from arriero.router.backend import GroupView
from arriero.shards.errors import InvalidRequest

Role = Literal["prefill", "decode", "both"]
ROLES: tuple[Role, ...] = get_args(Role)


def suits(group: GroupView, *, started: bool) -> bool:
    """Whether a group's role is the part of a request that comes next.

    Args:
        group: it.
        started: whether the first token is out.
    """
    return group.role != ("prefill" if started else "decode")


def hands_over(group: GroupView, groups: Sequence[GroupView]) -> bool:
    """Whether a group gives no more than the first token, since another can go on with it."""
    return group.role == "prefill" and any(
        suits(other, started=True) and other.card.compat_key == group.card.compat_key
        for other in groups
    )


def read(value: object) -> Role:
    """A role by its name.

    Raises:
        InvalidRequest: there is none of this name.
    """
    for role in ROLES:
        if value == role:
            return role
    raise InvalidRequest("role", f"`role`={str(value)[:32]!r} is none of {', '.join(ROLES)}")


def assign(groups: Mapping[str, Role], num_prefill: int) -> dict[str, Role]:
    """Roles for a model's groups: so many for prompts, the others for what follows.

    At least one is left for what follows; a group that is alone is for both. Those that have the
    role keep it, as far as may be.

    Args:
        groups: the roles that they have now, by group id.
        num_prefill: groups for prompts; 0 leaves all for both.
    """
    if not num_prefill or len(groups) < 2:
        return dict.fromkeys(groups, "both")
    ordered = sorted(groups, key=lambda one: (groups[one] != "prefill", one))
    chosen = ordered[: min(num_prefill, len(groups) - 1)]
    return {one: "prefill" if one in chosen else "decode" for one in groups}
