"""Reader of a checkpoint's matrices or slices of matrices, in all stored forms.

Returns plain matrices as views of the file and quantized matrices as `QuantizedWeight` with the
stored numbers, without dequantization. Knows which form reads which matrix, and Llama 4's experts,
fused or separate; knows nothing of the packing of a backend.

Shape legend: O rows (outputs), I columns (inputs).
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from arriero.shards.checkpoint.formats import awq, eight_bits, gptq, packed_words
from arriero.shards.checkpoint.formats.scheme import Method, QuantScheme
from arriero.shards.checkpoint.formats.stored_matrix import StoredMatrix
from arriero.shards.checkpoint.formats.stored_product import StoredProduct
from arriero.shards.checkpoint.tensor_folder import TensorFolder
from arriero.shards.errors import CheckpointError
from arriero.shards.layout.dense import Span

READERS: dict[Method, Callable[[StoredMatrix], StoredProduct]] = {
    "pack-quantized": packed_words.read,
    "awq": awq.read,
    "gptq": gptq.read,
}
"""Readers of the forms without a tensor `weight`; `eight_bits` reads the others."""

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
        if matrix.has("weight"):
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
        gate_up_IO = self._fused_expert(fused, expert)
        down_IO = self._fused_expert(f"{prefix}.down_proj", expert)
        inner = gate_up_IO.shape[1] // 2
        own = columns or Span(start=0, stop=inner)
        gate, up = (gate_up_IO[:, at + own.start : at + own.stop].t() for at in (0, inner))
        down = down_IO[own.start : own.stop].t()
        return StoredProduct(weight=gate), StoredProduct(weight=up), StoredProduct(weight=down)

    def _fused_expert(self, name: str, expert: int) -> Tensor:
        num_experts = self._folder.shape(name)[0]
        if not 0 <= expert < num_experts:
            raise CheckpointError(
                f"tensor {name!r} holds {num_experts} experts, but expert {expert} is needed; "
                "check `num_local_experts` in config.json"
            )
        return self._folder.rows(name, expert, expert + 1)[0]
