"""Features of the images that sequences carry, on the ranks that embed.

An image is computed when a step first comes to one of its placeholders, once however many
sequences carry it, and kept by its digest while there is room. Knows slots, positions and rows;
what turns pixels into features is a `VisionTower`, and files into pixels `arriero.shards.images`.

Shape legend: T tokens of a step, H hidden size, n features.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from arriero.shards.images.decode import ImageLimits, tiles_of
from arriero.shards.models.llama4_vision import VisionTower
from arriero.shards.protocol.step_plan import Int32, StepPlan

CACHE_BYTES = 256 << 20
"""Features kept of images that no step needs right now."""
_ANY_SIZE = ImageLimits(max_bytes=1 << 40, max_pixels=1 << 40)  # the front door has refused by size


@dataclass(slots=True)
class _Carried:
    """Images of a sequence.

    Attributes:
        images: the files.
        starts: feature at which each begins, and the count of all.
        positions: of the placeholders, rising.
    """

    images: tuple[bytes, ...]
    starts: Int32
    positions: Int32
    digests: list[bytes] = field(default_factory=list)


class ImageTable:
    """The images of the sequences in slots.

    Args:
        tower: makes the features.
    """

    def __init__(self, tower: VisionTower) -> None:
        self._tower = tower
        self._slots: dict[int, _Carried] = {}
        self._features: OrderedDict[bytes, Tensor] = OrderedDict()

    @property
    def nbytes(self) -> int:
        """Bytes of the tower's weights."""
        return self._tower.nbytes

    def apply(self, plan: StepPlan) -> None:
        """Take in the plan's freed slots and new sequences."""
        for slot in plan.freed.tolist():
            self._slots.pop(slot, None)
        for new in plan.new:
            self._slots.pop(new.slot, None)
            if new.images:
                starts = np.concatenate(([0], np.cumsum(new.image_sizes))).astype(np.int32)
                digests = [hashlib.blake2b(one, digest_size=16).digest() for one in new.images]
                self._slots[new.slot] = _Carried(new.images, starts, new.image_positions, digests)

    def fill(self, plan: StepPlan, x_TH: Tensor) -> None:
        """Put features where the step's placeholders are, in place."""
        if not self._slots:
            return
        row = 0
        for slot, start, count in zip(
            plan.slots.tolist(), plan.starts.tolist(), plan.counts.tolist(), strict=True
        ):
            carried = self._slots.get(slot)
            if carried is not None:
                self._fill_one(carried, x_TH[row : row + count], start)
            row += count

    def _fill_one(self, carried: _Carried, x_TH: Tensor, start: int) -> None:
        first, last = np.searchsorted(carried.positions, (start, start + len(x_TH)))
        for image, (begin, end) in enumerate(
            zip(carried.starts[:-1], carried.starts[1:], strict=True)
        ):
            a, b = max(first, begin), min(last, end)
            if a >= b:
                continue
            features_nH = self._of(carried.digests[image], carried.images[image])
            rows = torch.from_numpy(carried.positions[a:b] - start).long().to(x_TH.device)
            x_TH[rows] = features_nH[a - begin : b - begin].to(x_TH.dtype)

    def _of(self, digest: bytes, data: bytes) -> Tensor:
        """Features of an image, [n, H]."""
        found = self._features.get(digest)
        if found is None:
            _, tiles = tiles_of(data, self._tower.config.image_size, _ANY_SIZE)
            found = self._tower(tiles).flatten(0, 1)
            self._features[digest] = found
            held = sum(one.nbytes for one in self._features.values())
            while held > CACHE_BYTES and len(self._features) > 1:
                held -= self._features.popitem(last=False)[1].nbytes
        self._features.move_to_end(digest)
        return found
