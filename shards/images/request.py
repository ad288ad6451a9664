"""An image of a request: file, digest and number of placeholders.

Knows bytes and counts; knows nothing of pixels.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from arriero.shards.errors import InvalidRequest


@dataclass(frozen=True, kw_only=True)
class RequestImage:
    """An image of a request.

    Attributes:
        data: bytes of the file; already checked.
        num_features: number of placeholders in the prompt.
    """

    data: bytes
    num_features: int

    @cached_property
    def digest(self) -> bytes:
        """Identifier of the image: BLAKE2b-128 of the file."""
        return hashlib.blake2b(self.data, digest_size=16).digest()


def placeholders(prompt: Sequence[int], image_token: int) -> npt.NDArray[np.int32]:
    """Positions of the placeholders, in ascending order."""
    return np.flatnonzero(np.asarray(prompt) == image_token).astype(np.int32)


def check_images(
    prompt: Sequence[int], images: Sequence[RequestImage], image_token: int | None, max_images: int
) -> None:
    """Raise `InvalidRequest` unless the images match the prompt and the model."""
    if not images:
        return
    if image_token is None:
        raise InvalidRequest("images", "this model reads no images; send only text")
    if len(images) > max_images:
        raise InvalidRequest(
            "images", f"{len(images)} images, but at most {max_images} are accepted"
        )
    num_features = sum(image.num_features for image in images)
    num_placeholders = len(placeholders(prompt, image_token))
    if num_features != num_placeholders:
        raise InvalidRequest(
            "images",
            f"the images have {num_features} features, but the prompt has {num_placeholders} "
            "placeholders; send a placeholder for each feature",
        )


def key_tokens(
    prompt: Sequence[int], images: Sequence[RequestImage], image_token: int
) -> npt.NDArray[np.int32]:
    """The prompt for block keys: each placeholder becomes a number from the image's digest.

    Equal prompts with different images then have different keys from the first placeholder on.
    """
    tokens = np.asarray(prompt, dtype=np.int32).copy()
    words = [
        np.frombuffer(hashlib.shake_128(image.digest).digest(4 * image.num_features), dtype="<i4")
        for image in images
    ]
    tokens[placeholders(prompt, image_token)] = np.concatenate(words)
    return tokens
