"""Work of matrix products with packed weights, as `kernels/triton/backend.py` computes them.

Knows packed matrices and rows; knows nothing of models.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from arriero.cluster.planner.packed_stack import PackedStack
from arriero.cluster.planner.step_model.work import Item, Kind, Work
from arriero.cluster.planner.weight_forms import Weights
from arriero.kernels.sizes import FLOAT, PLAIN

FLOAT8 = 1
"""Bytes of a float8 number."""
_UNIT = 16
"""Sizes of matrices that torch's float8 product takes are multiples of this."""


class Products:
    """Products of a rank.

    Args:
        weights: form of the weights in memory.
    """

    def __init__(self, weights: Weights) -> None:
        self._weights = weights
        self.itemsize = PLAIN[weights.base]
        """Bytes of a number of the activations."""

    def rounds(self, stack: PackedStack) -> bool:
        """Whether the inputs of a product are rounded to float8, as the checkpoint's form has it.

        Checkpoints of plain "fp8" products round inputs; weights that are quantized on load do not.
        """
        if stack.precision != "fp8":
            return False
        scheme = self._weights.scheme
        if scheme is not None:
            return scheme.activation_bound is not None
        return self._weights.dtype == "fp8"

    def scaled(self, stack: PackedStack) -> bool:
        """Whether torch's float8 product computes this one, or its grouped one those of experts.

        See `triton/scaled_products.py` and `triton/scaled_experts.py`.
        """
        whole = stack.rows % _UNIT == 0 and stack.columns % _UNIT == 0
        return self.rounds(stack) and whole and self._weights.base == "bfloat16"

    def kind(self, stack: PackedStack) -> Kind:
        """The library's product for plain weights and rounded rows, else Triton's."""
        if self.scaled(stack):
            return "float8 product"
        return "product" if stack.precision in PLAIN else "triton product"

    def linear(
        self,
        item: Item,
        stack: PackedStack,
        rows: float,
        *,
        captured: bool,
        out: int = 0,
        rounded: bool = False,
    ) -> Work:
        """The product of `rows` rows with a matrix.

        Args:
            item: part of the step.
            stack: the matrix.
            rows: rows of the inputs.
            captured: the product runs in a CUDA graph.
            out: bytes of a number of the output; 0 for the activations' size.
            rounded: the kernel before rounds the inputs, where the product takes rounded ones.
        """
        launches: Counter[str] = Counter()
        kind = self.kind(stack)
        if kind == "float8 product":
            launches["aten::_scaled_mm"] = 1
            nbytes = float(stack.weights + stack.scales)
            nbytes += rows * self._float8_rows(stack, launches, rounded)
            nbytes += rows * stack.rows * (out or self.itemsize)
            return Work(
                item=item,
                kind=kind,
                nbytes=nbytes,
                operations=2.0 * rows * stack.rows * stack.columns,
                launches=launches,
                captured=captured,
            )
        rounding = self._rounding(stack, rows, launches, rounded)
        launches["aten::mm" if kind == "product" else "_matmul"] += 1
        return self._work(item, stack, rows, 1, rounding, launches, captured, out)

    def grouped(
        self,
        item: Item,
        stack: PackedStack,
        pairs: float,
        local: float,
        hit: float,
        *,
        captured: bool,
        rounded: bool = False,
    ) -> Work:
        """The products of the rows of each expert with the expert's matrix.

        Args:
            item: part of the step.
            stack: the matrix of each expert.
            pairs: rows of the tensors: (token, expert) pairs of all experts.
            local: pairs whose expert is on this rank.
            hit: experts of this rank with a row.
            captured: the products run in a CUDA graph.
            rounded: the kernel before rounds the inputs of a product by torch.
        """
        launches: Counter[str] = Counter()
        if self.scaled(stack):  # see `triton/scaled_experts.py`
            launches["aten::_scaled_grouped_mm"] = 1
            nbytes = float(hit * (stack.weights + stack.scales))
            nbytes += local * self._float8_rows(stack, launches, rounded)
            return Work(
                item=item,
                kind="float8 product",
                nbytes=nbytes + local * stack.rows * self.itemsize,
                operations=2.0 * local * stack.rows * stack.columns,
                launches=launches,
                captured=captured,
            )
        rounding = self._rounding(stack, pairs, launches, rounded=False)
        launches["_grouped_matmul"] += 1
        return self._work(item, stack, local, hit, rounding, launches, captured, 0)

    def _work(
        self,
        item: Item,
        stack: PackedStack,
        rows: float,
        matrices: float,
        rounding: float,
        launches: Mapping[str, float],
        captured: bool,
        out: int,
    ) -> Work:
        rounded = self.rounds(stack)
        inputs = FLOAT if rounded else self.itemsize
        outputs = out or (FLOAT if rounded else self.itemsize)
        nbytes = matrices * (stack.weights + stack.scales) + rounding
        nbytes += rows * (stack.columns * inputs + stack.rows * outputs)
        return Work(
            item=item,
            kind="product" if stack.precision in PLAIN else "triton product",
            nbytes=nbytes,
            operations=2.0 * rows * stack.rows * stack.columns,
            launches=launches,
            captured=captured,
        )

    def _float8_rows(self, stack: PackedStack, launches: Counter[str], rounded: bool) -> float:
        """Bytes of a row of inputs of torch's float8 product; adds the launch that rounds."""
        if rounded:
            return float(stack.columns * FLOAT8)
        launches["_quantize_rows"] += 1
        return float(stack.columns * (self.itemsize + 2 * FLOAT8))

    def _rounding(
        self, stack: PackedStack, rows: float, launches: Counter[str], rounded: bool
    ) -> float:
        """Bytes of the passes around a product with rounded inputs; adds their launches.

        The passes: inputs to float8, unless the kernel before has rounded them; float8 to float32,
        the product times the rows' scales, and the result in the activations' dtype.
        """
        if not self.rounds(stack):
            return 0.0
        item, columns, outputs = self.itemsize, stack.columns, stack.rows
        launches["aten::_to_copy"] += 1
        launches["aten::mul_"] += 1
        nbytes = columns * (FLOAT8 + FLOAT) + 2 * outputs * FLOAT
        if not rounded:
            launches["_quantize_rows"] += 1
            nbytes += columns * (item + FLOAT8)
        if item != FLOAT:
            launches["aten::_to_copy"] += 1
            nbytes += outputs * (FLOAT + item)
        return rows * nbytes
