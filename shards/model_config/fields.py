"""Typed reading of the fields of a JSON object, with an error for each invalid value.

Knows kinds of values and limits; knows nothing of models.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from arriero.shards.errors import CheckpointError

_MAX_SIZE = 2**31 - 1


class Fields:
    """The fields of a JSON object; each read checks the kind and the limits of the value.

    `source` names the object in errors.
    """

    def __init__(self, values: Mapping[str, Any], source: str) -> None:
        self.values = values
        self.source = source

    def get(self, name: str) -> Any:  # noqa: ANN401
        """The value; None if the field is missing or null."""
        return self.values.get(name)

    def wrong(self, name: str, value: object, wanted: str) -> CheckpointError:
        """Error for an invalid value; `wanted` describes valid values."""
        text = repr(value)
        return CheckpointError(f"{self.source}: `{name}`={text[:200]} must be {wanted}")

    def optional_size(self, name: str) -> int | None:
        """A whole number from 0, or None if missing."""
        value = self.get(name)
        if value is None:
            return None
        if isinstance(value, float) and value.is_integer():
            value = int(value)  # some tools write every number as a float
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= _MAX_SIZE:
            raise self.wrong(name, value, f"a whole number from 0 to {_MAX_SIZE}")
        return value

    def size(self, name: str, default: int | None = None, most: int = _MAX_SIZE) -> int:
        """A whole number from 1 to `most`."""
        value = self.optional_size(name)
        if value is None:
            value = default
        if value is None:
            raise CheckpointError(f"{self.source}: `{name}` is missing; add it as a whole number")
        if not 1 <= value <= most:
            raise self.wrong(name, value, f"a whole number from 1 to {most}")
        return value

    def optional_number(self, name: str) -> float | None:
        """A finite number, or None if missing."""
        value = self.get(name)
        if value is None:
            return None
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        # the bound prevents overflow in float() and refuses inf and nan
        if not (is_number and abs(value) < 1e30):
            raise self.wrong(name, value, "a finite number")
        return float(value)

    def number(self, name: str, default: float | None, *, low: float) -> float:
        """A finite number of at least `low`."""
        value = self.optional_number(name)
        if value is None:
            value = default
        if value is None:
            raise CheckpointError(f"{self.source}: `{name}` is missing; add it as a number")
        if value < low:
            raise self.wrong(name, value, f"a number of at least {low:g}")
        return value

    def flag(self, name: str) -> bool:
        """True or false; false if missing."""
        value = self.get(name)
        if value is None:
            return False
        if not isinstance(value, bool | int) or value not in (0, 1):
            raise self.wrong(name, value, "true or false")
        return bool(value)

    def one_of(self, name: str, allowed: tuple[str, ...], default: str) -> str:
        """A word of `allowed`; `default` if missing."""
        value = self.get(name)
        if value is None:
            return default
        if value not in allowed:
            raise self.wrong(
                name, value, f"one of {', '.join(allowed)}: no other value is supported"
            )
        return cast(str, value)

    def tokens(self, name: str, vocab_size: int) -> tuple[int, ...]:
        """Token ids, from a number or a list; -1 means no token, as in old Llama configs."""
        value = self.get(name)
        if value is None:
            return ()
        tokens = []
        for entry in value if isinstance(value, list) else [value]:
            token = _token_id(entry)
            if token is None:
                raise self.wrong(name, value, "a token id or a list of token ids")
            if not -1 <= token < vocab_size:
                raise self.wrong(name, value, f"a token id below `vocab_size`={vocab_size}")
            if token >= 0:
                tokens.append(token)
        return tuple(dict.fromkeys(tokens))


def _token_id(value: object) -> int | None:
    """A whole number, also given as 2.0 or "2"; None for other values."""
    if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) < 10:
        return int(value)
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value if isinstance(value, int) and not isinstance(value, bool) else None
