"""Sampling defaults of a checkpoint's generation_config.json, for fields that a request leaves out.

A bad default must not make a request fail: values with a usual meaning are converted, all other
values are left out with a warning.

`do_sample` has no effect, as in vLLM and TGI: the API samples by default, the checkpoint's
`temperature` says how, and 0 is greedy. (transformers is greedy unless `do_sample` is true, even if
the file recommends a temperature.) Knows numbers; knows nothing of requests.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

_FILE = "generation_config.json"
MAX_TOP_K = 2**31 - 1
"""Larger values of `top_k` count as off."""
LIKELIEST = 1e-6
"""`top_p` that keeps only the likeliest token."""


def read_defaults(generation: Mapping[str, Any]) -> tuple[dict[str, float], list[str]]:
    """The defaults by field, and a warning for each value that is left out.

    Args:
        generation: JSON object of generation_config.json.
    """
    defaults: dict[str, float] = {}
    warnings = []
    for name, (read, valid_values) in _FIELDS.items():
        raw = generation.get(name)
        if raw is None:
            continue
        number = _number(raw)
        value = None if number is None else read(number)
        if value is None:
            warnings.append(
                f"{_FILE}: `{name}`={str(raw)[:60]!r} must be {valid_values}, so the value is left "
                f"out; correct the file, or send `{name}` with each request"
            )
        else:
            defaults[name] = value
    return defaults, warnings


def _number(value: Any) -> float | None:  # noqa: ANN401
    """A finite number from a JSON number or a text; None otherwise."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def _top_k(number: float) -> float | None:
    """The value of `top_k`: -1, 0, and numbers above any vocabulary size are 0, off."""
    if not number.is_integer() or number < -1:
        return None
    return int(number) if 0 < number <= MAX_TOP_K else 0


def _top_p(number: float) -> float | None:
    """The value of `top_p`; 0 keeps the likeliest token, as in transformers."""
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
