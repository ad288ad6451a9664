"""An adapter's matrices, by the module of the model that they change.

Knows the names and shapes that peft and unsloth write; knows nothing of ranks and slots.

Shape legend: R rank, I inputs, O outputs, E experts.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from arriero.shards.adapters.bank_plan import EMBEDDINGS, adapted_modules
from arriero.shards.adapters.base_tables import check_tables, table_of
from arriero.shards.adapters.peft_config import CONFIG_FILE, PeftConfig
from arriero.shards.adapters.root import ADAPTER_FILES
from arriero.shards.checkpoint.formats.modules import Module
from arriero.shards.checkpoint.index import PICKLES
from arriero.shards.checkpoint.safetensors_header import StoredTensor, read_header
from arriero.shards.checkpoint.tensor_folder import FLOAT_DTYPES, TensorFolder
from arriero.shards.config.group import GroupConfig
from arriero.shards.errors import CheckpointError
from arriero.shards.families.registry import family_of
from arriero.shards.files.json_file import read_json_object
from arriero.shards.layout.parts import AnyModel

WEIGHTS_FILE = ADAPTER_FILES[1]
MAX_BYTES = 64 << 30
_A, _B = "lora_A", "lora_B"
_EMBEDDING_HALVES = {"lora_embedding_A": _A, "lora_embedding_B": _B}
_PREFIX = "base_model.model."
"""What peft puts before the names of the model's modules, which its patterns match without it."""
_MAX_LISTED = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class Matrices:
    """The change of one module: y += (x Aᵀ) B.

    Attributes:
        a: [R, I], or [E, R, I] of fused experts. The inputs of an embedding are the tokens.
        b: [R, O], or [E, R, O]; times the scale.
    """

    a: Tensor
    b: Tensor

    @property
    def rank(self) -> int:
        """The rank."""
        return self.a.shape[-2]


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """A LoRA adapter, checked against a model.

    Attributes:
        folder: where the adapter is.
        digest: 32 hex digits of BLAKE2b over settings and weights.
        names: for each changed module of the model, the names of A and B in the file.
        rank: the largest rank.
    """

    folder: TensorFolder
    config: PeftConfig
    digest: str
    names: Mapping[str, tuple[str, str]]
    modules: Mapping[str, Module]

    @classmethod
    def open(cls, path: Path, modules: Iterable[Module], model_path: str = "") -> Adapter:
        """Read settings and headers of an adapter, and match its tensors with the model's modules.

        Args:
            path: folder of the adapter.
            modules: modules of the model.
            model_path: folder of the model, whose embedding and head must be those of the file, if
                the file has them.

        Raises:
            CheckpointError: a file is missing or malformed; a tensor changes no module of the
                model, has another shape, or is one of a pair whose other half is missing.
        """
        config = PeftConfig.read(path)
        stored = _read_weights(path)
        known = {module.name: module for module in adapted_modules(modules)}
        by_end = {_end(name): module for name, module in known.items()}
        pairs: dict[str, dict[str, str]] = {}
        tables, strangers = {}, []
        for name in stored:
            module, half = _split(name, by_end, config, stored)
            if module is not None:
                pairs.setdefault(module, {})[half] = name
            elif (table := table_of(name, by_end)) is not None:
                tables[table] = name
            else:
                strangers.append(name)
        if strangers:
            raise CheckpointError(
                f"{path / WEIGHTS_FILE}: {_listed(strangers)} change no module of this model that "
                "an adapter may change; serve the adapter with its own base model"
            )
        if not pairs:
            raise CheckpointError(f"{path / WEIGHTS_FILE}: has no tensors; train the adapter again")
        halves = [module for module, pair in pairs.items() if len(pair) < 2]
        if halves:
            raise CheckpointError(
                f"{path / WEIGHTS_FILE}: {_listed(halves)} have only one of `{_A}` and `{_B}`; "
                "fetch the adapter again"
            )
        adapter = cls(
            folder=TensorFolder(path, stored),
            config=config,
            digest=_digest(path),
            names={module: (pair[_A], pair[_B]) for module, pair in sorted(pairs.items())},
            modules={name: known[name] for name in pairs},
        )
        adapter._check_shapes()
        check_tables(adapter.folder, tables, known, model_path)
        return adapter

    @cached_property
    def rank(self) -> int:
        """The largest rank of a module."""
        return max(self._rank(name) for name in self.names)

    def matrices(self, name: str) -> Matrices:
        """The matrices of a module, float32.

        Raises:
            CheckpointError: a number is not finite.
        """
        module, rank = self.modules[name], self._rank(name)
        a, b = (self.folder.tensor(stored).float() for stored in self.names[name])
        for stored, tensor in zip(self.names[name], (a, b), strict=True):
            if not torch.isfinite(tensor).all():
                raise CheckpointError(
                    f"{self.folder.path / WEIGHTS_FILE}: {stored!r} has numbers that are not "
                    "finite; train the adapter again"
                )
        scale = self.config.scale(self._path(name), rank)
        if not module.experts:
            return Matrices(a=a, b=b.T * scale)
        # Of fused experts peft multiplies the inputs with B first: W[e] is [in, out], and
        # W[e] += B[:, :, e] A[e], with B viewed as [in, rank, experts].
        inputs = b.view(b.shape[0], rank, module.experts).permute(2, 1, 0)
        outputs = a.view(module.experts, rank, a.shape[1])
        return Matrices(a=inputs.contiguous(), b=outputs * scale)

    def _rank(self, name: str) -> int:
        rows = self.folder.shape(self.names[name][0])[0]
        return rows // max(1, self.modules[name].experts)

    def _path(self, name: str) -> str:
        """Name of a module in the model that was trained, which patterns match."""
        stored = self.names[name][0]
        end = _end(name)
        if "layers." in end:
            before = stored.rpartition("layers.")[0]
        else:
            before = stored[: stored.index(f"{end}.lora_")]
        return f"{before.removeprefix(_PREFIX)}{end}"

    def _check_shapes(self) -> None:
        for name, pair in self.names.items():
            module, rank = self.modules[name], self.config.rank_of(self._path(name))
            outs, ins = module.shape
            count = max(1, module.experts)
            if module.experts or module.kind == EMBEDDINGS:
                outs, ins = ins, outs
            expected = ((rank * count, ins), (outs, rank * count))
            for stored, shape in zip(pair, expected, strict=True):
                if self.folder.shape(stored) != shape:
                    raise CheckpointError(
                        f"{self.folder.path / WEIGHTS_FILE}: {stored!r} has shape "
                        f"{list(self.folder.shape(stored))}, but {name} at rank {rank} needs "
                        f"{list(shape)}; serve the adapter with its own base model"
                    )
                if self.folder.dtype(stored) not in FLOAT_DTYPES:
                    raise CheckpointError(
                        f"{self.folder.path / WEIGHTS_FILE}: {stored!r} is of dtype "
                        f"{self.folder.dtype(stored)}; float32, bfloat16 and float16 can be served"
                    )


