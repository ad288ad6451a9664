"""The environment of all tests."""

from __future__ import annotations

import os

# pytest-xdist gives its workers a terminal's width; tests of tables set their own.
os.environ.pop("COLUMNS", None)
