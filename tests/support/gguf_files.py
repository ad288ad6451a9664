"""Tiny GGUF files for tests, written by the gguf package from the weights of a tiny model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from arriero.shards.model_config.dense import ModelConfig
from support.models import tiny_weights

GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
SPECIALS = ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>", "<|im_end|>"]
TEXT = "the quick brown fox jumps over the lazy dog; 12 34 567 don't  I'll\n\tif x == 10:\n" * 3


def trained_bpe(vocab: int) -> tuple[list[str], list[str]]:
    """Tokens and merges of a small byte-level BPE; `SPECIALS` come first."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=SPECIALS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    ids = tokenizer.get_vocab()
    tokens = sorted(ids, key=lambda token: ids[token])
    known = set(tokens)
    merges = []
    for token in tokens[len(SPECIALS) + 256 :]:  # any split into two known tokens will do
        cut = next(i for i in range(1, len(token)) if {token[:i], token[i:]} <= known)
        merges.append(f"{token[:cut]} {token[cut:]}")
    return tokens, merges


def interleave(rows: np.ndarray, head_dim: int) -> np.ndarray:
    """HF's row order to GGUF's: halves of a head become pairs."""
    shaped = rows.reshape(-1, 2, head_dim // 2, *rows.shape[1:])
    return np.ascontiguousarray(shaped.swapaxes(1, 2)).reshape(rows.shape)


def write_gguf(
    path: Path,
    config: ModelConfig,
    *,
    seed: int = 0,
    type_: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
    pre: str | None = "smollm",
    metadata: Mapping[str, Any] | None = None,
    drop: str | None = None,
    max_tensors: int = 0,
    architecture: str = "llama",
) -> dict[str, torch.Tensor]:
    """Write a file; return the weights that an import must give (float32).

    Args:
        path: the file.
        config: vocab of at least 260 tokens; sizes that divide into blocks of 32.
        seed: of the weights.
        type_: of every product; vectors stay F32. Types that the gguf package cannot make are
            filled with random small bytes.
        pre: tokenizer.ggml.pre; None leaves it out.
        metadata: strings, integers or floats that are added or replace what would be written.
        drop: a tensor that is left out.
        max_tensors: of each file, where the model is written in several.
        architecture: general.architecture; only "llama" interleaves the rows of q and k.
    """
    writer = gguf.GGUFWriter(path, architecture, split_max_tensors=max_tensors)
    tokens, merges = trained_bpe(config.vocab_size)
    values: dict[str, Any] = {
        "llama.block_count": config.num_layers,
        "llama.context_length": config.max_position_embeddings,
        "llama.embedding_length": config.hidden_size,
        "llama.feed_forward_length": config.intermediate_size,
        "llama.attention.head_count": config.num_heads,
        "llama.attention.head_count_kv": config.num_kv_heads,
        "llama.attention.key_length": config.head_dim,
        "llama.attention.value_length": config.head_dim,
        "llama.rope.freq_base": config.rope.theta,
        "llama.attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "llama.rope.dimension_count": config.head_dim,
        "llama.vocab_size": config.vocab_size,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.chat_template": "{{ messages }}",
        **({"tokenizer.ggml.pre": pre} if pre else {}),
        **(metadata or {}),
    }
    for name, value in values.items():
        key = name.replace("llama.", f"{architecture}.", 1) if name.startswith("llama.") else name
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        else:
            writer.add_string(key, value)
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in SPECIALS else 1 for token in tokens])
    writer.add_token_merges(merges)
    due: dict[str, torch.Tensor] = {}
    for name, weight in tiny_weights(config, seed).items():
        turned = architecture == "llama" and ("q_proj" in name or "k_proj" in name)
        made, due[name] = _stored(name, weight.float().numpy(), config.head_dim, type_, turned)
        if name != drop:
            writer.add_tensor(
                gguf_name(name), made, raw_dtype=type_ if made.dtype == np.uint8 else None
            )
    if config.rope.scaling == "llama3":
        plain = config.rope.theta ** -(np.arange(0, config.head_dim, 2) / config.head_dim)
        factors = (plain / config.inv_freq().numpy()).astype(np.float32)
        writer.add_tensor("rope_freqs.weight", factors)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return due


def gguf_name(name: str) -> str:
    """GGUF's name of a Hugging Face tensor."""
    stem, kind = name.rsplit(".", 1)
    if stem in GGUF_NAMES:
        return f"{GGUF_NAMES[stem]}.{kind}"
    _, _, layer, part = stem.split(".", 3)
    return f"blk.{layer}.{GGUF_NAMES[part]}.{kind}"


def _stored(
    name: str, weight: np.ndarray, head_dim: int, type_: gguf.GGMLQuantizationType, turned: bool
) -> tuple[np.ndarray, torch.Tensor]:
    """What lies in the file, and what an import must make of it."""
    rows = interleave(weight, head_dim) if turned else weight
    if weight.ndim == 1:
        return rows, torch.from_numpy(weight)
    try:
        stored = gguf.quantize(rows, type_)
    except NotImplementedError:
        return _random_blocks(name, weight.shape, head_dim if turned else 0, type_)
    # blocks run along a row, so quantizing commutes with the order of the rows
    return stored, torch.from_numpy(
        np.array(gguf.dequantize(gguf.quantize(weight, type_), type_), dtype=np.float32)
    )


def _random_blocks(
    name: str, shape: tuple[int, ...], head_dim: int, type_: gguf.GGMLQuantizationType
) -> tuple[np.ndarray, torch.Tensor]:
    """Blocks of bytes below 64, whose float16 fields are all finite, and what they mean.

    Of types that the package does not know, nothing.
    """
    block, block_bytes = gguf.GGML_QUANT_SIZES[type_]
    random = np.random.default_rng(sum(name.encode()))
    stored = random.integers(0, 64, (shape[0], shape[1] // block * block_bytes), dtype=np.uint8)
    try:
        means = torch.from_numpy(np.array(gguf.dequantize(stored, type_), dtype=np.float32))
    except NotImplementedError:
        means = torch.zeros(shape)
    return interleave(stored, head_dim) if head_dim else stored, means
