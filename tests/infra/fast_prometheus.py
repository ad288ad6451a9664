"""A Prometheus that evaluates the alerts of `infra/prometheus` in seconds instead of hours.

Knows Prometheus and its files; knows nothing of deployments.
"""

from __future__ import annotations

import contextlib
import json
import re
import socket
import subprocess
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

import yaml

from support.eventually import eventually

INFRA = Path(__file__).parents[2] / "infra"
WINDOWS = {"1m": "10s", "5m": "20s", "10m": "300s", "30m": "600s", "1h": "60s", "6h": "600s"}
"""Ranges of the rules, and those of the walk. Counts (over 10m and 30m) keep their thresholds."""
WAITS = {"30s": "1s", "1m": "3s", "10m": "3s"}
"""How long a condition must hold (`for`), and how long in the walk."""


def faster_rules() -> str:
    """The rules with the durations of the walk."""
    text = (INFRA / "prometheus" / "rules.yaml").read_text()
    text = re.sub(r"\[(\w+)\]", lambda match: f"[{WINDOWS[match[1]]}]", text)
    return re.sub(r"for: (\w+)", lambda match: f"for: {WAITS[match[1]]}", text)


class Prometheus:
    """A Prometheus of the test's own, which scrapes each second."""

    def __init__(self, folder: Path, target: str) -> None:
        self._folder, self._target = folder, target
        with socket.create_server(("127.0.0.1", 0)) as probe:
            self._address = f"127.0.0.1:{probe.getsockname()[1]}"
        (folder / "rules.yaml").write_text(faster_rules())
        self._configure(None)
        with (folder / "prometheus.log").open("w") as log:
            self._process = subprocess.Popen(
                ["prometheus", f"--config.file={folder}/prometheus.yaml",
                 f"--storage.tsdb.path={folder}/data", f"--web.listen-address={self._address}",
                 "--web.enable-lifecycle"],
                stdout=log, stderr=log,
            )  # fmt: skip
        eventually(lambda: self._is_ready(), 60, every_s=0.2, state=self._log)

    def _log(self) -> str:
        return (self._folder / "prometheus.log").read_text()

    def _is_ready(self) -> bool:
        assert self._process.poll() is None, self._log()
        with contextlib.suppress(OSError):
            urllib.request.urlopen(f"http://{self._address}/-/ready", timeout=5).close()
            return True
        return False

    def _configure(self, key: str | None) -> None:
        text = yaml.safe_load((INFRA / "prometheus" / "prometheus.yaml").read_text())
        text["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
        (job,) = text["scrape_configs"]
        job["scheme"] = "http"
        del job["tls_config"], job["authorization"]
        if key is not None:
            (self._folder / "metrics.key").write_text(key)
            job["authorization"] = {"credentials_file": "metrics.key"}
        job["static_configs"] = [{"targets": [self._target]}]
        (self._folder / "prometheus.yaml").write_text(yaml.safe_dump(text))

    def use_key(self, key: str) -> None:
        """Scrape with a key from now on."""
        self._configure(key)
        urllib.request.urlopen(f"http://{self._address}/-/reload", data=b"", timeout=10).close()

    def ask(self, path: str, **query: str) -> Any:  # noqa: ANN401
        """The data of an answer of the API."""
        url = f"http://{self._address}/api/v1/{path}?{urllib.parse.urlencode(query)}"
        with urllib.request.urlopen(url, timeout=10) as answer:
            return json.load(answer)["data"]

    def firing(self) -> set[str]:
        """Names of the alerts that fire."""
        alerts = self.ask("alerts")["alerts"]
        return {alert["labels"]["alertname"] for alert in alerts if alert["state"] == "firing"}

    def close(self) -> None:
        self._process.terminate()
        self._process.wait(30)
