"""Model and quantized form of a folder, from config.json.

Needs no torch; knows nothing of tensors.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from arriero.shards.checkpoint.formats.quant_config import read_scheme, scheme_of
from arriero.shards.checkpoint.formats.scheme import QuantScheme
from arriero.shards.checkpoint.side_files import SIDE_FILES, side_file
from arriero.shards.errors import CheckpointError
from arriero.shards.families.registry import find_family
from arriero.shards.files.bad_file import explain_error
from arriero.shards.files.json_file import read_json_object
from arriero.shards.layout.parts import AnyModel
from arriero.shards.model_config.dense import ModelConfig
from arriero.shards.model_config.end_tokens import with_tokenizer_ends
from arriero.shards.model_config.fields import Fields

_MAX_CONFIG_BYTES = 10_000_000


def read_settings(
    settings: Mapping[str, Any],
    generation: Mapping[str, Any] | None = None,
    *,
    source: str = "config.json",
) -> tuple[AnyModel, QuantScheme | None]:
    """The model and the form of its checkpoint, from the object of config.json.

    Args:
        settings: object of config.json.
        generation: object of generation_config.json, or None without that file.
        source: file name for errors.

    Raises:
        CheckpointError: malformed config, or an unsupported model or form.
    """
    scheme = read_scheme(settings, source=source)
    plain = {name: value for name, value in settings.items() if name != "quantization_config"}
    model: AnyModel = find_family(settings, source).read_config(plain, generation, source=source)
    return model, scheme


def describe(path: Path | str) -> tuple[AnyModel, QuantScheme | None]:
    """Model and form of a folder; the model's end tokens include the tokenizer's.

    Raises:
        CheckpointError: as for `read_settings`, or config.json is missing.
    """
    folder = Path(path)
    try:
        return _describe(folder)
    except OSError as error:
        raise CheckpointError(f"{folder}: {explain_error(folder, error)}") from None


def _describe(folder: Path) -> tuple[AnyModel, QuantScheme | None]:
    if not folder.is_dir():
        raise CheckpointError(
            f"{folder}: is not a folder; give a model folder in Hugging Face layout"
        )
    file, more = folder / "config.json", folder / "generation_config.json"
    if not os.path.lexists(file) or (folder / "adapter_config.json").is_file():
        ModelConfig.from_folder(folder)  # raises an error that tells the kind of folder
    generation = read_json_object(more, _MAX_CONFIG_BYTES) if os.path.lexists(more) else None
    settings = read_json_object(file, _MAX_CONFIG_BYTES)
    model, scheme = read_settings(settings, generation, source=str(file))
    if scheme is None and settings.get("quantization_config") is None:
        scheme = _side_file_scheme(folder)
    return with_tokenizer_ends(model, folder), scheme


def _side_file_scheme(folder: Path) -> QuantScheme | None:
    file = side_file(folder)
    if file is None:
        return None
    return scheme_of(
        Fields(read_json_object(file, _MAX_CONFIG_BYTES), str(file)), SIDE_FILES[file.name]
    )
