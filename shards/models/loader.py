"""Loads a rank's rows and columns of a checkpoint's matrices, in any form, and packs them.

Knows stacked matrices, quantization during loading, and the effect of forms on inputs. Knows
nothing of models: the caller gives the matrices and the rows and columns of the rank. The loader
ends after loading, and with it the map of the files, whose pages count as memory of this process.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import cache, partial
from types import TracebackType

import torch
from torch import Tensor

from arriero.kernels.input_transform import InputTransform
from arriero.kernels.ops import Ops
from arriero.kernels.packed_file import PackedFile
from arriero.kernels.packed_weights import Linear, Vocab
from arriero.kernels.quantize import in_pieces, quantize_fp8, quantize_int4, quantize_int8
from arriero.kernels.quantized_weight import QuantizedWeight
from arriero.shards.checkpoint.formats.products import ProductReader
from arriero.shards.checkpoint.formats.scheme import QuantScheme
from arriero.shards.checkpoint.formats.stored import TensorSpec, bytes_read
from arriero.shards.checkpoint.formats.stored_product import StoredProduct
from arriero.shards.checkpoint.pager import Pager, ranges_read
from arriero.shards.checkpoint.tensor_folder import TensorFolder
from arriero.shards.errors import CheckpointError
from arriero.shards.layout.dense import Span
from arriero.shards.layout.parts import AnyPart
from arriero.shards.models.kv_fold import for_divided_inputs, multiplied

Progress = Callable[[int, int], None]
"""Called with packed bytes and total bytes while the weights of a rank load."""

PAGED_BYTES = 64 << 20
"""A smaller slice of local files loads without a `Pager`; in bytes."""

QUANTIZERS: dict[str, Callable[[Tensor], QuantizedWeight]] = {
    "int8": quantize_int8,
    "int4": partial(quantize_int4, half=True),
    "fp8": quantize_fp8,
}
"""Quantizer of plain weights during loading, by value of `quantization`."""


class Loader:
    """Reads and packs matrices, norms and tables of an open folder; use in a `with` block."""

    def __init__(
        self,
        folder: TensorFolder,
        scheme: QuantScheme | None,
        specs: Iterable[TensorSpec],
        part: AnyPart,
        ops: Ops,
        *,
        dtype: torch.dtype,
        quantization: str | None = None,
        progress: Progress = lambda done, total: None,
        packed: PackedFile | None = None,
    ) -> None:
        """Prepare to load.

        Args:
            folder: folder with the tensors.
            scheme: quantized form of the matrices; None for plain weights.
            specs: all tensors of the checkpoint.
            part: part of this rank.
            ops: backend that packs.
            dtype: dtype of packed plain weights.
            quantization: key of `QUANTIZERS`, only for plain weights; None keeps `dtype`.
            progress: called with packed bytes and total bytes.
            packed: packed weights of an earlier start; None packs all.

        Raises:
            CheckpointError: `quantization` is set, but the weights are quantized already.
        """
        if scheme is not None and quantization is not None:
            raise CheckpointError(
                f"{folder.path}: `quantization`={quantization!r}, but the weights are quantized "
                f"already ({scheme.method}); remove `quantization`"
            )
        self._folder, self._ops, self._dtype = folder, ops, dtype
        self._reader = ProductReader(folder, scheme)
        self._quantize = None if quantization is None else QUANTIZERS[quantization]
        # the order in which slices load: first all layers, then tensors outside the layers
        ordered = sorted(specs, key=lambda spec: -1 if spec.layer is None else -2)
        ranges = ranges_read(folder, ordered, part)
        self._bytes: Counter[int | None] = Counter()
        for spec in ordered:
            self._bytes[spec.layer] += bytes_read([spec], part)
        self._kept = packed
        paged = self._total > PAGED_BYTES or folder.ranged is not None
        paged = paged and not (packed is not None and packed.complete)
        self._pager = Pager(folder, ranges) if paged else None
        self._progress, self._done = progress, 0
        self._used = 0  # packed bytes of the current layer

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
        if self._kept is not None:
            self._kept.close(whole=error is None)

    def finished(self, layer: int | None) -> None:
        """Report a packed layer; None for all tensors outside the layers."""
        self._done += self._bytes[layer]
        self._used = 0
        if self._pager is not None:
            self._pager.used(self._done)
        self._progress(self._done, self._total)

    def norm(self, name: str) -> Tensor:
        """Weights of a norm, float32 [H], on the device of the backend."""
        return self._folder.tensor(f"{name}.weight").to(self._ops.device, torch.float32, copy=True)

    def rows(
        self,
        parts: Sequence[tuple[str, Span]],
        *,
        bias: bool = False,
        keep: bool = False,
        factors: Sequence[float] = (),
    ) -> Linear:
        """A column-parallel matrix: rows of each named matrix, stacked.

        Args:
            parts: names without `.weight`, and the rows of each matrix.
            bias: whether each matrix has a vector `.bias`.
            keep: never quantize plain weights (routers).
            factors: power of two for each matrix, which multiplies its outputs; empty for 1.
        """
        each = tuple(factors) or (1.0,) * len(parts)

        def make() -> Linear:
            stored_parts = [
                multiplied(self._reader.product(name, rows=span), factor)
                for (name, span), factor in zip(parts, each, strict=True)
            ]
            joined = None
            if bias:
                pieces = [
                    self._folder.rows(f"{name}.bias", s.start, s.stop).float() * factor
                    for (name, s), factor in zip(parts, each, strict=True)
                ]
                joined = torch.cat(pieces)
            return self._pack([name for name, _ in parts], stored_parts, joined, keep=keep)

        return self._linear(" ".join(name for name, _ in parts), make)

    def columns(
        self, name: str, columns: Span, *, bias: bool = False, divisor: float = 1.0
    ) -> Linear:
        """A row-parallel matrix; with `bias` the whole bias vector, which a single rank adds.

        The inputs come divided by `divisor`, a power of two, which the matrix takes back.
        """

        def make() -> Linear:
            vector = self._folder.tensor(f"{name}.bias").float() if bias else None
            stored = self._reader.product(name, columns=columns)
            return self._pack([name], [for_divided_inputs(stored, divisor)], vector)

        return self._linear(name, make)

    def expert(
        self, prefix: str, expert: int, columns: Span | None = None
    ) -> tuple[Linear, Linear]:
        """The matrices of a routed expert, fused or separate in the checkpoint.

        Args:
            prefix: name of the layer's experts, such as "model.layers.1.feed_forward.experts".
            expert: global number of the expert.
            columns: this rank's columns of the inner dimension; None for all.

        Returns:
            Stacked gate and up matrices, and the down matrix.
        """
        name = f"{prefix}.{expert}"
        names = [f"{name}.gate_proj", f"{name}.up_proj"]

        @cache
        def stored() -> tuple[StoredProduct, StoredProduct, StoredProduct]:
            return self._reader.expert(prefix, expert, columns)

        return (
            self._linear(
                " ".join(names), lambda: self._pack(names, list(stored()[:2]), expert=True)
            ),
            self._linear(
                f"{name}.down_proj",
                lambda: self._pack([f"{name}.down_proj"], [stored()[2]], expert=True),
            ),
        )

    def vocab(self, name: str, rows: Span) -> Vocab:
        """Rows of the embedding or of the head."""
        if self._kept is None:
            return self._vocab(name, rows)
        return self._kept.vocab(name, rows.start, lambda: self._vocab(name, rows))

    def _linear(self, key: str, make: Callable[[], Linear]) -> Linear:
        """The weights of an earlier start, or packed now; a rank has each matrix once."""
        return make() if self._kept is None else self._kept.linear(key, make)

    def _vocab(self, name: str, rows: Span) -> Vocab:
        stored = self._reader.product(name, rows=rows)
        if isinstance(stored.weight, QuantizedWeight):
            if stored.inputs is not None:
                raise CheckpointError(
                    f"{name}: a quantized head with rounded or sorted inputs is not supported; "
                    "leave the head out when you quantize"
                )
            return self._ops.pack_quantized_vocab(stored.weight.with_half_scales(), rows.start)
        if self._quantize is None:
            return self._ops.pack_vocab(stored.weight, rows.start, self._dtype)
        # Rounding costs most in tables (fp8 here costs more than in all other matrices together),
        # and four bits would save least.
        return self._ops.pack_quantized_vocab(in_pieces(quantize_int8, stored.weight), rows.start)

    def _advance_pager(self, parts: Sequence[StoredProduct]) -> None:
        """Report packed bytes to the pager; a slight underestimate, because scales do not count."""
        self._used += sum(
            (part.weight if isinstance(part.weight, Tensor) else part.weight.data).nbytes
            for part in parts
        )
        if self._pager is not None:
            self._pager.used(self._done + self._used)

    def _pack(
        self,
        names: list[str],
        parts: list[StoredProduct],
        bias_O: Tensor | None = None,
        *,
        keep: bool = False,
        expert: bool = False,
    ) -> Linear:
        packed = self._packed(names, parts, bias_O, keep, expert)
        self._advance_pager(parts)
        return packed

    def _packed(
        self,
        names: list[str],
        parts: list[StoredProduct],
        bias_O: Tensor | None,
        keep: bool,
        expert: bool,
    ) -> Linear:
        plain = [part.weight for part in parts if isinstance(part.weight, Tensor)]
        stored = [part.weight for part in parts if isinstance(part.weight, QuantizedWeight)]
        weights = [weight.with_half_scales() for weight in stored]
        if plain and weights:
            raise CheckpointError(
                f"{' and '.join(names)} are stacked to one matrix, but only some are quantized; "
                "quantize all of them or none"
            )
        if plain and (self._quantize is None or keep):
            return self._ops.pack_linear(plain, bias_O, self._dtype)
        if plain:
            assert self._quantize is not None, "checked above"
            return self._ops.pack_quantized(
                [in_pieces(self._quantize, weight) for weight in plain], bias_O
            )
        inputs = _shared_inputs(names, [part.inputs for part in parts])
        if inputs is None:
            return self._ops.pack_quantized(weights, bias_O)
        if expert:
            return self._ops.pack_expert(weights, inputs)
        return self._ops.pack_transformed(weights, bias_O, inputs)


def _shared_inputs(names: list[str], inputs: list[InputTransform | None]) -> InputTransform | None:
    """Input change of stacked matrices, which must be equal for all of them.

    Static scales may differ: the greatest is used, so that no input exceeds the last level.
    """
    first = inputs[0]
    for other in inputs[1:]:
        same = (
            other is not None
            and first is not None
            and other.bound == first.bound
            and other.levels == first.levels
            and (other.scale is None) == (first.scale is None)
            and (other.order_I is None) == (first.order_I is None)
        )
        if same and other is not None and first is not None and other.order_I is not None:
            assert first.order_I is not None, "both or neither"
            same = torch.equal(other.order_I, first.order_I)
        if not same and not (other is None and first is None):
            raise CheckpointError(
                f"{' and '.join(names)} are stacked to one matrix, but sort or round inputs "
                "differently; quantize again without act-order"
            )
    scales = [each.scale for each in inputs if each is not None and each.scale is not None]
    if first is None or not scales:
        return first
    return replace(first, scale=torch.stack(scales).amax(0))
