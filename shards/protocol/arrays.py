"""NumPy arrays inside messages: msgpack extensions with the dtype as their code.

An array of one axis is a single extension; an array of more axes is a list of shape and extension.
The reader knows the dtype from the type of the field, and refuses any other.

Knows arrays and their bytes; knows nothing of messages.
"""

from __future__ import annotations

from functools import cache
from typing import Any, get_args, get_origin

import msgspec
import numpy as np
import numpy.typing as npt

_CODES = {np.dtype(name): code for code, name in enumerate(("<i4", "<f4", "u1", "<u8", "<i8"), 1)}
_DTYPES = {code: dtype for dtype, code in _CODES.items()}


def write(value: object) -> object:
    """An array, or a NumPy scalar, as values that msgpack has; a hook for msgspec.

    Raises:
        TypeError: messages have no such type.
    """
    if isinstance(value, np.generic):
        return value.item()
    if not isinstance(value, np.ndarray):
        raise TypeError(f"{type(value).__name__} has no encoding; use a dataclass or an enum")
    code = _CODES.get(value.dtype)
    if code is None:
        raise TypeError(f"an array of {value.dtype} has no encoding; use {_names()}")
    data = value.data if value.flags.c_contiguous else value.tobytes()
    extension = msgspec.msgpack.Ext(code, data)
    return extension if value.ndim == 1 else [list(value.shape), extension]


def read(kind: object, value: object) -> npt.NDArray[np.generic]:
    """The array of a field, read-only; a hook for msgspec.

    Args:
        kind: type of the field, `npt.NDArray[...]`.
        value: an extension, or a list of the shape and the extension.

    Raises:
        ValueError: `value` is no array of this dtype.
    """
    dtype = _dtype_of(kind)
    shape: Any = None
    if isinstance(value, list) and len(value) == 2:
        shape, value = value
    if not isinstance(value, msgspec.msgpack.Ext) or value.code != _CODES[dtype]:
        raise ValueError(f"expected an array of {dtype}, got {_described(value)}")
    array: npt.NDArray[np.generic] = np.frombuffer(bytes(value.data), dtype)
    if shape is None:
        return array
    try:
        shaped: npt.NDArray[np.generic] = array.reshape(shape)
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"{len(array)} elements do not fill the shape {shape!r:.80}") from None
    return shaped


def _described(value: object) -> str:
    if not isinstance(value, msgspec.msgpack.Ext):
        return type(value).__name__
    return f"an array of {_DTYPES.get(value.code, f'the unknown code {value.code}')}"


@cache
def _dtype_of(kind: object) -> np.dtype[np.generic]:
    """The dtype of a field's type."""
    if get_origin(kind) is not np.ndarray:
        raise TypeError(f"{kind} has no decoding; use a dataclass, an enum or an array")
    (scalar,) = get_args(get_args(kind)[1])
    dtype: np.dtype[np.generic] = np.dtype(scalar)
    return dtype


def _names() -> str:
    return ", ".join(str(dtype) for dtype in _CODES)
