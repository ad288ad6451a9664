"""The gRPC client: blocking and asynchronous, with retry and resume.

`Client` and `AsyncClient` are public.
"""

from arriero.router.client.client import AsyncClient, Client

__all__ = ["AsyncClient", "Client"]
