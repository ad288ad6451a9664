"""The request messages of a client, from Python values.

Knows the fields of the messages by name; knows nothing of connections.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from google.protobuf.message import Message as ProtoMessage

from arriero.router.proto.arriero.v1 import inference_pb2 as pb
from arriero.shards.errors import InvalidRequest

Messages = Sequence[Mapping[str, Any]]
Prompt = str | Sequence[int]


def generate_request(
    prompt: Prompt,
    *,
    model: str = "",
    request_id: str = "",
    **fields: Any,  # noqa: ANN401
) -> pb.GenerateRequest:
    """Make a GenerateRequest.

    Args:
        prompt: text, or token ids.
        model: id of the model; may be empty when a single model is served.
        request_id: name for the logs; empty for a name by the gateway.
        fields: fields of GenerateRequest, SamplingParams and Options, by name.
    """
    request = pb.GenerateRequest(model=model, request_id=request_id)
    if isinstance(prompt, str):
        request.text = prompt
    else:
        request.token_ids.ids.extend(prompt)
        request.token_ids.SetInParent()
    _fill(request, fields)
    return request


def chat_request(
    messages: Messages,
    *,
    model: str = "",
    request_id: str = "",
    **fields: Any,  # noqa: ANN401
) -> pb.ChatRequest:
    """Make a ChatRequest from mappings with `role` and `content`; else as `generate_request`."""
    request = pb.ChatRequest(model=model, request_id=request_id)
    request.messages.extend(pb.Message(**message) for message in messages)
    _fill(request, fields)
    return request


def _fill(request: pb.GenerateRequest | pb.ChatRequest, fields: Mapping[str, Any]) -> None:
    for name, value in fields.items():
        target: Any
        if name in pb.SamplingParams.DESCRIPTOR.fields_by_name:
            target = request.sampling
        elif name in pb.Options.DESCRIPTOR.fields_by_name:
            target = request.options
        elif name in request.DESCRIPTOR.fields_by_name:
            target = request
        else:
            raise InvalidRequest(
                name,
                f"`{name}` is no field of {request.DESCRIPTOR.name}, SamplingParams or Options",
            )
        if value is None:
            continue
        if name == "allowed_token_ids":
            target.allowed_token_ids.ids.extend(value)
            target.allowed_token_ids.SetInParent()
        elif isinstance(value, ProtoMessage):
            getattr(target, name).CopyFrom(value)
        elif isinstance(value, Mapping):
            getattr(target, name).update(value)
        elif isinstance(value, Sequence) and not isinstance(value, str):
            getattr(target, name).extend(value)
        else:
            setattr(target, name, value)
