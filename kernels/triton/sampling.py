"""From logits to tokens: bias, bans, penalties, filters and the draw, as `Ops.sample` defines.

Many programs take the chunks of a row's vocabulary at once. Filters sum integers and the draw takes
a minimum, so that the order changes no bit. Knows rows of numbers; knows nothing of text and
requests.

Shape legend: R rows, V vocabulary, C chunks of a row.
"""

from __future__ import annotations

import torch
from torch import Tensor

import triton.language as tl
from arriero.kernels.philox import KEY_STEPS, MULTIPLIERS, ROUNDS
from arriero.kernels.reference.sampling import FRACTION_BITS, MAX_VOCAB, with_logprobs
from arriero.kernels.sampling_rows import Sampled, SamplingRows
from arriero.kernels.token_noise import FACTORS, SHIFTS
from arriero.kernels.triton import filters
from arriero.kernels.triton.launch import EXACT, kernel
from arriero.kernels.triton.logit_tiles import LogitTiles, logit_tiles

_ONE = tl.constexpr(2.0**FRACTION_BITS)
_MASK = tl.constexpr(0xFFFFFFFF)
_ROUNDS = tl.constexpr(ROUNDS)
_M0, _M1 = (tl.constexpr(m) for m in MULTIPLIERS)
_K0, _K1 = (tl.constexpr(k) for k in KEY_STEPS)
_F0, _F1, _F2 = (tl.constexpr(factor) for factor in FACTORS)
_S0, _S1, _S2, _S3 = (tl.constexpr(shift) for shift in SHIFTS)
_NO_TOKEN = tl.constexpr(2**31 - 1)


@kernel
def _adjust(
    logits: tl.tensor,
    allowed: tl.tensor,
    seen: tl.tensor,
    counts: tl.tensor,
    repetition: tl.tensor,
    frequency: tl.tensor,
    presence: tl.tensor,
    adjusted: tl.tensor,
    chunk_max: tl.tensor,
    chunk_best: tl.tensor,
    num_rows: tl.tensor,
    size: tl.tensor,
    stride: tl.tensor,
    num_chunks: tl.tensor,
    BANS: tl.constexpr,
    REPETITION: tl.constexpr,
    FREQUENCY: tl.constexpr,
    PRESENCE: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
) -> None:
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    valid_row = row < num_rows
    token = (tl.program_id(1) * CHUNK + tl.arange(0, CHUNK))[None, :]
    valid = valid_row[:, None] & (token < size)
    row64 = row.to(tl.int64)[:, None]
    at = row64 * size + token
    x = tl.load(logits + row64 * stride + token, mask=valid, other=-float("inf"))
    if BANS:
        words = allowed + row64 * tl.cdiv(size, 32) + token // 32
        bit = (tl.load(words, mask=valid, other=-1) >> (token % 32)) & 1
        x = tl.where(bit != 0, x, -float("inf"))
    if REPETITION:
        factor = tl.load(repetition + row, mask=valid_row, other=1.0)[:, None]
        divisor = tl.broadcast_to(factor, x.shape)
        changed = tl.where(x < 0, x * factor, tl.div_rn(x, divisor))
        x = tl.where(tl.load(seen + at, mask=valid, other=0) != 0, changed, x)
    if FREQUENCY or PRESENCE:
        count = tl.load(counts + at, mask=valid, other=0)
        if FREQUENCY:
            x -= tl.load(frequency + row, mask=valid_row, other=0.0)[:, None] * count.to(tl.float32)
        if PRESENCE:
            occurs = (count > 0).to(tl.float32)
            x -= tl.load(presence + row, mask=valid_row, other=0.0)[:, None] * occurs
    x = tl.where(x == x, x, float("inf"))  # a NaN makes the row's maximum infinite
    if BANS or REPETITION or FREQUENCY or PRESENCE:
        tl.store(adjusted + at, x, mask=valid)
    greatest = tl.max(x, 1)
    best = tl.min(tl.where((x == greatest[:, None]) & valid, token, _NO_TOKEN), 1)
    to = row64 * num_chunks + tl.program_id(1)
    tl.store(chunk_max + to, greatest[:, None], mask=valid_row[:, None])
    tl.store(chunk_best + to, best[:, None], mask=valid_row[:, None])


