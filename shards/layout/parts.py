"""The types that stand for any model family and for any part of a model."""

from __future__ import annotations

from arriero.shards.layout.dense import SlicePart
from arriero.shards.layout.moe import MoEPart
from arriero.shards.model_config.dense import ModelConfig
from arriero.shards.model_config.llama4 import Llama4Config

AnyModel = ModelConfig | Llama4Config

AnyPart = SlicePart | MoEPart
