"""The ops put together as Llama 3 and Llama 4 against transformers in float32, random weights.

The batch is cut as a scheduler would: chunks and single tokens, over scattered blocks.
"""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch

from arriero.kernels.attention_mask import AttentionMaskSpec
from arriero.kernels.kv_cache import KVCacheSpec
from arriero.kernels.layers import AttentionStyle, DenseLayer, MoELayer
from arriero.kernels.ops import Ops
from arriero.kernels.packed_weights import Linear

from . import paged

pytestmark = pytest.mark.slow

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, VOCAB, EPS = 96, 6, 2, 16, 97, 1e-5
COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "num_hidden_layers": 4,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": HEAD_DIM,
    "rms_norm_eps": EPS,
    # The base that `paged.batch` turns by.
    "rope_theta": 1e4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def oracle(name: str) -> Any:  # noqa: ANN401
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    if name == "llama3":
        config = transformers.LlamaConfig(**COMMON, intermediate_size=100)
        model = transformers.LlamaForCausalLM(config)
    else:
        config = transformers.Llama4TextConfig(
            **COMMON,
            intermediate_size=48,
            intermediate_size_mlp=96,
            num_local_experts=4,
            num_experts_per_tok=1,
            interleave_moe_layer_step=2,
            attention_chunk_size=8,
            use_qk_norm=True,
            floor_scale=8,
            attn_scale=0.1,
            attn_temperature_tuning=True,
            no_rope_layers=[1, 1, 1, 0],
        )
        model = transformers.Llama4ForCausalLM(config)
    for parameter in model.parameters():
        # The inputs: of a matrix [out, in], and of fused experts [E, in, out].
        inner = parameter.shape[1] if parameter.dim() > 1 else 0
        noise = torch.randn_like(parameter)
        parameter.data = noise / math.sqrt(inner) if inner else 1 + 0.1 * noise
    return model.eval()


def layers_of(ops: Ops, model: Any, llama4: bool) -> list[DenseLayer]:  # noqa: ANN401
    def pack(*weights: torch.Tensor) -> Linear:
        return ops.pack_linear([w.data for w in weights], None, torch.float32)

    layers: list[DenseLayer] = []
    for i, block in enumerate(model.model.layers):
        attention = block.self_attn
        mlp = block.feed_forward if llama4 else block.mlp
        style = AttentionStyle()
        if llama4 and model.config.no_rope_layers[i]:
            style = AttentionStyle(rope="pairs", qk_norm=True, mask=AttentionMaskSpec(chunk_size=8))
        elif llama4:
            style = AttentionStyle(rope="none", query_scale=(0.1, 8.0))
        routed = hasattr(mlp, "router")
        dense = mlp.shared_expert if routed else mlp
        fields: dict[str, Any] = {
            "attn_norm_H": block.input_layernorm.weight.data,
            "qkv": pack(attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight),
            "o": pack(attention.o_proj.weight),
            "mlp_norm_H": block.post_attention_layernorm.weight.data,
            "gate_up": pack(dense.gate_proj.weight, dense.up_proj.weight),
            "down": pack(dense.down_proj.weight),
            "num_q_heads": HEADS,
            "num_kv_heads": KV_HEADS,
            "head_dim": HEAD_DIM,
            "softmax_scale": HEAD_DIM**-0.5,
            "eps": EPS,
            "style": style,
        }
        if routed:
            layers.append(
                MoELayer(
                    **fields,
                    router=pack(mlp.router.weight),
                    experts_gate_up=[pack(w.t()) for w in mlp.experts.gate_up_proj],
                    experts_down=[pack(w.t()) for w in mlp.experts.down_proj],
                    first_expert=0,
                    top_k=1,
                )
            )
        else:
            layers.append(DenseLayer(**fields))
    return layers


@pytest.mark.parametrize("name", ["llama3", "llama4"])
def test_logits(ops: Ops, name: str) -> None:
    model = oracle(name)
    layers = layers_of(ops, model, name == "llama4")
    spec = KVCacheSpec(
        num_layers=4,
        num_blocks=24,
        num_kv_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        block_size=paged.BLOCK,
        dtype=torch.float32,
    )
    run = ops.decoder(layers, paged.poisoned_cache(ops, spec), None)
    table = ops.pack_vocab(model.model.embed_tokens.weight.data, 0, torch.float32)
    head = ops.pack_vocab(model.lm_head.weight.data, 0, torch.float32)
    norm = model.model.norm.weight.data
    generator = torch.Generator().manual_seed(1)
    sequences = [torch.randint(0, VOCAB, (n,), generator=generator) for n in (40, 17)]
    blocks = paged.tables(paged.Case(1, 1, HEAD_DIM, [(0, 40), (0, 17)]), spec.num_blocks)
    logits: list[list[torch.Tensor]] = [[], []]
    done = [0, 0]
    for step in ((5, 9), (7, 1), (1, 1), (1, 6), (11, 0), (1, 0), (14, 0)):
        active = [s for s in range(2) if step[s]]
        batch = paged.batch(
            [(done[s], step[s]) for s in active], [blocks[s] for s in active], HEAD_DIM
        )
        tokens = torch.cat([sequences[s][done[s] : done[s] + step[s]] for s in active])
        out = ops.logits(run(ops.embed(tokens.int(), table), batch), norm, EPS, head)
        for s, part in zip(active, out.split([step[s] for s in active]), strict=True):
            logits[s].append(part)
            done[s] += step[s]
    for tokens, parts in zip(sequences, logits, strict=True):
        with torch.no_grad():
            expected = model(tokens[None]).logits[0]
        torch.testing.assert_close(torch.cat(parts), expected, rtol=0, atol=3e-5)
        assert torch.equal(torch.cat(parts).argmax(-1), expected.argmax(-1))