@kernel
def _greatest(
    chunk_max: tl.tensor,
    row: tl.tensor,
    num_rows: tl.tensor,
    num_chunks: tl.tensor,
    CHUNKS: tl.constexpr,
) -> tl.tensor:
    """The greatest logit of each row, and the greatest logits by chunk [R, C]."""
    chunk = tl.arange(0, CHUNKS)[None, :]
    valid = (row < num_rows)[:, None] & (chunk < num_chunks)
    at = chunk_max + row.to(tl.int64)[:, None] * num_chunks + chunk
    values = tl.load(at, mask=valid, other=-float("inf"))
    return tl.max(values, 1), values


@kernel
def _is_finite(x: tl.tensor) -> tl.tensor:
    return (x > -float("inf")) & (x < float("inf"))


@kernel
def _weigh(
    x: tl.tensor,
    chunk_max: tl.tensor,
    temperature: tl.tensor,
    min_p: tl.tensor,
    weights: tl.tensor,
    num_rows: tl.tensor,
    size: tl.tensor,
    stride: tl.tensor,
    num_chunks: tl.tensor,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
) -> None:
    """The integer weight of each token; 0 where min-p drops the token, and in greedy rows."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    valid_row = row < num_rows
    token = (tl.program_id(1) * CHUNK + tl.arange(0, CHUNK))[None, :]
    valid = valid_row[:, None] & (token < size)
    greatest, _ = _greatest(chunk_max, row, num_rows, num_chunks, CHUNKS)
    row_temperature = tl.load(temperature + row, mask=valid_row, other=0.0)
    draws = (row_temperature > 0) & _is_finite(greatest)
    row_temperature = tl.where(draws, row_temperature, 1.0).to(tl.float64)[:, None]
    greatest = tl.where(draws, greatest, 0.0).to(tl.float64)[:, None]
    row64 = row.to(tl.int64)[:, None]
    value = tl.load(x + row64 * stride + token, mask=valid, other=-float("inf"))
    # Rows without a draw get logits that are safe in the arithmetic below.
    value = tl.where(draws[:, None], value, -1.0).to(tl.float64)
    weight = (tl.exp((value - greatest) / row_temperature) * _ONE).to(tl.int64)
    least = tl.load(min_p + row, mask=valid_row, other=0.0).to(tl.float64)
    least = tl.ceil(least * _ONE).to(tl.int64)[:, None]
    weight = tl.where(valid & draws[:, None] & (weight >= least), weight, 0)
    tl.store(weights + row64 * size + token, weight, mask=valid)


@kernel
def row_key(seed: tl.tensor, position: tl.tensor) -> tl.tensor:
    """As `kernels.philox.row_key`: four uint32 for each seed and position, both int64."""
    c0, c1 = position & _MASK, (position >> 32) & _MASK
    k0, k1 = seed & _MASK, (seed >> 32) & _MASK
    c2, c3 = c0 * 0, c0 * 0
    m0, m1 = c2 + _M0, c2 + _M1
    for _ in tl.static_range(_ROUNDS):
        # The product of 32 x 32 bits fills 64 bits: int64 wraps, and the masks remove the sign.
        p0, p1 = c0 * m0, c2 * m1
        c0, c1, c2, c3 = (
            ((p1 >> 32) & _MASK) ^ c1 ^ k0,
            p1 & _MASK,
            ((p0 >> 32) & _MASK) ^ c3 ^ k1,
            p0 & _MASK,
        )
        k0, k1 = (k0 + _K0) & _MASK, (k1 + _K1) & _MASK
    return c0.to(tl.uint32), c1.to(tl.uint32), c2.to(tl.uint32), c3.to(tl.uint32)


@kernel
def _mix(token: tl.tensor, first: tl.tensor, second: tl.tensor) -> tl.tensor:
    """As `kernels.token_noise.mix`, uint32: products and sums wrap."""
    x = token ^ first
    x = (x ^ (x >> _S0)) * _F0
    x = ((x ^ (x >> _S1)) + second) * _F1
    x = (x ^ (x >> _S2)) * _F2
    return x ^ (x >> _S3)


@kernel
def token_uniform(
    token: tl.tensor, k0: tl.tensor, k1: tl.tensor, k2: tl.tensor, k3: tl.tensor
) -> tl.tensor:
    """As `kernels.token_noise.token_uniforms`: float64, of ids and words of keys in uint32."""
    high = _mix(token, k0, k1).to(tl.int64)
    low = _mix(token, k2, k3).to(tl.int64)
    return ((high << 21) | (low >> 11) | 1).to(tl.float64) * (2.0**-53)


@kernel
def _race(
    weights: tl.tensor,
    floors: tl.tensor,
    seeds: tl.tensor,
    positions: tl.tensor,
    token_ids: tl.tensor,
    chunk_time: tl.tensor,
    chunk_winner: tl.tensor,
    num_rows: tl.tensor,
    size: tl.tensor,
    num_chunks: tl.tensor,
    HAS_IDS: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
) -> None:
    """The least -log(u) / weight of each chunk of a row, and its first column."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    valid_row = row < num_rows
    column = (tl.program_id(1) * CHUNK + tl.arange(0, CHUNK))[None, :]
    row64 = row.to(tl.int64)
    at = weights + row64[:, None] * size + column
    weight = tl.load(at, mask=valid_row[:, None] & (column < size), other=0)
    floor = tl.load(floors + row, mask=valid_row, other=0)
    runs = (weight > 0) & (weight >= floor[:, None])
    token = column
    if HAS_IDS:
        token = tl.load(token_ids + column, mask=column < size, other=0)
    seed = tl.load(seeds + row, mask=valid_row, other=0)
    position = tl.load(positions + row, mask=valid_row, other=0)
    k0, k1, k2, k3 = row_key(seed[:, None], position[:, None])
    u = token_uniform(token.to(tl.uint32), k0, k1, k2, k3)
    time = -tl.log(u) / tl.where(runs, weight, 1).to(tl.float64)
    time = tl.where(runs, time, float("inf"))
    least = tl.min(time, 1)
    winner = tl.min(tl.where(runs & (time == least[:, None]), column, _NO_TOKEN), 1)
    to = row64 * num_chunks + tl.program_id(1)
    tl.store(chunk_time + to, least, mask=valid_row)
    tl.store(chunk_winner + to, winner, mask=valid_row)


