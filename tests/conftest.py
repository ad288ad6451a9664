"""The order of all tests, and the environment of their processes.

pytest-xdist gives each file to a process. All files that start Ray go to the same process, one
after another and before the rest: two clusters on two cores would wait for each other.
"""

from __future__ import annotations

import os

import pytest

# pytest-xdist gives its workers a terminal's width; tests of tables set their own.
os.environ.pop("COLUMNS", None)


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Group by file, the files that start Ray together and first."""
    with_ray = {item.path for item in items if item.get_closest_marker("ray")}
    for item in items:
        name = "ray" if item.path in with_ray else str(item.path)
        item.add_marker(pytest.mark.xdist_group(name))
    items.sort(key=lambda item: item.path not in with_ray)
