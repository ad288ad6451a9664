"""The scales that checkpoints ship for an fp8 KV cache: which are read, and what they change."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from arriero.kernels.input_transform import InputTransform
from arriero.kernels.quantize import quantize_fp8, quantize_int4, quantize_int8
from arriero.kernels.quantized_weight import QuantizedWeight
from arriero.shards.checkpoint.content_digest import content_digest
from arriero.shards.checkpoint.formats.stored_product import StoredProduct
from arriero.shards.checkpoint.kv_scales import KvScales, kv_scales
from arriero.shards.checkpoint.overlay import open_weights
from arriero.shards.checkpoint.reader import Checkpoint
from arriero.shards.checkpoint.verify import verify
from arriero.shards.config.adapters import AdapterSlots
from arriero.shards.config.group import GroupConfig
from arriero.shards.config.sampling_params import SamplingParams
from arriero.shards.engine.holds import Change, Kind
from arriero.shards.errors import CheckpointError
from arriero.shards.layout.dense import Span
from arriero.shards.layout.resolve import cache_salt
from arriero.shards.models.kv_fold import for_divided_inputs
from support.calibrated import calibrated, greatest, with_scales
from support.fp8_cache_model import fp8_cache_logits
from support.groups import running
from support.models import tiny_llama, tiny_llama4, tiny_qwen3
from support.quantized_models import quantized_llama
from support.slices import CPU, exact_ops, logits_of

TOKENS = [(7 * i * i + 3 * i + 5) % 128 for i in range(24)]
LAYERS = Span(start=0, stop=4)
FAMILIES: dict[str, Callable[[Path], object]] = {
    "llama": lambda path: tiny_llama(path, attention_bias=True),
    "qwen3": tiny_qwen3,
    "llama4": lambda path: tiny_llama4(path, experts=0, moe_step=0, top_k=0, chunk=None),
}


def tensor(*values: float) -> Tensor:
    return torch.tensor(values) if len(values) > 1 else torch.tensor(values[0])


def scales_of(num_layers: int) -> tuple[dict[str, Tensor], dict[int, tuple[float, float]]]:
    """Scales that are no powers of two, and the powers above them, for each layer."""
    tensors, powers = {}, {}
    for layer in range(num_layers):
        name = f"model.layers.{layer}.self_attn."
        tensors[f"{name}k_proj.k_scale"] = tensor(0.013 / 4**layer)
        tensors[f"{name}v_proj.v_scale"] = tensor(0.0021 * 4**layer)
        powers[layer] = (2.0**-6 / 4**layer, 2.0**-8 * 4**layer)
    return tensors, powers


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for each family, and the same with scales under NAME-scaled."""
    root = tmp_path_factory.mktemp("scales")
    for name, write in FAMILIES.items():
        write(root / name)
        num_layers = Checkpoint.open(root / name).config.num_layers
        with_scales(root / name, root / f"{name}-scaled", scales_of(num_layers)[0])
    return root


def config_of(path: Path, **fields: Any) -> GroupConfig:  # noqa: ANN401
    settings = {"dtype": "float32", "kv_dtype": "fp8", "num_blocks": 64, "max_sequences": 4}
    return GroupConfig(model_path=str(path), threads=1, **(settings | fields))


@pytest.mark.parametrize("kernels", ["reference", "cpu"])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_divided_keys_and_values(
    folders: Path, family: str, kernels: str
) -> None:
    checkpoint = Checkpoint.open(folders / family)
    _, powers = scales_of(checkpoint.config.num_layers)
    if family == "llama4":  # keys with a norm keep their range: only the last layer has none
        powers = {layer: (k if layer == 3 else 1.0, v) for layer, (k, v) in powers.items()}
    due = fp8_cache_logits(folders / family, TOKENS, powers)
    top = due.abs().max()
    unscaled = fp8_cache_logits(folders / family, TOKENS, {})
    assert (unscaled - due).abs().max() > 1e-3 * top
    for tp in (1, 2):
        got = logits_of(
            folders / f"{family}-scaled", TOKENS, tp=tp, kernels=kernels, kv_dtype="fp8"
        )
        assert (got - due).abs().max() < 1e-5 * top
        got = logits_of(folders / family, TOKENS, tp=tp, kernels=kernels, kv_dtype="fp8")
        assert (got - unscaled).abs().max() < 1e-5 * top


