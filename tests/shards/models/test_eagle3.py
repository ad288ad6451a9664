"""EAGLE-3 heads: the equations in both layouts, published shapes, and refusals by name."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from arriero.kernels.flat_batch import FlatBatch
from arriero.shards.checkpoint.safetensors_header import StoredTensor
from arriero.shards.checkpoint.tensor_folder import TensorFolder
from arriero.shards.collectives.mesh import Mesh
from arriero.shards.config.parallel import ParallelConfig
from arriero.shards.errors import CheckpointError
from arriero.shards.models.eagle3.check import check_head
from arriero.shards.models.eagle3.config import Eagle3Config
from arriero.shards.models.eagle3.slice import Eagle3Settings, Eagle3Slice
from arriero.shards.models.eagle3.tensors import (
    Eagle3Tensors,
    eagle3_parts,
    eagle3_specs,
)
from arriero.shards.worker.rope_table import Rope
from support.eagle3_heads import ReferenceHead, head_settings, head_weights, write_head
from support.slices import BLOCK, CPU, ThreadMesh, exact_ops

VOCAB, LENGTH, CHAIN = 128, 37, 4


def _batch(config: Eagle3Config, start: int, count: int, context: int) -> FlatBatch:
    positions = torch.arange(start, start + count, dtype=torch.int32)
    rope = Rope(config.layer.inv_freq(), 256, CPU)
    cos, sin = rope.at(positions)
    return FlatBatch(
        positions_T=positions,
        query_start_S1=torch.tensor([0, count], dtype=torch.int32),
        context_S=torch.tensor([context], dtype=torch.int32),
        block_table_SB=torch.arange(8, dtype=torch.int32)[None],
        slots_T=positions,
        cos_TD=cos,
        sin_TD=sin,
        max_query=count,
        max_context=context,
    )


def _outputs(
    path: Path, tokens: Tensor, taps: list[Tensor], tp: int, kernels: str, embedding: Tensor
) -> tuple[Tensor, Tensor]:
    """Logits of all rows, then of a greedy chain; summed over `tp` slices in threads."""
    config = Eagle3Config.from_folder(path)
    parts = eagle3_parts(config, ParallelConfig(tp=tp))
    barrier = threading.Barrier(tp)
    shared: list[Any] = [None] * tp

    def run(rank: int) -> tuple[Tensor, Tensor]:
        ops = exact_ops(kernels)
        part, mesh = parts[rank], cast(Mesh, ThreadMesh(tp, rank, shared, barrier))
        rows = embedding[part.vocab.start : part.vocab.stop]
        settings = Eagle3Settings(
            dtype=torch.float32,
            kv_dtype=torch.float32,
            num_blocks=8,
            block_size=BLOCK,
            embedding=ops.pack_vocab(rows, part.vocab.start, torch.float32),
        )
        head = Eagle3Slice(path, config, part, mesh, ops, settings)
        y = head.forward(tokens, head.fuse(taps), _batch(config, 0, LENGTH, LENGTH))
        first, chain = head.logits(y), []
        feature = head.next_feature(y[-1:])
        for step in range(CHAIN):
            at = LENGTH + step
            token = torch.tensor([(7 * step) % VOCAB], dtype=torch.int32)
            y = head.forward(token, feature, _batch(config, at, 1, at + 1))
            chain.append(head.logits(y))
            feature = head.next_feature(y)
        return first, torch.cat(chain)

    with ThreadPoolExecutor(tp) as pool:
        outs = list(pool.map(run, range(tp)))
    return torch.cat([a for a, _ in outs], 1), torch.cat([b for _, b in outs], 1)


@pytest.mark.parametrize("kernels", ["reference", "cpu"])
@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize(
    ("layout", "flags"),
    [
        ("flat", {}),
        ("flat", {"norm_output": True, "norm_before_fc": True}),
        ("nested", {}),
        ("nested", {"norm_before_residual": False, "fc_norm": True}),
    ],
)
def test_the_equations(
    tmp_path: Path, layout: str, flags: dict[str, bool], tp: int, kernels: str
) -> None:
    """Rows of a prompt and a chain of drafts equal plain torch in float32."""
    settings = head_settings(layout=layout, target_hidden=64, **flags)
    weights = head_weights(settings)
    path = write_head(tmp_path / "head", settings, weights)
    generator = torch.Generator().manual_seed(1)
    embedding = torch.randn(VOCAB, 64, generator=generator)
    tokens = torch.randint(VOCAB, (LENGTH,), generator=generator, dtype=torch.int32)
    taps = [torch.randn(LENGTH, 64, generator=generator) for _ in range(3)]
    rows, chain = _outputs(path, tokens, taps, tp, kernels, embedding)

    reference = ReferenceHead(settings, weights, embedding)
    features, all_tokens = reference.fuse(taps), tokens.long()
    wanted = reference.logits(reference(all_tokens, features))
    torch.testing.assert_close(rows.double(), wanted, atol=1e-5, rtol=0)
    for step in range(CHAIN):
        y = reference(all_tokens, features)[-1:]
        features = torch.cat([features, reference.next_feature(y)])
        all_tokens = torch.cat([all_tokens, torch.tensor([(7 * step) % VOCAB])])
        wanted = reference.logits(reference(all_tokens, features)[-1:])
        torch.testing.assert_close(chain[step : step + 1].double(), wanted, atol=1e-5, rtol=0)


def test_default_flags_of_both_layouts() -> None:
    """Only the nested layout norms before the residual without a flag."""
    flat, nested = (
        Eagle3Config.from_dict(head_settings(layout=layout)) for layout in ("flat", "nested")
    )
    assert (flat.norm_before_residual, nested.norm_before_residual) == (False, True)


def test_taps() -> None:
    """Default taps, and both meanings of explicit ids."""
    default = Eagle3Config.from_dict(head_settings())
    assert default.taps(32) == (2, 16, 29)
    maverick = Eagle3Config.from_dict(head_settings(taps=[1, 23, 44]))
    assert maverick.taps(48, "entering") == (1, 23, 44)
    assert maverick.taps(48, "leaving") == maverick.taps(48) == (2, 24, 45)
    nested = Eagle3Config.from_dict(head_settings(layout="nested", taps=[2, 24, 45]))
    assert nested.taps(48) == (2, 24, 45)
    others = [
        Eagle3Config.from_dict(head_settings(layout=layout, taps=[3, 9, 20]))
        for layout in ("flat", "nested")
    ]
    assert [head.taps(48) for head in others] == [(4, 10, 21), (3, 9, 20)]
    with pytest.raises(CheckpointError, match=r"\[1, 23, 44\].*target of 30 layers"):
        maverick.taps(30)


@pytest.mark.parametrize("layout", ["flat", "nested"])
def test_ids_of_the_default_taps_in_either_meaning(layout: str) -> None:
    """Converted heads keep their ids: those of the defaults mean the defaults in both layouts."""
    for ids in ([1, 23, 44], [2, 24, 45]):
        head = Eagle3Config.from_dict(head_settings(layout=layout, taps=ids))
        assert head.taps(48) == (2, 24, 45)
        assert head.taps(48, "entering") == tuple(ids), "a setting goes first"


def test_ids_of_both_meanings() -> None:
    """AngelSlim's heads name the layers of the training beside the ids for vLLM."""
    settings = head_settings(taps=[3, 9, 20])
    head = Eagle3Config.from_dict(settings | {"aux_hidden_states_layer_ids": [2, 8, 19]})
    assert head.taps(48) == (3, 9, 20)


