"""Reader of a checkpoint's matrices or slices of matrices, in all stored forms.

Returns plain matrices as views of the file and quantized matrices as `QuantizedWeight` with the
stored numbers, without dequantization. Knows which form reads which matrix, and Llama 4's experts,
fused or separate; knows nothing of the packing of a backend.

Shape legend: O rows (outputs), I columns (inputs).
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from arriero.shards.checkpoint.formats import awq, eight_bits, gptq, nvfp4, packed_words
from arriero.shards.checkpoint.formats.fused_experts import FusedMatrix
from arriero.shards.checkpoint.formats.scheme import Method, QuantScheme
from arriero.shards.checkpoint.formats.stored_matrix import StoredMatrix
from arriero.shards.checkpoint.formats.stored_product import StoredProduct
from arriero.shards.checkpoint.tensor_folder import TensorFolder
from arriero.shards.layout.dense import Span

READERS: dict[Method, Callable[[StoredMatrix], StoredProduct]] = {
    "pack-quantized": packed_words.read,
    "awq": awq.read,
    "gptq": gptq.read,
    "modelopt-nvfp4": nvfp4.read,
}
"""Readers of packed forms; `eight_bits` reads the others, and every plain matrix."""

_NO_SCHEME = QuantScheme(method="compressed-tensors")
"""Of a folder without a scheme: rows of an eight-bit matrix have scales, inputs are unchanged."""


class ProductReader:
    """Reads the matrices of an open folder."""

    def __init__(self, folder: TensorFolder, scheme: QuantScheme | None) -> None:
        self._folder, self._scheme = folder, scheme or _NO_SCHEME

    def product(
        self,
        name: str,
        rows: Span | None = None,
        columns: Span | None = None,
        *,
        pad_groups: bool = False,
    ) -> StoredProduct:
        """The matrix `name`, or a slice of rows and columns.

        Args:
            name: name of the module, without `.weight`.
            rows: rows of the slice; None for all rows.
            columns: columns of the slice; None for all columns.
            pad_groups: pad columns sorted by group to full groups. Equal cuts of equal matrices
                then have equal shapes, as a single launch over many experts requires.

        Raises:
            CheckpointError: the matrix is missing, scales are not finite, or a cut gives groups of
                columns that no kernel supports.
        """
        matrix = StoredMatrix(
            folder=self._folder,
            scheme=self._scheme,
            name=name,
            rows=rows,
            columns=columns,
            pad_groups=pad_groups,
        )
        if matrix.has("weight") and self._folder.dtype(f"{name}.weight") != torch.uint8:
            return eight_bits.read(matrix)
        return READERS.get(self._scheme.method, eight_bits.read)(matrix)

    def expert(
        self, prefix: str, expert: int, columns: Span | None = None
    ) -> tuple[StoredProduct, StoredProduct, StoredProduct]:
        """Gate, up and down matrices of an expert, each [out, in].

        Args:
            prefix: name of the layer's experts, such as "model.layers.1.feed_forward.experts".
            expert: number of the expert.
            columns: slice of the inner dimension: rows of gate and up, columns of down.
        """
        fused = f"{prefix}.gate_up_proj"
        if fused not in self._folder.stored:
            name = f"{prefix}.{expert}."
            return (
                self.product(f"{name}gate_proj", rows=columns, pad_groups=True),
                self.product(f"{name}up_proj", rows=columns, pad_groups=True),
                self.product(f"{name}down_proj", columns=columns, pad_groups=True),
            )
        inner = self._folder.shape(fused)[-1] // 2
        own = columns or Span(start=0, stop=inner)
        gate, up = (
            self._fused(fused, expert, rows=Span(start=at + own.start, stop=at + own.stop))
            for at in (0, inner)
        )
        return gate, up, self._fused(f"{prefix}.down_proj", expert, columns=own)

    def _fused(
        self, name: str, expert: int, rows: Span | None = None, columns: Span | None = None
    ) -> StoredProduct:
        stored = StoredMatrix(
            folder=self._folder,
            scheme=self._scheme,
            name=name,
            rows=rows,
            columns=columns,
            separator="_",
        )
        return FusedMatrix(stored=stored, expert=expert).read()
