"""Image files into tiles of pixels, whatever the file says.

Refuses by size and format before a pixel is decoded. Pillow is imported only where an image comes.

Shape legend: I tiles, C colours, S pixels of a tile's side.
"""

from __future__ import annotations

import io
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from arriero.shards.errors import InvalidRequest
from arriero.shards.images.layout import Grid, grid_of

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

FORMATS = ("JPEG", "PNG", "WEBP")


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageLimits:
    """What is taken.

    Attributes:
        max_bytes: of a file.
        max_pixels: of an image, by its header.
        max_images: of a request.
    """

    max_bytes: int = 20_000_000
    max_pixels: int = 50_000_000
    max_images: int = 8


def measure(data: bytes, limits: ImageLimits, field: str = "image") -> tuple[int, int]:
    """Height and width of an image file, from its header alone.

    Args:
        data: the file.
        limits: what is taken.
        field: what an error names.

    Raises:
        InvalidRequest: no image of a format that is read, or too large.
    """
    opened = _open(data, limits, field)
    width, height = opened.size
    return (width, height) if _orientation(opened) >= 5 else (height, width)


def check_decodes(data: bytes, limits: ImageLimits, field: str = "image") -> None:
    """Raise `InvalidRequest` unless an image file can be decoded to its last pixel."""
    _decoded(data, limits, field)


def tiles_of(
    data: bytes, tile: int, limits: ImageLimits, field: str = "image"
) -> tuple[Grid, Tensor]:
    """An image file as its grid, and its tiles' pixels, float32 [I, C, S, S] in -1 .. 1.

    The tile that shows the whole image comes last, where there are several.

    Args:
        data: the file.
        tile: pixels of a tile's side.
        limits: what is taken.
        field: what an error names.

    Raises:
        InvalidRequest: no image of a format that is read, too large, or broken.
    """
    import torch  # here, since a gateway only looks at files
    from PIL import Image

    image = _decoded(data, limits, field)
    grid = grid_of(image.height, image.width, tile)
    bilinear = Image.Resampling.BILINEAR
    canvas = np.zeros((grid.rows * tile, grid.columns * tile, 3), dtype=np.uint8)
    scaled = image.resize((grid.width, grid.height), bilinear)
    canvas[: grid.height, : grid.width] = np.asarray(scaled)
    cut = canvas.reshape(grid.rows, tile, grid.columns, tile, 3).transpose(0, 2, 4, 1, 3)
    tiles = [cut.reshape(-1, 3, tile, tile)]
    if grid.num_tiles > 1:
        whole = np.asarray(image.resize((tile, tile), bilinear))
        tiles.append(whole.transpose(2, 0, 1)[None])
    pixels = torch.from_numpy(np.concatenate(tiles)).float()
    return grid, pixels / 127.5 - 1.0


def _decoded(data: bytes, limits: ImageLimits, field: str) -> Image.Image:
    from PIL import Image

    turns = Image.Transpose
    upright = {
        2: turns.FLIP_LEFT_RIGHT,
        3: turns.ROTATE_180,
        4: turns.FLIP_TOP_BOTTOM,
        5: turns.TRANSPOSE,
        6: turns.ROTATE_270,
        7: turns.TRANSVERSE,
        8: turns.ROTATE_90,
    }
    opened = _open(data, limits, field)
    turn = upright.get(_orientation(opened))
    try:
        image = opened.convert("RGB")
        return image if turn is None else image.transpose(turn)
    except (OSError, ValueError, SyntaxError, MemoryError) as error:
        raise InvalidRequest(field, f"`{field}` cannot be decoded: {error}") from None


def _orientation(opened: Image.Image) -> int:
    """How a camera was held, as EXIF says it: 1 upright; from 5 on, height and width change places.

    Of JPEG and WebP alone: to tell it of a PNG file its pixels would be decoded.
    """
    if opened.format == "PNG":
        return 1
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = opened.getexif().get(0x0112, 1)
    except Exception:  # whatever a broken EXIF block makes Pillow raise; the image may be well
        return 1
    return found if isinstance(found, int) and 1 <= found <= 8 else 1


def _open(data: bytes, limits: ImageLimits, field: str) -> Image.Image:
    """Read the header; refuse what is too large to decode."""
    from PIL import Image, UnidentifiedImageError

    if len(data) > limits.max_bytes:
        raise InvalidRequest(
            field, f"`{field}` has {len(data)} bytes; at most {limits.max_bytes} are taken"
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of Pillow's own limits: ours are stricter or say so
            opened = Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError:
        raise InvalidRequest(
            field,
            f"`{field}` has more than the {limits.max_pixels} pixels that are taken; scale it down",
        ) from None
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError):
        raise InvalidRequest(
            field, f"`{field}` is no image that is read; send JPEG, PNG or WebP"
        ) from None
    width, height = opened.size
    if width * height > limits.max_pixels or not width * height:
        raise InvalidRequest(
            field,
            f"`{field}` is {width} x {height} = {width * height} pixels; 1 to {limits.max_pixels} "
            "are taken; scale it down",
        )
    return opened
