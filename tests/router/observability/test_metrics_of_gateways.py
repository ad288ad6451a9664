"""Metrics of several gateways: sums, the scrape with keys and TLS, and the export over OTLP."""

from __future__ import annotations

import gzip
import ssl
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import httpx
import trustme
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import (
    ExportMetricsServiceRequest,
)
from prometheus_client.parser import text_string_to_metric_families
from tokenizers import Tokenizer

from arriero.router.gateway import GatewayConfig
from arriero.router.observability.otlp_metrics import OtlpMetricsConfig
from arriero.router.tenants.keys import add_key
from arriero.router.tenants.tenant import Tenant
from arriero.router.tls import TlsFiles
from support.frontdoor import LLAMA3, endless, make_card
from support.gateways import Gateways, serve_by

ASK = {"prompt": [60, 61, 62], "max_tokens": 5}
OF_A_GROUP = (
    "arriero_group",
    "arriero_requests_running",
    "arriero_requests_waiting",
    "arriero_kv_",
)
Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def samples(text: str) -> Samples:
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


async def scraped(served: Gateways) -> list[Samples]:
    pages = []
    for number in range(len(served.gateways)):
        async with served.http(number) as ask:
            pages.append(samples((await ask.get("/metrics")).text))
    return pages


async def test_sums_do_not_grow_with_the_number_of_gateways(llama_tokenizer: Tokenizer) -> None:
    config = GatewayConfig(http_address="127.0.0.1:0")
    card = make_card(llama_tokenizer, LLAMA3)
    async with serve_by([card], endless, config, config, config) as served:
        for number, count in enumerate((1, 2, 3)):
            await served.warm(number)
            async with served.http(number) as ask:
                for _ in range(count):
                    assert (await ask.post("/v1/completions", json=ASK)).status_code == 200
        pages = await scraped(served)
    model = (("model", "tiny"),)
    expected = {
        "arriero_requests_total": 6, "arriero_prompt_tokens_total": 18,
        "arriero_generation_tokens_total": 30, "arriero_queue_seconds_count": 6,
        "arriero_time_to_first_token_seconds_count": 6,
        "arriero_inter_token_latency_seconds_count": 24,
    }  # fmt: skip
    for name, total in expected.items():  # of requests: add up
        assert sum(page[name, model] for page in pages) == total, name
    tenant = (("kind", "output"), ("tenant", "anyone"))
    assert sum(page["arriero_tenant_tokens_total", tenant] for page in pages) == 30
    for key in {key for page in pages for key in page if key[0].startswith(OF_A_GROUP)}:
        if key[0].endswith("_created"):
            continue
        # of a group or a model: every gateway has the number, and rules take the largest
        assert all(key in page for page in pages), key


async def test_metrics_are_scraped_with_a_key_over_tls(
    llama_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    authority = trustme.CA()
    certificate = authority.issue_cert("arriero-gateway")
    files = TlsFiles(certificate=tmp_path / "cert.pem", key=tmp_path / "key.pem")
    certificate.private_key_pem.write_to_path(files.key)
    for blob in certificate.cert_chain_pems:
        blob.write_to_path(files.certificate, append=True)
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    keys = tmp_path / "keys.yaml"
    scraper, tenant = add_key(keys, "metrics"), add_key(keys, "acme")
    config = GatewayConfig(
        http_address="127.0.0.1:0",
        keys=keys,
        tls=files,
        tenants=(Tenant(name="metrics", metrics=True),),
    )
    context = ssl.create_default_context(cafile=tmp_path / "ca.pem")
    async with serve_by([make_card(llama_tokenizer, LLAMA3)], endless, config) as served:
        base = f"https://127.0.0.1:{served.gateways[0].http_port}"
        server_name = {"sni_hostname": "arriero-gateway"}  # Prometheus: `tls_config.server_name`
        async with httpx.AsyncClient(verify=context, base_url=base) as client:
            for key, status in ((scraper, 200), (tenant, 403), ("", 401)):
                headers = {"authorization": f"Bearer {key}"} if key else {}
                page = await client.get("/metrics", headers=headers, extensions=server_name)
                assert page.status_code == status, page.text
                assert ("arriero_groups_linked" in page.text) == (status == 200)


class Collector:
    """A server that takes OTLP's metrics over HTTP."""

    def __init__(self) -> None:
        self.taken: list[ExportMetricsServiceRequest] = []
        taken = self.taken

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                assert self.path == "/v1/metrics"
                body = self.rfile.read(int(self.headers["content-length"]))
                if self.headers.get("content-encoding") == "gzip":
                    body = gzip.decompress(body)
                taken.append(ExportMetricsServiceRequest.FromString(body))
                self.send_response(200)
                self.send_header("content-length", "0")
                self.end_headers()

            def log_message(self, *_: object) -> None:
                return

        self.server = HTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self.server.serve_forever)

    def __enter__(self) -> Collector:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self._thread.join()
        self.server.server_close()


