"""A model folder on disk: which tensors it holds, and views of their bytes.

Knows safetensors files, their index and the memory map. It refuses to know how a model is cut
into slices, and never unpickles anything.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from math import prod
from pathlib import Path

from arriero.shards.checkpoint.fit import Wanted, misfits
from arriero.shards.checkpoint.formats.describe import describe
from arriero.shards.checkpoint.formats.form_fit import form_problems
from arriero.shards.checkpoint.formats.scheme import QuantScheme
from arriero.shards.checkpoint.formats.stored import tensors_due, text_prefix
from arriero.shards.checkpoint.ranges import RangedFolder
from arriero.shards.checkpoint.safetensors_header import DTYPES, StoredTensor
from arriero.shards.checkpoint.shard_files import find_tensors
from arriero.shards.checkpoint.tensor_folder import (
    TensorFolder,
)
from arriero.shards.checkpoint.wrapped_names import unwrapped
from arriero.shards.errors import CheckpointError
from arriero.shards.layout.parts import AnyModel


class Checkpoint(TensorFolder):
    """An open folder of a model, its weights plain or quantized.

    Attributes:
        config: what its config.json says of the model.
        scheme: what it says of the weights' form; None for plain ones.
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
        """Read config, index and headers of a folder, or of what an fsspec URL names.

        Of a URL's weights no more is fetched than is read.

        Raises:
            CheckpointError: something is missing, malformed or not what it should be; the
                message names the file and the tensor.
        """
        if isinstance(path, str) and "://" in path:
            from arriero.shards.checkpoint.remote import ranged_folder

            folder, ranged = ranged_folder(path)
        else:
            folder, ranged = Path(path), None
        if not folder.is_dir():
            raise CheckpointError(f"{folder}: is not a folder; a model is a folder in HF layout")
        config, scheme = describe(folder)
        stored = unwrapped(find_tensors(folder, ranged), text_prefix(config))
        if scheme is not None and scheme.method == "fp8":
            stored, scheme = _fp8_names(stored, scheme)
        return cls(folder, config, stored, scheme, ranged)

    def check_whole(self) -> None:
        """Compare with all that config and form call for.

        Raises:
            CheckpointError: lists the first few problems, as `check`.
        """
        self._refuse(self.misfits())

    @cached_property
    def wanted(self) -> dict[str, Wanted]:
        """All tensors that config and form call for."""
        return {
            one.name: Wanted(
                shape=one.shape,
                dtypes=tuple(DTYPES[label] for label in one.dtypes),
                optional=one.optional,
                longer=one.kind in ("embeddings", "head") and not one.scale,
            )
            for one in tensors_due(self.config, self.scheme)
        }

    def misfits(self) -> list[str]:
        """All that keeps the folder from being loaded, whatever the layout, one sentence each.

        Raises:
            CheckpointError: a matrix that the form cannot hold.
        """
        problems = misfits(self, self.wanted)
        if self.scheme is None or problems:
            return problems
        if self.ranged is not None:  # a rank fetches what it reads, and finds the same in that
            return []
        return form_problems(self, self.config, self.scheme)


def _fp8_names(
    stored: Mapping[str, StoredTensor], scheme: QuantScheme
) -> tuple[dict[str, StoredTensor], QuantScheme]:
    """Scales under one name (tools write two); whether they are of matrices or of rows."""
    found = {}
    for name, one in stored.items():
        new = name.removesuffix("_inv") if name.endswith(".weight_scale_inv") else name
        found[new] = replace(one, name=new)
    scales = [prod(one.shape) for name, one in found.items() if name.endswith(".weight_scale")]
    return found, replace(scheme, per_tensor=max(scales, default=1) == 1)
