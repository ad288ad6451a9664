"""The least memory of groups, and nodes and GPUs that lack it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from arriero.cluster.hosts.capacity import ClusterCapacity
from arriero.cluster.planner.capacity_check import WantedGroups, can_hold, refuse_beyond
from arriero.cluster.planner.group_memory import group_memory
from arriero.cluster.spec.model import ModelSpec
from arriero.shards.errors import SpecError

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "torch_dtype": "bfloat16",
}
PARAMETERS = 6.738e9


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    return tmp_path


def model(folder: Path, **more: Any) -> ModelSpec:  # noqa: ANN401
    return ModelSpec.model_validate(
        {"name": "m", "path": str(folder), "device": "cpu", "dtype": "bfloat16"} | more
    )


def total(spec: ModelSpec, device: str = "cpu") -> int:
    memory = group_memory(spec, device)
    assert memory is not None
    return sum(each.device + each.host for each in memory.slices)


def cluster(*gigabytes: float, gpu: str = "") -> ClusterCapacity:
    nodes: list[dict[str, float]] = [{"CPU": 64.0, "memory": size * 1e9} for size in gigabytes]
    for node in nodes:
        node |= {"GPU": 8.0, f"accelerator_type:{gpu}": 1.0} if gpu else {}
    return ClusterCapacity(
        num_cpus=64.0 * len(nodes),
        num_gpus=8.0 * len(nodes) if gpu else 0.0,
        cpus_per_slice=1.0,
        nodes=tuple(nodes),
    )


def check(capacity: ClusterCapacity, spec: ModelSpec, count: int = 1) -> None:
    refuse_beyond(capacity, [WantedGroups.of(spec, count, capacity)], [])


def test_weights_and_what_is_given_count(folder: Path) -> None:
    weights = total(model(folder))
    assert weights == pytest.approx(2 * PARAMETERS, rel=0.01)
    assert total(model(folder, quantization="int8")) == pytest.approx(PARAMETERS, rel=0.03)
    pool = total(model(folder, kv={"memory": "4GiB", "host": "2GiB"})) - weights
    assert pool == pytest.approx(6 * 2**30, rel=0.01)
    cut = model(folder, mesh={"tp": 2, "pp": 2})
    assert total(cut) == pytest.approx(weights, rel=0.01)


def test_weights_that_stay_on_disk_do_not_count(folder: Path) -> None:
    half = model(folder, offload={"layers": 16}, kernels="cpu")
    assert total(half) == pytest.approx(0.52 * total(model(folder)), rel=0.03)


def test_a_folder_that_is_not_here_is_unknown() -> None:
    assert group_memory(model(Path("/nowhere")), "cpu") is None
    assert group_memory(model(Path("/m"), path="s3://bucket/m"), "cpu") is None


def test_nodes_that_are_too_small(folder: Path) -> None:
    check(cluster(16), model(folder))
    with pytest.raises(SpecError) as refused:
        check(cluster(8), model(folder))
    assert str(refused.value) == (
        "model `m`: `mesh` TP1 does not fit the memory of the nodes: a group needs at least"
        " 13.49 GB (weights 13.48 GB, KV cache 0.01 GB); a stage of 1 slices needs 13.49 GB on"
        " one node, and the largest of 1 nodes has 8.00 GB; set `quantization`, or add nodes with"
        " more memory"
    )
    assert not can_hold(model(folder), cluster(8), group_memory(model(folder), "cpu"))
    check(cluster(8, 8), model(folder, mesh={"pp": 2}))  # a stage on each node
    with pytest.raises(SpecError, match=r"raise `mesh\.pp` or `mesh\.tp`"):
        check(cluster(8, 8), model(folder))


def test_groups_share_the_memory(folder: Path) -> None:
    check(cluster(30), model(folder), 2)
    with pytest.raises(SpecError, match=r"`groups`=3 exceeds 2, .* 13.49 GB of memory\); lower"):
        check(cluster(30), model(folder), 3)
    other = WantedGroups.of(model(folder, name="other"), 1, cluster(30))
    wanted = WantedGroups.of(model(folder), 2, cluster(30))
    with pytest.raises(SpecError, match="`groups`=2 exceeds 1"):
        refuse_beyond(cluster(30), [wanted, other], [])


def test_a_rollout_to_larger_weights_is_a_wish_for_more(folder: Path) -> None:
    small, large = model(folder, quantization="int8"), model(folder)
    capacity = cluster(10)
    before = [WantedGroups.of(small, 1, capacity)]
    refuse_beyond(capacity, before, before)
    with pytest.raises(SpecError, match="does not fit the memory of the nodes"):
        refuse_beyond(capacity, [WantedGroups.of(large, 1, capacity)], before)


def test_gpus_that_are_too_small_or_too_old(folder: Path) -> None:
    check(cluster(64, gpu="H100"), model(folder, device="cuda"))
    tight = model(folder, device="cuda", kv={"memory": "20GiB"})
    with pytest.raises(SpecError, match="does not fit the memory of l4-24g: a slice needs"):
        check(cluster(64, gpu="L4"), tight)
    check(
        cluster(64, gpu="L4"), model(folder, device="cuda", kv={"memory": "20GiB"}, mesh={"tp": 2})
    )
    check(cluster(64, gpu="MI999"), tight)  # a type that the catalogue lacks
    with pytest.raises(SpecError, match=r"`quantization`='fp8' needs compute capability 8\.9"):
        check(cluster(64, gpu="A100"), model(folder, device="cuda", quantization="fp8"))
    check(cluster(64, gpu="H100"), model(folder, device="cuda", quantization="fp8"))
