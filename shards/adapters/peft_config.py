"""`adapter_config.json`, as the package peft writes it: ranks, scales, and what an adapter changes.

Knows the fields; knows nothing of tensors and of the model. The file is untrusted input.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from arriero.shards.errors import CheckpointError
from arriero.shards.files.json_file import read_json_object

CONFIG_FILE = "adapter_config.json"
MAX_CONFIG_BYTES = 10_000_000
MAX_RANK = 1024
"""Largest rank of an adapter; a group may set a lower limit."""
MAX_PATTERNS = 10_000

_CHANGED_BASE = ("pissa", "olora", "corda", "loftq", "eva", "lora_ga")
"""Values of `init_lora_weights` that change the weights of the base model."""
_REFUSED: dict[str, tuple[Any, str]] = {
    "use_dora": (False, "DoRA scales whole columns; merge the adapter and serve the result"),
    "lora_bias": (False, "biases of adapters are not supported; train without `lora_bias`"),
    "modules_to_save": (None, "whole modules replace the base model's; merge the adapter"),
    "trainable_token_indices": (None, "changed rows of the embedding; merge the adapter"),
    "layer_replication": (None, "it changes the number of layers; merge the adapter"),
    "use_qalora": (False, "QALoRA pools the inputs; merge the adapter"),
    "alora_invocation_tokens": (None, "activated LoRA changes within a prompt"),
}
"""Fields that must have a harmless value: the value, and what to do about another."""


T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, slots=True)
class PeftConfig:
    """What an adapter's settings say.

    Attributes:
        rank, alpha: of each module that no pattern names.
        rank_pattern, alpha_pattern: values by pattern of the module's name.
        rslora: the scale is alpha / sqrt(rank) instead of alpha / rank.
        parameters: names of parameters that are no modules: fused experts.
    """

    rank: int
    alpha: float
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    rslora: bool = False
    parameters: tuple[str, ...] = ()

    @classmethod
    def read(cls, folder: Path) -> PeftConfig:
        """Read and check the settings of an adapter.

        Raises:
            CheckpointError: no such file, no LoRA adapter, a field out of range, or a variant of
                LoRA that is not supported; the message names the field.
        """
        file = folder / CONFIG_FILE
        settings = read_json_object(file, MAX_CONFIG_BYTES)
        kind = settings.get("peft_type")
        if kind != "LORA":
            raise _refusal(file, "peft_type", kind, "only LORA adapters can be served")
        for name, (harmless, remedy) in _REFUSED.items():
            value = settings.get(name, harmless)
            if value not in (harmless, None, False, [], {}):
                raise _refusal(file, name, value, remedy)
        if settings.get("bias", "none") != "none":
            raise _refusal(file, "bias", settings["bias"], "train with `bias`='none'")
        start = settings.get("init_lora_weights", True)
        if isinstance(start, str) and start.lower().startswith(_CHANGED_BASE):
            remedy = "it changed the base model's weights; convert it to a plain LoRA, or merge it"
            raise _refusal(file, "init_lora_weights", start, remedy)
        parameters = settings.get("target_parameters") or []
        if not isinstance(parameters, list) or not all(isinstance(p, str) for p in parameters):
            raise _refusal(file, "target_parameters", parameters, "a list of names is expected")
        return cls(
            rank=_rank(file, "r", settings.get("r")),
            alpha=_alpha(file, "lora_alpha", settings.get("lora_alpha")),
            rank_pattern=_pattern(file, "rank_pattern", settings, _rank),
            alpha_pattern=_pattern(file, "alpha_pattern", settings, _alpha),
            rslora=bool(settings.get("use_rslora")),
            parameters=tuple(parameters),
        )

    def scale(self, module: str, rank: int) -> float:
        """Factor of the product of a module, from its name and its rank."""
        alpha = _match(self.alpha_pattern, module, self.alpha)
        return alpha / math.sqrt(rank) if self.rslora else alpha / rank

    def rank_of(self, module: str) -> int:
        """Rank of a module, from its name."""
        return _match(self.rank_pattern, module, self.rank)


def _match(pattern: Mapping[str, T], module: str, default: T) -> T:
    """The value of the first pattern that matches the whole name or its end after a dot."""
    for key, value in pattern.items():
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    return default


def _pattern(
    file: Path, name: str, settings: Mapping[str, Any], read: Callable[[Path, str, Any], T]
) -> dict[str, T]:
    value = settings.get(name) or {}
    if not isinstance(value, dict) or len(value) > MAX_PATTERNS:
        raise _refusal(file, name, value, "an object of numbers by pattern is expected")
    for key in value:
        # only plain names: a hostile pattern could run for ever
        if not re.fullmatch(r"\^?[\w.]+\$?", key):
            raise _refusal(file, name, key, "give the names of modules, without other patterns")
    return {key: read(file, f"{name}[{key}]", number) for key, number in value.items()}


def _rank(file: Path, name: str, value: Any) -> int:  # noqa: ANN401
    if type(value) is not int or not 1 <= value <= MAX_RANK:
        raise _refusal(file, name, value, f"a rank is a number from 1 to {MAX_RANK}")
    return value


def _alpha(file: Path, name: str, value: Any) -> float:  # noqa: ANN401
    if type(value) not in (int, float) or not math.isfinite(value):
        raise _refusal(file, name, value, "a finite number is expected")
    return float(value)


def _refusal(file: Path, name: str, value: Any, remedy: str) -> CheckpointError:  # noqa: ANN401
    return CheckpointError(f"{file}: `{name}`={str(value)[:200]}: {remedy}")