@kernel
def _pick(
    chunk_max: tl.tensor,
    chunk_best: tl.tensor,
    chunk_time: tl.tensor,
    chunk_winner: tl.tensor,
    temperature: tl.tensor,
    tokens: tl.tensor,
    num_rows: tl.tensor,
    num_chunks: tl.tensor,
    ALL_GREEDY: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNKS: tl.constexpr,
) -> None:
    """The token of each row from the best of its chunks; -1 where no logit is finite."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    valid_row = row < num_rows
    chunk = tl.arange(0, CHUNKS)[None, :]
    valid = valid_row[:, None] & (chunk < num_chunks)
    at = row.to(tl.int64)[:, None] * num_chunks + chunk
    greatest, by_chunk = _greatest(chunk_max, row, num_rows, num_chunks, CHUNKS)
    best = tl.load(chunk_best + at, mask=valid, other=_NO_TOKEN)
    token = tl.min(tl.where(by_chunk == greatest[:, None], best, _NO_TOKEN), 1)
    if not ALL_GREEDY:
        row_temperature = tl.load(temperature + row, mask=valid_row, other=0.0)
        time = tl.load(chunk_time + at, mask=valid, other=float("inf"))
        winner = tl.load(chunk_winner + at, mask=valid, other=_NO_TOKEN)
        first = time == tl.min(time, 1)[:, None]
        drawn = tl.min(tl.where(first, winner, _NO_TOKEN), 1)
        token = tl.where(row_temperature == 0, token, drawn)
    token = tl.where(_is_finite(greatest), token, -1)
    tl.store(tokens + row, token, mask=valid_row)


def sample(logits_RV: Tensor, rows: SamplingRows) -> Sampled:
    """Draw a token for each row; see `Ops.sample`. Nothing here waits for the device."""
    num_rows, size = logits_RV.shape
    if size > MAX_VOCAB:
        raise ValueError(f"sample: the vocabulary has {size} tokens; the limit is {MAX_VOCAB}")
    raw_RV = logits_RV.float()
    if raw_RV.stride(-1) != 1:
        raw_RV = raw_RV.contiguous()
    device = raw_RV.device
    tokens_R = torch.empty(num_rows, dtype=torch.int32, device=device)
    if not num_rows:
        return Sampled(tokens_R=tokens_R)
    tiles = logit_tiles(num_rows, size)
    x_RV, chunk_max, chunk_best = _adjusted(raw_RV, rows, tiles)
    time_RC = winner_RC = None
    if not rows.all_greedy:
        time_RC, winner_RC = _raced(x_RV, chunk_max, rows, tiles)
    _pick[(tiles.row_programs,)](
        chunk_max,
        chunk_best,
        time_RC,
        winner_RC,
        rows.temperature_R,
        tokens_R,
        num_rows,
        tiles.chunks,
        ALL_GREEDY=rows.all_greedy,
        ROWS=tiles.rows,
        CHUNKS=tiles.chunks_power,
        **EXACT,
    )
    if rows.num_logprobs < 0:
        return Sampled(tokens_R=tokens_R)
    return with_logprobs(raw_RV, tokens_R.long(), rows.num_logprobs)


def _raced(
    x_RV: Tensor, chunk_max: Tensor, rows: SamplingRows, tiles: LogitTiles
) -> tuple[Tensor, Tensor]:
    """The least time of each chunk in the race, float64 [R, C], and its column, int32 [R, C]."""
    device, shape = x_RV.device, (tiles.num_rows, tiles.chunks)
    weights_RV = torch.empty(tiles.num_rows, tiles.size, dtype=torch.int64, device=device)
    _weigh[tiles.grid](
        x_RV,
        chunk_max,
        rows.temperature_R,
        rows.min_p_R,
        weights_RV,
        tiles.num_rows,
        tiles.size,
        x_RV.stride(0),
        tiles.chunks,
        ROWS=tiles.rows,
        CHUNK=tiles.chunk,
        CHUNKS=tiles.chunks_power,
        **EXACT,
    )
    floor_R = torch.zeros(tiles.num_rows, dtype=torch.int64, device=device)
    for by_mass, parameter_R in ((False, rows.top_k_R), (True, rows.top_p_R)):
        floor_R = filters.floor(weights_RV, rows, parameter_R, by_mass, floor_R, tiles)
    time_RC = torch.empty(shape, dtype=torch.float64, device=device)
    winner_RC = torch.empty(shape, dtype=torch.int32, device=device)
    _race[tiles.grid](
        weights_RV,
        floor_R,
        rows.seed_R,
        rows.position_R,
        rows.token_ids_V,
        time_RC,
        winner_RC,
        tiles.num_rows,
        tiles.size,
        tiles.chunks,
        HAS_IDS=rows.token_ids_V is not None,
        ROWS=tiles.rows,
        CHUNK=tiles.chunk,
        **EXACT,
    )
    return time_RC, winner_RC


def _adjusted(
    raw_RV: Tensor, rows: SamplingRows, tiles: LogitTiles
) -> tuple[Tensor, Tensor, Tensor]:
    """Logits after bias, bans and penalties; the greatest of each chunk, and its first token."""
    start_RV = raw_RV
    if rows.bias is not None:  # few tokens, scattered: not worth a kernel
        row_N, token_N, value_N = rows.bias
        start_RV = raw_RV.index_put((row_N, token_N), value_N, accumulate=True)
    shape = (tiles.num_rows, tiles.chunks)
    chunk_max = torch.empty(shape, dtype=torch.float32, device=raw_RV.device)
    chunk_best = torch.empty(shape, dtype=torch.int32, device=raw_RV.device)
    changes = (rows.allowed_RW, rows.repetition_R, rows.frequency_R, rows.presence_R)
    x_RV = start_RV
    if any(change is not None for change in changes):
        x_RV = torch.empty(tiles.num_rows, tiles.size, dtype=torch.float32, device=raw_RV.device)
    _adjust[tiles.grid](
        start_RV,
        rows.allowed_RW,
        rows.seen_RV,
        rows.counts_RV,
        rows.repetition_R,
        rows.frequency_R,
        rows.presence_R,
        x_RV,
        chunk_max,
        chunk_best,
        tiles.num_rows,
        tiles.size,
        start_RV.stride(0),
        tiles.chunks,
        BANS=rows.allowed_RW is not None,
        REPETITION=rows.repetition_R is not None,
        FREQUENCY=rows.frequency_R is not None,
        PRESENCE=rows.presence_R is not None,
        ROWS=tiles.rows,
        CHUNK=tiles.chunk,
        **EXACT,  # a penalty times its count is rounded before the subtraction
    )
    return x_RV, chunk_max, chunk_best
