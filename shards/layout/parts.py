"""Union types of all model families and of the parts of their models."""

from __future__ import annotations

from arriero.shards.layout.dense import SlicePart
from arriero.shards.layout.moe import MoEPart
from arriero.shards.model_config.dense import ModelConfig
from arriero.shards.model_config.llama4 import Llama4Config

AnyModel = ModelConfig | Llama4Config

AnyPart = SlicePart | MoEPart