@pytest.mark.parametrize("kv_dtype", [None, "int8"])
def test_other_dtypes_ignore_the_scales(folders: Path, kv_dtype: Any) -> None:  # noqa: ANN401
    plain, scaled = (
        logits_of(folders / name, TOKENS, tp=2, kv_dtype=kv_dtype)
        for name in ("llama", "llama-scaled")
    )
    assert torch.equal(plain, scaled)


NAMES: dict[str, tuple[dict[str, Tensor], KvScales]] = {
    "ModelOpt": (
        {"k_proj.k_scale": tensor(0.3), "v_proj.v_scale": tensor(2.0)},
        KvScales(k=0.5, v=2.0),
    ),
    "by head": ({"k_scale": tensor(0.3, 0.6), "v_scale": tensor(3.0, 1.0)}, KvScales(k=1.0, v=4.0)),
    "attn": ({"attn.k_scale": tensor(5.0), "attn.v_scale": tensor(0.1)}, KvScales(k=8.0, v=0.125)),
    "both": ({"kv_scale": torch.tensor([3.0], dtype=torch.bfloat16)}, KvScales(k=4.0, v=4.0)),
    "outputs": ({"k_proj.output_scale": tensor(0.2)}, KvScales(k=0.25)),
    "not calibrated": ({"k_scale": tensor(-1.0), "v_scale": tensor(0.7)}, KvScales(v=1.0)),
    "tiny": ({"k_scale": tensor(1e-30), "v_scale": tensor(1e30)}, KvScales(k=2**-32, v=2**32)),
}


@pytest.mark.parametrize("name", NAMES)
def test_names_and_shapes(folders: Path, tmp_path: Path, name: str) -> None:
    tensors, due = NAMES[name]
    scales = {f"model.layers.1.self_attn.{key}": value for key, value in tensors.items()}
    with_scales(folders / "llama", tmp_path / "m", scales)
    checkpoint = Checkpoint.open(tmp_path / "m")
    checkpoint.check_whole()
    assert kv_scales(checkpoint, LAYERS) == ({} if due == KvScales() else {1: due})
    assert kv_scales(checkpoint, Span(start=0, stop=1)) == {}
    assert verify(tmp_path / "m").notes == ()


def test_what_is_no_scale_is_refused(folders: Path, tmp_path: Path) -> None:
    name = "model.layers.0.self_attn.v_proj.v_scale"
    for number, bad in enumerate((tensor(float("nan")), torch.empty(0))):
        path = tmp_path / str(number)
        with_scales(folders / "llama", path, {name: bad})
        with pytest.raises(CheckpointError, match=f"{name}.*must hold a finite number"):
            kv_scales(Checkpoint.open(path), LAYERS)


def test_scales_of_four_bits_are_not_read(folders: Path, tmp_path: Path) -> None:
    with_scales(folders / "llama", tmp_path / "m", scales_of(2)[0])
    for algorithm, used in (("NVFP4", False), ("FP8", True)):
        text = json.dumps({"quantization": {"kv_cache_quant_algo": algorithm}})
        (tmp_path / "m" / "hf_quant_config.json").write_text(text)
        assert bool(kv_scales(Checkpoint.open(tmp_path / "m"), LAYERS)) is used


def test_keys_of_blocks_tell_whether_scales_are_used(folders: Path) -> None:
    scaled = config_of(folders / "llama-scaled")
    adapted = replace(scaled, adapter_slots=AdapterSlots(device=1, host=2))
    half = replace(scaled, dtype="float16")
    assert [config.scales_kv for config in (scaled, adapted, half)] == [True, False, False]
    assert not replace(scaled, kv_dtype="int8").scales_kv
    assert cache_salt(scaled, "digest") != cache_salt(adapted, "digest")
    digests = [Checkpoint.open(folders / name).digest for name in ("llama", "llama-scaled")]
    assert digests[0] != digests[1]


