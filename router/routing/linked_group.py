"""A group that a gateway is linked to, or is about to be linked to.

Knows the address and the link of a group; knows nothing of the other groups.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from arriero.router.link.client import LinkClient


@dataclass(frozen=True, slots=True)
class GroupAddress:
    """Address of a group's leader.

    Attributes:
        group_id: unique among the groups.
        model: id of the model in the API.
        address: host and port of the leader's `LinkServer`.
        token: secret that the leader requires for a link; "" when the leader requires none.
    """

    group_id: str
    model: str
    address: str
    token: str = field(default="", repr=False)


class LinkedGroup:
    """A linked group.

    Attributes:
        address: of the group's leader.
        link: connection to the leader; set by the owner.
        text_key: key of the group's text model.
        fault: why the group cannot be used although its link is up; "" for no reason.
        prepared: whether the text model is built.
    """

    link: LinkClient

    def __init__(self, address: GroupAddress) -> None:
        self.address = address
        self.text_key = ""
        self.fault = ""
        self.prepared = False

    @property
    def ready(self) -> bool:
        """Whether the group can take requests."""
        return self.prepared and self.link.connected

    @property
    def cause(self) -> str:
        """Why the group cannot take requests."""
        return self.fault or self.link.cause
