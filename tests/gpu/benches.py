"""Times of true shapes with random weights, as shares of what the machine was measured to do."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from gpu import shapes
from gpu.checks import Where
from gpu.shapes import LLAMA_8B, LLAMA_405B_TP8, MAVERICK_EP8, Shape

from arriero.kernels.sampling_rows import SamplingRows
from arriero.kernels.triton.backend import TritonOps

Result = dict[str, Any]


@dataclass(frozen=True)
class Machine:
    """What the device does at best, measured.

    Attributes:
        bytes_per_s: of a large copy, read and written bytes together.
        flops_per_s: of a large bfloat16 product.
    """

    bytes_per_s: float
    flops_per_s: float


def seconds(at: Where, work: Callable[[], object], repeats: int = 20) -> float:
    """Mean time of `work`, replayed as a CUDA graph."""
    if at.tiny:
        repeats = 1
    if at.device.type != "cuda":
        began = time.perf_counter()
        work()
        return time.perf_counter() - began
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    graph.replay()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(repeats):
        graph.replay()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1000 / repeats


def measure(at: Where) -> Machine:
    """Copy rate and matrix rate."""
    size = 1 << 10 if at.tiny else 1 << 31
    source = torch.empty(size, dtype=torch.uint8, device=at.device)
    target = torch.empty_like(source)
    copy_s = seconds(at, lambda: target.copy_(source))
    side = 32 if at.tiny else 8192
    a, b = at.randn(side, side), at.randn(side, side)
    product_s = seconds(at, lambda: a @ b)
    return Machine(2 * size / copy_s, 2 * side**3 / product_s)


class Model:
    """A stack of layers, with embedding and head where the shape has a vocabulary."""

    def __init__(self, at: Where, shape: Shape, *, independent: bool) -> None:
        self.at, self.shape = at, shape
        self.ops = TritonOps(at.device, batch_independent=independent)
        self.layers = [
            shapes.layer(self.ops, shape, at.dtype, at.device) for _ in range(shape.layers)
        ]
        self.norm = torch.ones(shape.hidden, device=at.device)
        self.vocab = None
        if shape.vocab:
            table = at.randn(shape.vocab, shape.hidden)
            self.vocab = self.ops.pack_vocab(table, 0, at.dtype)

    def step(self, sequences: list[tuple[int, int]], *, draws: bool = True) -> float:
        """Seconds of one step of the sequences, (cached, new) tokens each."""
        at, shape, ops = self.at, self.shape, self.ops
        kv = shapes.cache(ops, shape, sequences, at.dtype, at.device)
        batch = shapes.batch(sequences, shape.head_dim, at.device)
        run = ops.decoder(self.layers, kv, None)
        count = len(batch.positions_T)
        x = at.randn(count, shape.hidden)
        tokens = torch.zeros(count, dtype=torch.int32, device=at.device)
        last = (batch.query_start_S1[1:] - 1).long()
        rows = greedy(len(sequences), at.device)

        def work() -> None:
            h = x.clone() if self.vocab is None else ops.embed(tokens, self.vocab)
            h = run(h, batch)
            if self.vocab is not None and draws:
                logits = ops.logits(h.index_select(0, last), self.norm, 1e-5, self.vocab)
                ops.sample(logits, rows)

        taken = seconds(at, work, repeats=3 if count > 1024 else 20)
        del kv
        return taken

    def bytes_of(self, sequences: list[tuple[int, int]], experts_hit: int = 0) -> int:
        """Bytes that a step must read at least: each weight once, each key and value once."""
        shape, item = self.shape, self.at.dtype.itemsize
        weights = shape.attention_weights + shape.mlp_weights + experts_hit * shape.expert_weights
        total = shape.layers * weights * item
        if self.vocab is not None:
            total += shape.vocab * shape.hidden * item
        keys = sum(sum(sizes) for sizes in sequences)
        per_key = 2 * shape.kv_heads * shape.head_dim * item
        return total + shape.layers * keys * per_key

    def flops_of(self, sequences: list[tuple[int, int]]) -> int:
        """Floating-point operations of a step, causal attention counted by half."""
        shape = self.shape
        weights = shape.attention_weights + shape.mlp_weights
        weights += shape.expert_weights if shape.experts else 0
        tokens = sum(new for _, new in sequences)
        pairs = sum(new * cached + new * new // 2 for cached, new in sequences)
        attention = 4 * shape.q_heads * shape.head_dim * pairs
        return shape.layers * (2 * tokens * weights + attention)


def greedy(rows: int, device: torch.device) -> SamplingRows:
    """Parameters of rows that take the likeliest token."""
    zeros = torch.zeros(rows, device=device)
    ints = torch.zeros(rows, dtype=torch.int64, device=device)
    return SamplingRows(
        temperature_R=zeros,
        top_k_R=ints.int(),
        top_p_R=zeros + 1,
        min_p_R=zeros,
        seed_R=ints,
        position_R=ints,
        all_greedy=True,
    )


def limit_s(model: Model, machine: Machine, sequences: list[tuple[int, int]]) -> float:
    """The shortest time that memory and products allow."""
    shape = model.shape
    tokens = sum(new for _, new in sequences)
    hit = shape.experts and round(shape.experts * (1 - (1 - 1 / shape.experts) ** tokens))
    by_bytes = model.bytes_of(sequences, hit) / machine.bytes_per_s
    return max(by_bytes, model.flops_of(sequences) / machine.flops_per_s)


def stepped(at: Where, machine: Machine, model: Model, sequences: list[tuple[int, int]]) -> Result:
    taken = model.step(sequences)
    limit = limit_s(model, machine, sequences)
    tokens = sum(new for _, new in sequences)
    return {
        "ms": taken * 1e3,
        "limit_ms": limit * 1e3,
        "share": limit / taken,
        "tokens_per_s": tokens / taken,
    }


def llama_8b(at: Where, machine: Machine) -> Result:
    """Whole steps of the 8B, in both modes."""
    shape = LLAMA_8B.tiny() if at.tiny else LLAMA_8B
    cases = {
        "decode, batch 1, 1k": [(1023, 1)],
        "decode, batch 64, 4k": [(4095, 1)] * 64,
        "prefill 8k": [(0, 8192)],
    }
    if at.tiny:
        cases = {name: [(5, 1)] * 2 for name in cases}
    out: Result = {}
    for mode, independent in (("fastest", False), ("batch-independent", True)):
        model = Model(at, shape, independent=independent)
        for name, sequences in cases.items():
            out.setdefault(name, {})[mode] = stepped(at, machine, model, sequences)
        del model
        free(at)
    for result in out.values():
        result["cost of independence"] = (
            result["batch-independent"]["ms"] / result["fastest"]["ms"] - 1
        )
    return out


def layers(at: Where, machine: Machine) -> Result:
    """One layer of the two large models, as a slice of eight holds it."""
    out: Result = {}
    for shape in (LLAMA_405B_TP8, MAVERICK_EP8):
        model = Model(at, shape.tiny() if at.tiny else shape, independent=False)
        results = out.setdefault(shape.name, {})
        for count in (1,) if at.tiny else (1, 4, 16, 64, 256):
            sequences = [(1023 if not at.tiny else 5, 1)] * count
            results[f"decode, batch {count}"] = stepped(at, machine, model, sequences)
        prefill = [(0, 8192 if not at.tiny else 6)]
        results["prefill 8k"] = stepped(at, machine, model, prefill)
        del model
        free(at)
    return out


def attention_128k(at: Where, machine: Machine) -> Result:
    """Attention alone over a long context: decodes, and the last 32 tokens of a prompt."""
    shape = LLAMA_8B.tiny() if at.tiny else LLAMA_8B
    context = 1 << 17 if not at.tiny else 60
    ops = TritonOps(at.device, batch_independent=False)
    out: Result = {}
    for count in (1, 4) if not at.tiny else (1,):
        taken = attention_s(at, ops, shape, [(context - 1, 1)] * count)
        size = count * context * 2 * shape.kv_heads * shape.head_dim * at.dtype.itemsize
        limit = size / machine.bytes_per_s
        out[f"batch {count}"] = {"ms": taken * 1e3, "share": limit / taken}
        free(at)
    new = 2 if at.tiny else 32
    out[f"{new} tokens"] = {"ms": attention_s(at, ops, shape, [(context - new, new)]) * 1e3}
    return out


def attention_s(
    at: Where,
    ops: TritonOps,
    shape: Shape,
    sequences: list[tuple[int, int]],
    kv_dtype: torch.dtype | None = None,
) -> float:
    """Seconds of one layer's attention; the cache is of `kv_dtype`, for None as the queries."""
    kv = shapes.cache(ops, shape, sequences, kv_dtype or at.dtype, at.device, layers=1)
    batch = shapes.batch(sequences, shape.head_dim, at.device)
    q = at.randn(len(batch.positions_T), shape.q_heads, shape.head_dim)
    return seconds(at, lambda: ops.paged_attention(q, 0.1, kv, 0, batch))


