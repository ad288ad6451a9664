"""Messages of `arriero.v1.Inference` as the OpenAI API's JSON, whole or event by event.

Knows the JSON of the API; knows nothing of sending.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Mapping, Sequence
from json.encoder import encode_basestring_ascii
from typing import Any

from arriero.router.http import safety
from arriero.router.http.spelling import logprob_json
from arriero.router.http.token_fields import TokenFields, fingerprint
from arriero.router.proto.arriero.v1 import inference_pb2 as pb
from arriero.router.response import Message, TextDelta
from arriero.router.text.tokenizer import Tokenizer
from arriero.router.tools import ToolCall, partial_call

Json = dict[str, Any]

DONE = b"data: [DONE]\n\n"
_ENCODER = json.JSONEncoder(separators=(",", ":"))  # `dumps` would make an encoder for each event


def event(content: Mapping[str, Any]) -> bytes:
    """A server-sent event."""
    return b"data: " + _ENCODER.encode(content).encode() + b"\n\n"


class TextEvents:
    """Events with new text of a sample and nothing else.

    The constant parts are encoded once.

    Args:
        head: common fields of the chunks.
        before, after: JSON of the choice between index and text, and after the text.
    """

    def __init__(self, head: Json, before: str, after: str) -> None:
        self._head = f'data: {_ENCODER.encode(head)[:-1]},"choices":[{{"index":'
        self._before = before
        self._after = after + "]}\n\n"

    def make(self, index: int, text: str) -> bytes:
        """Encode an event."""
        encoded = encode_basestring_ascii(text)
        return f"{self._head}{index}{self._before}{encoded}{self._after}".encode("ascii")


REASONS = {
    pb.FINISH_REASON_STOP: "stop",
    pb.FINISH_REASON_LENGTH: "length",
    pb.FINISH_REASON_CANCELLED: "cancelled",
    pb.FINISH_REASON_CONTENT_FILTER: "content_filter",
}


def usage(*parts: pb.Usage) -> Json:
    """The sum of the usages of calls."""
    prompt = sum(part.prompt_tokens for part in parts)
    completion = sum(part.completion_tokens for part in parts)
    total: Json = {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": sum(part.cached_tokens for part in parts)},
    }
    drafts = prediction_tokens(*parts)
    return total | {"completion_tokens_details": drafts} if drafts else total


def prediction_tokens(*parts: pb.Usage) -> dict[str, int]:
    """Drafted tokens of calls that were right and that were wrong; empty without drafts."""
    counts = {
        name: sum(getattr(part, name) for part in parts)
        for name in ("accepted_prediction_tokens", "rejected_prediction_tokens")
    }
    return counts if any(counts.values()) else {}


def answer_head(kind: str, name: str, model: str) -> Json:
    """The common fields of the chunks of a new answer."""
    answer_id = f"{kind}-{secrets.token_hex(12)}"
    return {"id": answer_id, "object": name, "created": int(time.time()), "model": model}


class ChatCompletion:
    """The JSON of a chat completion.

    Args:
        model: id of the model.
        tokenizer: spells tokens, for log-probabilities.
        with_usage: end a stream with the usage.
        head: common fields of the chunks; None for a new answer.
        tokens: what the answer shows of its tokens; None for nothing.
    """

    def __init__(
        self,
        model: str,
        tokenizer: Tokenizer,
        *,
        with_usage: bool = False,
        head: Json | None = None,
        tokens: TokenFields | None = None,
    ) -> None:
        self._tokenizer = tokenizer
        self._with_usage = with_usage
        self._tokens = tokens or TokenFields()
        self.head: Json = head or answer_head("chatcmpl", "chat.completion.chunk", model)
        self._num_calls: dict[int, int] = {}
        self._text = self._text_events()

    def _text_events(self) -> TextEvents:
        return TextEvents(
            self.head, ',"delta":{"content":', '},"logprobs":null,"finish_reason":null}'
        )

    def _begin(self, start: pb.Start) -> Json:
        """Note the facts of an answer's start; gives the fields of the first chunk alone."""
        self.head = self.head | fingerprint(start.weights)
        self._text = self._text_events()
        return {"prompt_token_ids": list(start.prompt_token_ids)} if self._tokens.ids else {}

    def encoded(self, number: int, message: Message) -> bytes:
        """As `events`, encoded as server-sent events."""
        if isinstance(message, TextDelta):
            plain = message.text and not self._tokens.ids
            if plain and message.index in self._num_calls:
                return self._text.make(message.index, message.text)
            message = message.to_wire()
        return b"".join(map(event, self.events(number, message)))

    def events(self, number: int, message: pb.GenerateResponse) -> list[Json]:
        """Chunks of a stream: a chunk for each sample in `message`; its finish reason apart."""
        first = self._begin(message.start) if message.HasField("start") else {}
        chunks = [
            self.head | {"choices": [choice]}
            for output in message.outputs
            for choice in _apart(self._delta(output))
        ]
        if chunks:
            chunks[0] |= first
        return safety.on_last(chunks, message)

    def end(self, usages: Sequence[pb.Usage]) -> bytes:
        """The chunk with the usage, if wanted, and the end of the stream."""
        chunk = self.head | {"choices": [], "usage": usage(*usages)}
        return (event(chunk) if self._with_usage else b"") + DONE

    def failed(self, error: Json) -> bytes:
        """The event of an error, which ends the stream."""
        return event(error)

    def whole(self, messages: Sequence[tuple[int, pb.GenerateResponse]]) -> Json:
        """The sum of the messages as a whole completion."""
        counted = usage(*(message.usage for _, message in messages if message.HasField("usage")))
        choices: dict[int, Json] = {}
        prompt: Json = {}
        for number, message in messages:
            for event in self.events(number, message):
                if "prompt_token_ids" in event:
                    prompt = {"prompt_token_ids": event["prompt_token_ids"]}
                (part,) = event["choices"]
                choice = choices.setdefault(
                    part["index"],
                    {
                        "index": part["index"],
                        "message": {"role": "assistant", "content": None},
                        "logprobs": None,
                        "finish_reason": None,
                    },
                )
                _add(choice, part)
        for choice in choices.values():
            if choice["message"]["content"] is None and "tool_calls" not in choice["message"]:
                choice["message"]["content"] = ""
        head = self.head | {"object": "chat.completion"} | prompt | safety.of_messages(messages)
        return head | {"choices": [choices[i] for i in sorted(choices)], "usage": counted}

    def _delta(self, output: pb.Output) -> Json:
        delta: Json = {}
        num_calls = self._num_calls.get(output.index)
        if num_calls is None:
            num_calls = self._num_calls[output.index] = 0
            delta = {"role": "assistant", "content": ""}
        if output.text:
            delta["content"] = output.text
        calls = [_call(call.id, call) for call in output.tool_calls]
        if output.truncated_tool_call:
            part = partial_call(output.truncated_tool_call)
            if part is None:  # a call without a name yet is text
                delta["content"] = output.text + output.truncated_tool_call
            else:
                calls.append(_call(f"call_{secrets.token_hex(12)}", part))
        if calls:
            delta["tool_calls"] = [
                {"index": number} | call for number, call in enumerate(calls, num_calls)
            ]
            num_calls += len(calls)
            self._num_calls[output.index] = num_calls
        reason = REASONS.get(output.finish_reason)
        if reason == "stop" and num_calls:
            reason = "tool_calls"
        logprobs = None
        if output.logprobs:
            vocabulary = self._tokenizer.vocabulary
            as_ids = self._tokens.as_ids
            rows = [logprob_json(vocabulary, row, as_ids=as_ids) for row in output.logprobs]
            logprobs = {"content": rows}
        choice: Json = {
            "index": output.index,
            "delta": delta,
            "logprobs": logprobs,
            "finish_reason": reason,
        }
        if self._tokens.ids:
            choice["token_ids"] = list(output.token_ids)
        return choice