def open_adapters(config: GroupConfig, model: AnyModel) -> tuple[Adapter, ...]:
    """The adapters of a group, in order of their slots.

    Raises:
        CheckpointError: see `Adapter.open`; the message names the adapter.
    """
    modules = family_of(model).modules(model, True) if config.adapters else ()
    opened = []
    for file in config.adapters:
        try:
            opened.append(Adapter.open(Path(file.path), modules, config.model_path))
        except CheckpointError as error:
            raise CheckpointError(f"adapter {file.name!r}: {error}") from None
    return tuple(opened)


def _read_weights(path: Path) -> dict[str, StoredTensor]:
    file = path / WEIGHTS_FILE
    if not file.exists():
        pickles = [entry.name for entry in path.iterdir() if entry.suffix in PICKLES]
        if pickles:
            raise CheckpointError(
                f"{path}: holds {pickles[0]}, a pickle, which can run code: save the adapter as "
                f"{WEIGHTS_FILE} (`save_pretrained(..., safe_serialization=True)`)"
            )
    return read_header(file)


def _end(name: str) -> str:
    """A module's name from its layer on, or its last part: the same under every prefix."""
    _, marker, rest = name.rpartition("layers.")
    return f"{marker}{rest}" if marker else rest.rpartition(".")[2]


def _split(
    name: str, by_end: Mapping[str, Module], config: PeftConfig, stored: Mapping[str, StoredTensor]
) -> tuple[str | None, str]:
    """The model's module and the half of the pair that a tensor is of; None for no module."""
    if "vision" in name:
        return None, ""
    for marker, half in _EMBEDDING_HALVES.items():
        before, matched, _ = name.rpartition(f".{marker}")
        module = by_end.get(_end(before))
        if matched and module is not None and module.kind == EMBEDDINGS:
            return module.name, half
    for half in (_A, _B):
        before, matched, after = name.rpartition(f".{half}.")
        if not matched or after.rpartition(".")[2] != "weight":
            continue
        end = _end(before)
        module = by_end.get(end) or by_end.get(_expert_module(end, config, stored))
        if module is not None and module.kind != EMBEDDINGS:
            return module.name, half
    return None, ""


def _expert_module(end: str, config: PeftConfig, stored: Mapping[str, StoredTensor]) -> str:
    """Name of the fused experts' parameter that peft stores under the name of the module.

    With two adapted parameters peft nests: the inner one, `base_layer`, is `gate_up_proj`.
    """
    inner, nesting, _ = end.partition(".base_layer")
    if nesting:
        return f"{inner}.gate_up_proj"
    nested = any(f"{end}.base_layer.{_A}." in other for other in stored)
    only = [p.rpartition(".")[2] for p in config.parameters if "experts" in p]
    last = "down_proj" if nested or only == ["down_proj"] else "gate_up_proj"
    return f"{end}.{last}"


def _digest(path: Path) -> str:
    """Identifier of an adapter: every byte of settings and weights."""
    settings = read_json_object(path / CONFIG_FILE)
    digest = hashlib.blake2b(json.dumps(settings, sort_keys=True).encode(), digest_size=16)
    with (path / WEIGHTS_FILE).open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _listed(names: list[str]) -> str:
    more = len(names) - _MAX_LISTED
    shown = ", ".join(repr(name[:200]) for name in names[:_MAX_LISTED])
    return shown + (f" and {more} more" if more > 0 else "")
