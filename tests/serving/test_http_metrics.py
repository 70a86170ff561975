"""What GET /metrics says of the stages."""

from __future__ import annotations

from prometheus_client.parser import text_string_to_metric_families

from smolrun.serving.http_metrics import ServingMetrics
from smolrun.serving.messages import StageStats, Stats


def test_every_stage_has_its_figures() -> None:
    metrics = ServingMetrics()
    stages = [
        StageStats(0, "mini1", 0, 9, 1000, 200, 3000, 1.5, 2.5, 0.5, 70, 9000),
        StageStats(2, "mini2", 10, 29, 2000, 400, 5000, 2.5, 1.5, 0.25, 70, 80),
    ]
    metrics.stats = {0: Stats(1, 0, 0.5, 10, 20, 30, stages)}
    found: dict[str, list[float]] = {}
    for family in text_string_to_metric_families(metrics.text().decode()):
        for sample in family.samples:
            if sample.name.startswith("smolrun_stage_"):
                assert family.documentation
                found.setdefault(sample.name.removeprefix("smolrun_stage_"), []).append(
                    sample.value
                )
                labels = ("rank", "host", "stage")
                assert tuple(sample.labels[name] for name in labels) in (
                    ("0", "mini1", "0-9"),
                    ("2", "mini2", "10-29"),
                )
    assert found == {
        "compute_seconds_total": [1.5, 2.5],
        "wait_seconds_total": [2.5, 1.5],
        "network_seconds_total": [0.5, 0.25],
        "tokens_total": [70, 70],
        "sent_bytes_total": [9000, 80],
        "weight_bytes": [1000, 2000],
        "cache_bytes": [200, 400],
        "memory_bytes": [3000, 5000],
    }
