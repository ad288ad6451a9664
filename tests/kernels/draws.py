"""One row's draw by the letter of `Ops.sample`, in Python integers and floats, one row at a time.

Nothing here is shared with the code under test.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction

import numpy as np
import torch

from arriero.kernels.sampling_rows import SamplingRows

ONE = 2**44


@dataclass(frozen=True, kw_only=True)
class Row:
    """One request's parameters at one position."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    position: int = 0
    repetition: float = 1.0
    presence: float = 0.0
    frequency: float = 0.0
    prompt: tuple[int, ...] = ()
    output: tuple[int, ...] = ()
    bias: dict[int, float] = field(default_factory=dict)
    allowed: tuple[int, ...] | None = None


def batch_of(rows: list[Row], vocab: int, num_logprobs: int = -1) -> SamplingRows:
    """Rows as tensors; an optional field is there when some row uses it."""

    def floats(values: list[float]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.float32)

    seen = torch.zeros(len(rows), vocab, dtype=torch.bool)
    counts = torch.zeros(len(rows), vocab, dtype=torch.int32)
    allowed = torch.ones(len(rows), vocab, dtype=torch.bool)
    bias: list[tuple[int, int, float]] = []
    for i, row in enumerate(rows):
        seen[i, list(row.prompt + row.output)] = True
        for token in row.output:
            counts[i, token] += 1
        if row.allowed is not None:
            allowed[i] = False
            allowed[i, list(row.allowed)] = True
        bias += [(i, token, value) for token, value in row.bias.items()]
    repeats = any(r.repetition != 1 for r in rows)
    presence = any(r.presence != 0 for r in rows)
    frequency = any(r.frequency != 0 for r in rows)
    return SamplingRows(
        temperature_R=floats([r.temperature for r in rows]),
        top_k_R=torch.tensor([r.top_k for r in rows], dtype=torch.int32),
        top_p_R=floats([r.top_p for r in rows]),
        min_p_R=floats([r.min_p for r in rows]),
        seed_R=torch.tensor([r.seed for r in rows], dtype=torch.int64),
        position_R=torch.tensor([r.position for r in rows], dtype=torch.int64),
        repetition_R=floats([r.repetition for r in rows]) if repeats else None,
        presence_R=floats([r.presence for r in rows]) if presence else None,
        frequency_R=floats([r.frequency for r in rows]) if frequency else None,
        seen_RV=seen if repeats else None,
        counts_RV=counts if presence or frequency else None,
        bias=(
            torch.tensor([b[0] for b in bias]),
            torch.tensor([b[1] for b in bias]),
            floats([b[2] for b in bias]),
        )
        if bias
        else None,
        allowed_RW=packed(allowed) if any(r.allowed is not None for r in rows) else None,
        num_logprobs=num_logprobs,
        all_greedy=all(r.temperature == 0 for r in rows),
    )


def packed(allowed_RV: torch.Tensor) -> torch.Tensor:
    """Masks with a bit for each token, of bools."""
    padded = torch.nn.functional.pad(allowed_RV, (0, -allowed_RV.shape[1] % 32))
    return torch.from_numpy(np.packbits(padded.numpy(), axis=1, bitorder="little").view(np.int32))


def philox(counter: list[int], key: list[int]) -> list[int]:
    """Ten rounds in unbounded integers, straight from the paper."""
    c, k = list(counter), list(key)
    for _ in range(10):
        high0, low0 = divmod(0xD2511F53 * c[0], 2**32)
        high1, low1 = divmod(0xCD9E8D57 * c[2], 2**32)
        c = [high1 ^ c[1] ^ k[0], low1, high0 ^ c[3] ^ k[1], low0]
        k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
    return c


def row_key(seed: int, position: int) -> list[int]:
    """The four words of a row, from seed and position modulo 2**64."""
    counter = [position % 2**32, position % 2**64 // 2**32, 0, 0]
    return philox(counter, [seed % 2**32, seed % 2**64 // 2**32])


def words(tokens: np.ndarray, first: int, second: int) -> np.ndarray:
    """A word for each token: three products modulo 2**32, each after a shift by xor."""
    x = tokens.astype(np.uint64) ^ np.uint64(first)
    x = (x ^ x // 2**17) * 0xED5AD4BB % 2**32
    x = ((x ^ x // 2**11) + second) % 2**32 * 0xAC4C1B51 % 2**32
    x = (x ^ x // 2**15) * 0x31848BAB % 2**32
    return x ^ x // 2**14


def noise(seed: int, position: int, tokens: np.ndarray) -> np.ndarray:
    """The number of each token in (0, 1): 52 bits of two words, and half a step."""
    k0, k1, k2, k3 = row_key(seed, position)
    bits = words(tokens, k0, k1) * 2**20 + words(tokens, k2, k3) // 2**12
    return np.ldexp((2 * bits + 1).astype(np.float64), -53)


def adjusted(logits: np.ndarray, row: Row) -> np.ndarray:
    """Bias, bans and penalties in float32."""
    x = logits.astype(np.float32).copy()
    for token, value in row.bias.items():
        x[token] += np.float32(value)
    if row.allowed is not None:
        banned = np.ones(len(x), dtype=bool)
        banned[list(row.allowed)] = False
        x[banned] = -np.inf
    for token in set(row.prompt + row.output):
        factor = np.float32(row.repetition)
        x[token] = x[token] * factor if x[token] < 0 else x[token] / factor
    for token in set(row.output):
        x[token] -= np.float32(row.frequency) * np.float32(row.output.count(token))
        x[token] -= np.float32(row.presence)
    return x


def draw(logits: np.ndarray, row: Row, ids: Sequence[int] | None = None) -> int:
    """The column of one row; `ids`: the tokens of the columns."""
    ids = range(len(logits)) if ids is None else ids
    x = adjusted(logits, row)
    if not np.isfinite(x.max()):
        return -1
    if row.temperature == 0:
        return int(np.flatnonzero(x == x.max())[0])
    z = (x.astype(np.float64) - float(x.max())) / float(np.float32(row.temperature))
    weights = [int(w) for w in np.floor(np.exp(z) * ONE)]
    floor = math.ceil(Fraction(float(np.float32(row.min_p))) * ONE)
    weights = [w if w >= floor else 0 for w in weights]
    if row.top_k:
        floor = sorted(weights, reverse=True)[min(row.top_k, len(weights)) - 1]
        weights = [w if w >= floor else 0 for w in weights]
    if row.top_p < 1:
        target = float(np.float32(row.top_p)) * float(sum(weights))
        above, floor = 0, max(weights)
        for w in sorted(weights, reverse=True):
            if float(above) >= target:
                break
            above, floor = above + w, w
        weights = [w if w >= floor else 0 for w in weights]
    numbers = noise(row.seed, row.position, np.asarray(ids))
    times = [
        (-math.log(u) / w, column)
        for column, (u, w) in enumerate(zip(numbers.tolist(), weights, strict=True))
        if w
    ]
    return min(times)[1]
