"""Spans, the request log and the metrics of requests that really ran."""

from __future__ import annotations

import gzip
import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import httpx
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from tokenizers import Tokenizer

from arriero.router.client.client import AsyncClient
from arriero.router.gateway import Gateway, GatewayConfig, GroupAddress
from arriero.router.link.server import LinkServer
from arriero.router.observability.request_log import RequestLogConfig
from arriero.router.observability.tracing import Tracing, TracingConfig
from support.eventually import eventually_async
from support.frontdoor import LLAMA3, FakeEngine, endless, make_card, serve

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
BODY = {"messages": [{"role": "user", "content": "secret words"}], "max_tokens": 4}


async def test_spans_lead_from_the_caller_to_the_group(llama_tokenizer: Tokenizer) -> None:
    exporters = [InMemorySpanExporter(), InMemorySpanExporter()]
    here, there = (
        Tracing(name, to) for name, to in zip(("gateway", "leader"), exporters, strict=True)
    )
    engine = FakeEngine(endless)
    link = LinkServer(engine, make_card(llama_tokenizer, LLAMA3), tracing=there)
    engine.on_outputs = link.on_outputs
    address = await link.start()
    gateway = Gateway(GatewayConfig(http_address="127.0.0.1:0"), tracing=here)
    port = await gateway.start()
    await gateway.set_groups([GroupAddress("g0", "tiny", address)])
    await eventually_async(lambda: gateway.ready, 10)
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{gateway.http_port}") as ask:
        headers = {"traceparent": f"00-{TRACE}-{PARENT}-01", "x-request-id": "mine"}
        answer = await ask.post("/v1/chat/completions", json=BODY, headers=headers)
        assert answer.status_code == 200, answer.text
        for odd in ("", "nonsense", f"00-{TRACE}"):
            answer = await ask.post("/v1/models", headers={"traceparent": odd})
        bad = await ask.post("/v1/chat/completions", json=BODY, headers={"traceparent": "00-zz"})
        assert bad.status_code == 200
    async with AsyncClient(f"127.0.0.1:{port}") as client:
        assert [m async for m in client.generate([60], max_tokens=2)]
    await gateway.stop(0.5)
    await link.stop(0.5)
    engine.close()
    there.close()
    found = [span for exporter in exporters for span in exporter.get_finished_spans()]
    mine = {one.name: one for one in found if f"{one.context.trace_id:032x}" == TRACE}
    request, group = mine["request"], mine["group"]
    assert f"{request.parent.span_id:016x}" == PARENT
    assert group.parent.span_id == request.context.span_id
    assert request.attributes["arriero.request_id"] == "mine"
    assert request.attributes["gen_ai.usage.output_tokens"] == 4
    assert [event.name for event in request.events] == ["turn"]
    assert (group.attributes["arriero.steps"], group.attributes["arriero.end"]) == (4, "length")
    assert len(found) == 6
    assert "secret" not in "".join(one.to_json() for one in found)


async def test_the_request_log(llama_tokenizer: Tokenizer, tmp_path: Path) -> None:
    for prompts in (False, True):
        path = tmp_path / f"{prompts}.log"
        config = GatewayConfig(
            http_address="127.0.0.1:0", request_log=RequestLogConfig(path=path, prompts=prompts)
        )
        async with serve(make_card(llama_tokenizer, LLAMA3), endless, config=config) as stack:
            base = f"http://127.0.0.1:{stack.gateway.http_port}"
            async with httpx.AsyncClient(base_url=base) as ask:
                await ask.post("/v1/chat/completions", json=BODY, headers={"x-request-id": "a"})
            stack.engine.max_queued = 0
            async with httpx.AsyncClient(base_url=base) as ask:
                await ask.post("/v1/chat/completions", json=BODY, headers={"x-request-id": "b"})
            metrics = stack.gateway.inference.metrics.export().decode()
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        assert [(one["request_id"], one["end"]) for one in lines] == [
            ("a", "finished"),
            ("b", "Overloaded"),
        ]
        assert (lines[0]["tenant"], lines[0]["output_tokens"]) == ("anyone", 4)
        assert 0 <= lines[0]["queue_ms"] <= lines[0]["first_token_ms"] <= lines[0]["total_ms"]
        assert ("secret words" in path.read_text()) is prompts
        assert path.stat().st_mode & 0o777 == 0o600
        for name in (
            "arriero_prompt_tokens_total", "arriero_generation_tokens_total",
            "arriero_prefix_cache_hit_tokens_total", "arriero_requests_total",
            "arriero_request_failures_total", "arriero_time_to_first_token_seconds_bucket",
            "arriero_inter_token_latency_seconds_bucket", "arriero_queue_seconds_bucket",
            "arriero_tenant_tokens_total", "arriero_gateway_requests_waiting",
            "arriero_requests_waiting", "arriero_requests_running", "arriero_kv_blocks",
            "arriero_group_steps_total", "arriero_group_preemptions_total",
        ):  # fmt: skip
            assert f"\n{name}{{" in metrics, name


async def test_spans_reach_a_collector(llama_tokenizer: Tokenizer) -> None:
    """The exporter that a deployment's `tracing` makes, and a server that takes what it sends."""
    taken: list[tuple[str, bytes]] = []

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            if self.headers.get("content-encoding") == "gzip":
                body = gzip.decompress(body)
            taken.append((self.path, body))
            self.send_response(200)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            return

    with HTTPServer(("127.0.0.1", 0), Collector) as server:
        collecting = threading.Thread(target=server.serve_forever)
        collecting.start()
        try:
            endpoint = f"http://127.0.0.1:{server.server_port}/v1/traces"
            config = GatewayConfig(tracing=TracingConfig(endpoint=endpoint))
            async with serve(make_card(llama_tokenizer, LLAMA3), endless, config=config) as stack:
                assert [m async for m in stack.client.generate([60], max_tokens=3)]
        finally:
            server.shutdown()
            collecting.join()
    spans = []
    for path, body in taken:
        assert path == "/v1/traces"
        for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
            names = {one.key: one.value.string_value for one in resource.resource.attributes}
            assert names["service.name"] == "arriero-gateway"
            spans += [span for scope in resource.scope_spans for span in scope.spans]
    (span,) = spans
    facts = {one.key: one.value for one in span.attributes}
    assert span.name == "request"
    assert facts["gen_ai.usage.output_tokens"].int_value == 3
