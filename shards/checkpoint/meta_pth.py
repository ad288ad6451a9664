"""Conversion of Meta's release of a dense Llama 3: `consolidated.*.pth` and `params.json`.

Knows Meta's names, the cuts of its shards, and that its queries and keys rotate interleaved pairs.
Files are loaded with `weights_only`: no pickled code runs. Memory holds one tensor.
"""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from arriero.shards.checkpoint.llama_names import EMBEDDING, FINAL_NORM, HEAD, expected_tensors
from arriero.shards.checkpoint.meta_tokenizer import convert_tokenizer
from arriero.shards.checkpoint.reader import Checkpoint
from arriero.shards.checkpoint.writer import Progress, new_folder, write_shards
from arriero.shards.errors import CheckpointError
from arriero.shards.files.bad_file import explain_error, explain_head, head_of
from arriero.shards.files.json_file import read_json_object
from arriero.shards.model_config.dense import ModelConfig
from arriero.shards.model_config.fields import Fields

_TOP = {EMBEDDING: "tok_embeddings.weight", FINAL_NORM: "norm.weight", HEAD: "output.weight"}
_LAYER = {
    "self_attn.q_proj": "attention.wq",
    "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.up_proj": "feed_forward.w3",
    "mlp.down_proj": "feed_forward.w2",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
}
_HF_NAME = re.compile(r"model\.layers\.(\d+)\.(.+)\.weight")
_VOCAB = 128256  # vocabulary of Llama 3, for which the special tokens are known


def convert_meta(source: Path, out: Path, progress: Progress | None = None) -> None:
    """Write Meta's folder `source` as a folder in Hugging Face layout, in the same dtype.

    The folder appears complete or not at all.

    Args:
        source: folder with params.json, consolidated.00.pth and so on, and tokenizer.model.
        out: new folder; must not exist.
        progress: called after each written tensor.

    Raises:
        CheckpointError: a file or tensor is missing, contradicts params.json or is not a plain
            tensor, or `out` exists.
    """
    with new_folder(out) as partial:
        shards = [_load(file) for file in _files(source)]
        settings = _settings(source, shards)
        config = ModelConfig.from_dict(settings, source=str(source / "params.json"))
        (partial / "config.json").write_text(json.dumps(settings, indent=2) + "\n")
        if (source / "tokenizer.model").is_file():
            convert_tokenizer(source / "tokenizer.model", partial)
        meta = _Source(source, shards, config)
        dtype: torch.dtype = getattr(torch, config.torch_dtype)
        entries = {name: (dtype, shape) for name, shape in meta.expected.items()}
        write_shards(partial, entries, lambda name: meta.tensor(name).to(dtype), progress)
        Checkpoint.open(partial).check_whole()


def _files(source: Path) -> list[Path]:
    files = sorted(source.glob("consolidated.*.pth"))
    if not files:
        raise CheckpointError(
            f"{source}: holds no consolidated.*.pth; give the folder of Meta's release"
        )
    names = [f"consolidated.{i:02d}.pth" for i in range(len(files))]
    if [file.name for file in files] != names:
        raise CheckpointError(
            f"{source}: holds {len(files)} shards, but not {', '.join(names)}; "
            "fetch the missing files"
        )
    return files


def _load(file: Path) -> Mapping[str, Tensor]:
    try:
        tensors = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, ValueError, EOFError) as error:
        reason = explain_head(*head_of(file)) or " ".join(str(error).split())[:200]
        raise CheckpointError(
            f"{file}: is not a file of plain tensors, and no other content is read: {reason}"
        ) from None
    except OSError as error:
        raise CheckpointError(f"{file}: {explain_error(file, error)}") from None
    if not isinstance(tensors, dict) or not all(
        isinstance(tensor, Tensor) for tensor in tensors.values()
    ):
        raise CheckpointError(
            f"{file}: is not a mapping from names to tensors; fetch the file again"
        )
    return tensors


