"""The link between gateways and leaders: both ends under one name."""

from arriero.router.link_client import LinkClient
from arriero.router.link_server import Engine, LinkServer

__all__ = ["Engine", "LinkClient", "LinkServer"]
