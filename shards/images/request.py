"""An image as a request carries it: the file, its name, and the placeholders it takes.

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
    """One image of a request.

    Attributes:
        data: the file, checked to be one that is read.
        num_features: placeholders that stand for it in the prompt.
    """

    data: bytes
    num_features: int

    @cached_property
    def digest(self) -> bytes:
        """Names the image: BLAKE2b-128 of the file."""
        return hashlib.blake2b(self.data, digest_size=16).digest()


def placeholders(prompt: Sequence[int], image_token: int) -> npt.NDArray[np.int32]:
    """Positions of the tokens that features replace, rising."""
    return np.flatnonzero(np.asarray(prompt) == image_token).astype(np.int32)


def check_images(
    prompt: Sequence[int], images: Sequence[RequestImage], image_token: int | None, most: int
) -> None:
    """Raise `InvalidRequest` unless prompt and images fit each other and the model."""
    if not images:
        return
    if image_token is None:
        raise InvalidRequest("images", "this model reads no images; send text alone")
    if len(images) > most:
        raise InvalidRequest("images", f"{len(images)} images; at most {most} are taken")
    due, held = sum(one.num_features for one in images), len(placeholders(prompt, image_token))
    if due != held:
        raise InvalidRequest(
            "images", f"the images have {due} features, but the prompt {held} places for them"
        )


def key_tokens(
    prompt: Sequence[int], images: Sequence[RequestImage], image_token: int
) -> npt.NDArray[np.int32]:
    """The prompt as block keys see it: each placeholder is a number drawn from its image's digest.

    So equal prompts with unequal images have unequal keys from the first placeholder on.
    """
    found = np.asarray(prompt, dtype=np.int32).copy()
    words = [
        np.frombuffer(hashlib.shake_128(one.digest).digest(4 * one.num_features), dtype="<i4")
        for one in images
    ]
    found[placeholders(prompt, image_token)] = np.concatenate(words)
    return found
