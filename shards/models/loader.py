"""From a checkpoint's matrices to packed products: one rank's rows and columns, in any form.

Knows how matrices are stacked into products, what is quantized while it loads, and what formats
do to a product's inputs. Knows no model: which matrices there are, and which of their rows and
columns a rank holds, its caller says. Gone once loading is over; with it goes the map of the
files, whose pages would count as this process's memory.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from types import TracebackType

import torch
from torch import Tensor

from arriero.kernels.ops import Linear, Ops, Vocab
from arriero.kernels.quant import (
    ProductInputs,
    QuantizedWeight,
    in_pieces,
    quantize_fp8,
    quantize_int4,
    quantize_int8,
)
from arriero.shards.checkpoint.formats.products import ProductReader, StoredProduct
from arriero.shards.checkpoint.formats.scheme import QuantScheme
from arriero.shards.checkpoint.formats.stored import TensorSpec, bytes_read
from arriero.shards.checkpoint.pager import Pager, ranges_read
from arriero.shards.checkpoint.tensor_folder import TensorFolder
from arriero.shards.errors import CheckpointError
from arriero.shards.layout.dense import Span
from arriero.shards.layout.parts import AnyPart

Progress = Callable[[int, int], None]
"""Called with (bytes packed, bytes in all) while a rank's weights load."""

PAGED_BYTES = 64 << 20
"""A slice of fewer bytes that are all here loads without the help of a `Pager`."""

QUANTIZERS: dict[str, Callable[[Tensor], QuantizedWeight]] = {
    "int8": quantize_int8,
    "int4": quantize_int4,
    "fp8": quantize_fp8,
}
"""How plain weights are quantized while they load, matrix by matrix."""


