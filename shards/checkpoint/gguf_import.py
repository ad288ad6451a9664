"""Import of a GGUF file as a folder in Hugging Face layout.

Knows the tensor names of dense models in both formats and the row order of queries and keys; knows
nothing of
header, tokenizer and config (own modules). Weights are streamed: memory holds a piece of a tensor.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO

import gguf
import numpy as np
import numpy.typing as npt
import torch

from arriero.shards.checkpoint.formats.stored import tensor_specs
from arriero.shards.checkpoint.gguf_config import (
    ROPE_FACTORS,
    GgufModel,
    build_configs,
    find_gguf_model,
)
from arriero.shards.checkpoint.gguf_header import GgufTensor, read_gguf
from arriero.shards.checkpoint.gguf_tokenizer import build_tokenizer
from arriero.shards.checkpoint.index import SINGLE_FILE
from arriero.shards.checkpoint.llama_names import EMBEDDING, FINAL_NORM, HEAD
from arriero.shards.checkpoint.reader import Checkpoint
from arriero.shards.checkpoint.safetensors_header import make_header
from arriero.shards.errors import CheckpointError
from arriero.shards.layout.parts import AnyModel
from arriero.shards.model_config.dense import TORCH_DTYPES

Progress = Callable[[int, int, str], None]
"""Called with bytes read so far, total bytes, and the name of the written tensor."""

_TOP_NAMES = {
    "token_embd.weight": EMBEDDING,
    "output_norm.weight": FINAL_NORM,
    "output.weight": HEAD,
}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_PIECE_ELEMENTS = 8 * 1024 * 1024


@cache
def is_imported(type_: gguf.GGMLQuantizationType) -> bool:
    """Whether the gguf package can dequantize this type."""
    _, block_bytes = gguf.GGML_QUANT_SIZES[type_]
    try:
        gguf.dequantize(np.zeros((1, block_bytes), dtype=np.uint8), type_)
    except NotImplementedError:
        return False
    return True


def import_gguf(
    src: Path, out: Path, dtype: str = "bfloat16", progress: Progress | None = None
) -> None:
    """Write `src` as config.json, generation_config.json, model.safetensors and the tokenizer.

    The folder appears complete or not at all.

    Args:
        src: GGUF file of a supported architecture, in any type that the gguf package dequantizes;
            any file of a model in several files.
        out: new folder; must not exist.
        dtype: dtype of the written weights: "bfloat16", "float16" or "float32".
        progress: called after each written tensor.

    Raises:
        CheckpointError: the file cannot be imported, or `out` exists.
    """
    if dtype not in TORCH_DTYPES:
        raise CheckpointError(f"dtype={dtype!r} must be one of {', '.join(TORCH_DTYPES)}")
    if out.exists():
        raise CheckpointError(f"{out}: exists already; remove it or choose another folder")
    file = read_gguf(src)
    model = find_gguf_model(file)
    settings, generation = build_configs(model, dtype)
    tokenizer, tokenizer_settings = build_tokenizer(file, model.gguf.splits)
    weights = _Weights(model, model.config(settings, generation))
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{out.name}.partial-", dir=out.parent))
    try:
        partial.chmod(0o755)
        _write_json(partial / "config.json", settings)
        _write_json(partial / "generation_config.json", generation)
        _write_json(partial / "tokenizer_config.json", tokenizer_settings)
        tokenizer.save(str(partial / "tokenizer.json"))
        with (partial / SINGLE_FILE).open("wb") as stream:
            weights.write(stream, getattr(torch, dtype), progress)
            stream.flush()
            os.fsync(stream.fileno())
        Checkpoint.open(partial).check(weights.expected)
        partial.rename(out)
    except OSError as error:
        raise CheckpointError(f"{out}: cannot be written: {error.strerror or error}") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


class _Weights:
    """The tensors of the file under Hugging Face names, in file order, checked."""

    def __init__(self, model: GgufModel, config: AnyModel) -> None:
        self.file = file = model.file
        self.config = config
        self._pairs = model.gguf.pairs
        self._layer_names = {**_LAYER_NAMES, **model.gguf.layer_names}
        self.tensors: dict[str, GgufTensor] = {}
        self.expected = expected = {spec.name: spec.shape for spec in tensor_specs(config, None)}
        for tensor in file.tensors.values():
            if tensor.name == ROPE_FACTORS:  # now in the config's rope_scaling
                continue
            name = self._hf_name(tensor.name)
            where = f"{file.path}: tensor {tensor.name[:200]!r}"
            if expected.get(name) != tensor.shape:
                raise CheckpointError(
                    f"{where} ({name}) has shape {list(tensor.shape)}, but the metadata "
                    f"requires {list(expected[name]) if name in expected else 'no such tensor'}; "
                    "fetch the file again"
                )
            if not is_imported(tensor.type):
                known = [type_.name for type_ in gguf.GGMLQuantizationType if is_imported(type_)]
                raise CheckpointError(
                    f"{where}: {tensor.type.name} is not imported; imported: {', '.join(known)}"
                )
            self.tensors[name] = tensor
        missing = [name for name in expected if name not in self.tensors]
        if missing:
            raise CheckpointError(
                f"{file.path}: lacks tensor {missing[0]!r} of shape {list(expected[missing[0]])}"
                + (f" and {len(missing) - 1} more" if len(missing) > 1 else "")
                + "; fetch the file again"
            )

    def write(self, stream: BinaryIO, dtype: torch.dtype, progress: Progress | None) -> None:
        stream.write(
            make_header({name: (dtype, tensor.shape) for name, tensor in self.tensors.items()})
        )
        total = sum(tensor.stop - tensor.start for tensor in self.tensors.values())
        done = 0
        for name, tensor in self.tensors.items():
            for piece in self._pieces(tensor):
                converted = torch.from_numpy(np.array(piece, dtype=np.float32, order="C")).to(dtype)
                stream.write(converted.view(torch.uint8).numpy().data)
            done += tensor.stop - tensor.start
            if progress is not None:
                progress(done, total, name)

    def _pieces(self, tensor: GgufTensor) -> Iterator[npt.NDArray[np.float32]]:
        heads = {".attn_q.": self.config.num_heads, ".attn_k.": self.config.num_kv_heads}
        permuted = self._pairs and any(part in tensor.name for part in heads)
        if len(tensor.shape) == 1:
            vector = self.file.rows(tensor, 0, 1)[0]
            yield self._unpermute(vector[:, None])[:, 0] if permuted else vector
            return
        num_rows, row = tensor.shape
        head_dim = self.config.head_dim
        step = max(1, _PIECE_ELEMENTS // (row * head_dim)) * head_dim  # whole heads
        for start in range(0, num_rows, step):
            piece = self.file.rows(tensor, start, min(start + step, num_rows))
            yield self._unpermute(piece) if permuted else piece

    def _hf_name(self, name: str) -> str:
        if name in _TOP_NAMES:
            return _TOP_NAMES[name]
        parts = name.split(".")
        if (
            len(parts) == 4
            and parts[0] == "blk"
            and parts[1].isdecimal()
            and parts[2] in self._layer_names
            and parts[3] in ("weight", "bias")
        ):
            return f"model.layers.{int(parts[1])}.{self._layer_names[parts[2]]}.{parts[3]}"
        raise CheckpointError(
            f"{self.file.path}: tensor {name[:200]!r} is no part of a model of this architecture; "
            "convert the original checkpoint"
        )

    def _unpermute(self, rows: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Undo the row order of GGUF, which interleaves the two rotary halves of each head."""
        head_dim = self.config.head_dim
        pairs = rows.reshape(-1, head_dim // 2, 2, rows.shape[1])
        return pairs.swapaxes(1, 2).reshape(rows.shape)


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
