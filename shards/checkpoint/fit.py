"""Comparison of a folder's tensors with the model's: missing, wrong shape or dtype, unexpected.

A tensor that no part of the model reads is accepted outside the model (a vision tower beside a
text model, optimizer state). Inside a layer, or beside a weight that is read, an unexpected tensor
would change the output: the folder is refused unless the tensor has no effect. Knows names, shapes
and a few values; knows no quantized forms.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

import torch

from arriero.shards.checkpoint.llama_names import EMBEDDING, HEAD
from arriero.shards.checkpoint.safetensors_header import StoredTensor

if TYPE_CHECKING:
    from arriero.shards.checkpoint.tensor_folder import TensorFolder

KV_SCALES = (
    ".k_scale",
    ".v_scale",
    ".kv_scale",
    ".k_proj.output_scale",
    ".v_proj.output_scale",
)
"""Name endings of the calibrated scales of a KV cache; see `kv_scales`."""

NEVER_READ = (
    *KV_SCALES,
    ".rotary_emb.inv_freq",
    ".rotary_emb.cos_cached",
    ".rotary_emb.sin_cached",
    ".masked_bias",
    ".q_scale",
    ".prob_scale",
    ".k_zero_point",
    ".v_zero_point",
    ".input_scale",
    ".output_scale",
    ".activation_scale",
    "._extra_state",
)
"""Name endings of tensors in layers that no matrix needs: tables that the config determines, scales
of KV caches, and scales of activations that the form does not round."""

_NO_EFFECT_WHEN_ZERO = (".bias", ".weight_zero_point")
_INDEX = (".g_idx", ".weight_g_idx")
_LAYERS = "layers."
_SAMPLED_ROWS = 16
_NO_PART = "is no part of this model; remove the tensor, or give the config of its model"


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpectedTensor:
    """A tensor that the model needs.

    Attributes:
        shape: stored shape.
        dtypes: accepted dtypes.
        optional: the tensor may be missing.
        longer: more rows are accepted and not read (a padded vocabulary).
    """

    shape: tuple[int, ...]
    dtypes: tuple[torch.dtype, ...]
    optional: bool = False
    longer: bool = False


def misfits(folder: TensorFolder, expected: Mapping[str, ExpectedTensor]) -> list[str]:
    """Each missing, unexpected or wrong tensor (shape, dtype), one sentence for each."""
    problems = []
    for name, spec in expected.items():
        tensor = folder.stored.get(name)
        if tensor is not None:
            problem = misfit(tensor, spec)
        elif spec.optional:
            continue
        else:
            hint = _tied_hint(name, expected)
            problem = f"tensor {name!r} of shape {list(spec.shape)} is missing{hint}"
        if problem is not None:
            problems.append(problem)
    unexpected = _UnexpectedTensors(folder, expected)
    for tensor in folder.stored.values():
        if tensor.name not in expected:
            reason = unexpected.refusal(tensor)
            if reason is not None:
                problems.append(
                    f"{tensor.file.name}: tensor {tensor.name[:200]!r} of shape "
                    f"{list(tensor.shape)} {reason}"
                )
    return problems


def not_read(folder: TensorFolder, expected: Container[str]) -> list[str]:
    """Names of the tensors that nothing reads in any group; fp8 caches read `KV_SCALES`."""
    return [name for name in folder.names if name not in expected and not name.endswith(KV_SCALES)]


def misfit(tensor: StoredTensor, spec: ExpectedTensor) -> str | None:
    """Why a tensor's shape or dtype cannot be loaded; None if it can."""
    where = f"{tensor.file.name}: tensor {tensor.name!r} has"
    shape = tensor.shape
    if spec.longer and len(shape) == len(spec.shape) and shape[0] > spec.shape[0]:
        shape = (spec.shape[0], *shape[1:])
    if shape != spec.shape and not prod(shape) == prod(spec.shape) == 1:
        remedy = ""
        if spec.longer and shape[1:] == spec.shape[1:]:
            remedy = f"; set `vocab_size` to {shape[0]} if the tokenizer has no more tokens"
        return (
            f"{where} shape {list(tensor.shape)}, but the config requires {list(spec.shape)}"
            f"{remedy}"
        )
    if tensor.dtype not in spec.dtypes:
        dtypes = ", ".join(map(str, spec.dtypes))
        return f"{where} dtype {tensor.dtype}, but the dtype must be one of {dtypes}"
    return None


def _tied_hint(name: str, expected: Mapping[str, ExpectedTensor]) -> str:
    if name.endswith(HEAD) and any(other.endswith(EMBEDDING) for other in expected):
        return "; if the head is the embedding, set `tie_word_embeddings` to true in config.json"
    return ""


class _UnexpectedTensors:
    """Decides whether a tensor that the model does not need may stay unread."""

    def __init__(self, folder: TensorFolder, expected: Mapping[str, ExpectedTensor]) -> None:
        self._folder = folder
        self._modules = {name.rpartition(".")[0] for name in expected}
        self._layers = tuple(
            {name[: name.index(_LAYERS) + len(_LAYERS)] for name in expected if _LAYERS in name}
        )

    def refusal(self, tensor: StoredTensor) -> str | None:
        """Why the folder is refused because of a tensor; None if the tensor may stay unread."""
        name = tensor.name
        if name.endswith(NEVER_READ):
            return None
        module, _, last = name.rpartition(".")
        if name.endswith(HEAD) and module not in self._modules:
            return self._untied_head(tensor)
        if name.endswith(".self_attn.bias") and len(tensor.shape) > 1:
            return None  # the causal mask, which old tools stored
        if module not in self._modules and not name.startswith(self._layers):
            return None
        if name.endswith(_NO_EFFECT_WHEN_ZERO) and module in self._modules:
            if not self._folder.tensor(name).count_nonzero():
                return None
            if last == "bias":
                return (
                    "is not zero, but the config gives this matrix no bias; set `attention_bias` "
                    "or `mlp_bias` to true if the model has biases, else remove the tensor"
                )
        if name.endswith(_INDEX) and self._is_ordered(tensor):
            return None
        return _NO_PART

    def _is_ordered(self, tensor: StoredTensor) -> bool:
        """Whether a group index only describes consecutive columns: ascending, or all -1."""
        index_I = self._folder.tensor(tensor.name).long()
        return not index_I.numel() or bool((index_I.diff() >= 0).all())

    def _untied_head(self, tensor: StoredTensor) -> str | None:
        """Refusal of a head that the config ties to the embedding, unless both are equal."""
        table = f"{tensor.name.removesuffix(HEAD)}{EMBEDDING}"
        embedding = self._folder.stored.get(table)
        if embedding is None or tensor.shape != embedding.shape:
            return _NO_PART
        rows = tensor.shape[0]
        for start in {0, rows // 2, max(0, rows - _SAMPLED_ROWS)}:
            stop = min(rows, start + _SAMPLED_ROWS)
            head, body = (self._folder.rows(x, start, stop).float() for x in (tensor.name, table))
            if not torch.equal(head.nan_to_num(), body.nan_to_num()):
                return (
                    "differs from the embedding, but the config ties both; set "
                    "`tie_word_embeddings` to false, or remove the tensor"
                )
        return None
