"""A model folder on disk: config, quantized form, tensors, and views of the bytes.

Knows safetensors files, the index and the memory map; knows nothing of slices of a model. Never
loads a pickle.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from math import prod
from pathlib import Path

from arriero.shards.checkpoint.fit import ExpectedTensor, misfits
from arriero.shards.checkpoint.formats.describe import describe
from arriero.shards.checkpoint.formats.form_fit import form_problems
from arriero.shards.checkpoint.formats.scheme import QuantScheme
from arriero.shards.checkpoint.formats.stored import tensor_specs, text_prefix
from arriero.shards.checkpoint.ranges import RangedFolder
from arriero.shards.checkpoint.safetensors_header import DTYPES, StoredTensor
from arriero.shards.checkpoint.shard_files import find_tensors
from arriero.shards.checkpoint.tensor_folder import TensorFolder
from arriero.shards.checkpoint.wrapped_names import unwrapped
from arriero.shards.errors import CheckpointError
from arriero.shards.layout.parts import AnyModel

_FUSED_EXPERTS = ".experts.gate_up_proj"


class Checkpoint(TensorFolder):
    """An open model folder with plain or quantized weights.

    Attributes:
        config: the model, from config.json.
        scheme: quantized form of the weights, from config.json; None for plain weights.
    """

    def __init__(
        self,
        path: Path,
        config: AnyModel,
        stored: Mapping[str, StoredTensor],
        scheme: QuantScheme | None = None,
        ranged: RangedFolder | None = None,
    ) -> None:
        super().__init__(path, stored, ranged)
        self.config, self.scheme = config, scheme

    @classmethod
    def open(cls, path: Path | str) -> Checkpoint:
        """Read config, index and headers of a folder or of an fsspec URL.

        For a URL, weights are fetched only when a reader needs them.

        Raises:
            CheckpointError: a file or tensor is missing, malformed or wrong; the message names the
                file and the tensor.
        """
        if isinstance(path, str) and "://" in path:
            from arriero.shards.checkpoint.remote import ranged_folder

            folder, ranged = ranged_folder(path)
        else:
            folder, ranged = Path(path), None
        if not folder.is_dir():
            raise CheckpointError(
                f"{folder}: is not a folder; give a model folder in Hugging Face layout"
            )
        config, scheme = describe(folder)
        stored = unwrapped(find_tensors(folder, ranged), text_prefix(config))
        if scheme is not None and scheme.method == "fp8":
            stored, scheme = _fp8_names(stored, scheme)
        if scheme is not None and scheme.method.startswith("modelopt"):
            fused = any(name.endswith(_FUSED_EXPERTS) for name in stored)
            scheme = replace(scheme, fused=fused)
        return cls(folder, config, stored, scheme, ranged)

    def check_whole(self) -> None:
        """Compare the folder with all tensors that config and form require.

        Raises:
            CheckpointError: lists the first problems, as `check` does.
        """
        self._refuse(self.misfits())

    @cached_property
    def expected(self) -> dict[str, ExpectedTensor]:
        """All tensors that config and form require."""
        return {
            spec.name: ExpectedTensor(
                shape=spec.shape,
                dtypes=tuple(DTYPES[label] for label in spec.dtypes),
                optional=spec.optional,
                longer=spec.kind in ("embeddings", "head") and not spec.scale,
            )
            for spec in tensor_specs(self.config, self.scheme)
        }

    def misfits(self) -> list[str]:
        """All defects that prevent loading in any layout, one sentence each.

        Raises:
            CheckpointError: the form cannot store a matrix of this shape.
        """
        problems = misfits(self, self.expected)
        if self.scheme is None or problems:
            return problems
        if self.ranged is not None:  # a rank makes the same checks on the bytes that it fetches
            return []
        return form_problems(self, self.config, self.scheme)


def _fp8_names(
    stored: Mapping[str, StoredTensor], scheme: QuantScheme
) -> tuple[dict[str, StoredTensor], QuantScheme]:
    """Unify the two names that tools give to scales; find out if a scale covers matrix or row."""
    renamed = {}
    for name, tensor in stored.items():
        new = name.removesuffix("_inv") if name.endswith(".weight_scale_inv") else name
        renamed[new] = replace(tensor, name=new)
    scales = [
        prod(tensor.shape) for name, tensor in renamed.items() if name.endswith(".weight_scale")
    ]
    return renamed, replace(scheme, per_tensor=max(scales, default=1) == 1)
