"""Tiles and tokens of images: published totals, and against the definition."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from arriero.shards.images.layout import ImageTokens, grid_of, image_tokens

IDS = ImageTokens(start=200080, end=200081, patch=200092, image=200090, column=200084, row=200085)


@pytest.mark.parametrize(
    ("height", "width", "grid", "total"),
    [
        (336, 336, (1, 1), 147),
        (337, 337, (2, 2), 727),
        (500, 700, (2, 3), 1017),
        (5000, 5000, (4, 4), 2467),
    ],
)
def test_totals(height: int, width: int, grid: tuple[int, int], total: int) -> None:
    found = grid_of(height, width, 336)
    assert (found.rows, found.columns) == grid
    assert len(image_tokens(found, 144, IDS)) == total


def test_layout() -> None:
    tokens = image_tokens(grid_of(336, 600, 336), 2, IDS)
    p, x, y = IDS.patch, IDS.column, IDS.row
    assert tokens == [IDS.start, p, p, x, p, p, y, IDS.image, p, p, IDS.end]
    assert image_tokens(grid_of(10, 10, 336), 2, IDS) == [IDS.start, IDS.image, p, p, IDS.end]


@given(st.integers(1, 9000), st.integers(1, 9000))
def test_any_size(height: int, width: int) -> None:
    grid = grid_of(height, width, 336)
    assert 1 <= grid.rows * grid.columns <= 16
    assert 1 <= grid.height <= grid.rows * 336 and 1 <= grid.width <= grid.columns * 336
    counts = Counter(image_tokens(grid, 144, IDS))
    assert counts[IDS.patch] == 144 * grid.num_tiles
    assert counts[IDS.image] == counts[IDS.start] == counts[IDS.end] == 1
