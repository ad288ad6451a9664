"""Train the tiny Maverick of this folder, from nothing but Python's own standard library.

    python tests/assets/train_tiny_maverick.py --out tests/assets/tiny-maverick

Text: the standard library's sources and documentation strings. Tokenizer: byte-level BPE, trained
here. Model: Maverick's shape in small (dense and routed layers in turn, a shared expert, top-1 of
12 experts by sigmoid, chunked attention with RoPE on three layers of four, none on the fourth).
Plain torch on one thread, seeded; about forty minutes. Knows nothing of the engine, which must
read what it writes.
"""

from __future__ import annotations

import argparse
import ast
import json
import math
import os
import random
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn

BOS, EOS = "<|begin_of_text|>", "<|end_of_text|>"
VOCAB, HIDDEN, LAYERS, HEADS, KV_HEADS, HEAD_DIM = 2048, 128, 8, 4, 2, 32
EXPERTS, EXPERT_COLUMNS, MLP_COLUMNS = 12, 160, 512
CHUNK, FLOOR_SCALE, ATTN_SCALE, THETA, EPS = 64, 64, 0.1, 10000.0, 1e-5
BATCH, LENGTH = 16, 256
BALANCE = 0.003
"""Weight of the loss that keeps every expert in use; small, so that the routing stays skewed."""


def corpus() -> list[str]:
    """Documents: each module's source, and apart from it its documentation strings, twice."""
    root = Path(os.__file__).parent
    skipped = {"test", "tests", "idlelib", "lib2to3", "site-packages", "__pycache__", "ensurepip"}
    documents = []
    for file in sorted(root.rglob("*.py")):
        if skipped & set(file.relative_to(root).parts):
            continue
        text = file.read_text(encoding="utf-8", errors="ignore")
        if not text.strip() or len(text) > 400_000:
            continue
        documents.append(text)
        try:
            tree = ast.parse(text)
        except (SyntaxError, ValueError):
            continue
        kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        found = [ast.get_docstring(one) for one in ast.walk(tree) if isinstance(one, kinds)]
        prose = "\n\n".join(one for one in found if one and len(one) > 60)
        if prose:
            documents += [prose, prose]
    return documents


def make_tokenizer(documents: list[str]) -> Tokenizer:
    """Byte-level BPE with a begin and an end token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=[BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return tokenizer


class Norm(nn.Module):
    """Root-mean-square norm."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(HIDDEN))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (HIDDEN,), self.weight, EPS)


