"""What a folder holds against what its model calls for: missing, misshapen, and what is not read.

A tensor that nothing reads does no harm where the model has no such part (a vision tower beside a
text model, an optimizer's leftovers); one inside a layer or beside a weight that is read would
change the answers, and is refused unless it says nothing. Knows names, shapes and a few numbers;
knows no forms.
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

NEVER_READ = (
    ".rotary_emb.inv_freq",
    ".rotary_emb.cos_cached",
    ".rotary_emb.sin_cached",
    ".masked_bias",
    ".k_scale",
    ".v_scale",
    ".q_scale",
    ".kv_scale",
    ".prob_scale",
    ".k_zero_point",
    ".v_zero_point",
    ".input_scale",
    ".output_scale",
    ".activation_scale",
    "._extra_state",
)
"""Ends of names of what lies in layers and changes nothing here: tables that follow from the
config, and scales of KV caches and activations that keep their own dtype."""

_SAYS_NOTHING_AS_ZERO = (".bias", ".weight_zero_point")
_INDEX = (".g_idx", ".weight_g_idx")
_LAYERS = "layers."
_SAMPLED_ROWS = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class Wanted:
    """A tensor that the model calls for.

    Attributes:
        shape: as stored.
        dtypes: that it may have.
        optional: it may be missing.
        longer: it may have rows beyond these, which are not read (a padded vocabulary).
    """

    shape: tuple[int, ...]
    dtypes: tuple[torch.dtype, ...]
    optional: bool = False
    longer: bool = False


def misfits(folder: TensorFolder, wanted: Mapping[str, Wanted]) -> list[str]:
    """What is missing, of another shape or dtype, or has no place: one sentence a tensor."""
    problems = []
    for name, want in wanted.items():
        one = folder.stored.get(name)
        if one is not None:
            problem = _misfit(one, want)
        elif want.optional:
            continue
        else:
            problem = f"tensor {name!r} of shape {list(want.shape)} is missing{_tied(name, wanted)}"
        if problem is not None:
            problems.append(problem)
    extra = _Extra(folder, wanted)
    for one in folder.stored.values():
        if one.name not in wanted:
            because = extra.refused(one)
            if because is not None:
                problems.append(
                    f"{one.file.name}: tensor {one.name[:200]!r} of shape {list(one.shape)} "
                    f"{because}"
                )
    return problems


def not_read(folder: TensorFolder, wanted: Container[str]) -> list[str]:
    """Names of the tensors that nothing reads."""
    return [name for name in folder.names if name not in wanted]


def _misfit(one: StoredTensor, want: Wanted) -> str | None:
    where = f"{one.file.name}: tensor {one.name!r} has"
    shape = one.shape
    if want.longer and len(shape) == len(want.shape) and shape[0] > want.shape[0]:
        shape = (want.shape[0], *shape[1:])
    if shape != want.shape and not prod(shape) == prod(want.shape) == 1:
        remedy = ""
        if want.longer and shape[1:] == want.shape[1:]:
            remedy = f"; set `vocab_size` to {shape[0]}, if the tokenizer has no more tokens"
        return (
            f"{where} shape {list(one.shape)}, but the config makes it {list(want.shape)}{remedy}"
        )
    if one.dtype not in want.dtypes:
        return (
            f"{where} dtype {one.dtype}, but it must be one of {', '.join(map(str, want.dtypes))}"
        )
    return None


def _tied(name: str, wanted: Mapping[str, Wanted]) -> str:
    if name.endswith(HEAD) and any(one.endswith(EMBEDDING) for one in wanted):
        return " (where it is the embedding, config.json says `tie_word_embeddings`: true)"
    return ""


class _Extra:
    """Tensors that the model does not call for."""

    def __init__(self, folder: TensorFolder, wanted: Mapping[str, Wanted]) -> None:
        self._folder, self._wanted = folder, wanted
        self._modules = {name.rpartition(".")[0] for name in wanted}
        self._layers = tuple(
            {name[: name.index(_LAYERS) + len(_LAYERS)] for name in wanted if _LAYERS in name}
        )

    def refused(self, one: StoredTensor) -> str | None:
        """Why a tensor may not be left unread; None where it may."""
        name = one.name
        if name.endswith(NEVER_READ):
            return None
        module, _, last = name.rpartition(".")
        if name.endswith(HEAD) and module not in self._modules:
            return self._other_head(one)
        if name.endswith(".self_attn.bias") and len(one.shape) > 1:
            return None  # the causal mask, as old tools stored it
        if module not in self._modules and not name.startswith(self._layers):
            return None
        if name.endswith(_SAYS_NOTHING_AS_ZERO) and module in self._modules:
            if not self._folder.tensor(name).count_nonzero():
                return None
            if last == "bias":
                return (
                    "is not zero, and the config gives that matrix none; set `attention_bias` or "
                    "`mlp_bias`, if the model was made so"
                )
        if name.endswith(_INDEX) and self._rises(one):
            return None
        return "has no place in this model"

    def _rises(self, one: StoredTensor) -> bool:
        """Whether an index of groups is that of runs of columns: rising, or all -1."""
        index_I = self._folder.tensor(one.name).long()
        return not index_I.numel() or bool((index_I.diff() >= 0).all())

    def _other_head(self, one: StoredTensor) -> str | None:
        """A head without a place is one that the config ties to the embedding."""
        table = f"{one.name.removesuffix(HEAD)}{EMBEDDING}"
        embedding = self._folder.stored.get(table)
        if embedding is None or one.shape != embedding.shape:
            return "has no place in this model"
        rows = one.shape[0]
        for start in {0, rows // 2, max(0, rows - _SAMPLED_ROWS)}:
            stop = min(rows, start + _SAMPLED_ROWS)
            head, body = (self._folder.rows(x, start, stop).float() for x in (one.name, table))
            if not torch.equal(head.nan_to_num(), body.nan_to_num()):
                return (
                    "differs from the embedding, which the config says it is; set "
                    "`tie_word_embeddings` to false, or remove the tensor"
                )
        return None
