"""The time of each op, and its share of the machine's limit.

The time limit of an op is the larger of bytes / memory rate and operations / matrix rate; both
rates are measured here. As with the layers of a model, each call uses another copy of the weights,
and all copies together exceed the caches. Knows ops and shapes; knows nothing of models and steps.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from itertools import cycle
from typing import Any

import torch
from torch import Tensor

from arriero.kernels.flat_batch import FlatBatch
from arriero.kernels.kv_cache import KVCache, KVCacheSpec
from arriero.kernels.layers import DenseLayer
from arriero.kernels.ops import Ops
from arriero.kernels.packed_weights import Linear
from arriero.kernels.quantize import quantize_fp8, quantize_int4, quantize_int8
from arriero.kernels.quantized_weight import QuantizedWeight
from arriero.kernels.sampling_rows import SamplingRows

BLOCK_SIZE = 16
_UNCACHED_BYTES = 96 << 20
_QUANTIZERS: dict[str, Callable[[Tensor], QuantizedWeight]] = {
    "int8": quantize_int8,
    "int4": quantize_int4,
    "fp8": quantize_fp8,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """Sizes of a slice's part of a layer and of the vocabulary.

    Attributes:
        quantization: form of the weights: int8, int4, fp8, or None for `dtype`.
    """

    hidden: int
    columns: int
    q_heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    dtype: torch.dtype
    quantization: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Rates:
    """Peak rates of the machine.

    Attributes:
        memory: bytes read per second.
        matrix: operations per second; a multiplication with its addition counts 2.
    """

    memory: float
    matrix: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Timing:
    """Time of an op at a shape.

    Attributes:
        op: name of the op; for linear ops with the name of the matrix.
        tokens: T of the batch (or number of rows).
        context: tokens that each sequence attends to; 0 without attention.
        us: median time in microseconds.
        limit_us: shortest time in microseconds by the machine's rates.
    """

    op: str
    tokens: int
    context: int
    us: float
    limit_us: float

    @property
    def share(self) -> float:
        """Share of the limit; above 1 where data comes from a cache instead of memory."""
        return self.limit_us / self.us

    def as_dict(self) -> dict[str, Any]:
        """The fields for JSON."""
        return {**asdict(self), "share": round(self.share, 4)}


class KernelBench:
    """A layer of random weights on a backend, to measure its ops."""

    def __init__(self, ops: Ops, shape: Shape, device: torch.device, seconds: float = 0.2) -> None:
        """Pack the weights.

        Args:
            ops: the backend.
            shape: sizes of the layer.
            device: device of the tensors.
            seconds: duration of each measurement.
        """
        self._ops, self._shape, self._device, self._seconds = ops, shape, device, seconds
        s = shape
        sizes = {
            "qkv": ((s.q_heads + 2 * s.kv_heads) * s.head_dim, s.hidden),
            "o": (s.hidden, s.q_heads * s.head_dim),
            "gate_up": (2 * s.columns, s.hidden),
            "down": (s.hidden, s.columns),
        }
        self._linears = {name: self._copies(*size) for name, size in sizes.items()}
        rows_VH = self._weight(s.vocab, s.hidden)
        if s.quantization is None:
            self._vocab = ops.pack_vocab(rows_VH, 0, s.dtype)
        else:  # slices have at least eight bits in the vocabulary
            quantize = _QUANTIZERS["int8" if s.quantization == "int4" else s.quantization]
            self._vocab = ops.pack_quantized_vocab(quantize(rows_VH), 0)
        self._norm_H = torch.ones(s.hidden, device=device)
        self.rates = measure_rates(ops, s.dtype, device)

    def run(self, tokens: int, context: int) -> Iterator[Timing]:
        """All ops on `tokens` decodes at `context`, then attention on a prefill of `tokens`."""
        s, ops = self._shape, self._ops
        x_TH = self._floats(tokens, s.hidden)
        x_bytes = x_TH.nbytes
        tokens_T = torch.arange(tokens, dtype=torch.int32, device=self._device) % s.vocab
        yield self._time("embed", tokens, lambda: ops.embed(tokens_T, self._vocab), 2 * x_bytes)
        yield self._time(
            "rms_norm", tokens, lambda: ops.rms_norm(x_TH, self._norm_H, 1e-5), 2 * x_bytes
        )
        for name, copies in self._linears.items():
            yield self._linear(name, copies, tokens)
        gate_up_TF2 = self._floats(tokens, 2 * s.columns)
        yield self._time(
            "silu_mul", tokens, lambda: ops.silu_mul(gate_up_TF2), gate_up_TF2.nbytes * 3 // 2
        )
        yield from self._attention(tokens, [1] * tokens, context)
        if tokens > 1:
            yield from self._attention(tokens, [tokens], tokens)
        vocab = self._vocab
        yield self._time(
            "logits",
            tokens,
            lambda: ops.logits(x_TH, self._norm_H, 1e-5, vocab),
            vocab.nbytes + tokens * s.vocab * 4,
            2.0 * tokens * s.vocab * s.hidden,
        )
        logits_RV = self._floats(tokens, s.vocab)
        for name, temperature in (("sample, greedy", 0.0), ("sample, top-p", 0.8)):
            rows = self._sampling_rows(tokens, temperature)
            yield self._time(name, tokens, partial(ops.sample, logits_RV, rows), logits_RV.nbytes)

    def _linear(self, name: str, copies: list[Linear], tokens: int) -> Timing:
        w = copies[0]
        x_TI = self._floats(tokens, w.in_features)
        weights = cycle(copies)
        return self._time(
            f"linear {name}",
            tokens,
            lambda: self._ops.linear(x_TI, next(weights)),
            w.nbytes + x_TI.nbytes + tokens * w.out_features * 4,
            2.0 * tokens * w.out_features * w.in_features,
        )

    def _attention(self, tokens: int, queries: list[int], context: int) -> Iterator[Timing]:
        """RoPE with the cache write, and attention, for sequences that end at `context`."""
        s, ops = self._shape, self._ops
        kv, batch = self._cache(queries, context)
        layer = self._layer()
        qkv_TE = self._floats(tokens, (s.q_heads + 2 * s.kv_heads) * s.head_dim)
        kind = "decode" if len(queries) == tokens else "prefill"
        write = tokens * 2 * s.kv_heads * s.head_dim * s.dtype.itemsize
        yield self._time(
            f"rope_write_kv, {kind}",
            tokens,
            lambda: ops.rope_write_kv(qkv_TE, layer, kv, 0, batch),
            qkv_TE.nbytes + write,
            context=context,
        )
        q_TND = self._floats(tokens, s.q_heads * s.head_dim).view(tokens, s.q_heads, s.head_dim)
        num_pairs = sum(sum(range(context - n + 1, context + 1)) for n in queries)
        yield self._time(
            f"paged_attention, {kind}",
            tokens,
            lambda: ops.paged_attention(q_TND, s.head_dim**-0.5, kv, 0, batch),
            len(queries) * context * 2 * s.kv_heads * s.head_dim * s.dtype.itemsize,
            4.0 * num_pairs * s.q_heads * s.head_dim,
            context=context,
        )

    def _time(
        self,
        op: str,
        tokens: int,
        run: Callable[[], object],
        num_bytes: int,
        operations: float = 0.0,
        context: int = 0,
    ) -> Timing:
        times: list[float] = []
        run()
        self._wait()
        deadline = time.perf_counter() + self._seconds
        while not times or time.perf_counter() < deadline:
            started = time.perf_counter()
            run()
            self._wait()
            times.append(time.perf_counter() - started)
        limit_s = max(num_bytes / self.rates.memory, operations / self.rates.matrix)
        return Timing(
            op=op,
            tokens=tokens,
            context=context,
            us=round(statistics.median(times) * 1e6, 2),
            limit_us=round(limit_s * 1e6, 2),
        )

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def _weight(self, rows: int, columns: int) -> Tensor:
        weight_OI: Tensor = torch.randn(rows, columns) * float(columns) ** -0.5
        return weight_OI.to(self._shape.dtype)

    def _floats(self, rows: int, columns: int) -> Tensor:
        on_cpu = self._device.type == "cpu"
        dtype = torch.float32 if on_cpu else self._shape.dtype
        return torch.randn(rows, columns, device=self._device).to(dtype)

    def _copies(self, rows: int, columns: int) -> list[Linear]:
        """Packed copies of a matrix, together larger than the caches."""
        weight_OI = self._weight(rows, columns)
        copies: list[Linear] = []
        while not copies or sum(copy.nbytes for copy in copies) < _UNCACHED_BYTES:
            if self._shape.quantization is None:
                copies.append(self._ops.pack_linear([weight_OI], None, self._shape.dtype))
            else:
                quantized = _QUANTIZERS[self._shape.quantization](weight_OI)
                copies.append(self._ops.pack_quantized([quantized], None))
        return copies

    def _layer(self) -> DenseLayer:
        s, first = self._shape, {name: copies[0] for name, copies in self._linears.items()}
        return DenseLayer(
            attn_norm_H=self._norm_H,
            mlp_norm_H=self._norm_H,
            num_q_heads=s.q_heads,
            num_kv_heads=s.kv_heads,
            head_dim=s.head_dim,
            softmax_scale=s.head_dim**-0.5,
            eps=1e-5,
            qkv=first["qkv"],
            o=first["o"],
            gate_up=first["gate_up"],
            down=first["down"],
        )

    def _cache(self, queries: list[int], context: int) -> tuple[KVCache, FlatBatch]:
        s, device = self._shape, self._device
        blocks = -(-context // BLOCK_SIZE)
        spec = KVCacheSpec(
            num_layers=1,
            num_blocks=blocks * len(queries),
            num_kv_heads=s.kv_heads,
            head_dim=s.head_dim,
            block_size=BLOCK_SIZE,
            dtype=s.dtype,
        )
        table_SB = torch.arange(spec.num_blocks, dtype=torch.int32).view(len(queries), blocks)
        positions = [torch.arange(context - n, context, dtype=torch.int32) for n in queries]
        slots = [
            row[at.long() // BLOCK_SIZE] * BLOCK_SIZE + at % BLOCK_SIZE
            for row, at in zip(table_SB, positions, strict=True)
        ]
        positions_T = torch.cat(positions).to(device)
        angles_TD = positions_T[:, None] * torch.linspace(1, 0.01, s.head_dim // 2, device=device)
        starts_S1 = torch.tensor([0, *queries], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        return self._ops.kv_cache(spec, device), FlatBatch(
            positions_T=positions_T,
            query_start_S1=starts_S1.to(device),
            context_S=torch.full((len(queries),), context, dtype=torch.int32, device=device),
            block_table_SB=table_SB.to(device),
            slots_T=torch.cat(slots).to(device),
            cos_TD=angles_TD.cos(),
            sin_TD=angles_TD.sin(),
            max_query=max(queries),
            max_context=context,
        )

    def _sampling_rows(self, rows: int, temperature: float) -> SamplingRows:
        def full(value: float, dtype: torch.dtype) -> Tensor:
            return torch.full((rows,), value, dtype=dtype, device=self._device)

        return SamplingRows(
            temperature_R=full(temperature, torch.float32),
            top_k_R=full(0, torch.int32),
            top_p_R=full(0.9, torch.float32),
            min_p_R=full(0, torch.float32),
            seed_R=full(1, torch.int64),
            position_R=full(7, torch.int64),
            all_greedy=temperature == 0.0,
        )


def measure_rates(ops: Ops, dtype: torch.dtype, device: torch.device) -> Rates:
    """Rates of the machine: with the instructions of the C++ kernels if possible, else by torch."""
    from arriero.kernels.cpu import limits
    from arriero.kernels.cpu.backend import CpuOps

    if isinstance(ops, CpuOps):
        data = torch.ones(_UNCACHED_BYTES * 2 // 4)
        rounds = 100_000
        memory = data.nbytes / _best_s(lambda: limits.read_bytes(ops, data))
        matrix = limits.multiply_only(ops, 1, dtype) * rounds
        best_s = _best_s(lambda: limits.multiply_only(ops, rounds, dtype))
        return Rates(memory=memory, matrix=matrix / best_s)
    data = torch.ones(_UNCACHED_BYTES * 2 // 4, device=device)
    a_NN = torch.randn(2048, 2048, device=device).to(dtype)

    def wait(result: Tensor) -> None:
        result.flatten()[0].item()

    return Rates(
        memory=data.nbytes / _best_s(lambda: wait(data.sum())),
        matrix=2.0 * a_NN.shape[0] ** 3 / _best_s(lambda: wait(a_NN @ a_NN)),
    )


def _best_s(run: Callable[[], object], repeats: int = 7) -> float:
    """Seconds of the fastest of several runs: the limit is the time of an undisturbed run."""
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        run()
        times.append(time.perf_counter() - started)
    return min(times)
