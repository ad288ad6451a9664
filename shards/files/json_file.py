"""JSON objects from untrusted files: bounded size, a clear error for each defect.

Knows JSON and file sizes; knows nothing of the meaning of objects.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from arriero.shards.errors import CheckpointError
from arriero.shards.files.bad_file import HEAD_BYTES, explain_error, explain_head

MAX_JSON_BYTES = 100_000_000


def read_json_object(path: Path, limit: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """Read a file with a JSON object.

    Args:
        path: the file.
        limit: largest size in bytes.

    Raises:
        CheckpointError: missing, unreadable, too large, not JSON, or not an object.
    """
    try:
        with path.open("rb") as file:
            data = file.read(limit + 1)
    except OSError as error:
        raise CheckpointError(f"{path}: {explain_error(path, error)}") from None
    if len(data) > limit:
        raise CheckpointError(
            f"{path}: has more than {limit} bytes, the limit for this kind of file; fetch it again"
        )
    return parse_json_object(data, str(path))


def parse_json_object(
    data: bytes, source: str, *, unique_keys: str | None = None
) -> dict[str, Any]:
    """Parse a JSON object.

    Args:
        data: UTF-8 text.
        source: file name for errors.
        unique_keys: kind of the keys for the error on a repeated key (for example "tensor"); None
            accepts repeated keys.

    Raises:
        CheckpointError: not UTF-8, not JSON, nested too deeply, not an object, repeated key.
    """
    pairs: Callable[[list[tuple[str, Any]]], dict[str, Any]] | None = None
    if unique_keys is not None:

        def unique(entries: list[tuple[str, Any]]) -> dict[str, Any]:
            values: dict[str, Any] = {}
            for key, value in entries:
                if key in values:
                    raise CheckpointError(
                        f"{source}: {unique_keys} {key!r} appears twice; fetch the file again"
                    )
                values[key] = value
            return values

        pairs = unique
    try:
        # some editors write a byte order mark, which has no effect
        value = json.loads(data.decode("utf-8-sig"), object_pairs_hook=pairs)
    except (ValueError, RecursionError) as error:  # both decoders raise subclasses of ValueError
        reason = explain_head(data[:HEAD_BYTES], len(data))
        if reason is not None:
            raise CheckpointError(f"{source}: is not valid JSON: the file {reason}") from None
        raise CheckpointError(
            f"{source}: is not valid JSON: {error}; correct it or fetch it again"
        ) from None
    if not isinstance(value, dict):
        raise CheckpointError(
            f"{source}: holds a JSON {type(value).__name__}, not an object; fetch the file again"
        )
    return value
