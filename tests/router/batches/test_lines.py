"""Lines of a batch: what is read, and what an error says."""

from __future__ import annotations

import io
import json

import pytest

from arriero.router.batches.lines import LineError, RawLine, duplicate, raw_lines, read_line

GOOD = {
    "custom_id": "a",
    "method": "POST",
    "url": "/v1/chat/completions",
    "body": {"messages": []},
}


def raw(value: object) -> RawLine:
    data = value if isinstance(value, bytes) else json.dumps(value).encode()
    return RawLine(7, data, len(data))


def test_a_good_line() -> None:
    line = read_line(raw(GOOD))
    assert (line.number, line.custom_id, line.url) == (7, "a", "/v1/chat/completions")


@pytest.mark.parametrize(
    ("value", "code", "field", "words"),
    [
        (b"{", "invalid_json_line", "", "line 7: the line is not JSON"),
        (b"[" * 100_000, "invalid_json_line", "", "line 7: the line is not JSON"),
        ([1], "invalid_json_line", "", "no JSON object"),
        ({**GOOD, "custom_id": None}, "missing_required_parameter", "custom_id", "is needed"),
        ({**GOOD, "custom_id": 5}, "invalid_custom_id", "custom_id", "`custom_id`=5 must be"),
        ({**GOOD, "custom_id": "x" * 600}, "invalid_custom_id", "custom_id", "512 characters"),
        ({**GOOD, "method": "GET"}, "invalid_method", "method", '`method`="GET" must be "POST"'),
        ({**GOOD, "url": "/v1/x"}, "invalid_url", "url", '`url`="/v1/x" must be'),
        ({**GOOD, "body": "x"}, "invalid_request", "body", "must be a JSON object"),
        ({**GOOD, "body": {"stream": True}}, "invalid_request", "body.stream", "`body.stream`=tru"),
    ],
)
def test_errors_name_line_field_value_and_limit(
    value: object, code: str, field: str, words: str
) -> None:
    with pytest.raises(LineError) as caught:
        read_line(raw(value))
    assert (caught.value.line, caught.value.code, caught.value.field) == (7, code, field)
    assert words in str(caught.value)


def test_a_line_that_is_too_long() -> None:
    file = io.BytesIO(b'{"a": 1}\n\n' + b"x" * 3_000_000 + b"\r\n" + b"{}")
    lines = list(raw_lines(file, 1000))
    assert [(line.number, len(line.data) <= 1002) for line in lines] == [
        (1, True),
        (3, True),
        (4, True),
    ]
    with pytest.raises(LineError, match="line 3: the line has 3000001 bytes; the limit is 1000"):
        read_line(lines[1], max_bytes=1000)


def test_a_duplicate_names_both_lines() -> None:
    error = duplicate(read_line(raw(GOOD)), 3)
    assert "line 7" in str(error) and "line 3" in str(error) and error.custom_id == "a"
