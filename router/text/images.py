"""The images of a request: reads and checks the files, and gives their tokens in the prompt.

All refusals happen here: first by count, source and header, so that no large file is decoded; then
by decoding, off the event loop and a single file at a time, so that a broken file never reaches a
slice. Knows files and layouts; knows nothing of conversations or of the computation of features.
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
"""Largest number of remembered digests of images that decode; the latest stay."""


@dataclass(frozen=True, slots=True)
class GivenImage:
    """An image file, and the field of the request with the file."""

    field: str
    data: bytes


@dataclass(frozen=True, slots=True)
class PromptImage:
    """An image for the engine, and its tokens in the prompt."""

    image: RequestImage
    tokens: list[int]


def read_image(field: str, image: pb.Image) -> GivenImage:
    """The image file of a client.

    Raises:
        InvalidRequest: the field has no file, or has a URL other than a data URL.
    """
    if image.WhichOneof("source") == "url":
        return GivenImage(field, _from_url(f"{field}.url", image.url))
    if not image.data:
        raise InvalidRequest(field, f"`{field}` has no file; give `data` or a data URL")
    return GivenImage(field, image.data)


class ImageReader:
    """Checks the images of a model's requests and lays out their tokens.

    Args:
        card: gives the size of the model's image tiles; 0 for a model that reads no images.
        control_ids: ids of the tokenizer's special tokens, by text.
        limits: limits of files and of their number.
    """

    def __init__(
        self, card: ModelCard, control_ids: Mapping[str, int], limits: ImageLimits | None = None
    ) -> None:
        self._model = card.model
        self._tile, self._features = card.image_tile, card.image_features
        self._limits = limits or ImageLimits()
        missing = [text for text in TOKEN_TEXTS.values() if text not in control_ids]
        self._missing_tokens = ", ".join(missing)
        self._ids: ImageTokens | None = None
        if self._tile and not missing:
            self._ids = ImageTokens(**{name: control_ids[t] for name, t in TOKEN_TEXTS.items()})
        self._decodes: OrderedDict[bytes, None] = OrderedDict()  # digests of checked images
        self._decode_lock = asyncio.Lock()

    @property
    def image_token(self) -> int | None:
        """Id of a template's token for an image; None for a model that reads no images."""
        return None if self._ids is None else self._ids.image

    async def lay_out(self, images: Sequence[GivenImage]) -> list[PromptImage]:
        """Check images and lay out their tokens, in order.

        Raises:
            InvalidRequest: the model reads no images, the request has too many, or an image file is
                broken, too large or of another format.
        """
        if not images:
            return []
        ids = self._ids
        if ids is None:
            why = "reads no images"
            if self._tile:
                why = f"lacks the tokens {self._missing_tokens} for images"
            raise InvalidRequest(images[0].field, f"model {self._model!r} {why}; send text alone")
        if len(images) > self._limits.max_images:
            raise InvalidRequest(
                images[self._limits.max_images].field,
                f"the request has {len(images)} images; send at most {self._limits.max_images}",
            )
        sizes = [measure(image.data, self._limits, image.field) for image in images]
        prompt_images = []
        for given, (height, width) in zip(images, sizes, strict=True):
            grid = grid_of(height, width, self._tile)
            image = RequestImage(data=given.data, num_features=grid.num_tiles * self._features)
            await self._check(given, image.digest)
            prompt_images.append(PromptImage(image, image_tokens(grid, self._features, ids)))
        return prompt_images

    async def _check(self, given: GivenImage, digest: bytes) -> None:
        async with self._decode_lock:
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
            f"`{field}` begins with {scheme[:16]!r}; images are not fetched from URLs: send the "
            "file itself, as data:image/…;base64,…",
        )
    head, comma, body = rest.partition(",")
    if not comma or not head.lower().endswith(";base64"):
        raise InvalidRequest(field, f"`{field}` must have the form data:image/…;base64,…")
    try:
        return base64.b64decode(body, validate=True)
    except (binascii.Error, ValueError) as error:
        raise InvalidRequest(
            field, f"`{field}` is not base64: {error}; encode the file anew"
        ) from None
