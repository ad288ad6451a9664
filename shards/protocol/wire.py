"""The one converter between typed values and bytes: msgpack between processes, JSON in stores.

The types are dataclasses, enums, msgspec structs and arrays (see `arrays`). A value is read back as
the same type, checked field by field. A reader ignores keys that its type lacks, and a missing key
takes the default of its field: so two versions understand each other during an upgrade.

Knows types and formats; knows nothing of the meaning of a message. Processes that import only the
types of messages need no msgspec.
"""

from __future__ import annotations

from functools import cache
from types import UnionType
from typing import TypeVar, overload

import msgspec

from arriero.shards.errors import WireError

T = TypeVar("T")


def encode(value: object) -> bytes:
    """Bytes of a value, in msgpack.

    Raises:
        TypeError: a field has a type without encoding.
    """
    return _encoder().encode(value)


@overload
def decode(data: bytes | memoryview, kind: type[T]) -> T: ...
@overload
def decode(data: bytes | memoryview, kind: UnionType) -> object: ...
def decode(data: bytes | memoryview, kind: object) -> object:
    """The value of a type, from the bytes of `encode`.

    Args:
        data: the bytes, from any sender.
        kind: type of the value, or a union of tagged structs.

    Raises:
        WireError: the bytes are no value of that type; the text names the field.
    """
    try:
        return _decoder(kind).decode(data)
    except (msgspec.DecodeError, RecursionError) as error:
        raise _unreadable(kind, error) from None


def to_builtins(value: object) -> object:
    """A value as dicts, lists, texts and numbers, as JSON can carry it."""
    return msgspec.to_builtins(value, str_keys=True)


def from_builtins(value: object, kind: type[T]) -> T:
    """The value of a type, from the output of `to_builtins` after JSON.

    Raises:
        WireError: `value` is no value of that type; the text names the field.
    """
    try:
        return msgspec.convert(value, kind, str_keys=True)
    except (msgspec.ValidationError, RecursionError) as error:
        raise _unreadable(kind, error) from None


def _unreadable(kind: object, error: Exception) -> WireError:
    name = kind.__name__ if isinstance(kind, type) else str(kind)
    return WireError(f"unreadable {name}: {error}; do both ends run the same version?")


@cache
def _encoder() -> msgspec.msgpack.Encoder:
    # NumPy comes with the first message: some processes read JSON alone, and start sooner without
    from arriero.shards.protocol import arrays

    return msgspec.msgpack.Encoder(enc_hook=arrays.write)


@cache
def _decoder(kind: object) -> msgspec.msgpack.Decoder[object]:
    from arriero.shards.protocol import arrays

    return msgspec.msgpack.Decoder(kind, dec_hook=arrays.read)
