"""Rotary position embedding (RoPE): frequencies from the scaling rule of a config.

Knows the rules (none, linear, llama3, yarn) and their arithmetic; knows nothing of configs, heads
and kernels. Needs torch only to compute.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:  # leaders and gateways read a config without loading torch
    from torch import Tensor

RopeScaling = Literal["none", "linear", "llama3", "yarn"]


@dataclass(frozen=True, kw_only=True, slots=True)
class RopeConfig:
    """Rotary position embedding.

    Attributes:
        theta: base of the frequencies.
        scaling: "none"; "linear" (all frequencies are divided by `factor`); "llama3" or "yarn" (the
            frequencies of long waves are divided, of short waves unchanged, between both blended).
        factor: divisor of frequencies; at least 1.
        low: llama3 and yarn: waves longer than original_max / low are divided.
        high: llama3 and yarn: waves shorter than original_max / high are unchanged; may equal
            `low`.
        original_max: llama3 and yarn: number of positions in the first training.
        attention_factor: yarn: factor of cosines and sines; attention scores get the square.
    """

    theta: float
    scaling: RopeScaling = "none"
    factor: float = 1.0
    low: float = 1.0
    high: float = 1.0
    original_max: int = 0
    attention_factor: float = 1.0

    def inv_freq(self, dim: int) -> Tensor:
        """Frequencies of `dim` / 2 pairs: radians a position, float32, shape [dim / 2].

        Equal to the transformers library bit for bit, with the same order of operations, because
        cosines of large positions magnify the last bit. Sources: Su et al., "RoFormer" (2021);
        "llama3": Meta's Llama 3.1 release; YaRN: Peng et al. (2023).
        """
        import torch

        exponents = torch.arange(0, dim, 2, dtype=torch.float32) / dim
        freq: Tensor = 1.0 / (self.theta**exponents)
        if self.scaling == "none":
            return freq
        if self.scaling == "linear":
            return freq / self.factor
        if self.scaling == "yarn":
            return self._yarn(self.theta**exponents)
        wavelength = 2 * math.pi / freq
        longest_unchanged, shortest_divided = (
            self.original_max / self.high,
            self.original_max / self.low,
        )
        scaled = torch.where(wavelength > shortest_divided, freq / self.factor, freq)
        if self.high == self.low:  # no waves between; the blend would divide by zero
            return scaled
        unchanged = (self.original_max / wavelength - self.low) / (self.high - self.low)
        blend = (1 - unchanged) * scaled / self.factor + unchanged * scaled
        between = (wavelength >= longest_unchanged) & (wavelength <= shortest_divided)
        return torch.where(between, blend, scaled)

    def _yarn(self, period: Tensor) -> Tensor:
        """YaRN's frequencies from inverse plain frequencies: a ramp over the pairs blends both."""
        import torch

        dim = 2 * len(period)

        def pair_of(turns: float) -> float:
            """The pair (a fraction) that makes `turns` turns within `original_max` positions."""
            spread = math.log(self.original_max / (turns * 2 * math.pi))
            return dim * spread / (2 * math.log(self.theta))

        first = max(math.floor(pair_of(self.high)), 0)
        last: float = min(math.ceil(pair_of(self.low)), dim - 1)
        if first == last:
            last += 0.001
        ramp = (torch.arange(dim // 2, dtype=torch.float32) - first) / (last - first)
        unchanged = 1 - torch.clamp(ramp, 0, 1)
        return 1.0 / (self.factor * period) * (1 - unchanged) + 1.0 / period * unchanged


def yarn_attention_factor(
    factor: float, scale: float | None = None, all_dims: float | None = None
) -> float:
    """YaRN's default factor of cosines and sines, for a config without `attention_factor`.

    Args:
        factor: divisor of the frequencies of long waves.
        scale: `mscale`; used only together with `all_dims`.
        all_dims: `mscale_all_dim`.
    """

    def scaled(by: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * by * math.log(factor) + 1.0

    if scale and all_dims:
        return scaled(scale) / scaled(all_dims)
    return scaled(1.0)