def _settings(source: Path, shards: Sequence[Mapping[str, Tensor]]) -> dict[str, Any]:
    """The object of config.json, from params.json and the shapes of the tensors."""
    file = source / "params.json"
    read = Fields(read_json_object(file), str(file))
    hidden, heads = read.size("dim"), read.size("n_heads")
    first = shards[0].get("layers.0.feed_forward.w1.weight")
    table = shards[0].get("tok_embeddings.weight")
    if first is None or table is None or first.ndim != 2 or table.ndim != 2:
        raise CheckpointError(
            f"{source}: the first shard lacks layers.0 or tok_embeddings; "
            "fetch consolidated.00.pth again"
        )
    by_rows = table.shape[1] == hidden
    vocab = table.shape[0] * (len(shards) if by_rows else 1)
    scaled = read.flag("use_scaled_rope")
    rope = {
        "rope_type": "llama3",
        "factor": read.number("rope_scaling_factor", 8.0, low=1),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    llama3 = vocab == _VOCAB
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": first.shape[0] * len(shards),
        "num_hidden_layers": read.size("n_layers"),
        "num_attention_heads": heads,
        "num_key_value_heads": read.size("n_kv_heads", heads),
        "hidden_act": "silu",
        "rms_norm_eps": read.number("norm_eps", 1e-5, low=0),
        "rope_theta": read.number("rope_theta", 500000.0, low=1),
        "rope_scaling": rope if scaled else None,
        "max_position_embeddings": 131072 if scaled else 8192,
        "tie_word_embeddings": _tied(shards),
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": 128000 if llama3 else None,
        "eos_token_id": ([128001, 128008, 128009] if scaled else [128001, 128009])
        if llama3
        else None,
        "torch_dtype": str(first.dtype).removeprefix("torch."),
    }


def _tied(shards: Sequence[Mapping[str, Tensor]]) -> bool:
    """Whether the head is the embedding: the head is missing, or both are equal."""
    heads = [shard.get("output.weight") for shard in shards]
    tables = [shard.get("tok_embeddings.weight") for shard in shards]
    if all(head is None for head in heads):
        return True
    return all(
        a is not None and b is not None and a.shape == b.shape and torch.equal(a[:8], b[:8])
        for a, b in zip(heads, tables, strict=True)
    ) and all(
        a is not None and b is not None and torch.equal(a, b)
        for a, b in zip(heads, tables, strict=True)
    )


class _Source:
    """Meta's tensors under Hugging Face names."""

    def __init__(
        self, folder: Path, shards: Sequence[Mapping[str, Tensor]], config: ModelConfig
    ) -> None:
        self.config = config
        self._folder, self._shards = folder, shards
        self.expected = expected_tensors(config)

    def tensor(self, name: str) -> Tensor:
        """A tensor, joined from the shards, with rows in Hugging Face order."""
        meta_name = _meta_name(name)
        parts = []
        for i, shard in enumerate(self._shards):
            part = shard.get(meta_name)
            if part is None:
                raise CheckpointError(
                    f"{self._folder}/consolidated.{i:02d}.pth: lacks tensor {meta_name!r}, which "
                    "params.json requires; fetch the file again"
                )
            parts.append(part)
        whole = self._join(meta_name, parts, self.expected[name])
        for rotated, heads in (
            ("q_proj", self.config.num_heads),
            ("k_proj", self.config.num_kv_heads),
        ):
            if rotated in name:
                pairs = whole.view(heads, self.config.head_dim // 2, 2, -1)
                whole = pairs.transpose(1, 2).reshape(whole.shape)
        return whole

    def _join(self, name: str, parts: list[Tensor], shape: tuple[int, ...]) -> Tensor:
        if all(tuple(part.shape) == shape for part in parts):
            return parts[0]  # norms are in every shard
        for dim in range(len(shape)):
            if any(part.ndim != len(shape) for part in parts):
                break
            total = sum(part.shape[dim] for part in parts)
            rest = shape[:dim] + shape[dim + 1 :]
            fits = all(
                tuple(part.shape[:dim]) + tuple(part.shape[dim + 1 :]) == rest for part in parts
            )
            if fits and total == shape[dim]:
                return torch.cat(parts, dim)
            copies = total // shape[dim]
            if fits and copies > 1 and total % shape[dim] == 0 and len(parts) % copies == 0:
                # more shards than key/value heads: neighbouring shards hold the same head
                if all(torch.equal(parts[i], parts[i - i % copies]) for i in range(len(parts))):
                    return torch.cat(parts[::copies], dim)
        shapes = ", ".join(str(list(part.shape)) for part in parts[:4])
        raise CheckpointError(
            f"{self._folder}: {name!r} in parts of {shapes} does not make {list(shape)}, which "
            "params.json requires; fetch the files again"
        )


def _meta_name(name: str) -> str:
    if name in _TOP:
        return _TOP[name]
    match = _HF_NAME.fullmatch(name)
    assert match is not None, f"{name} is not a tensor of a dense Llama"
    return f"layers.{match[1]}.{_LAYER[match[2]]}.weight"
