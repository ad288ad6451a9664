"""The networks that can draft: a smaller model, and an EAGLE-3 head.

Each computes rows at positions of the target's sequences and gives logits of the next token. Knows
which token and which activations belong to a row; knows nothing of steps and of drawing.

Shape legend: T tokens, H hidden size of the network, R rows that need logits, V vocabulary of the
network.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from arriero.kernels.flat_batch import FlatBatch
from arriero.shards.collectives.mesh import Mesh
from arriero.shards.models.eagle3.slice import Eagle3Slice
from arriero.shards.models.model_slice import ModelSlice


class DraftNetwork(Protocol):
    """A network that drafts. All ranks of the tensor-parallel group call each method together.

    Attributes:
        shift: the row at position t has the token at position t + `shift`, and predicts the token
            after that.
        reads_target: rows need a feature of the target's activations at their position; the rows
            of a chain of drafts take the output of the row before.
        taps: activations of the target that `features` needs.
        token_ids_V: int32, the target's id of each token of the network, rising; None where both
            have the same tokens.
    """

    shift: int
    reads_target: bool
    taps: tuple[int, ...]
    token_ids_V: Tensor | None

    @property
    def weights_nbytes(self) -> int:
        """Bytes of weights on this rank."""

    @property
    def kv_nbytes(self) -> int:
        """Bytes of the KV cache on this rank."""

    def features(self, taps: Sequence[Tensor]) -> Tensor:
        """Features [T, H] of rows from their taps."""

    def forward(self, tokens_T: Tensor, features_TH: Tensor | None, batch: FlatBatch) -> Tensor:
        """Outputs [T, H] of rows; writes their keys and values."""

    def next_features(self, y_RH: Tensor) -> Tensor | None:
        """Features of the rows that follow rows with outputs y in a chain of drafts."""

    def logits(self, y_RH: Tensor) -> Tensor | None:
        """Logits float32 [R, V] of the whole vocabulary on tp rank 0; None on other ranks."""


class ModelNetwork:
    """A smaller model of the same vocabulary."""

    shift, reads_target = 0, False
    taps: tuple[int, ...] = ()
    token_ids_V: Tensor | None = None

    def __init__(self, model: ModelSlice, mesh: Mesh, vocab_sizes: list[int]) -> None:
        """Wrap a loaded slice; `vocab_sizes` are the rows of the head on each tp rank."""
        self._model, self._mesh, self._sizes = model, mesh, vocab_sizes
        on_cpu = mesh.device.type == "cpu"
        self._dtype = torch.float32 if on_cpu else model.dtype

    @property
    def weights_nbytes(self) -> int:
        """Bytes of weights on this rank."""
        return self._model.weights_nbytes

    @property
    def kv_nbytes(self) -> int:
        """Bytes of the KV cache on this rank."""
        return self._model.kv_nbytes

    def features(self, taps: Sequence[Tensor]) -> Tensor:
        """Never called: the model reads tokens alone."""
        raise NotImplementedError("a draft model reads no activations")

    def forward(self, tokens_T: Tensor, features_TH: Tensor | None, batch: FlatBatch) -> Tensor:
        """Outputs [T, H] of the last layer."""
        return self._model.decoder(self._model.embed(tokens_T).to(self._dtype), batch)

    def next_features(self, y_RH: Tensor) -> Tensor | None:
        """None: the model reads tokens alone."""
        return None

    def logits(self, y_RH: Tensor) -> Tensor | None:
        """Logits on tp rank 0."""
        return self._mesh.gather_logits(self._model.logits(y_RH), self._sizes)


class Eagle3Network:
    """An EAGLE-3 head."""

    shift, reads_target = 1, True
    token_ids_V: Tensor | None

    def __init__(
        self,
        head: Eagle3Slice,
        mesh: Mesh,
        vocab_sizes: list[int],
        taps: tuple[int, ...],
        *,
        extra_nbytes: int = 0,
    ) -> None:
        """Wrap a loaded head.

        Args:
            head: the head.
            mesh: ranks of the group.
            vocab_sizes: rows of the head's `lm_head` on each tp rank.
            taps: layers of the target, for each tap of the head.
            extra_nbytes: bytes of a table of the target that was loaded for the head alone.
        """
        self._extra_nbytes = extra_nbytes
        self._head, self._mesh, self._sizes, self.taps = head, mesh, vocab_sizes, taps
        self.token_ids_V = head.targets.to(mesh.device)

    @property
    def weights_nbytes(self) -> int:
        """Bytes of weights on this rank, without tables that the target's slice holds."""
        return self._head.weights_nbytes + self._extra_nbytes

    @property
    def kv_nbytes(self) -> int:
        """Bytes of the KV cache on this rank."""
        return self._head.kv_nbytes

    def features(self, taps: Sequence[Tensor]) -> Tensor:
        """Features [T, H] of rows from their taps."""
        return self._head.fuse(taps)

    def forward(self, tokens_T: Tensor, features_TH: Tensor | None, batch: FlatBatch) -> Tensor:
        """Outputs [T, H] before the norm."""
        assert features_TH is not None, "a head reads features"
        return self._head.forward(tokens_T, features_TH, batch)

    def next_features(self, y_RH: Tensor) -> Tensor | None:
        """The outputs, normed where the head wants it."""
        return self._head.next_feature(y_RH)

    def logits(self, y_RH: Tensor) -> Tensor | None:
        """Logits of the draft vocabulary on tp rank 0."""
        logits_RV = self._mesh.gather_logits(self._head.logits(y_RH), self._sizes)
        return None if logits_RV is None else self._head.in_order(logits_RV)
