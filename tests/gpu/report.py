"""The report of `run.py`: children, their results, and the time that is left.

Knows items and JSON; knows nothing of GPUs.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from gpu.items import Item

PARTS = {"compile": "compiles", "check": "checks", "bench": "benches", "tune": "tuning"}
RUN = Path(__file__).with_name("run.py")
RESERVE_S = 5.0
"""Seconds before the deadline after which nothing starts or goes on."""


class Report:
    """Results so far, in memory and in the JSON file.

    Args:
        out: file of the JSON; None prints the JSON at the end.
        deadline: end of the budget, by `time.monotonic`.
        dry: items run in this process on the simulated device.
    """

    def __init__(self, out: Path | None, deadline: float, *, dry: bool) -> None:
        self.out, self.dry, self._deadline = out, dry, deadline
        self._started = time.monotonic()
        self._lock = threading.Lock()
        self._planned_s = 0.0
        self.content: dict[str, Any] = {"cpus": os.cpu_count(), "dry_run": dry}

    @property
    def checks(self) -> dict[str, Any]:
        """Results of checks, by name."""
        results: dict[str, Any] = self.content.get("checks", {})
        return results

    @property
    def failed(self) -> dict[str, Any]:
        """Compiles and checks without a good result, by name."""
        results = self.content.get("compiles", {}) | self.checks
        return {name: result for name, result in results.items() if not result.get("ok")}

    def run_child(self, item: Item) -> None:
        """Run an item in a child process, or note why not."""
        left = self._deadline - RESERVE_S - time.monotonic()
        if left < item.estimate_s:
            reason = f"out of time: {left:.0f} s left, about {item.estimate_s:.0f} s needed"
            self._add(item, {name: {"skipped": reason} for name in item.names})
            return
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "results"
            out.touch()
            error = _child(item, out, min(item.limit_s, left))
            lines = [json.loads(line) for line in out.read_text().splitlines()]
        results = {line.pop("name"): line for line in lines}
        lost = {name: {"error": error} for name in item.names if name not in results}
        self._add(item, results | lost)

    def run_here(self, item: Item) -> None:
        """Run an item in this process, and print what the real call does instead."""
        self._planned_s += item.estimate_s if item.kind != "check" else item.estimate_s / 6
        print(
            f"{item.kind}: {', '.join(item.names)}: about {item.estimate_s:.0f} s, at most "
            f"{item.limit_s:.0f} s",
            file=sys.stderr,
            flush=True,
        )
        if time.monotonic() > self._deadline:
            self._add(item, {name: {"skipped": "out of time"} for name in item.names})
            return
        from gpu.child import run_names

        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "results"
            run_names(item.kind, item.names, out, dry=True)
            lines = [json.loads(line) for line in out.read_text().splitlines()]
        self._add(item, {line.pop("name"): line for line in lines})

    def finish(self) -> None:
        """Write the JSON, the tuned blocks, and a summary."""
        self.content["seconds"] = round(time.monotonic() - self._started, 1)
        self._write()
        if self.out is None:
            print(json.dumps(self.content, indent=2))
        checks = self.checks.values()
        good = sum(bool(result.get("ok")) for result in checks)
        others = [r for part in ("benches", "tuning") for r in self.content.get(part, {}).values()]
        done = sum("error" not in r and "skipped" not in r for r in others)
        print(
            f"{good} of {len(checks)} checks good, {done} of {len(others)} benches and tuners done,"
            f" {self.content['seconds']:.0f} s",
            file=sys.stderr,
        )
        if self.dry:
            print(f"the real call takes about {self._planned_s:.0f} s", file=sys.stderr)

    def _add(self, item: Item, results: dict[str, Any]) -> None:
        with self._lock:
            self.content.setdefault(PARTS[item.kind], {}).update(results)
            self._write()

    def _write(self) -> None:
        """Write the JSON as a whole, so that a kill leaves the last one."""
        if self.out is None:
            return
        whole = self.out.with_suffix(".part")
        whole.write_text(json.dumps(self.content, indent=2) + "\n")
        whole.replace(self.out)
        tuned: dict[str, Any] = {}
        for result in self.content.get("tuning", {}).values():
            tuned |= result.get("entries", {})
        if tuned:
            self.out.with_name("tuned.json").write_text(json.dumps(tuned, indent=1) + "\n")


def _child(item: Item, out: Path, limit_s: float) -> str:
    """Run an item's child; why it ended before its last name."""
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    command = [sys.executable, str(RUN), "--out", str(out), "--child", item.kind, *item.names]
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=limit_s
        )
    except subprocess.TimeoutExpired:
        return f"killed after {limit_s:.0f} s"
    return f"ended with status {done.returncode}: {done.stderr[-1500:]}"
