"""Train a tiny draft model and an EAGLE-3 head for SmolLM2-135M-Instruct, in minutes on a CPU.

    python tests/assets/train_drafts.py --target models/SmolLM2-135M-Instruct --out FOLDER

Text: what the target itself answers to prompts made here of Python's own documentation and of the
licences on the machine. The answers are drawn with arriero's kernels, which also give the taps and
the target's last hidden states, so that both students learn the target's distribution. `FOLDER`
then has `draft/` (a Llama of hidden size 192 with the target's tokenizer) and `eagle3/` (the flat
layout, 4,096 draft tokens with `d2t` and `t2d`). The data of the first run is kept in
`FOLDER/data.pt`. Plain torch on one thread, seeded. Knows nothing of engines.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import shutil
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor, nn

DRAFT_VOCAB, OTHERS = 4096, 512
DRAFT = {"hidden": 192, "mlp": 512, "heads": 3, "layers": 4}
LENGTH, BATCH, TEMPERATURE = 256, 16, 0.7
UNROLL = 2
"""Steps of the head's chain in training: the later ones read the head's own outputs."""
SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
ASKS = (
    "Explain {}.",
    "What is {} used for?",
    "Write a short story about {}.",
    "Give five facts about {}.",
    "Write a Python function that has to do with {}.",
    "Summarize this text:\n{}",
    "Correct the spelling of this text:\n{}",
    "How does {} work? Answer step by step.",
)


def prompts(tokenizer: Tokenizer, count: int) -> list[list[int]]:
    """Chat prompts about modules of Python and passages of texts on the machine."""
    rng = random.Random(0)
    root = Path(json.__file__).parent.parent
    names = sorted(file.stem for file in root.glob("*.py") if not file.stem.startswith("_"))
    passages: list[str] = []
    for file in sorted(Path("/usr/share/common-licenses").glob("*")) + sorted(root.glob("*.py")):
        text = file.read_text(encoding="utf-8", errors="ignore")[:20_000]
        blocks = [" ".join(block.split()) for block in text.split("\n\n")]
        passages += [block[:300] for block in blocks if 80 < len(block)]
    out = []
    for i in range(count):
        ask = ASKS[i % len(ASKS)]
        subject = rng.choice(passages if "text:" in ask else [f"the {name}" for name in names])
        text = f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n{ask.format(subject)}"
        out.append(tokenizer.encode(f"{text}<|im_end|>\n<|im_start|>assistant\n").ids[-120:])
    return out


def draw_answers(target: Path, token_lists: list[list[int]], dtype: str, file: Path) -> None:
    """Write the target's answers: tokens, taps and last hidden states of each sequence.

    The file is written after each batch, so that a run can be stopped and used.
    """
    from arriero.kernels.sampling_rows import SamplingRows
    from arriero.kernels.select import ops_for
    from arriero.shards.checkpoint.reader import Checkpoint
    from arriero.shards.collectives.mesh import Mesh
    from arriero.shards.config.group import GroupConfig
    from arriero.shards.layout.families import parts_of
    from arriero.shards.models.model_slice import SliceSettings, load_slice
    from arriero.shards.protocol.step_plan import StepPlan, int32
    from arriero.shards.worker.rope_table import Rope
    from arriero.shards.worker.speculation.paged_rows import PagedRows

    cpu, size = torch.device("cpu"), 16
    checkpoint = Checkpoint.open(target)
    config = GroupConfig(model_path=str(target))
    (part,) = parts_of(checkpoint.config, config)
    mesh, ops = Mesh(part, config, device=cpu), ops_for(cpu, threads=1)
    per_text = -(-LENGTH // size)
    layers = checkpoint.config.num_layers
    model = load_slice(
        checkpoint,
        part,
        mesh,
        ops,
        SliceSettings(
            dtype=getattr(torch, dtype),
            num_blocks=BATCH * per_text,
            block_size=size,
            taps=(2, layers // 2, layers - 3, layers),
        ),
    )
    ends = set(checkpoint.config.eos_token_ids)
    made = []
    for first in range(0, len(token_lists), BATCH):
        texts = [list(tokens) for tokens in token_lists[first : first + BATCH]]
        kept: list[list[Tensor]] = [[] for _ in texts]
        rows = PagedRows(
            max_sequences=len(texts),
            max_blocks=per_text,
            block_size=size,
            rope=Rope(checkpoint.config.inv_freq(), LENGTH, cpu),
            device=cpu,
        )
        table = np.arange(len(texts) * per_text)
        empty = int32()
        plan = StepPlan(
            step=0,
            freed=empty,
            new=[],
            block_slots=int32(table // per_text),
            block_index=int32(table % per_text),
            block_ids=int32(table),
            slots=empty,
            starts=empty,
            counts=empty,
            tokens=empty,
            samples=empty,
        )
        rows.apply(plan)
        active, done = list(range(len(texts))), [0] * len(texts)
        while active:
            counts = [len(texts[i]) - done[i] for i in active]
            batch = rows.batch(int32(active), int32([done[i] for i in active]), int32(counts))
            tokens = torch.tensor(
                [token for i in active for token in texts[i][done[i] :]], dtype=torch.int32
            )
            x = model.decoder(model.embed(tokens), batch)
            taps = torch.stack(model.taps.kept(len(tokens)), 1).half()
            for i, piece in zip(active, taps.split(counts), strict=True):
                kept[i].append(piece)
                done[i] = len(texts[i])
            last = torch.tensor(np.cumsum(counts) - 1)
            ones = torch.ones(len(active))
            drawn = ops.sample(
                model.logits(x[last]),
                SamplingRows(
                    temperature_R=ones * TEMPERATURE,
                    top_k_R=torch.zeros(len(active), dtype=torch.int32),
                    top_p_R=ones,
                    min_p_R=ones * 0,
                    seed_R=torch.tensor([first + i for i in active]),
                    position_R=torch.tensor([done[i] for i in active]),
                ),
            ).tokens_R.tolist()
            for i, token in zip(active, drawn, strict=True):
                texts[i].append(token)
            active = [i for i in active if len(texts[i]) < LENGTH and texts[i][-1] not in ends]
        for tokens_, pieces in zip(texts, kept, strict=True):
            states = torch.cat(pieces)
            made.append({"tokens": torch.tensor(tokens_), "states": states})
        torch.save(made, file)
        total = sum(len(text["tokens"]) for text in made)
        print(f"answers: {len(made)} of {len(token_lists)}, {total} tokens", flush=True)


@dataclass
class Teacher:
    """What both students need of the target."""

    embedding: Tensor
    norm: Tensor
    eps: float

    def probabilities(self, states: Tensor, ids: Tensor) -> Tensor:
        """The target's distribution over the tokens `ids` alone."""
        hidden = F.rms_norm(states.float(), self.norm.shape, self.norm, self.eps)
        return (hidden @ self.embedding[ids].T).softmax(-1)


