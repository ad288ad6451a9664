"""Messages of `arriero.v1.Inference` as the JSON of `/v1/responses`, whole or event by event.

The whole response is what the events have built, so both always agree. Knows the JSON of the API;
knows nothing of sending and storing.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Iterator, Sequence
from typing import Any

from arriero.router.http import safety
from arriero.router.http.responses import prediction_tokens
from arriero.router.http.responses_api.schemas import ResponsesBody
from arriero.router.http.spelling import logprob_json
from arriero.router.http.text_and_calls import split
from arriero.router.proto.arriero.v1 import inference_pb2 as pb
from arriero.router.response import Message, TextDelta
from arriero.router.text.detokenizer import Vocabulary

Json = dict[str, Any]

_ENCODER = json.JSONEncoder(separators=(",", ":"))
_CUTS = {
    pb.FINISH_REASON_LENGTH: "max_output_tokens",
    pb.FINISH_REASON_CONTENT_FILTER: "content_filter",
}
"""Reasons of incomplete responses."""


class ResponseEvents:
    """The JSON of one response.

    Args:
        model: id of the model.
        body: the request.
        vocabulary: spells tokens, for log-probabilities; None for none.

    Attributes:
        response: the response so far.
    """

    def __init__(
        self, model: str, body: ResponsesBody, vocabulary: Vocabulary | None = None
    ) -> None:
        self._vocabulary = vocabulary
        # of tokens whose text has not come yet, and of the open text
        self._new_logprobs: list[Json] = []
        self._logprobs: list[Json] = []
        self.response = _response(model, body)
        self._output: list[Json] = self.response["output"]
        self._sequence = 0
        self._text: list[str] | None = None
        self._cut = ""

    def encoded(self, number: int, message: Message) -> bytes:
        """Server-sent events of a message."""
        return b"".join(map(self._event, self._events(message)))

    def end(self, usages: Sequence[pb.Usage]) -> bytes:
        """The events of the end."""
        return b"".join(map(self._event, self._last(usages)))

    def failed(self, error: Json) -> bytes:
        """The event of an error, which ends the stream."""
        code, words = error["error"]["code"] or "server_error", error["error"]["message"]
        self.response |= {"status": "failed", "error": {"code": code, "message": words}}
        return self._event({"type": "response.failed", "response": self._shown()})

    def cancelled(self) -> None:
        """Note that the response was cancelled."""
        self.response["status"] = "cancelled"

    def whole(self, messages: Sequence[tuple[int, pb.GenerateResponse]]) -> Json:
        """The response as a whole."""
        for _, message in messages:
            for _ in self._events(message):
                pass
        usages = [message.usage for _, message in messages if message.HasField("usage")]
        for _ in self._last(usages):
            pass
        return self._shown()

    def _event(self, content: Json) -> bytes:
        content = content | {"sequence_number": self._sequence}
        self._sequence += 1
        return f"event: {content['type']}\ndata: {_ENCODER.encode(content)}\n\n".encode()

    def _shown(self) -> Json:
        return self.response | {"output": list(self._output)}

    def _events(self, message: Message) -> Iterator[Json]:
        if isinstance(message, TextDelta):
            yield from self._add_text(message.text)
            return
        if message.HasField("start"):
            for kind in ("response.created", "response.in_progress"):
                yield {"type": kind, "response": self._shown()}
        for output in message.outputs:
            if self._vocabulary is not None:
                rows = (logprob_json(self._vocabulary, row) for row in output.logprobs)
                self._new_logprobs += rows
            for part in split(output):
                if isinstance(part, str):
                    yield from self._add_text(part)
                else:
                    yield from self._add_call(part)
            self._cut = _CUTS.get(output.finish_reason, self._cut)
        self.response |= safety.verdicts(message.safety)

    def _add_text(self, text: str) -> Iterator[Json]:
        if not text:
            return
        if self._text is None:
            self._text = []
            item: Json = {
                "id": f"msg_{secrets.token_hex(12)}",
                "type": "message",
                "status": "in_progress",
                "role": "assistant",
                "content": [],
            }
            self._output.append(item)
            yield self._of_item("response.output_item.added", item=dict(item))
            yield self._of_part("response.content_part.added", part=_part(""))
        self._text.append(text)
        rows, self._new_logprobs = self._new_logprobs, []
        self._logprobs += rows
        yield self._of_part("response.output_text.delta", delta=text, logprobs=rows)

    def _end_text(self, status: str = "completed") -> Iterator[Json]:
        """Complete the message whose text is open."""
        if self._text is None:
            return
        rows = self._logprobs + self._new_logprobs
        part = _part("".join(self._text), rows)
        self._text = None
        self._logprobs, self._new_logprobs = [], []
        yield self._of_part("response.output_text.done", text=part["text"], logprobs=rows)
        yield self._of_part("response.content_part.done", part=part)
        item = self._output[-1] = self._output[-1] | {"status": status, "content": [part]}
        yield self._of_item("response.output_item.done", item=item)

    def _add_call(self, call: pb.ToolCall) -> Iterator[Json]:
        yield from self._end_text()
        self._new_logprobs = []  # of the call's own tokens
        item: Json = {
            "id": f"fc_{secrets.token_hex(12)}",
            "type": "function_call",
            "status": "in_progress",
            "call_id": call.id,
            "name": call.name,
            "arguments": "",
        }
        self._output.append(item)
        yield self._of_item("response.output_item.added", item=item)
        place = {"item_id": item["id"], "output_index": len(self._output) - 1}
        kind = "response.function_call_arguments"
        yield {"type": f"{kind}.delta", **place, "delta": call.arguments}
        yield {"type": f"{kind}.done", **place, "name": call.name, "arguments": call.arguments}
        item = item | {"status": "completed", "arguments": call.arguments}
        self._output[-1] = item
        yield self._of_item("response.output_item.done", item=item)

    def _of_item(self, kind: str, *, item: Json) -> Json:
        return {"type": kind, "output_index": len(self._output) - 1, "item": item}

    def _of_part(self, kind: str, **content: Any) -> Json:  # noqa: ANN401
        place = {
            "item_id": self._output[-1]["id"],
            "output_index": len(self._output) - 1,
            "content_index": 0,
        }
        return {"type": kind, **place, **content}

    def _last(self, usages: Sequence[pb.Usage]) -> Iterator[Json]:
        status = "incomplete" if self._cut else "completed"
        yield from self._end_text(status)
        self.response |= {"status": status, "usage": _usage(*usages)}
        if self._cut:
            self.response["incomplete_details"] = {"reason": self._cut}
        else:
            self.response["completed_at"] = int(time.time())
        yield {"type": f"response.{status}", "response": self._shown()}


def _part(text: str, logprobs: Sequence[Json] = ()) -> Json:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": list(logprobs)}


def _response(model: str, body: ResponsesBody) -> Json:
    """The response before its first token, with the request's settings as the API repeats them."""
    given = body.model_dump(by_alias=True, exclude_none=True)
    return {
        "id": f"resp_{secrets.token_hex(24)}",
        "object": "response",
        "created_at": int(time.time()),
        "completed_at": None,
        "status": "in_progress",
        "background": body.background,
        "error": None,
        "incomplete_details": None,
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "metadata": body.metadata or {},
        "model": model,
        "output": [],
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "previous_response_id": body.previous_response_id,
        "prompt_cache_key": body.prompt_cache_key,
        "prompt_cache_retention": body.prompt_cache_retention,
        "reasoning": {"effort": None, "summary": None},
        "service_tier": "default",
        "store": body.store,
        "temperature": body.temperature,
        "text": given.get("text") or {"format": {"type": "text"}},
        "tool_choice": _flat(given.get("tool_choice", "auto")),
        "tools": [tool for tool in given.get("tools", ()) if tool["type"] == "function"],
        "top_logprobs": body.top_logprobs or 0,
        "top_p": body.top_p,
        "truncation": "disabled",
        "usage": None,
    }


def _flat(choice: str | Json) -> str | Json:
    """A choice of tools as the API writes it."""
    if isinstance(choice, str) or choice["type"] != "allowed_tools":
        return choice if isinstance(choice, str) else {"type": "function", **choice["function"]}
    allowed = choice["allowed_tools"]
    tools = [{"type": "function", **tool["function"]} for tool in allowed["tools"]]
    return {"type": "allowed_tools", "mode": allowed["mode"], "tools": tools}


def _usage(*parts: pb.Usage) -> Json:
    prompt = sum(part.prompt_tokens for part in parts)
    output = sum(part.completion_tokens for part in parts)
    return {
        "input_tokens": prompt,
        "input_tokens_details": {
            "cached_tokens": sum(part.cached_tokens for part in parts),
            "cache_write_tokens": sum(part.written_tokens for part in parts),
        },
        "output_tokens": output,
        "output_tokens_details": {"reasoning_tokens": 0} | prediction_tokens(*parts),
        "total_tokens": prompt + output,
    }
