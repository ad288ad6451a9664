"""Sends a trainer's weights to a deployment: the trainer's side of vLLM's paths for weights.

Every push makes a broadcast group of this process and all slices, so that groups may come and go
between two pushes. Knows HTTP and tensors; knows nothing of optimizers. See docs/weights.md.
"""

from __future__ import annotations

import socket
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any, Self

import httpx
from torch import Tensor

from arriero.shards.collectives.broadcast_group import BroadcastGroup, bytes_of, lead_group
from arriero.shards.errors import CheckpointError, InvalidRequest

NamedTensors = Mapping[str, Tensor] | Iterable[tuple[str, Tensor]]
_CONNECT_S = 10.0


class TrainerGroup:
    """A trainer's connection to a deployment.

    Args:
        base_url: of a gateway, such as `http://127.0.0.1:8000`.
        token: admin token of the role `operate`.
        model: the model; may be left out where only one is served.
        address: address of this process for the slices; a loopback address serves loopback alone.
        timeout_s: longest wait for a rank, and for one tensor, in seconds.
        transport: replaces the connection, for tests.
    """

    def __init__(
        self,
        base_url: str,
        token: str,
        *,
        model: str = "",
        address: str = "127.0.0.1",
        timeout_s: float = 120.0,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        self._http = httpx.Client(
            base_url=base_url,
            headers={"authorization": f"Bearer {token}"},
            params={"model": model} if model else {},
            timeout=httpx.Timeout(None, connect=_CONNECT_S),
            transport=transport,
        )
        self._address, self._timeout_s = address, timeout_s

    def push(self, tensors: NamedTensors, weight_version: str = "") -> dict[str, Any]:
        """Send tensors, and return once every group serves them.

        Args:
            tensors: whole tensors under the names of the model folder; on any device.
            weight_version: name of this version for the deployment's history.

        Returns:
            The gateway's answer, with `version`.

        Raises:
            InvalidRequest, CheckpointError: the deployment refused, or a rank is gone. The
                deployment serves what it served before; the next push may succeed.
        """
        named = dict(tensors)
        info = {
            "names": list(named),
            "dtype_names": [str(tensor.dtype).removeprefix("torch.") for tensor in named.values()],
            "shapes": [list(tensor.shape) for tensor in named.values()],
        }
        with ThreadPoolExecutor(1) as calls:
            group = self._join(calls)
            try:
                self._post("/start_weight_update", {"update_info": info})
                call = calls.submit(self._post, "/update_weights", {"update_info": info})
                _broadcast(group, named, call)
                call.result()
                return self._post("/finish_weight_update", {"weight_version": weight_version})
            finally:
                group.close()

    def _join(self, calls: ThreadPoolExecutor) -> BroadcastGroup:
        size = 1 + int(self._answer(self._http.get("/get_world_size"))["world_size"])
        with socket.create_server((self._address, 0)) as listening:
            info = {
                "master_address": self._address,
                "master_port": listening.getsockname()[1],
                "rank_offset": 1,
                "world_size": size,
                "timeout_s": self._timeout_s,
            }
            call = calls.submit(self._post, "/init_weight_transfer_engine", {"init_info": info})
            try:
                group = lead_group(listening, self._address, size, self._timeout_s)
            except CheckpointError:
                call.result()  # the deployment's reason comes first
                raise
        call.result()
        return group

    def _post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        return self._answer(self._http.post(path, json=body))

    @staticmethod
    def _answer(response: httpx.Response) -> dict[str, Any]:
        if response.is_success:
            return dict(response.json())
        try:
            text = str(response.json()["error"]["message"])
        except (ValueError, KeyError, TypeError):
            text = response.text[:1000]
        if response.status_code < httpx.codes.INTERNAL_SERVER_ERROR:
            raise InvalidRequest("weights", text)
        raise CheckpointError(text)

    def close(self) -> None:
        """Close the connection."""
        self._http.close()

    def __enter__(self) -> Self:
        """Use as a context manager."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close the connection."""
        self.close()


def _broadcast(
    group: BroadcastGroup, named: Mapping[str, Tensor], call: Future[dict[str, Any]]
) -> None:
    """Broadcast every tensor, in order; stops with the deployment's error if it refuses."""
    for name, tensor in named.items():
        if call.done():
            call.result()
        if not tensor.numel():
            continue
        try:
            group.broadcast(bytes_of(tensor), name)
        except CheckpointError:
            group.close()  # ends the waits of the slices
            call.result()  # the deployment's reason comes first
            raise
