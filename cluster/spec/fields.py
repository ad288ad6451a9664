"""Types of spec fields: bytes, names, counts, times.

Knows the notation of values; knows nothing of the meaning of fields.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from arriero.shards.errors import SpecError

_UNITS = {
    "": 1,
    "b": 1,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "kib": 2**10,
    "mib": 2**20,
    "gib": 2**30,
}
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


def _bytes(value: Any) -> Any:  # noqa: ANN401
    if not isinstance(value, str):
        return value
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", value)
    if match is None or match[2].lower() not in _UNITS:
        raise ValueError("write bytes as a number with an optional unit: 200MB, 1.5GiB")
    return int(float(match[1]) * _UNITS[match[2].lower()])


def parse_bytes(name: str, text: str) -> int:
    """Number of bytes from text such as "64GiB".

    Raises:
        SpecError: the text is no number of bytes; the message names the field `name`.
    """
    try:
        nbytes = _bytes(text)
    except ValueError as error:
        raise SpecError(f"`{name}`={text!r}: {error}") from None
    if nbytes < 1:
        raise SpecError(f"`{name}`={text!r} must be at least 1 byte")
    return int(nbytes)


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches a listener at `host`."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False  # a name, which other machines may know


def _everywhere(value: Path) -> Path:
    path = value.expanduser()
    if not path.is_absolute():
        raise ValueError("give an absolute path: it is the same on every node")
    return path


def _name(value: str) -> str:
    if not _NAME.fullmatch(value):
        raise ValueError("use 1 to 128 letters, digits, dots, dashes or underscores")
    return value


Bytes = Annotated[int, BeforeValidator(_bytes), Field(gt=0)]
EverywherePath = Annotated[Path, AfterValidator(_everywhere)]
Name = Annotated[str, AfterValidator(_name)]
Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]
Port = Annotated[int, Field(ge=0, le=65535)]
LogLevel = Literal["debug", "info", "warning", "error"]
LogFormat = Literal["text", "json"]


def refuse_twice(names: Sequence[str], kind: str, remedy: str) -> None:
    """Check that no name occurs twice.

    Raises:
        ValueError: a name occurs twice; the message says the kind, the name and the remedy.
    """
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"{kind} `{name}` occurs twice; {remedy}")


class SpecSection(BaseModel):
    """A section of the spec: immutable; unknown fields are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)
