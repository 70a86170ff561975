"""The dashboard of docs/grafana asks for metrics and labels that exist, in a form that Grafana
imports."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from smolrun.serving.http_metrics import ServingMetrics
from smolrun.serving.messages import StageStats, Stats
from smolrun.tracking.loki import LABELS
from smolrun.tracking.prometheus import TrainingMetrics
from tests.tracking.test_prometheus import EVENTS

PAGE = Path(__file__).parents[2] / "docs" / "grafana" / "smolrun.json"
DASHBOARD: dict[str, Any] = json.loads(PAGE.read_text(encoding="utf-8"))
PANELS: list[dict[str, Any]] = DASHBOARD["panels"]
TARGETS = [(panel["title"], target) for panel in PANELS for target in panel.get("targets", [])]
VARIABLES = {one["name"]: one for one in DASHBOARD["templating"]["list"]}
OF_A_SCRAPE = {"instance", "job"}  # Prometheus adds them
METRIC = re.compile(r"\b(smolrun_\w+)(?:\{([^}]*)\})?")


def known() -> dict[str, set[str]]:
    """Every sample that a run or a server exposes, and its labels."""
    training = TrainingMetrics("run", ["mini1", "mini2"])
    for event in EVENTS:
        training.record(event)
    registry = CollectorRegistry(auto_describe=False)
    registry.register(training)
    serving = ServingMetrics()
    serving.first_token.observe(1)
    serving.stats = {0: Stats(1, 1, 0.5, 1, 1, 1, [StageStats(0, "mini1", 0, 1)])}
    labels = defaultdict[str, set[str]](set)
    for text in (generate_latest(registry), serving.text()):
        for family in text_string_to_metric_families(text.decode()):
            for sample in family.samples:
                labels[sample.name] |= set(sample.labels)
    return labels


KNOWN = known()


def test_every_metric_and_label_exists() -> None:
    asked = [target["expr"] for _, target in TARGETS if target["datasource"]["type"] != "loki"]
    asked += [one["query"]["query"] for one in VARIABLES.values() if "query" in one["query"]]
    found = set()
    for expression in asked:
        assert METRIC.search(expression), expression
        for name, selector in METRIC.findall(expression):
            assert name in KNOWN, expression
            wanted = set(re.findall(r"(\w+)\s*=~?", selector))
            for listed in re.findall(r"\bby \(([^)]*)\)", expression):
                wanted |= set(re.split(r",\s*", listed))
            if label := re.fullmatch(r"label_values\(\w+, (\w+)\)", expression):
                wanted.add(label[1])
            assert wanted <= KNOWN[name] | OF_A_SCRAPE, expression
            found.add(name)
    of_runs = {name for name in KNOWN if re.match(r"smolrun_(train|eval|rank)_", name)}
    of_servers = {"smolrun_rank_up", "smolrun_rank_choices"}
    unseen = {
        "smolrun_train_parameters",
        "smolrun_train_tokens_per_second",
        "smolrun_eval_accuracy",
    }
    assert of_runs - of_servers - unseen - {"smolrun_rank_steps"} <= found


def test_a_legend_names_labels_of_its_metric() -> None:
    for title, target in TARGETS:
        names = set(re.findall(r"\{\{(\w+)\}\}", target.get("legendFormat", "")))
        if target["datasource"]["type"] == "loki":
            assert names <= set(LABELS), title
        else:
            has = set.union(*(KNOWN[name] for name, _ in METRIC.findall(target["expr"])))
            assert names <= has | OF_A_SCRAPE, title


def test_logs_are_selected_by_labels_that_are_sent() -> None:
    of_loki = [target["expr"] for _, target in TARGETS if target["datasource"]["type"] == "loki"]
    assert len(of_loki) == 2
    for expression in of_loki:
        selector = re.search(r"\{([^}]*)\}", expression)
        assert selector is not None
        assert set(re.findall(r"(\w+)\s*=~", selector[1])) <= set(LABELS), expression
    labels = {one["query"]["label"] for one in VARIABLES.values() if "label" in one["query"]}
    assert labels <= set(LABELS)


def test_grafana_can_import_it() -> None:
    assert DASHBOARD["schemaVersion"] >= 36 and DASHBOARD["title"] and DASHBOARD["uid"]
    ids = [panel["id"] for panel in PANELS]
    assert len(set(ids)) == len(ids)
    taken = set()
    for panel in PANELS:
        at = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(at["x"], at["x"] + at["w"])
            for y in range(at["y"], at["y"] + at["h"])
        }
        assert not cells & taken and at["x"] + at["w"] <= 24, panel["title"]
        taken |= cells
        if panel["type"] != "row":
            names = [target["refId"] for target in panel["targets"]]
            assert names and len(set(names)) == len(names)
            for target in panel["targets"]:
                assert target["datasource"] == panel["datasource"]
    used = set(re.findall(r"\$\{?(\w+)", json.dumps(PANELS))) - {"__all"}
    assert used == set(VARIABLES)


@pytest.mark.parametrize(
    "name", ["smolrun_train_steps", "smolrun_time_to_first_token_seconds_bucket"]
)
def test_the_names_are_those_of_a_scrape(name: str) -> None:
    assert name in KNOWN, "or all tests here are about nothing"
