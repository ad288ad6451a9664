"""Imports Ray Serve once, without the warnings about pydantic that its own modules cause."""

from __future__ import annotations

import warnings

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import ray.serve  # noqa: F401
