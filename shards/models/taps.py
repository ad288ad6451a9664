"""Activations that enter chosen layers of a model, kept during a step for a model that drafts.

A drafter on the last stage reads activations of layers on any stage, so kept activations travel
with the hidden states from stage to stage, as further columns. Knows layer numbers and tensors;
knows nothing of drafters, steps and collectives.

Shape legend: T tokens, H hidden size, W width of a row between stages.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from arriero.shards.layout.dense import Span


class Taps:
    """The kept activations of a rank. Tap k is residual + hidden as they enter layer k.

    A tap belongs to the stage with layer k; the number of layers of the model is also a tap, the
    output of the last layer. Without taps no method copies or allocates anything.
    """

    def __init__(self, layers: Sequence[int], stage: Span, *, last_stage: bool) -> None:
        """Prepare to keep the taps `layers`, global numbers in any order, without repetition.

        Args:
            layers: numbers of the taps, in the order of `kept`.
            stage: layers of this rank's stage.
            last_stage: whether the stage also has the tap after its last layer.
        """
        self.layers = tuple(layers)
        ascending = sorted(self.layers)
        self._before = [k for k in ascending if k < stage.start]
        stop = stage.stop + last_stage
        self._here = [k for k in ascending if stage.start <= k < stop]
        self._start = stage.start
        self._kept: dict[int, Tensor] = {}
        self._buffers: dict[int, Tensor] = {}

    def width(self, hidden_size: int) -> int:
        """Columns of a row that the stage receives: hidden states and the taps of stages before."""
        return hidden_size * (1 + len(self._before))

    def reserve(
        self, rows: int, hidden_size: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        """Keep taps in buffers at fixed addresses, as captured CUDA graphs require.

        Args:
            rows: most tokens of a step.
            hidden_size: columns of a tap.
            dtype: dtype of activations.
            device: device of activations.
        """
        self._buffers = {
            k: torch.empty(rows, hidden_size, dtype=dtype, device=device) for k in self._here
        }

    @property
    def hooks(self) -> dict[int, Callable[[Tensor], None]]:
        """For each tap of the stage: the layer's number in the stage, and what keeps its input."""
        return {k - self._start: self._keeper(k) for k in self._here}

    def receive(self, x_TW: Tensor) -> Tensor:
        """Keep the taps of received rows; gives the hidden states [T, H]."""
        if not self._before:
            return x_TW
        x_TH, *taps = x_TW.chunk(1 + len(self._before), dim=1)
        self._kept |= dict(zip(self._before, taps, strict=True))
        return x_TH.contiguous()

    def send(self, x_TH: Tensor) -> Tensor:
        """Rows for the next stage: hidden states, then all taps kept so far."""
        ready = [*self._before, *self._here]
        return torch.cat([x_TH, *(self._kept[k] for k in ready)], dim=1) if ready else x_TH

    def kept(self, rows: int) -> tuple[Tensor, ...]:
        """The taps of a step of `rows` tokens, each [T, H], in the caller's order; last stage."""
        return tuple(self._kept_rows(k, rows) for k in self.layers)

    def _kept_rows(self, k: int, rows: int) -> Tensor:
        # a replayed CUDA graph fills the buffer without a call of the hook
        kept = self._buffers.get(k)
        return (self._kept[k] if kept is None else kept)[:rows]

    def _keeper(self, k: int) -> Callable[[Tensor], None]:
        def keep(x_TH: Tensor) -> None:
            buffer = self._buffers.get(k)
            if buffer is None:
                self._kept[k] = x_TH.clone()  # layers add to x in place
            else:
                self._kept[k] = buffer[: len(x_TH)].copy_(x_TH)

        return keep
