"""Image files: what is taken, what is refused before a pixel is decoded."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from arriero.shards.errors import InvalidRequest
from arriero.shards.images.decode import ImageLimits, measure, tiles_of

LIMITS = ImageLimits(max_bytes=2_000_000, max_pixels=4_000_000)


def encoded(width: int, height: int, kind: str, mode: str = "RGB") -> bytes:
    rng = np.random.default_rng(0)
    shape = (height, width) if mode == "L" else (height, width, len(mode))
    image = Image.fromarray(rng.integers(0, 255, shape, dtype=np.uint8), mode)
    out = io.BytesIO()
    image.save(out, kind)
    return out.getvalue()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_formats(kind: str) -> None:
    data = encoded(70, 50, kind)
    assert measure(data, LIMITS) == (50, 70)
    grid, tiles = tiles_of(data, 32, LIMITS)
    assert tiles.shape == (grid.num_tiles, 3, 32, 32) and tiles.dtype == torch.float32
    assert -1 <= tiles.min() < tiles.max() <= 1


@pytest.mark.parametrize("mode", ["L", "RGBA"])
def test_other_modes_become_rgb(mode: str) -> None:
    _, tiles = tiles_of(encoded(32, 32, "PNG", mode), 32, LIMITS)
    assert tiles.shape == (1, 3, 32, 32)


def test_pixels_lie_where_they_should() -> None:
    """Tiles are cut row by row; what the image does not cover is black."""
    array = np.zeros((64, 96, 3), dtype=np.uint8)
    for row in range(2):
        for column in range(3):
            array[row * 32 : row * 32 + 32, column * 32 : column * 32 + 32] = 40 * (
                row * 3 + column
            )
    out = io.BytesIO()
    Image.fromarray(array).save(out, "PNG")
    grid, tiles = tiles_of(out.getvalue(), 32, LIMITS)
    assert (grid.rows, grid.columns, grid.num_tiles) == (2, 3, 7)
    for i in range(6):
        assert torch.allclose(tiles[i], torch.tensor(40 * i / 127.5 - 1.0))
    _, wide = tiles_of(encoded(64, 20, "PNG"), 32, LIMITS)
    assert bool((wide[0][:, 20:] == -1).all()) and not bool((wide[0][:, :20] == -1).all())


def bomb(width: int, height: int) -> bytes:
    """A PNG whose header claims so many pixels, with almost no data."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = zlib.compress(b"\0" * 1000)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
    )


def test_refusals() -> None:
    gif = io.BytesIO()
    Image.new("RGB", (4, 4)).save(gif, "GIF")
    for data, words in (
        (b"", "not an image of a supported format"),
        (b"not an image", "JPEG, PNG or WebP"),
        (gif.getvalue(), "not an image of a supported format"),
        (bomb(100_000, 100_000), "scale the image down"),
        (bomb(2001, 2000), "4002000 pixels"),
        (b"x" * 2_000_001, "2000001 bytes"),
    ):
        for read in (measure, lambda one, limits: tiles_of(one, 32, limits)):
            with pytest.raises(InvalidRequest, match=words):
                read(data, LIMITS)
    assert measure(bomb(100, 100), LIMITS) == (100, 100)
    with pytest.raises(InvalidRequest, match="cannot be decoded"):
        tiles_of(bomb(100, 100), 32, LIMITS)
    whole = encoded(200, 200, "JPEG")
    with pytest.raises(InvalidRequest, match="cannot be decoded"):
        tiles_of(whole[: len(whole) // 2], 32, LIMITS)


@pytest.mark.parametrize("held", range(1, 9))
def test_photographs_stand_upright(held: int) -> None:
    """As Pillow turns them by what EXIF says; a broken block leaves them as they are."""
    image = Image.open(io.BytesIO(encoded(64, 32, "PNG")))
    exif = Image.Exif()
    exif[0x0112] = held
    out, plain = io.BytesIO(), io.BytesIO()
    image.save(out, "WEBP", exif=exif, lossless=True)
    ImageOps.exif_transpose(Image.open(io.BytesIO(out.getvalue()))).save(plain, "PNG")
    turned = Image.open(plain)
    assert measure(out.getvalue(), LIMITS) == (turned.height, turned.width)
    assert torch.equal(
        tiles_of(out.getvalue(), 32, LIMITS)[1], tiles_of(plain.getvalue(), 32, LIMITS)[1]
    )
    broken = io.BytesIO()
    image.save(broken, "WEBP", exif=b"Exif\x00\x00II*\x00\xff\xff\xff\xff", lossless=True)
    assert measure(broken.getvalue(), LIMITS) == (32, 64)
