"""JSON objects from files that may be hostile: bounded size, one clear error for each defect.

Knows JSON and file sizes; knows nothing of what the objects mean.
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
    """Read a file that holds one JSON object.

    Args:
        path: the file.
        limit: most bytes that it may have.

    Raises:
        CheckpointError: missing, unreadable, too large, not JSON, or not an object.
    """
    try:
        with path.open("rb") as file:
            data = file.read(limit + 1)
    except OSError as error:
        raise CheckpointError(f"{path}: {explain_error(path, error)}") from None
    if len(data) > limit:
        raise CheckpointError(f"{path}: more than {limit} bytes; a file of this kind is smaller")
    return parse_json_object(data, str(path))


def parse_json_object(
    data: bytes, source: str, *, unique_keys_because: str | None = None
) -> dict[str, Any]:
    """Parse one JSON object.

    Args:
        data: UTF-8 text.
        source: what an error names.
        unique_keys_because: refuse a repeated key, naming it as this (for example "tensor").

    Raises:
        CheckpointError: not UTF-8, not JSON, nested too deeply, not an object, repeated key.
    """
    pairs: Callable[[list[tuple[str, Any]]], dict[str, Any]] | None = None
    if unique_keys_because is not None:
        what = unique_keys_because

        def unique(found: list[tuple[str, Any]]) -> dict[str, Any]:
            made: dict[str, Any] = {}
            for key, value in found:
                if key in made:
                    raise CheckpointError(f"{source}: {what} {key!r} is there twice")
                made[key] = value
            return made

        pairs = unique
    try:
        # a byte order mark, which editors of some systems write, changes nothing
        value = json.loads(data.decode("utf-8-sig"), object_pairs_hook=pairs)
    except (ValueError, RecursionError) as error:  # both decoders raise kinds of ValueError
        because = explain_head(data[:HEAD_BYTES], len(data))
        if because is not None:
            raise CheckpointError(f"{source}: is not valid JSON: it {because}") from None
        raise CheckpointError(f"{source}: is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{source}: holds a JSON {type(value).__name__}, not an object")
    return value
