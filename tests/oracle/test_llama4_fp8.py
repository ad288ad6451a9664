"""A checkpoint in the form of Maverick's FP8 release: experts apart, in eight bits, the rest plain.

The same text as transformers, whose fused experts are exactly what those bits mean, and are given
inputs rounded as the format says.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from arriero.cluster.planner.weight_forms import shipped_fp8
from arriero.kernels.quantize import quantize_fp8
from arriero.shards.config.group import GroupConfig
from arriero.shards.config.sampling_params import SamplingParams
from support.groups import running
from support.models import llama4_settings, llama4_weights, tiny_llama4, write_safetensors

TEXT = [(7 + 3 * j * j) % 128 for j in range(80)]
SETTINGS = {"moe_step": 2, "qk_norm": False, "experts": 4, "heads": 6, "kv_heads": 3}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """In eight bits, and fused with the same numbers."""
    root = tmp_path_factory.mktemp("fp8")
    config = tiny_llama4(root / "fused", seed=4, **SETTINGS)
    weights = llama4_weights(config, 4)
    apart: dict[str, torch.Tensor] = {}
    for name, whole in list(weights.items()):
        if ".experts." not in name:
            apart[name] = whole
            continue
        prefix, part = name.rsplit(".", 1)
        exact = []
        for expert, matrix_IO in enumerate(whole):
            names = ("gate_proj", "up_proj") if part == "gate_up_proj" else ("down_proj",)
            pieces = []
            for one, piece_IO in zip(names, matrix_IO.chunk(len(names), dim=1), strict=True):
                made = quantize_fp8(piece_IO.t().contiguous())
                key = f"{prefix}.{expert}.{one}"
                apart[f"{key}.weight"] = made.data
                apart[f"{key}.weight_scale"] = made.scales.float().view(-1, 1)
                pieces.append(made.dequantize().t())
            exact.append(torch.cat(pieces, dim=1))
        weights[name] = torch.stack(exact)
    write_safetensors(root / "fused" / "model.safetensors", weights)
    eight = root / "eight"
    eight.mkdir()
    channel = {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True}
    token = channel | {"strategy": "token", "dynamic": True}
    made = llama4_settings(**SETTINGS) | {
        "quantization_config": {
            "quant_method": "compressed-tensors",
            "format": "float-quantized",
            "quantization_status": "compressed",
            "config_groups": {
                "group_0": {
                    "targets": ["Linear"],
                    "weights": channel | {"dynamic": False},
                    "input_activations": token,
                }
            },
            "ignore": list(shipped_fp8(config).ignored),
        }
    }
    (eight / "config.json").write_text(json.dumps(made))
    write_safetensors(eight / "model.safetensors", apart)
    return eight, root / "fused"


def rounded(x: torch.Tensor) -> torch.Tensor:
    """Each row's nearest float8 numbers by a scale of its own, as compressed-tensors has them."""
    scale = x.abs().amax(-1, keepdim=True) / 448
    scale = torch.where(scale > 0, scale, 1.0)
    return (x / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale


def by_the_book(experts: Any, x_XH: torch.Tensor) -> torch.Tensor:  # noqa: ANN401
    """transformers' experts, their inputs rounded."""
    x_ETH = rounded(x_XH).view(experts.gate_up_proj.shape[0], -1, experts.hidden_size)
    gate, up = torch.bmm(x_ETH, experts.gate_up_proj).chunk(2, dim=-1)
    out = torch.bmm(rounded(up * experts.act_fn(gate)), experts.down_proj)
    return out.view(-1, experts.hidden_size)


@pytest.fixture(scope="module")
def expected(folders: tuple[Path, Path]) -> torch.Tensor:
    """Log-probabilities of the text, by transformers with experts of such products."""
    import transformers
    from transformers.models.llama4.modeling_llama4 import Llama4TextExperts

    model = transformers.AutoModelForCausalLM.from_pretrained(folders[1], dtype=torch.float32)
    with pytest.MonkeyPatch.context() as patch, torch.inference_mode():
        patch.setattr(Llama4TextExperts, "forward", by_the_book)
        rows = model(input_ids=torch.tensor([TEXT])).logits[0].log_softmax(-1)
    return rows[torch.arange(len(TEXT) - 1), TEXT[1:]]


@pytest.mark.parametrize(
    "layout",
    [{}, {"tp": 2}, {"tp": 3}, {"dp": 2, "spare_experts": 1}, {"pp": 2}, {"dp": 2}],
    ids=str,
)
def test_eight_bits(
    folders: tuple[Path, Path], expected: torch.Tensor, layout: dict[str, int]
) -> None:
    """Along one text: a sum's last bit may turn an input's rounding, and what follows with it."""
    params = SamplingParams(temperature=0.0, max_tokens=1, seed=0, prompt_logprobs=0)
    config = GroupConfig(
        model_path=str(folders[0]),
        dtype="float32",
        kernels="reference",
        num_blocks=64,
        max_sequences=4,
        threads=1,
        **layout,
    )
    with running(config) as group:
        answer = group.generate([TEXT], params)[0]
    assert answer.error is None, answer.error
    got = torch.tensor([one.logprob for one in answer.prompt_logprobs])
    far = (got - expected).abs().sort().values.tolist()
    print(f"half within {far[len(far) // 2]:.1e}, nine of ten within {far[len(far) * 9 // 10]:.1e}")
    assert far[len(far) // 2] < 1e-4
    assert far[-1] < 0.1
