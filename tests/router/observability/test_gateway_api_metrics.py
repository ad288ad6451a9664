"""The metrics under vLLM's names, as Kubernetes' inference gateways parse them."""

from __future__ import annotations

from dataclasses import replace

from prometheus_client.parser import text_string_to_metric_families
from tokenizers import Tokenizer

from arriero.router.backend import GroupLoad, GroupView
from arriero.router.observability.metrics import Metrics
from arriero.router.text.model_card import ServedAdapter
from arriero.shards.engine.stats import AdapterStats, EngineStats
from support.frontdoor import make_card


def samples(metrics: Metrics) -> dict[str, list[tuple[dict[str, str], float]]]:
    found: dict[str, list[tuple[dict[str, str], float]]] = {}
    for family in text_string_to_metric_families(metrics.export().decode()):
        for sample in family.samples:
            if sample.name.startswith("vllm:"):
                found.setdefault(sample.name, []).append((dict(sample.labels), sample.value))
    return found


def test_numbers_are_sums_over_the_groups(llama_tokenizer: Tokenizer) -> None:
    card = make_card(llama_tokenizer, None, block_size=16)
    stats = EngineStats(
        blocks_used=10, blocks_total=40, prompt_tokens=100, cached_tokens=30, output_tokens=7,
        preemptions=1,
    )  # fmt: skip
    names = ("legal", "poet", "idle")
    card = replace(card, adapters=tuple(ServedAdapter(name=n, digest=f"d-{n}") for n in names))
    adapters = (
        AdapterStats(num_slots=2, running=("d-poet",), waiting=("d-poet", "d-withdrawn")),
        AdapterStats(num_slots=4, in_slots=("d-idle", "d-legal"), running=("d-legal",)),
    )
    views = [
        GroupView(
            group_id=f"g{number}",
            model="m",
            card=card,
            load=GroupLoad(num_running=3, num_waiting=number),
            stats=replace(stats, adapters=adapters[number]),
        )
        for number in range(2)
    ]
    waiting = {("m", "a"): 4, ("m", "b"): 1, ("idle", "a"): 2}
    found = samples(Metrics(lambda: views, lambda: waiting))
    of_m = {
        name: value
        for name, rows in found.items()
        for labels, value in rows
        if labels.get("model_name") == "m"
    }
    assert of_m == {
        "vllm:num_requests_running": 6,
        "vllm:num_requests_waiting": 6,
        "vllm:kv_cache_usage_perc": 0.25,
        "vllm:gpu_cache_usage_perc": 0.25,
        "vllm:cache_config_info": 1,
        "vllm:prompt_tokens_total": 200,
        "vllm:generation_tokens_total": 14,
        "vllm:prefix_cache_queries_total": 200,
        "vllm:prefix_cache_hits_total": 60,
        "vllm:num_preemptions_total": 2,
    }
    ((labels, _),) = found["vllm:cache_config_info"]
    assert (labels["block_size"], labels["num_gpu_blocks"]) == ("16", "80")
    ((labels, now_s),) = found["vllm:lora_requests_info"]
    assert labels == {
        "max_lora": "6",
        "running_lora_adapters": "legal,poet",
        "waiting_lora_adapters": "poet",
    }
    assert now_s > 1e9
    # a model that has no group while idle shows its queue
    idle = [value for labels, value in found["vllm:num_requests_waiting"]
            if labels["model_name"] == "idle"]  # fmt: skip
    assert idle == [2]