LLAMA_8B = head_settings(
    vocab=128256,
    draft_vocab=32000,
    hidden=4096,
    intermediate=14336,
    heads=32,
    kv_heads=8,
    dtype="bfloat16",
)
MAVERICK = head_settings(
    vocab=202048,
    draft_vocab=202048,
    hidden=5120,
    intermediate=32768,
    heads=40,
    kv_heads=8,
    head_dim=128,
    taps=[1, 23, 44],
    dtype="bfloat16",
)


class _MetaFolder(TensorFolder):
    """A folder whose tensors are on the meta device, except maps between vocabularies."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors = tensors
        file = Path("model.safetensors")
        super().__init__(
            Path("head"),
            {
                name: StoredTensor(
                    name=name, file=file, dtype=t.dtype, shape=tuple(t.shape), start=0, stop=0
                )
                for name, t in tensors.items()
            },
        )

    def copy(self, name: str) -> Tensor:
        return self.tensors[name]


def _published(settings: dict[str, Any], prefix: str) -> dict[str, Tensor]:
    """The tensors of a published head, from its shapes alone."""
    layer = settings
    hidden, mlp, d = layer["hidden_size"], layer["intermediate_size"], layer["head_dim"]
    q, kv = layer["num_attention_heads"] * d, layer["num_key_value_heads"] * d
    shapes = {
        "fc": (hidden, 3 * hidden),
        f"{prefix}input_layernorm": (hidden,),
        f"{prefix}hidden_norm": (hidden,),
        f"{prefix}post_attention_layernorm": (hidden,),
        f"{prefix}self_attn.q_proj": (q, 2 * hidden),
        f"{prefix}self_attn.k_proj": (kv, 2 * hidden),
        f"{prefix}self_attn.v_proj": (kv, 2 * hidden),
        f"{prefix}self_attn.o_proj": (hidden, q),
        f"{prefix}mlp.gate_proj": (mlp, hidden),
        f"{prefix}mlp.up_proj": (mlp, hidden),
        f"{prefix}mlp.down_proj": (hidden, mlp),
        "norm": (hidden,),
        "lm_head": (layer["draft_vocab_size"], hidden),
    }
    tensors = {
        f"{name}.weight": torch.empty(shape, dtype=torch.bfloat16, device="meta")
        for name, shape in shapes.items()
    }
    if layer["draft_vocab_size"] < layer["vocab_size"]:
        tensors["d2t"] = torch.arange(layer["draft_vocab_size"]) * 3
        t2d = torch.zeros(layer["vocab_size"], dtype=torch.bool)
        t2d[tensors["d2t"] + torch.arange(layer["draft_vocab_size"])] = True
        tensors["t2d"] = t2d
    return tensors


@pytest.mark.parametrize("settings", [LLAMA_8B, MAVERICK], ids=["8b", "maverick"])
@pytest.mark.parametrize("prefix", ["midlayer.", "layers.0."])
@pytest.mark.parametrize("embedded", [False, True])
def test_published_shapes(settings: dict[str, Any], prefix: str, embedded: bool) -> None:
    """Every tensor of a published head is claimed, and each rank's share adds up to all bytes."""
    tensors = _published(settings, prefix)
    if embedded:
        shape = (settings["vocab_size"], settings["hidden_size"])
        tensors["embed_tokens.weight"] = torch.empty(shape, dtype=torch.bfloat16, device="meta")
    config = Eagle3Config.from_dict(settings)
    stored = check_head(_MetaFolder(tensors), config)
    assert stored == Eagle3Tensors(prefix=prefix, has_embedding=embedded, has_head=True)
    claimed = {spec.name for spec in eagle3_specs(config, stored)}
    assert claimed == set(tensors) - {"d2t", "t2d"}


