"""A request's images: files out of what clients send, checked, and the tokens that stand for them.

Every refusal is made here: first by count, source and header, so that nothing large is decoded;
then by decoding, off the event loop and one at a time, so that a broken file never reaches a slice.
Knows files and layouts; knows nothing of conversations or of how features are computed.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from arriero.router.proto.arriero.v1 import inference_pb2 as pb
from arriero.router.text.model_card import ModelCard
from arriero.shards.errors import InvalidRequest
from arriero.shards.images.decode import ImageLimits, check_decodes, measure
from arriero.shards.images.layout import TOKEN_TEXTS, ImageTokens, grid_of, image_tokens
from arriero.shards.images.request import RequestImage

MAX_CHECKED = 256
"""Digests of images kept that were found to decode, the last used."""


@dataclass(frozen=True, slots=True)
class GivenImage:
    """A file, and the field it came in."""

    field: str
    data: bytes


@dataclass(frozen=True, slots=True)
class LaidImage:
    """An image as the engine takes it, and its tokens in the prompt."""

    image: RequestImage
    tokens: list[int]


def read_image(field: str, image: pb.Image) -> GivenImage:
    """The file that a client sent.

    Raises:
        InvalidRequest: there is none, or it is a URL that is not one of data.
    """
    if image.WhichOneof("source") == "url":
        return GivenImage(field, _from_url(f"{field}.url", image.url))
    if not image.data:
        raise InvalidRequest(field, f"`{field}` holds no file; give `data` or a data URL")
    return GivenImage(field, image.data)


class ImageReader:
    """Lays out the images of one model's requests.

    Args:
        card: says how the model cuts images, if it reads them.
        control_ids: the tokenizer's special tokens.
        limits: what is taken.
    """

    def __init__(
        self, card: ModelCard, control_ids: Mapping[str, int], limits: ImageLimits | None = None
    ) -> None:
        self._model = card.model
        self._tile, self._features = card.image_tile, card.image_features
        self._limits = limits or ImageLimits()
        missing = [text for text in TOKEN_TEXTS.values() if text not in control_ids]
        self._lacks = ", ".join(missing)
        self._ids: ImageTokens | None = None
        if self._tile and not missing:
            self._ids = ImageTokens(**{name: control_ids[t] for name, t in TOKEN_TEXTS.items()})
        self._decodes: OrderedDict[bytes, None] = OrderedDict()
        self._one_at_a_time = asyncio.Lock()

    @property
    def place(self) -> int | None:
        """The token that a template leaves for an image; None where none is read."""
        return None if self._ids is None else self._ids.image

    async def lay(self, given: Sequence[GivenImage]) -> list[LaidImage]:
        """Check and lay out images, in order.

        Raises:
            InvalidRequest: the model reads none, there are too many, or one is not what is taken.
        """
        if not given:
            return []
        ids = self._ids
        if ids is None:
            why = "reads no images" if not self._tile else f"has no tokens {self._lacks} for images"
            raise InvalidRequest(given[0].field, f"model {self._model!r} {why}; send text alone")
        if len(given) > self._limits.max_images:
            raise InvalidRequest(
                given[self._limits.max_images].field,
                f"the request has {len(given)} images; at most {self._limits.max_images} are taken",
            )
        sizes = [measure(one.data, self._limits, one.field) for one in given]
        laid = []
        for one, (height, width) in zip(given, sizes, strict=True):
            grid = grid_of(height, width, self._tile)
            image = RequestImage(data=one.data, num_features=grid.num_tiles * self._features)
            await self._check(one, image.digest)
            laid.append(LaidImage(image, image_tokens(grid, self._features, ids)))
        return laid

    async def _check(self, given: GivenImage, digest: bytes) -> None:
        async with self._one_at_a_time:
            if digest not in self._decodes:
                await asyncio.to_thread(check_decodes, given.data, self._limits, given.field)
            self._decodes[digest] = None
            self._decodes.move_to_end(digest)
            if len(self._decodes) > MAX_CHECKED:
                self._decodes.popitem(last=False)


def _from_url(field: str, url: str) -> bytes:
    scheme, _, rest = url.partition(":")
    if scheme.lower() != "data":
        raise InvalidRequest(
            field,
            f"`{field}` begins with {scheme[:16]!r}; images are not fetched: send the file itself, "
            "as data:image/…;base64,…",
        )
    head, comma, body = rest.partition(",")
    if not comma or not head.lower().endswith(";base64"):
        raise InvalidRequest(field, f"`{field}` must be of the form data:image/…;base64,…")
    try:
        return base64.b64decode(body, validate=True)
    except (binascii.Error, ValueError) as error:
        raise InvalidRequest(field, f"`{field}` is not base64: {error}") from None