def transformers_8b(at: Where, machine: Machine) -> Result:
    """Decode steps of the 8B shape by transformers on the same device, and by this backend."""
    from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

    shape = LLAMA_8B.tiny() if at.tiny else LLAMA_8B
    context = 1024 if not at.tiny else 6
    config = LlamaConfig(
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        intermediate_size=shape.mlp,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.q_heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
    )
    theirs: dict[int, float] = {}
    counts = (1, 32) if not at.tiny else (1,)
    with torch.device(at.device):
        before = torch.get_default_dtype()
        torch.set_default_dtype(at.dtype)
        model = LlamaForCausalLM(config).eval()
        torch.set_default_dtype(before)
    for count in counts:
        past = DynamicCache(config=config)
        tokens = torch.zeros(count, context, dtype=torch.long, device=at.device)
        past = model(tokens, past_key_values=past, use_cache=True, logits_to_keep=1).past_key_values
        one = tokens[:, :1]
        steps = 12 if not at.tiny else 1
        for i in range(2 * steps):
            if i == steps:
                wait(at)
                began = time.perf_counter()
            logits = model(one, past_key_values=past, use_cache=True).logits
            one = logits[:, -1:].argmax(-1)
        wait(at)
        theirs[count] = (time.perf_counter() - began) / steps
    del model, past
    free(at)
    ours = Model(at, shape, independent=False)
    out: Result = {}
    for count in counts:
        mine = ours.step([(context + 17, 1)] * count)
        out[f"batch {count}"] = {
            "ms": mine * 1e3,
            "transformers_ms": theirs[count] * 1e3,
            "times": theirs[count] / mine,
        }
    return out


def wait(at: Where) -> None:
    if at.device.type == "cuda":
        torch.cuda.synchronize()


def free(at: Where) -> None:
    if at.device.type == "cuda":
        torch.cuda.empty_cache()


BENCHES: dict[str, Callable[[Where, Machine], Result]] = {
    "attention, 128k": attention_128k,
    "Llama-3.1-8B": llama_8b,
    "layers of the large models": layers,
    "against transformers": transformers_8b,
}