def test_pushed_weights_keep_the_scales(folders: Path, tmp_path: Path) -> None:
    tiny_llama(tmp_path / "new", seed=5, attention_bias=True)
    with_scales(tmp_path / "new", tmp_path / "due", scales_of(2)[0])
    other = {name: 3 * scale for name, scale in scales_of(2)[0].items()}
    with_scales(tmp_path / "new", tmp_path / "pushed", other)
    base, pushed = folders / "llama-scaled", str(tmp_path / "pushed")
    sources = (pushed, str(tmp_path / "pushed" / "kv_scales.safetensors"))
    started = kv_scales(Checkpoint.open(base), LAYERS)
    for some in (sources[:1], sources):
        assert kv_scales(open_weights(str(base), some), LAYERS) == started
    digests = {
        content_digest(open_weights(str(folders / name), sources))
        for name in ("llama", "llama-scaled")
    }
    assert len(digests) == 2  # blocks of groups with other scales have other keys
    greedy = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True, seed=0)
    with running(config_of(tmp_path / "due")) as group:
        due = group.generate([TOKENS], greedy)[0].tokens
    with running(config_of(base)) as group:
        group.engine.name_weights("first", (), lambda digest: digest.encode())
        before = group.generate([TOKENS], greedy)[0].tokens
        group.engine.change(Change(kind=Kind.PUSH, sources=(pushed,))).result(timeout=120)
        assert group.generate([TOKENS], greedy)[0].tokens == due != before


def nvfp4(weight: Tensor) -> QuantizedWeight:
    return QuantizedWeight(
        kind="fp4",
        in_features=32,
        data=torch.randint(0, 256, (16, 16), dtype=torch.uint8),
        scales=(torch.rand(16, 2) * 400 + 1).to(torch.float8_e4m3fn).float(),
        row_scales=torch.full((16, 1), 1e-3),
        group_size=16,
    )


FORMS: dict[str, tuple[Callable[[Tensor], Any], InputTransform | None]] = {
    "plain": (lambda weight: weight, None),
    "int4": (quantize_int4, None),
    "int8 by token": (quantize_int8, InputTransform(num_inputs=32, levels="int8", bound=1e9)),
    "fp8 with a bound": (quantize_fp8, InputTransform(num_inputs=32, bound=1.5)),
    "fp8 static": (quantize_fp8, InputTransform(num_inputs=32, scale=tensor(0.004)[None])),
    "nvfp4": (nvfp4, InputTransform(num_inputs=32, levels="fp4", scale=tensor(0.004)[None])),
}


@pytest.mark.parametrize("form", FORMS)
def test_products_take_divided_inputs_exactly(form: str) -> None:
    torch.manual_seed(0)
    quantize, inputs = FORMS[form]
    product = StoredProduct(weight=quantize(torch.randn(16, 32)), inputs=inputs)
    ops, x = exact_ops("reference"), torch.randn(5, 32)

    def multiply(stored: StoredProduct, x: Tensor) -> Tensor:
        if isinstance(stored.weight, Tensor):
            return ops.linear(x, ops.pack_linear([stored.weight], None, torch.float32))
        if stored.inputs is None:
            return ops.linear(x, ops.pack_quantized([stored.weight], None))
        return ops.linear(x, ops.pack_transformed([stored.weight], None, stored.inputs))

    due = multiply(product, x)
    assert torch.equal(multiply(for_divided_inputs(product, 2.0**-7), x * 2.0**7), due)
    assert not torch.equal(multiply(product, x * 2.0**7), due)


@pytest.mark.parametrize(
    "form", ["modelopt-fp8", "modelopt-nvfp4", "compressed-fp8", "awq", "int8"]
)
def test_quantized_weights_take_the_scales_exactly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    """In a cache that rounds nothing, scales in the weights change no bit of the logits."""
    quantization = "int8" if form == "int8" else None
    if quantization:
        tiny_llama(tmp_path / "plain")
    else:
        quantized_llama(tmp_path / "plain", form, layers=2)
    vocab = Checkpoint.open(tmp_path / "plain").config.vocab_size
    tokens = [token % vocab for token in TOKENS]
    due = logits_of(tmp_path / "plain", tokens, quantization=quantization)
    scales = {layer: KvScales(k=k, v=v) for layer, (k, v) in scales_of(2)[1].items()}
    monkeypatch.setattr(GroupConfig, "scales_kv", property(lambda config: True))
    monkeypatch.setattr("support.slices.kv_scales", lambda checkpoint, layers: scales)
    assert torch.equal(logits_of(tmp_path / "plain", tokens, quantization=quantization), due)


def test_a_calibrated_copy_fills_the_range(folders: Path, tmp_path: Path) -> None:
    calibrated(folders / "qwen3", tmp_path / "m", TOKENS)
    scales = kv_scales(Checkpoint.open(tmp_path / "m"), LAYERS)
    for layer, (key, value) in enumerate(greatest(folders / "qwen3", TOKENS).tolist()):
        assert 224 < key / scales[layer].k <= 448 and 224 < value / scales[layer].v <= 448
    assert logits_of(tmp_path / "m", TOKENS, kv_dtype="fp8").device == CPU
