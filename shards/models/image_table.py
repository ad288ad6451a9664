"""Image features of sequences, on the ranks of the first stage.

The features of an image are computed at the first step that reaches a placeholder of the image,
once for all sequences with the image, and cached by digest while there is space. Knows slots,
positions and rows; knows nothing of features (see `VisionTower`) and pixels (see
`arriero.shards.images`).

Shape legend: T tokens of a step, H hidden size, n features.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from arriero.shards.collectives.host_copy import to_device
from arriero.shards.images.decode import ImageLimits, tiles_of
from arriero.shards.protocol.step_plan import Int32, StepPlan

if TYPE_CHECKING:  # the tower's family uses this module
    from arriero.shards.models.llama4.vision import VisionTower

CACHE_BYTES = 256 << 20
"""Limit in bytes of the feature cache."""
_NO_LIMITS = ImageLimits(max_bytes=1 << 40, max_pixels=1 << 40)  # the gateway checks sizes


@dataclass(slots=True)
class _SequenceImages:
    """Images of a sequence.

    Attributes:
        images: bytes of the files.
        starts: first feature of each image; at the end the number of all features.
        positions: positions of the placeholders, in ascending order.
        digests: digest of each file.
    """

    images: tuple[bytes, ...]
    starts: Int32
    positions: Int32
    digests: list[bytes] = field(default_factory=list)


class ImageTable:
    """The images of the sequences in slots.

    Args:
        tower: computes features.
    """

    def __init__(self, tower: VisionTower) -> None:
        self._tower = tower
        self._slots: dict[int, _SequenceImages] = {}
        self._features: OrderedDict[bytes, Tensor] = OrderedDict()

    @property
    def nbytes(self) -> int:
        """Bytes of the vision tower's weights."""
        return self._tower.nbytes

    def apply(self, plan: StepPlan) -> None:
        """Apply the freed slots and new sequences of a step plan."""
        for slot in plan.freed.tolist():
            self._slots.pop(slot, None)
        for new in plan.new:
            self._slots.pop(new.slot, None)
            if new.images:
                starts = np.concatenate(([0], np.cumsum(new.image_sizes))).astype(np.int32)
                digests = [hashlib.blake2b(data, digest_size=16).digest() for data in new.images]
                self._slots[new.slot] = _SequenceImages(
                    new.images, starts, new.image_positions, digests
                )

    def fill(self, plan: StepPlan, x_TH: Tensor) -> None:
        """Write features into the rows of the step's placeholders, in place."""
        if not self._slots:
            return
        row = 0
        for slot, start, count in zip(
            plan.slots.tolist(), plan.starts.tolist(), plan.counts.tolist(), strict=True
        ):
            sequence = self._slots.get(slot)
            if sequence is not None:
                self._fill_sequence(sequence, x_TH[row : row + count], start)
            row += count

    def _fill_sequence(self, sequence: _SequenceImages, x_TH: Tensor, start: int) -> None:
        first, last = np.searchsorted(sequence.positions, (start, start + len(x_TH)))
        for image, (begin, end) in enumerate(
            zip(sequence.starts[:-1], sequence.starts[1:], strict=True)
        ):
            a, b = max(first, begin), min(last, end)
            if a >= b:
                continue
            features_nH = self._features_of(sequence.digests[image], sequence.images[image])
            rows = to_device(sequence.positions[a:b].astype(np.int64) - start, x_TH.device)
            x_TH[rows] = features_nH[a - begin : b - begin].to(x_TH.dtype)

    def _features_of(self, digest: bytes, data: bytes) -> Tensor:
        """Features of an image, [n, H]."""
        features_nH = self._features.get(digest)
        if features_nH is None:
            _, tiles = tiles_of(data, self._tower.config.image_size, _NO_LIMITS)
            features_nH = self._tower(tiles).flatten(0, 1)
            self._features[digest] = features_nH
            cached_bytes = sum(features.nbytes for features in self._features.values())
            while cached_bytes > CACHE_BYTES and len(self._features) > 1:
                cached_bytes -= self._features.popitem(last=False)[1].nbytes
        self._features.move_to_end(digest)
        return features_nH
