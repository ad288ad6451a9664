"""`infra/prometheus` and `infra/grafana` name what gateways export, and the alerts fire.

`promtool` is the real command: the rules run over series that two gateways would export.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from arriero.router.backend import GroupLoad, GroupView
from arriero.router.observability.metrics import Metrics
from arriero.router.observability.model_groups import ModelGroups
from arriero.shards.engine.stats import EngineStats, SpeculationStats
from support.frontdoor import LLAMA_SPECIALS, make_card, make_tokenizer

ROOT = Path(__file__).parents[2]
INFRA = ROOT / "infra"
RULES = INFRA / "prometheus" / "rules.yaml"
RECORDED = set(re.findall(r"record: (\S+)", RULES.read_text()))
needs_promtool = pytest.mark.skipif(
    shutil.which("promtool") is None, reason="no promtool (Debian: prometheus)"
)


def exported() -> set[str]:
    """The names that a gateway exports, with every kind of thing counted once."""
    view = GroupView(
        group_id="g",
        model="m",
        card=make_card(make_tokenizer(LLAMA_SPECIALS), None),
        load=GroupLoad(),
        stats=EngineStats(
            step_us={"wait": 1.0},
            expert_loads={"0": [1, 2]},
            expert_imbalance=1.5,
            speculation=SpeculationStats(drafts=1, drafted=2, accepted=1, by_position=[1]),
        ),
    )
    metrics = Metrics(
        lambda: [view],
        lambda: {("m", "t"): 1},
        lambda: ["m", "asleep"],
        lambda: {"m": ModelGroups(wanted=2, starts=3, start_s={"g": 1.5})},
    )
    with metrics.request("m", "t"):
        metrics.migrated("m", 1)
    with pytest.raises(Exception, match="x"), metrics.failures():
        raise RuntimeError("x")
    text = metrics.export().decode()
    return set(re.findall(r"^(arriero_\w+)", text, re.MULTILINE))


def expressions() -> Iterator[tuple[str, str]]:
    rules = yaml.safe_load((INFRA / "prometheus/rules.yaml").read_text())
    for group in rules["groups"]:
        for rule in group["rules"]:
            yield rule.get("alert") or rule["record"], rule["expr"]
    for file in sorted((INFRA / "grafana").glob("*.json")):
        board = json.loads(file.read_text())
        for panel in board["panels"]:
            for target in panel["targets"]:
                yield f"{file.name}: {panel['title']}", target["expr"]
        for variable in board["templating"]["list"]:
            if variable["type"] == "query":
                yield f"{file.name}: {variable['name']}", variable["query"]


def test_rules_and_dashboards_name_metrics_that_are_exported() -> None:
    names = exported()
    for where, expression in expressions():
        used = set(re.findall(r"\barriero_\w+", expression))
        recorded = set(re.findall(r"\barriero:[\w:]+", expression))
        assert (used or recorded) and used <= names, f"{where}: {used - names}"
        assert recorded <= RECORDED, f"{where}: {recorded - RECORDED}"
        assert expression.count("(") == expression.count(")"), where


def test_every_metric_is_shown_or_watched() -> None:
    shown = {
        name for _, expression in expressions() for name in re.findall(r"arriero_\w+", expression)
    }
    families = {re.sub(r"_(bucket|sum|count|created|total)$", "", name) for name in exported()}
    used = {re.sub(r"_(bucket|sum|count|created|total)$", "", name) for name in shown}
    assert families == used


def test_every_alert_has_an_entry_in_the_runbook() -> None:
    headings = re.findall(r"^## (\w+)$", (INFRA / "runbook.md").read_text(), re.MULTILINE)
    rules = yaml.safe_load((INFRA / "prometheus/rules.yaml").read_text())
    alerts = [rule for group in rules["groups"] for rule in group["rules"] if "alert" in rule]
    assert [rule["alert"] for rule in alerts] == headings
    for rule in alerts:
        assert rule["annotations"]["runbook"] == f"infra/runbook.md#{rule['alert'].lower()}"
        assert rule["labels"]["severity"] in ("page", "warn")


def test_a_model_without_a_group_is_exported_as_zero() -> None:
    metrics = Metrics(lambda: [], dict, lambda: ["m"], lambda: {"m": ModelGroups(wanted=1)})
    text = metrics.export().decode()
    assert 'arriero_groups_linked{model="m"} 0.0' in text
    assert 'arriero_groups_wanted{model="m"} 1.0' in text
    assert 'arriero_groups_serving{model="m"} 0.0' in text


def test_groups_numbers_are_never_added_over_gateways() -> None:
    """Every gateway exports them, so a sum counts each group once for each gateway."""
    shared = re.compile(r"arriero_(?:groups?_\w+|requests_(?:running|waiting)|kv_\w+)")
    for where, expression in expressions():
        for call in re.findall(r"\bsum[^(]*(?:\([^()]*\) )?\((\w+)", expression):
            assert not shared.fullmatch(call), f"{where}: take max by (model, group) first"


@needs_promtool
def test_the_rules_fire_and_stay_silent(tmp_path: Path) -> None:
    for file in (RULES, Path(__file__).parent / "rules_test.yaml"):
        shutil.copy(file, tmp_path)
    done = subprocess.run(
        ["promtool", "test", "rules", "rules_test.yaml"],
        cwd=tmp_path, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_is_tried() -> None:
    tried = set(
        re.findall(r"alertname: (\w+)", (Path(__file__).parent / "rules_test.yaml").read_text())
    )
    alerts = set(re.findall(r"alert: (\w+)", RULES.read_text()))
    assert alerts - tried == {"ArrieroStreamsMove", "ArrieroPreempts"}, "plain thresholds"


@needs_promtool
def test_the_scrape_configuration_is_prometheus(tmp_path: Path) -> None:
    file = INFRA / "prometheus" / "prometheus.yaml"
    subprocess.run(
        ["promtool", "check", "config", "--syntax-only", str(file)], check=True, timeout=60
    )
    (job,) = yaml.safe_load(file.read_text())["scrape_configs"]
    assert job["scheme"] == "https" and job["authorization"]["credentials_file"]
    monitor = yaml.safe_load((INFRA / "kubernetes/components/monitoring/monitor.yaml").read_text())
    (endpoint,) = monitor["spec"]["podMetricsEndpoints"]
    assert endpoint["scheme"] == "https"
    assert endpoint["tlsConfig"]["serverName"] == job["tls_config"]["server_name"]
