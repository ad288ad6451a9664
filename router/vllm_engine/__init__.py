"""The service `vllm.grpc.engine.VllmEngine`, through which other gateways use this one as a worker.

Only this folder imports `smg_grpc_proto`, an optional package: `handlers` imports the rest late.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from arriero.shards.errors import SpecError

if TYPE_CHECKING:
    from arriero.router.vllm_engine.service import VllmEngine

SERVICE = "vllm.grpc.engine.VllmEngine"


def service_class() -> type[VllmEngine]:
    """The class of the service.

    Raises:
        SpecError: the package of the messages is not installed.
    """
    try:
        import_module("smg_grpc_proto")
    except ImportError as error:
        raise SpecError(
            f"`gateway.vllm_engine` needs the package smg-grpc-proto ({error}); install it in the "
            "environment of the gateways with `pip install 'arriero[smg]'`, or leave out the field"
        ) from None
    from arriero.router.vllm_engine.service import VllmEngine

    return VllmEngine