class Layer(nn.Module):
    """A Llama layer under published names; `wide` reads inputs of twice the hidden size."""

    def __init__(
        self, hidden: int, mlp: int, heads: int, kv_heads: int, d: int, wide: bool
    ) -> None:
        super().__init__()
        inputs = 2 * hidden if wide else hidden
        self.heads, self.d, self.hidden = heads, d, hidden
        self.input_layernorm = nn.RMSNorm(hidden, 1e-5)
        self.post_attention_layernorm = nn.RMSNorm(hidden, 1e-5)
        self.self_attn = nn.ModuleDict(
            {
                "q_proj": nn.Linear(inputs, heads * d, bias=False),
                "k_proj": nn.Linear(inputs, kv_heads * d, bias=False),
                "v_proj": nn.Linear(inputs, kv_heads * d, bias=False),
                "o_proj": nn.Linear(heads * d, hidden, bias=False),
            }
        )
        self.mlp = nn.ModuleDict(
            {
                "gate_proj": nn.Linear(hidden, mlp, bias=False),
                "up_proj": nn.Linear(hidden, mlp, bias=False),
                "down_proj": nn.Linear(mlp, hidden, bias=False),
            }
        )
        if wide:
            self.hidden_norm = nn.RMSNorm(hidden, 1e-5)

    def keys(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated q and k, and v: [B, heads, T, d]."""
        batch, length, _ = x.shape
        q, k, v = (
            self.self_attn[f"{n}_proj"](x).view(batch, length, -1, self.d).transpose(1, 2)
            for n in "qkv"
        )
        return rotate(q, cos, sin), rotate(k, cos, sin), v

    def finish(self, residual: Tensor, attended: Tensor) -> Tensor:
        """Output projection and MLP."""
        batch, _, length, _ = attended.shape
        out = attended.transpose(1, 2).reshape(batch, length, -1)
        y = residual + self.self_attn["o_proj"](out)
        h = self.post_attention_layernorm(y)
        mlp = self.mlp
        return y + mlp["down_proj"](F.silu(mlp["gate_proj"](h)) * mlp["up_proj"](h))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE by halves."""
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def angles(length: int, d: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines [T, d / 2]."""
    turns = torch.arange(length)[:, None] / theta ** (torch.arange(0, d, 2) / d)
    return turns.cos(), turns.sin()


class Head(nn.Module):
    """The EAGLE-3 head in its flat layout."""

    def __init__(self, settings: dict[str, Any], teacher: Teacher, ids: Tensor) -> None:
        super().__init__()
        hidden, d = settings["hidden_size"], settings["head_dim"]
        self.fc = nn.Linear(3 * hidden, hidden, bias=False)
        self.midlayer = Layer(
            hidden,
            settings["intermediate_size"],
            settings["num_attention_heads"],
            settings["num_key_value_heads"],
            d,
            wide=True,
        )
        self.norm = nn.RMSNorm(hidden, 1e-5)
        self.lm_head = nn.Linear(hidden, len(ids), bias=False)
        with torch.no_grad():  # from the target: the latest tap, its final norm and its rows
            self.fc.weight.mul_(0.1)
            self.fc.weight[:, 2 * hidden :] += torch.eye(hidden)
            self.norm.weight.copy_(teacher.norm)
            self.lm_head.weight.copy_(teacher.embedding[ids])
            self.midlayer.self_attn["o_proj"].weight.mul_(0.1)
            self.midlayer.mlp["down_proj"].weight.mul_(0.1)

    def losses(
        self, taps: Tensor, embeds: Tensor, wanted: Tensor, some: Tensor, cos: Tensor, sin: Tensor
    ) -> list[Tensor]:
        """Cross entropies of the steps of a chain over the draft tokens `some`, at all positions.

        Step s at position t reads the output of step s - 1 at t - 1 and attends to the rows of step
        0 up to t - s and to its own chain: training-time test of the EAGLE-3 paper.
        """
        layer, length = self.midlayer, taps.shape[1]
        feature = self.fc(taps)
        causal = torch.ones(length, length).tril().log()
        keys: list[Tensor] = []
        values: list[Tensor] = []
        losses = []
        for step in range(UNROLL):
            e = layer.input_layernorm(embeds)
            q, k, v = layer.keys(torch.cat([e, layer.hidden_norm(feature)], -1), cos, sin)
            repeat = layer.heads // k.shape[1]
            keys.append(k.repeat_interleave(repeat, 1))
            values.append(v.repeat_interleave(repeat, 1))
            scale = layer.d**-0.5
            # position t sees step 0's rows up to t - step, then one row of each later step
            scores = [(q @ keys[0].transpose(-1, -2)) * scale + _shifted(causal, step)]
            for later in range(1, step + 1):
                back = step - later
                scores.append((q * _rolled(keys[later], back)).sum(-1, keepdim=True) * scale)
            weights = torch.cat(scores, -1).softmax(-1)
            out = weights[..., :length] @ values[0]
            for later in range(1, step + 1):
                at = length + later - 1
                out = out + weights[..., at : at + 1] * _rolled(values[later], step - later)
            y = layer.finish(feature, out)
            logits = self.norm(y) @ self.lm_head.weight[some].T
            loss = -(wanted * logits.log_softmax(-1)).sum(-1)
            losses.append(loss[:, step:].mean())
            feature = _rolled_time(y)
        return losses


def _shifted(causal: Tensor, step: int) -> Tensor:
    """The mask of rows up to t - step; the first rows, which count for nothing, see themselves."""
    if not step:
        return causal
    mask = torch.full_like(causal, -math.inf)
    mask[step:, :] = causal[:-step, :]
    mask[:step, 0] = 0
    return mask


def _rolled(x: Tensor, by: int) -> Tensor:
    """Rows [.., T, d] moved `by` positions later."""
    return (
        x
        if not by
        else torch.cat([x[..., :1, :].expand(*x.shape[:-2], by, -1), x[..., :-by, :]], -2)
    )


def _rolled_time(y: Tensor) -> Tensor:
    """Outputs [B, T, H] moved one position later."""
    return torch.cat([y[:, :1], y[:, :-1]], 1)


class Draft(nn.Module):
    """A tiny Llama whose table starts as the principal components of the target's."""

    def __init__(self, teacher: Teacher) -> None:
        super().__init__()
        hidden, heads = DRAFT["hidden"], DRAFT["heads"]
        d = hidden // heads
        self.embed_tokens = nn.Embedding(len(teacher.embedding), hidden)
        self.layers = nn.ModuleList(
            Layer(hidden, DRAFT["mlp"], heads, heads, d, wide=False) for _ in range(DRAFT["layers"])
        )
        self.norm = nn.RMSNorm(hidden, 1e-5)
        with torch.no_grad():
            table = teacher.embedding
            _, vectors = torch.linalg.eigh(table.T @ table)
            self.embed_tokens.weight.copy_(table @ vectors[:, -hidden:])
            scale = self.embed_tokens.weight.std()
            self.embed_tokens.weight.mul_(0.08 / scale)
            for layer in self.layers:
                layer.self_attn["o_proj"].weight.mul_(0.3)
                layer.mlp["down_proj"].weight.mul_(0.3)

    def forward(self, tokens: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Normed outputs [B, T, H]."""
        x = self.embed_tokens(tokens)
        for layer in self.layers:
            q, k, v = layer.keys(layer.input_layernorm(x), cos, sin)
            x = layer.finish(x, F.scaled_dot_product_attention(q, k, v, is_causal=True))
        return cast(Tensor, self.norm(x))


def batches(data: list[dict[str, Tensor]], size: int, rng: random.Random) -> list[list[int]]:
    """Indices of texts of like length, `size` at a time."""
    order = sorted(range(len(data)), key=lambda i: (len(data[i]["states"]), rng.random()))
    groups = [order[i : i + size] for i in range(0, len(order), size)]
    rng.shuffle(groups)
    return groups


def stacked(
    data: list[dict[str, Tensor]], group: list[int], most: int, rng: random.Random
) -> tuple[Tensor, Tensor]:
    """Tokens [B, T + 1] and states [B, T, 4, H]: a window of at most `most` positions."""
    length = min(len(data[i]["states"]) for i in group)
    start = rng.randrange(max(1, length - most + 1))
    stop = min(length, start + most)
    tokens = torch.stack([data[i]["tokens"][start : stop + 1] for i in group])
    return tokens, torch.stack([data[i]["states"][start:stop] for i in group])


def frequent(tokens: Tensor, ids: Tensor) -> Tensor:
    """Draft tokens that the loss covers: those of the batch and some others, by index in `ids`."""
    inside = torch.isin(ids, tokens.unique())
    inside[torch.randint(len(ids), (OTHERS,))] = True
    return inside.nonzero()[:, 0]


def optimise(module: nn.Module, rate: float, steps: int) -> tuple[Any, Any]:
    """Adam with a cosine schedule."""
    optimiser = torch.optim.AdamW(
        module.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.01
    )

    def share(step: int) -> float:
        cosine = 0.5 * (1 + math.cos(math.pi * step / steps))
        return min(1.0, (step + 1) / 20) * (0.02 + 0.98 * cosine)

    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, share)
    return optimiser, schedule


def train_head(
    data: list[dict[str, Tensor]],
    teacher: Teacher,
    settings: dict[str, Any],
    ids: Tensor,
    epochs: int,
    most: int,
    save: Callable[[Head], None],
) -> Head:
    """Train the head, saved after each epoch; prints the losses of the chain's steps."""
    rng = random.Random(1)
    torch.manual_seed(1)
    head = Head(settings, teacher, ids)
    size = 4 if most > 128 else 2
    total = epochs * -(-len(data) // size)
    optimiser, schedule = optimise(head, 1e-3, total)
    cos, sin = angles(LENGTH, settings["head_dim"], settings["rope_theta"])
    started, at = time.time(), 0
    for _ in range(epochs):
        for group in batches(data, size, rng):
            tokens, states = stacked(data, group, most, rng)
            length = states.shape[1] - 1
            if length <= UNROLL:
                continue
            some = frequent(tokens, ids)
            losses = head.losses(
                states[:, :-1, :3].float().flatten(2),
                teacher.embedding[tokens[:, 1 : length + 1]],
                teacher.probabilities(states[:, 1:, 3], ids[some]),
                some,
                cos[:length],
                sin[:length],
            )
            loss = sum(0.8**i * each for i, each in enumerate(losses))
            optimiser.zero_grad()
            cast(Tensor, loss).backward()
            nn.utils.clip_grad_norm_(head.parameters(), 1.0)
            optimiser.step()
            schedule.step()
            at += 1
            if at % 10 == 0:
                shown = " ".join(f"{float(each.detach()):.3f}" for each in losses)
                print(f"head: {at} of {total}, {time.time() - started:.0f} s, {shown}", flush=True)
        save(head)
    return head


def train_draft(
    data: list[dict[str, Tensor]],
    teacher: Teacher,
    ids: Tensor,
    theta: float,
    epochs: int,
    most: int,
) -> Draft:
    """Train the draft model on the frequent tokens and some others; prints the loss."""
    rng = random.Random(2)
    torch.manual_seed(2)
    draft = Draft(teacher)
    total = epochs * -(-len(data) // 8)
    optimiser, schedule = optimise(draft, 2e-3, total)
    cos, sin = angles(LENGTH, DRAFT["hidden"] // DRAFT["heads"], theta)
    started, at = time.time(), 0
    for _ in range(epochs):
        for group in batches(data, 8, rng):
            tokens, states = stacked(data, group, most, rng)
            length = states.shape[1]
            others = torch.randint(len(teacher.embedding), (OTHERS,))
            some = torch.cat([ids[frequent(tokens, ids)], others]).unique()
            wanted = teacher.probabilities(states[:, :, 3], some)
            y = draft(tokens[:, :length], cos[:length], sin[:length])
            logits = y @ draft.embed_tokens.weight[some].T
            loss = -(wanted * logits.log_softmax(-1)).sum(-1).mean()
            optimiser.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(draft.parameters(), 1.0)
            optimiser.step()
            schedule.step()
            at += 1
            if at % 10 == 0:
                shown = float(loss.detach())
                print(
                    f"draft: {at} of {total}, {time.time() - started:.0f} s, {shown:.3f}",
                    flush=True,
                )
    return draft


def save_head(folder: Path, head: Head, settings: dict[str, Any], ids: Tensor, vocab: int) -> None:
    """Write the flat layout, bfloat16."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: value.detach().bfloat16() for name, value in head.state_dict().items()}
    t2d = torch.zeros(vocab, dtype=torch.bool)
    t2d[ids] = True
    save_file(
        tensors | {"d2t": ids - torch.arange(len(ids)), "t2d": t2d}, folder / "model.safetensors"
    )
    config = settings | {
        "architectures": ["LlamaForCausalLMEagle3"],
        "num_hidden_layers": 1,
        "draft_vocab_size": len(ids),
        "tie_word_embeddings": False,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2))


def save_draft(folder: Path, draft: Draft, settings: dict[str, Any], target: Path) -> None:
    """Write a Llama checkpoint with the target's tokenizer, bfloat16."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        f"model.{name}": value.detach().bfloat16() for name, value in draft.state_dict().items()
    }
    save_file(tensors, folder / "model.safetensors")
    heads = DRAFT["heads"]
    config = settings | {
        "hidden_size": DRAFT["hidden"],
        "intermediate_size": DRAFT["mlp"],
        "num_hidden_layers": DRAFT["layers"],
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "head_dim": DRAFT["hidden"] // heads,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        if (target / name).is_file():
            shutil.copy(target / name, folder / name)


def main() -> None:
    """Draw the answers once, then train and write both."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--target", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path.home() / ".cache/arriero/drafts")
    parser.add_argument("--texts", type=int, default=256)
    parser.add_argument("--head-epochs", type=int, default=3)
    parser.add_argument("--draft-epochs", type=int, default=5)
    parser.add_argument("--window", type=int, default=LENGTH, help="positions of a text in a step")
    parser.add_argument("--only", choices=("data", "head", "draft"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    target, out = arguments.target, arguments.out
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer.from_file(str(target / "tokenizer.json"))
    if not (out / "data.pt").is_file():
        with torch.no_grad():
            draw_answers(target, prompts(tokenizer, arguments.texts), "bfloat16", out / "data.pt")
    data = torch.load(out / "data.pt", mmap=True)
    settings = json.loads((target / "config.json").read_text())
    weights = load_file(target / "model.safetensors")
    teacher = Teacher(
        weights["model.embed_tokens.weight"].float(),
        weights["model.norm.weight"].float(),
        settings["rms_norm_eps"],
    )
    counts = Counter(token for text in data for token in text["tokens"].tolist())
    ids = {token for token, _ in counts.most_common(DRAFT_VOCAB)}
    ids |= set(list(set(range(len(teacher.embedding))) - ids)[: DRAFT_VOCAB - len(ids)])
    draft_ids = torch.tensor(sorted(ids))
    print(f"data: {len(data)} texts, {counts.total()} tokens, {len(counts)} different", flush=True)
    if arguments.only in (None, "head"):

        def save(head: Head) -> None:
            save_head(out / "eagle3", head, settings, draft_ids, len(teacher.embedding))

        epochs = arguments.head_epochs
        train_head(data, teacher, settings, draft_ids, epochs, arguments.window, save)
    if arguments.only in (None, "draft"):
        draft = train_draft(
            data,
            teacher,
            draft_ids,
            settings["rope_theta"],
            arguments.draft_epochs,
            arguments.window,
        )
        save_draft(out / "draft", draft, settings, target)


if __name__ == "__main__":
    main()
