"""Number of random examples of a property test.

`make test` runs a share of the examples of the long property tests; `make fuzz`, which sets
`ARRIERO_ALL_EXAMPLES`, runs all. Examples are random in each run, so that runs add up.
"""

from __future__ import annotations

import os

SHARE = 4


def examples(count: int) -> int:
    """All examples, or a quarter of them in the usual run."""
    return count if os.environ.get("ARRIERO_ALL_EXAMPLES") else max(1, count // SHARE)
