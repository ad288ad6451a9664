"""A small client of `arriero.v1.Admin`, for the command line and for tests."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Self, TypeVar

import grpc

from arriero.cluster.deployment_file import Deployment
from arriero.router.grpc_options import CLIENT_OPTIONS
from arriero.router.proto.arriero.v1 import admin_pb2 as pb
from arriero.router.proto.arriero.v1.admin_pb2_grpc import AdminStub
from arriero.shards.errors import (
    ArrieroError,
    CheckpointError,
    InvalidRequest,
    NotFound,
    PermissionDenied,
    SpecError,
    Unauthenticated,
    Unavailable,
)

R = TypeVar("R")

TIMEOUT_S = 8.0
"""Seconds within which Admin must answer; a healthy Admin takes some milliseconds."""
_LONG_TIMEOUT_S = 30.0
"""The same for calls that read checkpoints, or that start processes on nodes."""
_REMEDY = (
    "if the head of the cluster is gone, `arriero down` ends the rest of the deployment"
    " (`--force` without a drain)"
)
_ERRORS: dict[grpc.StatusCode, type[ArrieroError]] = {
    grpc.StatusCode.NOT_FOUND: NotFound,
    grpc.StatusCode.PERMISSION_DENIED: PermissionDenied,
    grpc.StatusCode.UNAUTHENTICATED: Unauthenticated,
    grpc.StatusCode.FAILED_PRECONDITION: SpecError,
    grpc.StatusCode.DATA_LOSS: CheckpointError,
}


class AdminClient:
    """Calls Admin; raises arriero's own errors.

    Args:
        address: host and port.
        token: admin token of the deployment.
        ca: certificates, as PEM, of the authorities that may sign Admin's certificate; "" for a
            connection without TLS.
        name: name in Admin's certificate; "" for the host in `address`.
    """

    def __init__(self, address: str, token: str, *, ca: str = "", name: str = "") -> None:
        if ca:
            override = (("grpc.ssl_target_name_override", name),) if name else ()
            options = (*CLIENT_OPTIONS, *override)
            credentials = grpc.ssl_channel_credentials(ca.encode())
            self._channel = grpc.secure_channel(address, credentials, options=options)
        else:
            self._channel = grpc.insecure_channel(address, options=CLIENT_OPTIONS)
        self._address = address
        self._stub = AdminStub(self._channel)
        self._metadata = (("authorization", f"Bearer {token}"),)

    @classmethod
    def of(cls, deployment: Deployment) -> AdminClient:
        """The client of a deployment.

        Raises:
            Unavailable: the deployment does not serve Admin yet.
        """
        if not deployment.admin:
            raise Unavailable("the deployment is still starting; try again")
        return cls(
            deployment.admin,
            deployment.admin_token,
            ca=deployment.admin_ca,
            name=deployment.admin_name,
        )

    def status(self) -> pb.Status:
        """The current and the desired state of the deployment."""
        return self._call(self._stub.GetStatus, pb.GetStatusRequest())

    def events(self, limit: int = 0) -> list[pb.Event]:
        """The latest events, oldest first."""
        return list(self._call(self._stub.ListEvents, pb.ListEventsRequest(limit=limit)).events)

    def why(self, name: str = "") -> pb.WhyResponse:
        """The first cause of the latest failure of a group, seat or model."""
        return self._call(self._stub.Why, pb.WhyRequest(name=name))

    def logs(self, name: str, lines: int) -> list[pb.ProcessLog]:
        """The last lines of a group's processes."""
        return list(self._call(self._stub.Logs, pb.LogsRequest(name=name, lines=lines)).logs)

    def scale(self, model: str, groups: int) -> str:
        """Set the number of groups of a model."""
        return self._call(self._stub.Scale, pb.ScaleRequest(model=model, groups=groups)).text

    def drain(self, name: str) -> str:
        """End a group after the group's streams have ended or moved."""
        return self._call(self._stub.Drain, pb.DrainRequest(name=name)).text

    def rollout(self, spec: str = "", *, force: bool = False) -> str:
        """Replace the groups whose settings or weights have changed."""
        return self.change_spec(pb.RolloutRequest(spec=spec, force=force)).text

    def change_spec(self, request: pb.RolloutRequest) -> pb.ChangeResponse:
        """A rollout with all its options; the response has the details."""
        return self._call_long(self._stub.Rollout, request)

    def pause_rollout(self, model: str, *, paused: bool) -> str:
        """Pause or resume the rollout of a model."""
        request = pb.PauseRolloutRequest(model=model, paused=paused)
        return self._call(self._stub.PauseRollout, request).text

    def drain_node(self, name: str, *, undo: bool = False) -> str:
        """Drain a node, or take the drain back."""
        return self._call(self._stub.DrainNode, pb.DrainNodeRequest(name=name, undo=undo)).text

    def spec(self) -> str:
        """The spec as JSON, with the settings and counts that hold now."""
        return self._call(self._stub.GetSpec, pb.GetSpecRequest()).spec

    def rollback(self, model: str) -> str:
        """Go back to the previous revision of a model's settings."""
        return self._call(self._stub.Rollback, pb.RollbackRequest(model=model)).text

    def reload(self, spec: str) -> str:
        """Apply the fields of a spec that can change while everything runs."""
        return self._call(self._stub.Reload, pb.ReloadRequest(spec=spec)).text

    def tokens(self, action: str, **fields: str | float) -> pb.TokensResponse:
        """List, add or revoke admin tokens; `fields` are fields of `TokensRequest`."""
        return self._call(self._stub.Tokens, pb.TokensRequest(action=action, **fields))  # type: ignore[arg-type]

    def keys(self, action: str, **fields: str | float | Sequence[str]) -> pb.KeysResponse:
        """List, add, rotate or revoke API keys; `fields` are fields of `KeysRequest`."""
        return self._call_long(self._stub.Keys, pb.KeysRequest(action=action, **fields))  # type: ignore[arg-type]

    def rotate_token(self, overlap_s: float) -> str:
        """Replace the token of this client; returns the new token."""
        request = pb.RotateTokenRequest(overlap_s=overlap_s)
        return self._call(self._stub.RotateToken, request).token

    def kv(self, request: pb.KvRequest) -> list[pb.KvGroup]:
        """Run an action on the KV caches of groups; returns the contents of the caches after."""
        return list(self._call_long(self._stub.Kv, request).groups)

    def adapters(self, request: pb.AdaptersRequest) -> pb.AdaptersResponse:
        """List, add or remove adapters."""
        return self._call_long(self._stub.Adapters, request)

    def weights(self, request: pb.WeightsRequest) -> pb.WeightsResponse:
        """Push weights, take pushed weights back, or tell which weights serve."""
        return self._call_long(self._stub.Weights, request)

    def hold(self, request: pb.HoldRequest) -> pb.WeightsResponse:
        """Pause, resume, put to sleep or wake groups."""
        return self._call_long(self._stub.Hold, request)

    def _call_long(self, method: Callable[..., R], request: object) -> R:
        """A call that may take long; first checks that Admin answers at all."""
        self.events(1)
        return self._call(method, request, _LONG_TIMEOUT_S)

    def _call(self, method: Callable[..., R], request: object, timeout_s: float | None = None) -> R:
        timeout_s = TIMEOUT_S if timeout_s is None else timeout_s
        try:
            return method(request, metadata=self._metadata, timeout=timeout_s)
        except grpc.RpcError as error:
            assert isinstance(error, grpc.Call), "the error of a call has a status code"
            code, details = error.code(), error.details() or ""
            if code is grpc.StatusCode.DEADLINE_EXCEEDED:
                raise Unavailable(
                    f"Admin at {self._address} gave no answer in {timeout_s:g} s; {_REMEDY}"
                ) from None
            if code is grpc.StatusCode.UNAVAILABLE:
                text = f"Admin at {self._address} cannot be reached ({details}); {_REMEDY}"
                raise Unavailable(text) from None
            if code is grpc.StatusCode.INVALID_ARGUMENT:
                raise InvalidRequest("", details) from None
            raise _ERRORS.get(code, ArrieroError)(details) from None

    def close(self) -> None:
        """Close the connection."""
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
