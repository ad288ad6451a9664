"""The tile grid of an image, and the tokens for an image. Pure arithmetic.

Meta's rule for Llama 4: of all grids of at most sixteen square tiles, choose the grid that enlarges
the image least; if none enlarges it, the grid that shrinks the image least; of equal grids the
smallest. With several tiles, an additional tile shows the whole image.
Knows sizes and token ids; knows nothing of files and pixels.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

MAX_TILES = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageTokens:
    """Token ids of image tokens, found in the tokenizer by text.

    Attributes:
        start, end: first and last token of an image.
        patch: placeholder that an image feature replaces.
        image: token before the tile that shows the whole image.
        column, row: token between the tiles of a row, and token after each row.
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
    """Tile grid of an image.

    Attributes:
        rows, columns: number of tiles in each direction.
        height, width: pixels of the scaled image, which is at the top left of the grid.
    """

    rows: int
    columns: int
    height: int
    width: int

    @property
    def num_tiles(self) -> int:
        """Number of computed tiles, including the tile of the whole image."""
        cut = self.rows * self.columns
        return cut + 1 if cut > 1 else 1


def grid_of(height: int, width: int, tile: int, max_tiles: int = MAX_TILES) -> Grid:
    """The grid for an image.

    Args:
        height: height of the image in pixels.
        width: width of the image in pixels.
        tile: side of a tile in pixels.
        max_tiles: largest number of tiles of a grid.
    """
    shapes = [(r, c) for r in range(1, max_tiles + 1) for c in range(1, max_tiles // r + 1)]

    def scale(shape: tuple[int, int]) -> Fraction:
        return min(Fraction(shape[0] * tile, height), Fraction(shape[1] * tile, width))

    enlarging = [factor for factor in map(scale, shapes) if factor >= 1]
    best = min(enlarging) if enlarging else max(map(scale, shapes))
    rows, columns = min(
        (shape for shape in shapes if scale(shape) == best),
        key=lambda shape: (shape[0] * shape[1], shape),
    )
    # a small image is enlarged to a single tile at most, not to the whole grid
    high = min(max(height, tile), rows * tile)
    wide = min(max(width, tile), columns * tile)
    if Fraction(wide, width) < Fraction(high, height):
        high = max(1, min(height * wide // width, high))
    else:
        wide = max(1, min(width * high // height, wide))
    return Grid(rows=rows, columns=columns, height=high, width=wide)


def image_tokens(grid: Grid, features_per_tile: int, ids: ImageTokens) -> list[int]:
    """The tokens of an image, in order."""
    patches = [ids.patch] * features_per_tile
    tokens = [ids.start]
    if grid.num_tiles > 1:
        for _ in range(grid.rows):
            for column in range(grid.columns):
                tokens += [*patches, ids.column] if column < grid.columns - 1 else patches
            tokens.append(ids.row)
    return [*tokens, ids.image, *patches, ids.end]
