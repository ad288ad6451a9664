"""The lines of a batch: requests in, answers and errors out, in the form of the OpenAI API.

A line of the input is `{"custom_id", "method", "url", "body"}`. Each line gives one line of the
output or of the errors. Knows bytes and JSON; knows nothing of files, gateways or states.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

Json = dict[str, Any]

URLS = ("/v1/chat/completions", "/v1/completions", "/v1/responses")
"""Paths that the lines of a batch may name."""
MAX_LINE_BYTES = 32 * 1024 * 1024
MAX_ID_CHARS = 512
_FIELDS = ("custom_id", "method", "url", "body")
_SHOWN = 64


@dataclass(frozen=True, slots=True)
class RawLine:
    """A line of a file as read.

    Attributes:
        number: number of the line, from 1.
        data: bytes of the line without its end; the first bytes of a line that is too long.
        size: bytes of the whole line.
    """

    number: int
    data: bytes
    size: int


@dataclass(frozen=True, slots=True)
class BatchLine:
    """A request of a batch.

    Attributes:
        number: number of the line in the file, from 1.
        custom_id: the name that the client gave to the request.
        url: path of the API.
        body: body of the request.
    """

    number: int
    custom_id: str
    url: str
    body: Json


class LineError(Exception):
    """A line that holds no request.

    Args:
        line: number of the line.
        code: the kind of fault, for programs.
        field: field at fault; "" for the whole line.
        message: text for people: line, field, value, limit and remedy.
        custom_id: name of the request; "" where the line has none.
    """

    def __init__(self, line: int, code: str, field: str, message: str, custom_id: str = "") -> None:
        super().__init__(f"line {line}: {message}")
        self.line, self.code, self.field, self.custom_id = line, code, field, custom_id

    def to_json(self) -> Json:
        """The error as in the `errors` of a batch."""
        param = self.field or None
        return {"code": self.code, "message": str(self), "param": param, "line": self.line}


def raw_lines(file: BinaryIO, max_bytes: int) -> Iterator[RawLine]:
    """The lines of a file that are not blank; holds no more than `max_bytes` of a line."""
    number = 0
    while data := file.readline(max_bytes + 2):
        number += 1
        size = len(data)
        while not data.endswith(b"\n") and (rest := file.readline(1 << 20)):
            size += len(rest)
            if rest.endswith(b"\n"):
                break
        if data.strip():
            text = data.rstrip(b"\r\n")
            yield RawLine(number, text, max(len(text), size - 1))


def read_line(raw: RawLine, *, max_bytes: int = MAX_LINE_BYTES, url: str = "") -> BatchLine:
    """The request of a line.

    Args:
        raw: the line.
        max_bytes: most bytes of a line.
        url: path that each line must name; "" for any path of `URLS`.

    Raises:
        LineError: the line holds no request.
    """
    number = raw.number
    if raw.size > max_bytes:
        raise LineError(
            number,
            "line_too_long",
            "",
            f"the line has {raw.size} bytes; the limit is {max_bytes}; send less in a request",
        )
    try:
        value = json.loads(raw.data)
    except (ValueError, RecursionError) as error:
        words = f"the line is not JSON: {error}"
        raise LineError(number, "invalid_json_line", "", words) from None
    if not isinstance(value, dict):
        words = f"the line is no JSON object with the fields {', '.join(_FIELDS)}"
        raise LineError(number, "invalid_json_line", "", words)
    return _checked(number, value, url)


def _checked(number: int, value: Json, url: str) -> BatchLine:
    custom_id, body = value.get("custom_id"), value.get("body")
    name = custom_id[:MAX_ID_CHARS] if isinstance(custom_id, str) else ""

    def refuse(field: str, code: str, words: str) -> LineError:
        return LineError(number, code, field, words, name)

    missing = [field for field in _FIELDS if value.get(field) is None]
    if missing:
        field = missing[0]
        raise refuse(field, "missing_required_parameter", f"`{field}` is needed")
    if not isinstance(custom_id, str) or not 0 < len(custom_id) <= MAX_ID_CHARS:
        raise refuse(
            "custom_id",
            "invalid_custom_id",
            f"`custom_id`={_shown(custom_id)} must be a text of 1 to {MAX_ID_CHARS} characters",
        )
    if value["method"] != "POST":
        words = f'`method`={_shown(value["method"])} must be "POST"'
        raise refuse("method", "invalid_method", words)
    urls = (url,) if url else URLS
    if value["url"] not in urls:
        words = f"`url`={_shown(value['url'])} must be {' or '.join(urls)}"
        raise refuse("url", "mismatched_url" if url else "invalid_url", words)
    if not isinstance(body, dict):
        words = f"`body`={_shown(body)} must be a JSON object"
        raise refuse("body", "invalid_request", words)
    for field in ("stream", "background"):
        if body.get(field):
            words = (
                f"`body.{field}`={_shown(body[field])} is not supported in a batch; leave it out"
            )
            raise refuse(f"body.{field}", "invalid_request", words)
    return BatchLine(number, custom_id, str(value["url"]), body)


def duplicate(line: BatchLine, first: int) -> LineError:
    """The error for a `custom_id` that line `first` has already."""
    return LineError(
        line.number,
        "duplicate_custom_id",
        "custom_id",
        f"`custom_id`={_shown(line.custom_id)} is also the name of line {first}; the limit is one "
        "line for each name; give another name",
        line.custom_id,
    )


def answer_line(custom_id: str, status: int, request_id: str, body: Any) -> bytes:  # noqa: ANN401
    """The line for a request that was answered, maybe with an error status."""
    response = {"status_code": status, "request_id": request_id, "body": body}
    return _output(custom_id or None, response, None)


def error_line(custom_id: str, code: str, message: str, **fields: Any) -> bytes:  # noqa: ANN401
    """The line for a request without an answer; `fields` are further fields of the error."""
    return _output(custom_id or None, None, {"code": code, "message": message, **fields})


def fault_line(error: LineError) -> bytes:
    """The line for a line that holds no request."""
    return _output(error.custom_id or None, None, error.to_json())


def _output(custom_id: str | None, response: Json | None, error: Json | None) -> bytes:
    value = {
        "id": f"batch_req_{secrets.token_hex(12)}",
        "custom_id": custom_id,
        "response": response,
        "error": error,
    }
    return json.dumps(value, separators=(",", ":")).encode() + b"\n"


def _shown(value: object) -> str:
    """A value as in the line, cut to a few characters."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"