class Loader:
    """Reads and packs the products, norms and tables of an open folder, in a `with` block."""

    def __init__(
        self,
        folder: TensorFolder,
        scheme: QuantScheme | None,
        due: Iterable[TensorSpec],
        part: AnyPart,
        ops: Ops,
        *,
        dtype: torch.dtype,
        quantization: str | None = None,
        progress: Progress = lambda done, total: None,
    ) -> None:
        """Prepare to load.

        Args:
            folder: holds the tensors.
            scheme: the form of its products; None for plain ones.
            due: all tensors of the checkpoint.
            part: what this rank holds.
            ops: the backend that packs.
            dtype: plain weights are packed in this.
            quantization: a name of `QUANTIZERS`, for plain weights alone; None keeps `dtype`.
            progress: told of the bytes packed.

        Raises:
            CheckpointError: the weights are to be quantized, and are already.
        """
        if scheme is not None and quantization is not None:
            raise CheckpointError(
                f"{folder.path}: `quantization`={quantization!r}: the weights are quantized "
                f"already ({scheme.method}); leave `quantization` out"
            )
        self._folder, self._ops, self._dtype = folder, ops, dtype
        self._reader = ProductReader(folder, scheme)
        self._quantize = None if quantization is None else QUANTIZERS[quantization]
        # layer by layer, then what stands outside of them: the order in which slices load
        ordered = sorted(due, key=lambda one: -1 if one.layer is None else -2)
        ranges = ranges_read(folder, ordered, part)
        self._bytes: Counter[int | None] = Counter()
        for one in ordered:
            self._bytes[one.layer] += bytes_read([one], part)
        paged = self._total > PAGED_BYTES or folder.ranged is not None
        self._pager = Pager(folder, ranges) if paged else None
        self._progress, self._done = progress, 0
        self._used = 0  # of the bytes not done yet: of this layer's products

    @property
    def _total(self) -> int:
        return self._bytes.total()

    def __enter__(self) -> Loader:
        if self._pager is not None:
            self._pager.start()
        self._progress(0, self._total)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._pager is not None:
            self._pager.close()

    def finished(self, layer: int | None) -> None:
        """Tell that a layer is packed; None stands for all that belongs to no layer."""
        self._done += self._bytes[layer]
        self._used = 0
        if self._pager is not None:
            self._pager.used(self._done)
        self._progress(self._done, self._total)

    def norm(self, name: str) -> Tensor:
        """A norm's weights, float32 [H], where the backend computes."""
        return self._folder.tensor(f"{name}.weight").to(self._ops.device, torch.float32, copy=True)

    def rows(
        self, parts: Sequence[tuple[str, Span]], *, bias: bool = False, keep: bool = False
    ) -> Linear:
        """A product whose outputs are cut: rows of each named matrix, stacked.

        Args:
            parts: names, without `.weight`, and the rows wanted of each.
            bias: whether each has a vector `.bias`.
            keep: plain weights stay plain, whatever `quantization` says (routers).
        """
        found = [self._reader.product(name, rows=span) for name, span in parts]
        joined = None
        if bias:
            pieces = [self._folder.rows(f"{name}.bias", s.start, s.stop) for name, s in parts]
            joined = torch.cat(pieces).float()
        return self._pack([name for name, _ in parts], found, joined, keep)

    def columns(self, name: str, columns: Span, *, bias: bool = False) -> Linear:
        """A product whose inputs are cut; with its whole bias, which one rank of all adds."""
        vector = self._folder.tensor(f"{name}.bias").float() if bias else None
        found = self._reader.product(name, columns=columns)
        return self._pack([name], [found], vector, keep=False)

    def expert(
        self, prefix: str, expert: int, columns: Span | None = None
    ) -> tuple[Linear, Linear]:
        """One routed expert's products, fused with the others in the checkpoint or not.

        Args:
            prefix: of the layer's experts, such as "model.layers.1.feed_forward.experts".
            expert: its global number.
            columns: of its inner dimension that are held here; None for all.

        Returns:
            Gate and up stacked, and down.
        """
        gate, up, down = self._reader.expert(prefix, expert, columns)
        name = f"{prefix}.{expert}"
        names = [f"{name}.gate_proj", f"{name}.up_proj"]
        gate_up = self._pack(names, [gate, up], None, keep=False)
        return gate_up, self._pack([f"{name}.down_proj"], [down], None, keep=False)

    def vocab(self, name: str, rows: Span) -> Vocab:
        """Rows of the embedding or of the head."""
        found = self._reader.product(name, rows=rows)
        if isinstance(found.weight, QuantizedWeight):
            if found.inputs is not None:
                raise CheckpointError(
                    f"{name}: a head whose inputs are rounded or sorted is not computed; ignore "
                    "it when quantizing"
                )
            return self._ops.pack_quantized_vocab(found.weight, rows.start)
        if self._quantize is None:
            return self._ops.pack_vocab(found.weight, rows.start, self._dtype)
        # Tables are where rounding costs most (in fp8 more than all other products together), and
        # four bits would save least.
        return self._ops.pack_quantized_vocab(in_pieces(quantize_int8, found.weight), rows.start)

    def _note(self, parts: Sequence[StoredProduct]) -> None:
        """Let the pager read on; scales and what is stored wider make this a little less."""
        self._used += sum(
            (one.weight if isinstance(one.weight, Tensor) else one.weight.data).nbytes
            for one in parts
        )
        if self._pager is not None:
            self._pager.used(self._done + self._used)

    def _pack(
        self, names: list[str], parts: list[StoredProduct], bias_O: Tensor | None, keep: bool
    ) -> Linear:
        packed = self._packed(names, parts, bias_O, keep)
        self._note(parts)
        return packed

    def _packed(
        self, names: list[str], parts: list[StoredProduct], bias_O: Tensor | None, keep: bool
    ) -> Linear:
        plain = [one.weight for one in parts if isinstance(one.weight, Tensor)]
        weights = [one.weight for one in parts if isinstance(one.weight, QuantizedWeight)]
        if plain and weights:
            raise CheckpointError(
                f"{' and '.join(names)} make one product, but some of them are quantized and some "
                "are not"
            )
        if plain and (self._quantize is None or keep):
            return self._ops.pack_linear(plain, bias_O, self._dtype)
        if plain:
            assert self._quantize is not None, "checked above"
            return self._ops.pack_quantized(
                [in_pieces(self._quantize, one) for one in plain], bias_O
            )
        inputs = _shared(names, [one.inputs for one in parts])
        if inputs is None:
            return self._ops.pack_quantized(weights, bias_O)
        return self._ops.pack_product(weights, bias_O, inputs)


def _shared(names: list[str], inputs: list[ProductInputs | None]) -> ProductInputs | None:
    """What stacked matrices do to their inputs, which must be one thing."""
    first = inputs[0]
    for one in inputs[1:]:
        same = (
            one is not None
            and first is not None
            and one.bound == first.bound
            and (one.order_I is None) == (first.order_I is None)
        )
        if same and one is not None and first is not None and one.order_I is not None:
            assert first.order_I is not None, "both or neither"
            same = torch.equal(one.order_I, first.order_I)
        if not same and not (one is None and first is None):
            raise CheckpointError(
                f"{' and '.join(names)} make one product, but sort or round their inputs "
                "differently"
            )
    return first