def _apart(choice: Json) -> list[Json]:
    """The role before the rest and the finish reason after it, each in a chunk of its own.

    Clients expect both so: some read no text and no tool call beside a role or a reason.
    """
    delta, reason = choice["delta"], choice["finish_reason"]
    rest = {name: value for name, value in delta.items() if name != "role"}
    empty: Json = {"index": choice["index"], "delta": {}, "logprobs": None, "finish_reason": None}
    if "token_ids" in choice:
        empty["token_ids"] = []
    chunks = []
    if "role" in delta:
        chunks.append(empty | {"delta": {"role": delta["role"], "content": ""}})
        if rest["content"] == "":
            del rest["content"]
    if rest or choice["logprobs"] or choice.get("token_ids"):
        chunks.append(choice | {"delta": rest, "finish_reason": None})
    if reason is not None:
        chunks.append(empty | {"finish_reason": reason})
    return chunks or [choice]


def _call(call_id: str, call: pb.ToolCall | ToolCall) -> Json:
    return {
        "id": call_id,
        "type": "function",
        "function": {"name": call.name, "arguments": call.arguments},
    }


def _add(choice: Json, part: Json) -> None:
    """Add a chunk's choice to the choice of the whole completion."""
    message, delta = choice["message"], part["delta"]
    if delta.get("content"):
        message["content"] = (message["content"] or "") + delta["content"]
    for call in delta.get("tool_calls", ()):
        whole = {name: value for name, value in call.items() if name != "index"}
        message.setdefault("tool_calls", []).append(whole)
    if part["logprobs"] is not None:
        if choice["logprobs"] is None:
            choice["logprobs"] = {"content": []}
        choice["logprobs"]["content"] += part["logprobs"]["content"]
    if "token_ids" in part:
        choice.setdefault("token_ids", []).extend(part["token_ids"])
    choice["finish_reason"] = part["finish_reason"] or choice["finish_reason"]


def model(message: pb.Model) -> Json:
    """An entry of `/v1/models`."""
    return {
        "id": message.id,
        "object": "model",
        "created": message.created,
        "owned_by": "arriero",
        "max_model_len": message.max_model_len,
        "root": message.parent or message.id,
        "parent": message.parent or None,
    }
