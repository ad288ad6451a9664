"""Conversion of untrusted image files to tiles of pixels.

Size and format are checked before a pixel is decoded. Pillow is imported with the first image.
Knows image files; knows nothing of models.

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
    """Limits for the images of a request.

    Attributes:
        max_bytes: largest file in bytes.
        max_pixels: largest image in pixels, as stated by the header.
        max_images: largest number of images of a request.
    """

    max_bytes: int = 20_000_000
    max_pixels: int = 50_000_000
    max_images: int = 8


def measure(data: bytes, limits: ImageLimits, field: str = "image") -> tuple[int, int]:
    """Height and width of an image file, from the header.

    Args:
        data: bytes of the file.
        limits: limits of the request.
        field: name of the request field for errors.

    Raises:
        InvalidRequest: not an image of a supported format, or too large.
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
    """Grid and tiles of an image file; pixels are float32 [I, C, S, S] in -1 .. 1.

    With several tiles, the last tile shows the whole image.

    Args:
        data: bytes of the file.
        tile: side of a tile in pixels.
        limits: limits of the request.
        field: name of the request field for errors.

    Raises:
        InvalidRequest: not an image of a supported format, too large, or damaged.
    """
    import torch  # imported late: a gateway only checks files
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

    transpose = Image.Transpose
    upright = {
        2: transpose.FLIP_LEFT_RIGHT,
        3: transpose.ROTATE_180,
        4: transpose.FLIP_TOP_BOTTOM,
        5: transpose.TRANSPOSE,
        6: transpose.ROTATE_270,
        7: transpose.TRANSVERSE,
        8: transpose.ROTATE_90,
    }
    opened = _open(data, limits, field)
    rotation = upright.get(_orientation(opened))
    try:
        image = opened.convert("RGB")
        return image if rotation is None else image.transpose(rotation)
    except (OSError, ValueError, SyntaxError, MemoryError) as error:
        raise InvalidRequest(
            field, f"`{field}` cannot be decoded: {error}; send an undamaged file"
        ) from None


def _orientation(opened: Image.Image) -> int:
    """EXIF orientation: 1 is upright; from 5 on, height and width are exchanged.

    Read only from JPEG and WebP: Pillow would decode the pixels of a PNG file for this field.
    """
    if opened.format == "PNG":
        return 1
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            orientation = opened.getexif().get(0x0112, 1)
    except Exception:  # Pillow raises many errors for broken EXIF data; the image may be good
        return 1
    return orientation if isinstance(orientation, int) and 1 <= orientation <= 8 else 1


def _open(data: bytes, limits: ImageLimits, field: str) -> Image.Image:
    """Read the header; refuse a file or image over the limits."""
    from PIL import Image, UnidentifiedImageError

    if len(data) > limits.max_bytes:
        raise InvalidRequest(
            field,
            f"`{field}` has {len(data)} bytes, but the limit is {limits.max_bytes}; send "
            "a smaller file",
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore"
            )  # Pillow warns about its own limits; `limits` decides here
            opened = Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError:
        raise InvalidRequest(
            field,
            f"`{field}` has more than {limits.max_pixels} pixels, the limit; scale the image down",
        ) from None
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError):
        raise InvalidRequest(
            field, f"`{field}` is not an image of a supported format; send JPEG, PNG or WebP"
        ) from None
    width, height = opened.size
    if width * height > limits.max_pixels or not width * height:
        raise InvalidRequest(
            field,
            f"`{field}` is {width} x {height} = {width * height} pixels, but 1 to "
            f"{limits.max_pixels} are accepted; scale the image down",
        )
    return opened