class Attention(nn.Module):
    """Within chunks and rotated, or over everything and not."""

    def __init__(self, rotates: bool) -> None:
        super().__init__()
        self.rotates = rotates
        self.q_proj = nn.Linear(HIDDEN, HEADS * HEAD_DIM, bias=False)
        self.k_proj = nn.Linear(HIDDEN, KV_HEADS * HEAD_DIM, bias=False)
        self.v_proj = nn.Linear(HIDDEN, KV_HEADS * HEAD_DIM, bias=False)
        self.o_proj = nn.Linear(HEADS * HEAD_DIM, HIDDEN, bias=False)

    def forward(self, x: Tensor, turns: Tensor, gains: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q = self.q_proj(x).view(batch, length, HEADS, HEAD_DIM)
        k, v = (
            one(x).view(batch, length, KV_HEADS, HEAD_DIM) for one in (self.k_proj, self.v_proj)
        )
        if self.rotates:
            q, k = rotate(q, turns), rotate(k, turns)
            split = (batch * length // CHUNK, CHUNK)
            q, k, v = (one.reshape(*split, -1, HEAD_DIM) for one in (q, k, v))
        else:
            q = q * gains[:, None, None]
        q, k, v = (one.transpose(1, 2) for one in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.o_proj(out.transpose(1, 2).reshape(batch, length, -1))


def rotate(x: Tensor, turns: Tensor) -> Tensor:
    """RoPE on interleaved pairs."""
    cos, sin = turns[0][:, None], turns[1][:, None]
    a, b = x[..., ::2], x[..., 1::2]
    return torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1).flatten(-2)


class Mlp(nn.Module):
    """A gated MLP."""

    def __init__(self, columns: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(HIDDEN, columns, bias=False)
        self.up_proj = nn.Linear(HIDDEN, columns, bias=False)
        self.down_proj = nn.Linear(columns, HIDDEN, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Experts(nn.Module):
    """All experts of a layer, fused as the checkpoints have them."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(EXPERTS, HIDDEN, 2 * EXPERT_COLUMNS))
        self.down_proj = nn.Parameter(torch.empty(EXPERTS, EXPERT_COLUMNS, HIDDEN))


class Routed(nn.Module):
    """A shared expert, and one of several by the router's choice."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(HIDDEN, EXPERTS, bias=False)
        self.shared_expert = Mlp(EXPERT_COLUMNS)
        self.experts = Experts()
        self.balance = torch.zeros(())
        self.counts = torch.zeros(EXPERTS)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, 1)
        logits = self.router(rows)
        best = logits.max(dim=-1)
        scaled = rows * best.values.sigmoid()[:, None]
        order = best.indices.argsort(stable=True)
        counts = torch.bincount(best.indices, minlength=EXPERTS)
        parts = []
        for expert, own in enumerate(scaled[order].split(counts.tolist())):
            gate, up = (own @ self.experts.gate_up_proj[expert]).chunk(2, dim=-1)
            parts.append((F.silu(gate) * up) @ self.experts.down_proj[expert])
        out = torch.zeros_like(rows).index_copy(0, order, torch.cat(parts))
        # Fedus, Zoph and Shazeer, "Switch Transformers" (2021)
        share = counts / counts.sum()
        self.balance = EXPERTS * (share * logits.softmax(-1).mean(0)).sum()
        self.counts = counts.detach()
        return (out + self.shared_expert(rows)).view_as(x)


class Layer(nn.Module):
    """One decoder layer."""

    def __init__(self, index: int) -> None:
        super().__init__()
        self.input_layernorm, self.post_attention_layernorm = Norm(), Norm()
        self.self_attn = Attention(rotates=(index + 1) % 4 != 0)
        self.feed_forward: nn.Module = Routed() if index % 2 else Mlp(MLP_COLUMNS)

    def forward(self, x: Tensor, turns: Tensor, gains: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), turns, gains)
        return x + self.feed_forward(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """Embedding, layers, norm."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(VOCAB, HIDDEN)
        self.layers = nn.ModuleList(Layer(index) for index in range(LAYERS))
        self.norm = Norm()


class TinyMaverick(nn.Module):
    """The model; its parameters bear the checkpoint's names."""

    def __init__(self) -> None:
        super().__init__()
        self.model = Decoder()
        self.lm_head = nn.Linear(HIDDEN, VOCAB, bias=False)
        for name, one in self.named_parameters():
            if one.ndim > 1:
                fan_in = (
                    one.shape[1] if "experts.gate" in name or "experts.down" in name else HIDDEN
                )
                std = 0.02 if "embed" in name else fan_in**-0.5
                if name.endswith(("o_proj.weight", "down_proj.weight", "down_proj")):
                    std /= (2 * LAYERS) ** 0.5
                nn.init.normal_(one, std=std)

    def forward(self, tokens: Tensor) -> Tensor:
        positions = torch.arange(tokens.shape[1])
        frequencies = THETA ** -(torch.arange(0, HEAD_DIM, 2) / HEAD_DIM)
        angles = positions[:, None] * frequencies
        turns = torch.stack((angles.cos(), angles.sin()))
        gains = 1 + ATTN_SCALE * torch.log1p(torch.floor((positions + 1) / FLOOR_SCALE))
        x = self.model.embed_tokens(tokens)
        for layer in self.model.layers:
            x = layer(x, turns, gains)
        return self.lm_head(self.model.norm(x))


def settings(tokenizer: Tokenizer) -> dict[str, object]:
    """config.json."""
    return {
        "architectures": ["Llama4ForCausalLM"],
        "model_type": "llama4_text",
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "intermediate_size": EXPERT_COLUMNS,
        "intermediate_size_mlp": MLP_COLUMNS,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "hidden_act": "silu",
        "num_local_experts": EXPERTS,
        "num_experts_per_tok": 1,
        "interleave_moe_layer_step": 2,
        "use_qk_norm": False,
        "no_rope_layers": [int((index + 1) % 4 != 0) for index in range(LAYERS)],
        "attention_chunk_size": CHUNK,
        "attn_temperature_tuning": True,
        "floor_scale": FLOOR_SCALE,
        "attn_scale": ATTN_SCALE,
        "rms_norm_eps": EPS,
        "rope_theta": THETA,
        "rope_scaling": None,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
        "bos_token_id": tokenizer.token_to_id(BOS),
        "eos_token_id": tokenizer.token_to_id(EOS),
        "pad_token_id": None,
        "torch_dtype": "bfloat16",
    }


def save(model: TinyMaverick, tokenizer: Tokenizer, out: Path) -> None:
    """Write the folder that the engine reads."""
    out.mkdir(parents=True, exist_ok=True)
    weights = {name: one.detach().bfloat16().contiguous() for name, one in model.named_parameters()}
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    (out / "config.json").write_text(json.dumps(settings(tokenizer), indent=2) + "\n")
    tokenizer.save(str(out / "tokenizer.json"))
    words = {"bos_token": BOS, "eos_token": EOS, "tokenizer_class": "PreTrainedTokenizerFast"}
    (out / "tokenizer_config.json").write_text(json.dumps(words, indent=2) + "\n")


def train(out: Path, steps: int, peak: float) -> None:
    """Train and write; a line of progress every fifty steps."""
    random.seed(0)
    torch.manual_seed(0)
    torch.set_num_threads(1)
    documents = corpus()
    random.shuffle(documents)
    tokenizer = make_tokenizer(documents)
    ids: list[int] = []
    end = tokenizer.token_to_id(EOS)
    for one in tokenizer.encode_batch(documents):
        ids += [*one.ids, end]
    text = torch.tensor(ids)
    kept, held = text[: -64 * LENGTH], text[-64 * LENGTH :].view(64, LENGTH)
    model = TinyMaverick()
    count = sum(one.numel() for one in model.parameters())
    print(f"{len(documents)} documents, {len(ids)} tokens, {count} parameters", flush=True)
    decayed = [one for one in model.parameters() if one.ndim > 1]
    rest = [one for one in model.parameters() if one.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}],
        lr=peak,
        betas=(0.9, 0.95),
        fused=True,
    )
    begun = time.monotonic()
    for step in range(steps):
        warm, left = (step + 1) / 100, 0.5 * (1 + math.cos(math.pi * step / steps))
        for group in optimizer.param_groups:
            group["lr"] = peak * min(warm, 0.05 + 0.95 * left)
        starts = torch.randint(0, len(kept) - LENGTH - 1, (BATCH,))
        rows = torch.stack([kept[at : at + LENGTH + 1] for at in starts.tolist()])
        logits = model(rows[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
        balance = sum(one.balance for one in model.modules() if isinstance(one, Routed))
        (loss + BALANCE * balance).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if (step + 1) % 50 == 0 or step + 1 == steps:
            spent = time.monotonic() - begun
            print(f"step {step + 1} of {steps}: loss {loss.item():.3f}, {spent:.0f} s", flush=True)
        if (step + 1) % 500 == 0 or step + 1 == steps:
            save(model, tokenizer, out)
            with torch.no_grad():
                logits = model(held[:, :-1])
                loss = F.cross_entropy(logits.flatten(0, 1), held[:, 1:].flatten())
            counts = [one.counts.tolist() for one in model.modules() if isinstance(one, Routed)]
            print(f"held out: {loss.item():.3f}; tokens by expert: {counts}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=1900)
    parser.add_argument("--peak", type=float, default=3e-3)
    asked = parser.parse_args()
    train(asked.out, asked.steps, asked.peak)
