"""The environment of all tests, and the order of their files."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

TESTS = Path(__file__).parent
LONG_FILES = (
    "oracle/test_sampling.py",
    "router/http/test_structured.py",
    "oracle/",
    "shards/engine/test_scheduler.py",
    "shards/worker/cuda/",
    "gpu/",
    "kernels_triton/",
    "kernels/",
    "shards/kv/",
    "fuzz/",
)
"""Files and folders whose tests take longest, longest first."""

# pytest-xdist gives its workers a terminal's width; tests of tables set their own.
os.environ.pop("COLUMNS", None)

# The wall time of an example says how busy the machine is; no test shows a time by it.
settings.register_profile("tests", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("tests")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files first, so that no process is left with one at the end."""

    def place(item: pytest.Item) -> int:
        name = item.path.relative_to(TESTS).as_posix()
        places = (i for i, start in enumerate(LONG_FILES) if name.startswith(start))
        return next(places, len(LONG_FILES))

    items.sort(key=place)
