"""A checkpoint in the form of Maverick's FP8 release: experts apart, in eight bits, the rest plain.

The same tokens as the fused checkpoint whose experts are exactly what those bits mean.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from arriero.cluster.plan.products import shipped_fp8
from arriero.kernels.quant import quantize_fp8
from arriero.shards.group import GroupConfig
from arriero.shards.sampling import SamplingParams
from support.groups import running
from support.models import llama4_settings, llama4_weights, tiny_llama4, write_safetensors

SETTINGS = {"moe_step": 2, "qk_norm": False, "experts": 4}


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


@pytest.mark.parametrize("layout", [{}, {"tp": 2}, {"dp": 2, "spare_experts": 1}], ids=str)
def test_eight_bits(folders: tuple[Path, Path], layout: dict[str, int]) -> None:
    """Along one text, since a product in eight bits rounds its inputs, and tokens part in time."""
    text = [(7 + 3 * j * j) % 128 for j in range(80)]
    params = SamplingParams(temperature=0.0, max_tokens=1, seed=0, prompt_logprobs=0)
    logprobs = []
    for folder, how in zip(folders, (layout, {}), strict=True):
        config = GroupConfig(
            model_path=str(folder),
            dtype="float32",
            kernels="reference",
            num_blocks=64,
            max_sequences=4,
            threads=1,
            **how,
        )
        with running(config) as group:
            answer = group.generate([text], params)[0]
        assert answer.error is None, answer.error
        logprobs.append([one.logprob for one in answer.prompt_logprobs])
    far = sorted(abs(a - b) for a, b in zip(*logprobs, strict=True))
    print(
        f"half of the log-probabilities within {far[len(far) // 2]:.5f}, all within {far[-1]:.5f}"
    )
    assert far[len(far) // 2] < 0.02
