"""The text and the tool calls of an output, in the order in which the model wrote them."""

from __future__ import annotations

from collections.abc import Iterator

from arriero.router.proto.arriero.v1 import inference_pb2 as pb


def split(output: pb.Output) -> Iterator[str | pb.ToolCall]:
    """The texts and calls of an output, in order.

    The beginning of a call that `max_tokens` cut off counts as text: a client would run an
    incomplete call.
    """
    at = 0
    for call, offset in zip(output.tool_calls, output.tool_call_offsets, strict=True):
        if offset > at:
            yield output.text[at:offset]
        yield call
        at = offset
    rest = output.text[at:] + output.truncated_tool_call
    if rest:
        yield rest