def _broken(change: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    settings = head_settings()
    weights = head_weights(settings)
    if change == "shape":
        weights["midlayer.self_attn.q_proj.weight"] = torch.zeros(64, 64)
    elif change == "dtype":
        weights["d2t"] = weights["d2t"].to(torch.int16)
    elif change == "no d2t":
        del weights["d2t"]
    elif change == "far d2t":
        weights["d2t"][5] = 4000
    elif change == "twice":
        weights["d2t"][5] = weights["d2t"][4] - 1
    elif change == "t2d":
        weights["t2d"] = ~weights["t2d"]
    elif change == "missing":
        del weights["fc.weight"]
    elif change == "more":
        weights["midlayer.self_attn.q_norm.weight"] = torch.zeros(16)
    elif change == "bias":
        weights["fc.bias"] = torch.zeros(64)
    elif change == "no head":
        del weights["lm_head.weight"]
    elif change == "narrow":
        settings["target_hidden_size"] = 32
        weights["fc.weight"] = torch.zeros(64, 96)
    return settings, weights


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ("shape", r"q_proj.weight' has shape \[64, 64\].*requires \[64, 128\]"),
        ("dtype", r"'d2t' has shape \[48\] and dtype torch.int16"),
        ("no d2t", r"'d2t' is missing, but `draft_vocab_size`=48 differs from `vocab_size`=128"),
        ("far d2t", r"'d2t' makes draft token 5 to token 4005, but the target has 128 tokens"),
        ("twice", r"'d2t' names tokens twice: 48 draft tokens, but 47 different ones"),
        ("t2d", r"'d2t' and 't2d' name different tokens"),
        ("missing", r"'fc.weight' of shape \[64, 192\] is missing"),
        ("more", r"'midlayer.self_attn.q_norm.weight' of shape \[16\] is no part"),
        ("bias", r"'fc.bias' of shape \[64\] is no part"),
        ("no head", r"'lm_head.weight' is missing, and the target's has another shape"),
        ("narrow", r"'embed_tokens.weight' is missing, and the target's has another shape"),
    ],
)
def test_hostile_heads(tmp_path: Path, change: str, text: str) -> None:
    """A wrong head is refused by the name of its tensor."""
    path = write_head(tmp_path / "head", *_broken(change))
    with pytest.raises(CheckpointError, match=text):
        check_head(TensorFolder.of(path), Eagle3Config.from_folder(path))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"architectures": ["LlamaForCausalLM"]}, "'LlamaForCausalLM' is no EAGLE-3 head"),
        ({"num_hidden_layers": 2}, "`num_hidden_layers`=2 must be 1"),
        ({"draft_vocab_size": 500}, "`draft_vocab_size`=500 must be at most `vocab_size`=128"),
        ({"quantization_config": {"quant_algo": "FP8"}}, "`quantization_config`"),
        ({"eagle_config": {"eagle_aux_hidden_state_layer_ids": "no"}}, "must be a list"),
    ],
)
def test_hostile_configs(change: dict[str, Any], text: str) -> None:
    """A wrong config is refused by the name of its field."""
    with pytest.raises(CheckpointError, match=text):
        Eagle3Config.from_dict(head_settings() | change)


def test_an_empty_quantization_section_is_no_quantization() -> None:
    """Maverick's published head has a section without a form."""
    section = {"quant_method": "modelopt", "quant_algo": None, "config_groups": {}}
    Eagle3Config.from_dict(MAVERICK | {"quantization_config": section})


def test_another_target_is_refused() -> None:
    """A head of another vocabulary or hidden size names both numbers."""
    target = Eagle3Config.from_dict(head_settings()).layer
    other = Eagle3Config.from_dict(head_settings(vocab=64, draft_vocab=32))
    with pytest.raises(CheckpointError, match=r"`vocab_size`=64 .* the target has 128"):
        other.check_target(target, "head")
    narrow = Eagle3Config.from_dict(head_settings(target_hidden=32))
    with pytest.raises(CheckpointError, match=r"`target_hidden_size`=32 .* the target has 64"):
        narrow.check_target(target, "head")
