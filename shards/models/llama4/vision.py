"""Llama 4's vision tower: computes image features from tiles of pixels.

Knows the structure and tensor names of the tower; knows nothing of image files, tiling and
placeholders. Computes in plain torch: the tower runs once for each image, on large matrices.

Shape legend: I tiles, P patches of a tile, H width of the tower, N heads, D width of a head, F
patches after the pixel shuffle, O width of the text model.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from arriero.shards.checkpoint.tensor_folder import TensorFolder
from arriero.shards.models.llama4.config import VisionConfig

_TILES_AT_ONCE = 4
"""Bounds the memory of activations; the result does not depend on the number."""


class VisionTower:
    """The whole tower, the adapter and the projection into the text model."""

    def __init__(
        self, folder: TensorFolder, config: VisionConfig, device: torch.device, dtype: torch.dtype
    ) -> None:
        """Read the weights.

        Args:
            folder: the checkpoint.
            config: config of the tower.
            device: device of weights and computation.
            dtype: dtype of weights and activations.
        """
        self.config, self._device, self._dtype = config, device, dtype

        def read(name: str) -> Tensor:
            return folder.tensor(name).to(device, dtype, copy=True)

        tower = "vision_model."
        self._patches = read(f"{tower}patch_embedding.linear.weight")
        self._class_H = read(f"{tower}class_embedding")
        self._positions_PH = read(f"{tower}positional_embedding_vlm")
        names = ("layernorm_pre", "layernorm_post")
        self._pre, self._post = (
            (read(f"{tower}{name}.weight"), read(f"{tower}{name}.bias")) for name in names
        )
        parts = (
            *(f"self_attn.{part}_proj" for part in "qkvo"),
            *("mlp.fc1", "mlp.fc2", "input_layernorm", "post_attention_layernorm"),
        )
        self._layers = [
            {
                part: tuple(
                    read(f"{tower}model.layers.{layer}.{part}.{kind}")
                    for kind in ("weight", "bias")
                )
                for part in parts
            }
            for layer in range(config.num_layers)
        ]
        adapter = f"{tower}vision_adapter.mlp."
        self._adapter = [read(f"{adapter}{name}.weight") for name in ("fc1", "fc2")]
        self._projection = read("multi_modal_projector.linear_1.weight")
        self._cos_PD, self._sin_PD = (table.to(device) for table in _angles(config))

    @property
    def nbytes(self) -> int:
        """Bytes of all weights."""
        weights = [self._patches, self._class_H, self._positions_PH, *self._pre, *self._post]
        weights += [tensor for layer in self._layers for pair in layer.values() for tensor in pair]
        return sum(tensor.nbytes for tensor in (*weights, *self._adapter, self._projection))

    @property
    def features_per_tile(self) -> int:
        """Number of features of a tile."""
        config = self.config
        side = config.image_size // config.patch_size
        return int(side * config.pixel_shuffle_ratio) ** 2

    def __call__(self, tiles_ICSS: Tensor) -> Tensor:
        """Features of tiles [I, F, O]: projected output of the tower.

        Args:
            tiles_ICSS: normalised pixels, float [I, colours, side, side].
        """
        parts = torch.split(tiles_ICSS.to(self._device, self._dtype), _TILES_AT_ONCE)
        return torch.cat([F.linear(self.tower(part), self._projection) for part in parts])

    def tower(self, tiles_ICSS: Tensor) -> Tensor:
        """Output of tower and adapter before the projection, [I, F, output_dim]."""
        config, size = self.config, self.config.patch_size
        # [I, P, colours x rows x columns of a patch]
        patches = F.unfold(tiles_ICSS, size, stride=size).transpose(1, 2)
        x_IPH = F.linear(patches, self._patches)
        x_IPH = torch.cat((x_IPH, self._class_H.expand(len(x_IPH), 1, -1)), dim=1)
        x_IPH = self._norm(x_IPH + self._positions_PH, self._pre)
        for layer in self._layers:
            x_IPH = x_IPH + self._attention(self._norm(x_IPH, layer["input_layernorm"]), layer)
            h_IPH = self._norm(x_IPH, layer["post_attention_layernorm"])
            h_IPH = F.gelu(F.linear(h_IPH, *layer["mlp.fc1"]))
            x_IPH = x_IPH + F.linear(h_IPH, *layer["mlp.fc2"])
        x_IPH = self._norm(x_IPH, self._post)[:, :-1]  # the class token came last
        y = _shuffle(x_IPH, config.pixel_shuffle_ratio)
        for weight in self._adapter:
            y = F.gelu(F.linear(y, weight))
        return y

    def _norm(self, x: Tensor, weights: tuple[Tensor, ...]) -> Tensor:
        weight, bias = weights
        return F.layer_norm(x, x.shape[-1:], weight, bias, self.config.norm_eps)

    def _attention(self, x_IPH: Tensor, layer: dict[str, tuple[Tensor, ...]]) -> Tensor:
        heads = (*x_IPH.shape[:2], self.config.num_heads, -1)
        q, k, v = (F.linear(x_IPH, *layer[f"self_attn.{part}_proj"]).view(heads) for part in "qkv")
        q, k = self._rotate(q), self._rotate(k)
        q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v)
        return F.linear(out.transpose(1, 2).flatten(2), *layer["self_attn.o_proj"])

    def _rotate(self, x_IPND: Tensor) -> Tensor:
        """Two-dimensional RoPE on interleaved pairs."""
        cos, sin = self._cos_PD[:, None], self._sin_PD[:, None]
        a, b = x_IPND[..., ::2].float(), x_IPND[..., 1::2].float()
        rotated = torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1)
        return rotated.flatten(-2).to(x_IPND.dtype)


def _angles(config: VisionConfig) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the angles of each patch, [P, D / 2]: half by column, half by row.

    Coordinates count from 1; the angle of the class token is 0.
    """
    side = config.image_size // config.patch_size
    half = config.hidden_size // config.num_heads // 2
    frequency = 1.0 / config.rope_theta ** (torch.arange(0, half, 2)[: half // 2].float() / half)
    patch = torch.arange(side * side)
    by_column = (patch % side + 1)[:, None] * frequency
    by_row = (patch // side + 1)[:, None] * frequency
    angles = torch.cat((by_column, by_row), dim=1)
    angles = torch.cat((angles, torch.zeros(1, angles.shape[1])))
    return angles.cos(), angles.sin()


def _shuffle(x_IPH: Tensor, ratio: float) -> Tensor:
    """Merge square blocks of patches: [I, P * ratio ** 2, H / ratio ** 2], row by row."""
    tiles, patches, width = x_IPH.shape
    side, step = round(patches**0.5), round(1 / ratio)
    grid = x_IPH.view(tiles, side // step, step, side // step, step * width)
    return grid.transpose(2, 3).reshape(tiles, (side // step) ** 2, step * step * width)
