"""Sampling defaults of a checkpoint's generation_config.json, as requests can take them.

What a request leaves out is taken from here, so a request is never refused for a value that it did
not send: a value with a usual meaning is put into our terms, any other is left out with a warning.

`do_sample` is not looked at, as in vLLM and TGI: the API's default is to sample, a checkpoint's
`temperature` says how, and 0 is greedy. (transformers would be greedy wherever `do_sample` is not
true, also where the file recommends a temperature.) Knows numbers; knows nothing of requests.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

_FILE = "generation_config.json"
MAX_TOP_K = 2**31 - 1
LIKELIEST = 1e-6
"""`top_p` that keeps the likeliest token alone."""


def read_defaults(generation: Mapping[str, Any]) -> tuple[dict[str, float], list[str]]:
    """The defaults by field, and a warning for each value that is left out.

    Args:
        generation: the object of generation_config.json.
    """
    defaults: dict[str, float] = {}
    warnings = []
    for name, (read, wanted) in _FIELDS.items():
        given = generation.get(name)
        if given is None:
            continue
        number = _number(given)
        value = None if number is None else read(number)
        if value is None:
            warnings.append(
                f"{_FILE}: `{name}`={str(given)[:60]!r} must be {wanted}; it is left out: correct "
                "the file, or send the field with each request"
            )
        else:
            defaults[name] = value
    return defaults, warnings


def _number(value: Any) -> float | None:  # noqa: ANN401
    """A finite number, also one written as text."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def _top_k(number: float) -> float | None:
    """-1 and 0 mean off; more than any vocabulary keeps all, which is off as well."""
    if not number.is_integer() or number < -1:
        return None
    return int(number) if 0 < number <= MAX_TOP_K else 0


def _top_p(number: float) -> float | None:
    """0 keeps the likeliest token, as in transformers."""
    if not 0 <= number <= 1:
        return None
    return max(number, LIKELIEST)


def _between(low: float, high: float) -> Callable[[float], float | None]:
    return lambda number: number if low <= number <= high else None


_FIELDS: Mapping[str, tuple[Callable[[float], float | None], str]] = {
    "temperature": (_between(0, 100), "from 0 to 100"),
    "top_k": (_top_k, "a whole number; 0 or -1 is off"),
    "top_p": (_top_p, "from 0 to 1"),
    "min_p": (_between(0, 1), "from 0 to 1"),
    "repetition_penalty": (_between(0.01, 100), "from 0.01 to 100"),
}
