"""Messages of `arriero.v1.Inference` as the JSON of `/v1/messages`, whole or event by event.

The whole message is the sum of the events, so both always agree. Knows the JSON of the API; knows
nothing of sending.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterator, Sequence
from typing import Any

from arriero.router.http import safety
from arriero.router.http.text_and_calls import split
from arriero.router.proto.arriero.v1 import inference_pb2 as pb
from arriero.router.response import Message, TextDelta

Json = dict[str, Any]

_ENCODER = json.JSONEncoder(separators=(",", ":"))


class MessageEvents:
    """The JSON of one message.

    Args:
        model: id of the model.
        message_id: id of the message; None for a new id.
        has_breakpoints: the request has a breakpoint, so that tokens count as written.
    """

    def __init__(
        self, model: str, message_id: str | None = None, *, has_breakpoints: bool = False
    ) -> None:
        self._has_breakpoints = has_breakpoints
        self._message: Json = {
            "id": message_id or f"msg_{secrets.token_hex(12)}",
            "type": "message",
            "role": "assistant",
            "model": model,
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
        }
        self._num_blocks = 0
        self._in_text = False
        self._with_calls = False
        self._end: Json = {"stop_reason": "end_turn", "stop_sequence": None}
        self._safety: Json = {}

    def encoded(self, number: int, message: Message) -> bytes:
        """Server-sent events of a message."""
        return b"".join(map(_event, self._events(message)))

    def end(self, usages: Sequence[pb.Usage]) -> bytes:
        """The events with the reason of the end and the usage."""
        return b"".join(map(_event, self._last(usages)))

    def failed(self, error: Json) -> bytes:
        """The event of an error, which ends the stream."""
        content = {"type": "api_error", "message": error["error"]["message"]}
        if error["error"]["type"] == "service_unavailable_error":
            content["type"] = "overloaded_error"
        return _event({"type": "error", "error": content})

    def whole(self, messages: Sequence[tuple[int, pb.GenerateResponse]]) -> Json:
        """The message as a whole."""
        content: list[Json] = []
        partial: list[str] = []
        for _, message in messages:
            for event in self._events(message):
                if event["type"] == "content_block_start":
                    content.append(dict(event["content_block"]))
                    partial = []
                elif event["type"] == "content_block_delta":
                    delta = event["delta"]
                    partial.append(delta.get("text") or delta.get("partial_json", ""))
                elif event["type"] == "content_block_stop":
                    _fill(content[-1], "".join(partial))
        usages = [message.usage for _, message in messages if message.HasField("usage")]
        for event in self._last(usages):
            if event["type"] == "content_block_stop":
                _fill(content[-1], "".join(partial))
        whole = self._message | {"content": content, "usage": self._usage(*usages)}
        return whole | self._end | self._safety

    def _events(self, message: Message) -> Iterator[Json]:
        if isinstance(message, TextDelta):
            yield from self._text(message.text)
            return
        if message.HasField("start"):
            start = message.start
            counted = self._usage(
                pb.Usage(
                    prompt_tokens=start.prompt_tokens,
                    cached_tokens=start.cached_tokens,
                    written_tokens=start.written_tokens,
                )
            )
            yield {"type": "message_start", "message": self._message | {"usage": counted}}
        for output in message.outputs:
            for part in split(output):
                if isinstance(part, str):
                    yield from self._text(part)
                else:
                    yield from self._call(part)
            if output.finish_reason:
                self._end = self._reason(output)
        self._safety |= safety.verdicts(message.safety)

    def _text(self, text: str) -> Iterator[Json]:
        if not text:
            return
        if not self._in_text:
            self._in_text = True
            yield self._start({"type": "text", "text": ""})
        yield self._delta({"type": "text_delta", "text": text})

    def _call(self, call: pb.ToolCall) -> Iterator[Json]:
        yield from self._stop()
        self._with_calls = True
        yield self._start({"type": "tool_use", "id": call.id, "name": call.name, "input": {}})
        yield self._delta({"type": "input_json_delta", "partial_json": call.arguments})
        yield {"type": "content_block_stop", "index": self._num_blocks - 1}

    def _start(self, block: Json) -> Json:
        self._num_blocks += 1
        return {
            "type": "content_block_start",
            "index": self._num_blocks - 1,
            "content_block": block,
        }

    def _delta(self, delta: Json) -> Json:
        return {"type": "content_block_delta", "index": self._num_blocks - 1, "delta": delta}

    def _stop(self) -> Iterator[Json]:
        if self._in_text:
            self._in_text = False
            yield {"type": "content_block_stop", "index": self._num_blocks - 1}

    def _last(self, usages: Sequence[pb.Usage]) -> Iterator[Json]:
        yield from self._stop()
        delta = {"type": "message_delta", "delta": self._end, "usage": self._usage(*usages)}
        yield delta | self._safety
        yield {"type": "message_stop"}

    def _usage(self, *parts: pb.Usage) -> Json:
        """The usage; `input_tokens` are those neither read from the cache nor written to it."""
        cached = sum(part.cached_tokens for part in parts)
        written = sum(part.written_tokens for part in parts) if self._has_breakpoints else 0
        return {
            "input_tokens": sum(part.prompt_tokens for part in parts) - cached - written,
            "cache_creation_input_tokens": written,
            "cache_read_input_tokens": cached,
            "output_tokens": sum(part.completion_tokens for part in parts),
        }

    def _reason(self, output: pb.Output) -> Json:
        if output.finish_reason == pb.FINISH_REASON_CONTENT_FILTER:
            return {"stop_reason": "refusal", "stop_sequence": None}
        if output.finish_reason == pb.FINISH_REASON_LENGTH:
            return {"stop_reason": "max_tokens", "stop_sequence": None}
        if output.stop_string:
            return {"stop_reason": "stop_sequence", "stop_sequence": output.stop_string}
        reason = "tool_use" if self._with_calls else "end_turn"
        return {"stop_reason": reason, "stop_sequence": None}


def _fill(block: Json, text: str) -> None:
    """Put the content of a block that is complete into the block."""
    if block["type"] == "text":
        block["text"] = text
    else:
        block["input"] = json.loads(text or "{}")


def _event(content: Json) -> bytes:
    return f"event: {content['type']}\ndata: {_ENCODER.encode(content)}\n\n".encode()
