"""Config of a dense Qwen3, from a folder's `config.json`.

Knows Qwen3's defaults and refuses attention windows; the numbers are those of a dense Llama. Knows
nothing of tensors, slices and engines.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from arriero.shards.errors import CheckpointError
from arriero.shards.model_config.dense import ModelConfig
from arriero.shards.model_config.fields import Fields

QWEN3_ARCHITECTURE = "Qwen3ForCausalLM"

_DEFAULTS = {"max_position_embeddings": 32768}
_REQUIRED = ("head_dim", "num_key_value_heads")
"""Fields whose default in Llama's configs differs from the default in Qwen3's."""
_WINDOW = ("sliding_window", "max_window_layers", "use_sliding_window")


@dataclass(frozen=True, kw_only=True, slots=True)
class Qwen3Config(ModelConfig):
    """A dense Qwen3; `head_dim` is independent of `hidden_size` and `num_heads`."""

    @classmethod
    def from_dict(
        cls,
        settings: Mapping[str, Any],
        generation: Mapping[str, Any] | None = None,
        *,
        source: str = "config.json",
    ) -> Self:
        """A model config from the objects of config.json and generation_config.json.

        Args:
            settings: object of config.json, in the spelling of transformers 4 or 5.
            generation: object of generation_config.json, or None without that file.
            source: file name for errors.

        Raises:
            CheckpointError: a missing or malformed field, or an attention window.
        """
        read = Fields(settings, source)
        for name in _REQUIRED:
            if read.get(name) is None:
                raise CheckpointError(
                    f"{source}: `{name}` is missing, but a Qwen3 config requires this field; add it"
                )
        if read.flag("use_sliding_window"):
            raise read.wrong(
                "use_sliding_window",
                True,
                f"false: a `sliding_window` of {read.get('sliding_window')} in layers from "
                f"`max_window_layers`={read.get('max_window_layers')} is not supported for Qwen3",
            )
        plain = {name: value for name, value in settings.items() if name not in _WINDOW}
        return cls.from_fields(Fields(_DEFAULTS | plain, source), generation, QWEN3_ARCHITECTURE)

    def num_parameters(self) -> int:
        """Number of weights; a tied head counts once."""
        # not super(): a dataclass with slots is another class than the one that super() names
        return ModelConfig.num_parameters(self) + 2 * self.head_dim * self.num_layers