async def test_metrics_reach_a_collector(llama_tokenizer: Tokenizer) -> None:
    """The exporter that a spec makes; the numbers are those of `/metrics`."""
    with Collector() as collector:
        endpoint = f"http://127.0.0.1:{collector.server.server_port}/v1/metrics"
        config = GatewayConfig(
            http_address="127.0.0.1:0",
            otlp_metrics=OtlpMetricsConfig(endpoint=endpoint, period_s=0.2),
        )
        card = make_card(llama_tokenizer, LLAMA3)
        async with serve_by([card], endless, config, config) as served:
            for number in (0, 1):
                await served.warm(number)
                async with served.http(number) as ask:
                    assert (await ask.post("/v1/completions", json=ASK)).status_code == 200
            pages = await scraped(served)
    last: dict[str, dict[str, Any]] = {}  # by gateway, the last export: at its stop
    for request in collector.taken:
        for resource in request.resource_metrics:
            facts = {fact.key: fact.value.string_value for fact in resource.resource.attributes}
            assert facts["service.name"] == "arriero-gateway"
            metrics = {m.name: m for scope in resource.scope_metrics for m in scope.metrics}
            last[facts["service.instance.id"]] = metrics
    assert len(collector.taken) > 2 and len(last) == 2
    total = 0
    for metrics in last.values():
        (point,) = metrics["arriero_requests"].sum.data_points
        assert metrics["arriero_requests"].sum.is_monotonic
        assert metrics["arriero_requests"].sum.aggregation_temporality == 2  # cumulative
        assert [(fact.key, fact.value.string_value) for fact in point.attributes] == [
            ("model", "tiny")
        ]
        total += point.as_double
        (histogram,) = metrics["arriero_inter_token_latency_seconds"].histogram.data_points
        assert histogram.count == sum(histogram.bucket_counts) == 4
        assert len(histogram.bucket_counts) == len(histogram.explicit_bounds) + 1
        (first,) = metrics["arriero_time_to_first_token_seconds"].histogram.data_points
        assert first.count == 1 and first.sum > 0
        assert metrics["arriero_kv_blocks"].gauge.data_points
    assert total == 2
    named = {name.removesuffix("_total") for page in pages for name, _ in page}
    named = {name for name in named if not name.endswith(("_bucket", "_count", "_sum", "_created"))}
    assert named <= set().union(*last.values())


async def test_a_collector_that_is_away_stops_nothing(llama_tokenizer: Tokenizer) -> None:
    config = GatewayConfig(
        http_address="127.0.0.1:0",
        otlp_metrics=OtlpMetricsConfig(endpoint="http://127.0.0.1:1/v1/metrics", period_s=0.05),
    )
    async with serve_by([make_card(llama_tokenizer, LLAMA3)], endless, config) as served:
        await served.warm(0)
        async with served.http(0) as ask:
            for _ in range(10):
                assert (await ask.post("/v1/completions", json=ASK)).status_code == 200
