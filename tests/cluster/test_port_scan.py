"""Nothing but what the spec opens answers a stranger, as `port_scan.py` tries it."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from support.namespace import Namespace, namespace, why_not

sys.path.insert(0, str(Path(__file__).parent))
from port_scan import (
    ADMIN_PORT,
    GRPC_PORT,
    HTTP_PORT,
    Scan,
    closed_spec,
    opened_spec,
    report,
    scan,
)

MODEL = os.environ.get("ARRIERO_TEST_MODEL", "")
NO_NAMESPACE = why_not()
GATEWAY = "ray::ServeReplica:arriero:gateway"
pytestmark = [
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.timeout(1500),
    pytest.mark.skipif(not MODEL, reason="ARRIERO_TEST_MODEL names no checkpoint folder"),
    pytest.mark.skipif(bool(NO_NAMESPACE), reason=NO_NAMESPACE or "namespaces can be made"),
]


def scanned(spec: Path, inside: Namespace, folder: Path) -> Scan:
    result = scan(spec, inside, folder / "state")
    print(report(spec.stem, result))
    return result


def check_loopback(result: Scan, *spec_ports: int) -> None:
    """No process answers without a credential, but for the ports of the spec."""
    answering = {
        (entry.process, entry.answer.protocol): entry.answer.detail
        for entry in result.loopback
        if entry.answer.verdict == "answers" and entry.port not in spec_ports
    }
    assert not answering
    refusing = {
        entry.answer.protocol for entry in result.loopback if entry.answer.verdict == "refuses"
    }
    assert {"grpc", "http", "link"} <= refusing, "Ray's servers and the link were tried"
    for process in ("gcs_server", "raylet", "ray::DashboardAgent", "ray.util.client.server"):
        said = [entry.answer for entry in result.loopback if entry.process == process]
        assert said, f"{process} was not tried"
        # of GCS and raylet some hundred methods; each but the health check asks for the token
        assert all(answer.verdict in ("refuses", "alive") for answer in said), process


def test_the_defaults_open_nothing(tmp_path: Path) -> None:
    with namespace() as inside:
        result = scanned(closed_spec(os.path.abspath(MODEL), tmp_path), inside, tmp_path)
    assert result.outside == []
    assert [entry for entry in result.listeners if not entry.on_loopback] == []
    # without keys the gateway answers everybody who reaches it: those on this machine
    gateway = {entry.port for entry in result.loopback if entry.process == GATEWAY}
    check_loopback(result, *(gateway & {GRPC_PORT, HTTP_PORT}))


def test_an_opened_spec_opens_what_it_names(tmp_path: Path) -> None:
    with namespace() as inside:
        result = scanned(opened_spec(os.path.abspath(MODEL), tmp_path), inside, tmp_path)
    beyond = {entry.port for entry in result.listeners if not entry.on_loopback}
    assert beyond == {entry.port for entry in result.outside} == {GRPC_PORT, HTTP_PORT, ADMIN_PORT}
    answers = {entry.port: entry.answer for entry in result.outside}
    assert answers[ADMIN_PORT].protocol == "grpc over tls"
    assert answers[ADMIN_PORT].verdict == "refuses"
    assert answers[GRPC_PORT].protocol == "grpc over tls"
    assert answers[GRPC_PORT].verdict == "refuses"
    assert answers[HTTP_PORT].protocol == "https"
    assert answers[HTTP_PORT].detail == "/health /openapi.json", "as docs/security.md says"
    check_loopback(result, HTTP_PORT)
