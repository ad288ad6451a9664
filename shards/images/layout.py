"""How an image of some size is cut into tiles, and which tokens stand for it. Pure arithmetic.

Meta's rule for Llama 4: of all grids of at most sixteen square tiles, the one that enlarges the
image least, else the one that shrinks it least; of equal ones the smallest. Where there are several
tiles, the whole image comes once more, on a tile of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

MAX_TILES = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageTokens:
    """Token ids that an image is made of; read from the tokenizer by their texts.

    Attributes:
        start, end: around an image.
        patch: stands for one feature; the only ones that features replace.
        image: before the tile that shows the whole.
        column, row: between the tiles of a row, and after each row.
    """

    start: int
    end: int
    patch: int
    image: int
    column: int
    row: int


TOKEN_TEXTS = {
    "start": "<|image_start|>",
    "end": "<|image_end|>",
    "patch": "<|patch|>",
    "image": "<|image|>",
    "column": "<|tile_x_separator|>",
    "row": "<|tile_y_separator|>",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Grid:
    """Tiles of an image.

    Attributes:
        rows, columns: of tiles.
        height, width: pixels of the scaled image, which lies at the grid's top left.
    """

    rows: int
    columns: int
    height: int
    width: int

    @property
    def num_tiles(self) -> int:
        """Tiles that are computed, the whole image's among them."""
        cut = self.rows * self.columns
        return cut + 1 if cut > 1 else 1


def grid_of(height: int, width: int, tile: int, most: int = MAX_TILES) -> Grid:
    """The grid for an image of so many pixels.

    Args:
        height: of the image.
        width: of the image.
        tile: pixels of a tile's side.
        most: tiles of a grid.
    """
    shapes = [(r, c) for r in range(1, most + 1) for c in range(1, most // r + 1)]

    def scale(shape: tuple[int, int]) -> Fraction:
        return min(Fraction(shape[0] * tile, height), Fraction(shape[1] * tile, width))

    enlarging = [one for one in map(scale, shapes) if one >= 1]
    best = min(enlarging) if enlarging else max(map(scale, shapes))
    rows, columns = min(
        (one for one in shapes if scale(one) == best), key=lambda one: (one[0] * one[1], one)
    )
    # a small image is enlarged to one tile at most, not to the whole grid
    high = min(max(height, tile), rows * tile)
    wide = min(max(width, tile), columns * tile)
    if Fraction(wide, width) < Fraction(high, height):
        high = max(1, min(height * wide // width, high))
    else:
        wide = max(1, min(width * high // height, wide))
    return Grid(rows=rows, columns=columns, height=high, width=wide)


def image_tokens(grid: Grid, features_per_tile: int, ids: ImageTokens) -> list[int]:
    """Tokens that stand for an image, in order."""
    patches = [ids.patch] * features_per_tile
    found = [ids.start]
    if grid.num_tiles > 1:
        for _ in range(grid.rows):
            for column in range(grid.columns):
                found += [*patches, ids.column] if column < grid.columns - 1 else patches
            found.append(ids.row)
    return [*found, ids.image, *patches, ids.end]
