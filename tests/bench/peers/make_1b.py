"""Write a dense model of 1.07 billion parameters with random weights in bfloat16.

Its layers have the shape of Llama 3.2 1B; tokenizer and the other settings come from SmolLM2.

Usage: make_1b.py SMOLLM2_DIR OUT_DIR
"""

import json
import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

HIDDEN, LAYERS, QUERIES, KV, COLUMNS, INNER, WORDS = 2048, 16, 32, 8, 64, 8192, 49152
SHAPES = {
    "self_attn.q_proj": (QUERIES * COLUMNS, HIDDEN),
    "self_attn.k_proj": (KV * COLUMNS, HIDDEN),
    "self_attn.v_proj": (KV * COLUMNS, HIDDEN),
    "self_attn.o_proj": (HIDDEN, QUERIES * COLUMNS),
    "mlp.gate_proj": (INNER, HIDDEN),
    "mlp.up_proj": (INNER, HIDDEN),
    "mlp.down_proj": (HIDDEN, INNER),
}
SIZES = {
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": QUERIES,
    "num_key_value_heads": KV,
    "head_dim": COLUMNS,
    "intermediate_size": INNER,
    "vocab_size": WORDS,
    "tie_word_embeddings": True,
}
source, out = map(Path, sys.argv[1:3])
out.mkdir(parents=True, exist_ok=True)
for file in source.iterdir():
    if file.is_file() and file.suffix != ".safetensors":
        shutil.copy(file, out / file.name)
config = json.loads((source / "config.json").read_text()) | SIZES
(out / "config.json").write_text(json.dumps(config, indent=1))
generator = torch.Generator().manual_seed(0)


def normal(*shape: int) -> torch.Tensor:
    return (torch.randn(*shape, generator=generator) * 0.02).to(torch.bfloat16)


ones = torch.ones(HIDDEN, dtype=torch.bfloat16)
tensors = {"model.embed_tokens.weight": normal(WORDS, HIDDEN), "model.norm.weight": ones.clone()}
for layer in range(LAYERS):
    start = f"model.layers.{layer}."
    for name, shape in SHAPES.items():
        tensors[f"{start}{name}.weight"] = normal(*shape)
    for name in ("input_layernorm", "post_attention_layernorm"):
        tensors[f"{start}{name}.weight"] = ones.clone()
save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
