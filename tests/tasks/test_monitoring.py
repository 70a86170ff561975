"""A run that Loki and Prometheus watch, one of whose ranks is killed."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.cli.command import smolrun
from tests.ports import free_ports
from tests.project.test_grafana import METRIC, TARGETS
from tests.tasks.background import in_background, process_of
from tests.tracking.fake_loki import FakeLoki, serving
from tests.waiting import until

SCRAPE = """
global: {{scrape_interval: 1s, scrape_timeout: 1s}}
scrape_configs:
  - job_name: smolrun
    static_configs: [{{targets: ["127.0.0.1:{port}"]}}]
"""


@contextmanager
def prometheus(folder: Path, scraped: int) -> Iterator[str]:
    """The URL of a Prometheus that scrapes this port every second."""
    (port,) = free_ports(1)
    (folder / "prometheus.yml").write_text(SCRAPE.format(port=scraped))
    with (folder / "prometheus.log").open("wb") as log:
        process = subprocess.Popen(
            [
                "prometheus",
                f"--config.file={folder / 'prometheus.yml'}",
                f"--storage.tsdb.path={folder / 'tsdb'}",
                f"--web.listen-address=127.0.0.1:{port}",
            ],
            stdout=log,
            stderr=log,
        )
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(30)


def query(url: str, expression: str) -> list[dict[str, Any]]:
    """The series that Prometheus finds; an error of its parser fails the test."""
    asked = urllib.parse.urlencode({"query": expression})
    try:
        with urllib.request.urlopen(f"{url}/api/v1/query?{asked}", timeout=30) as answer:
            found = json.load(answer)
    except urllib.error.HTTPError as error:
        raise AssertionError(f"{expression}: {error.read().decode()}") from None
    except OSError:
        return []  # it only starts
    result: list[dict[str, Any]] = found["data"]["result"]
    return result


@pytest.mark.soak
@pytest.mark.timeout(400)
@pytest.mark.skipif(shutil.which("prometheus") is None, reason="needs Debian's prometheus")
def test_prometheus_scrapes_a_run_and_understands_the_dashboard(tmp_path: Path) -> None:
    (port,) = free_ports(1)
    keys = [f"tracker.prometheus={port}", "training.eval_every=20"]
    with in_background(tmp_path, *keys) as run, prometheus(tmp_path, port) as url:
        run.until_it_trains()
        assert f"metrics for Prometheus: http://127.0.0.1:{port}/metrics" in run.log()
        until(lambda: bool(query(url, "smolrun_eval_loss")), 100)
        until(lambda: len(query(url, "rate(smolrun_rank_sent_bytes_total[1m]) > 0")) == 2, 100)
        (steps,) = query(url, "smolrun_train_steps")
        assert steps["metric"]["run"] == run.run_id and float(steps["value"][1]) > 3
        memory = query(url, "smolrun_rank_memory_bytes")
        assert {(one["metric"]["rank"], one["metric"]["host"]) for one in memory} == {
            ("0", "local"),
            ("1", "local"),
        }
        has_value = 0
        for title, target in TARGETS:
            if target["datasource"]["type"] != "loki":
                expression = re.sub(r"\$\w+", ".+", target["expr"])
                assert METRIC.search(expression), title
                has_value += bool(query(url, expression))
        assert has_value >= 10
        exposed = subprocess.run(
            ["promtool", "check", "metrics"],
            input=urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics").read(),
            capture_output=True,
            check=False,
        )
        assert exposed.returncode == 0, exposed.stdout + exposed.stderr


@pytest.mark.soak
@pytest.mark.timeout(300)
@pytest.mark.skipif(os.name != "posix", reason="kill -9")
def test_loki_gets_the_last_lines_of_a_killed_rank_and_why_the_run_ended(tmp_path: Path) -> None:
    loki = FakeLoki()
    with serving(loki) as url, in_background(tmp_path, f"tracker.loki={url}") as run:
        run.until_it_trains()
        loki.faults = [500, 429, 503]
        process_of(1, run.path).send_signal(signal.SIGKILL)
        run.until_it_is_gone([])
    assert loki.refused == []
    sent = [(labels["rank"], labels["level"], line) for labels, _, line in loki.lines]
    assert any(rank == "1" and "links up with" in line for rank, _, line in sent)
    assert any(
        (rank, level) == ("driver", "error") and "rank 1" in line for rank, level, line in sent
    )
    shown = smolrun(tmp_path, "task=logs", "--json")
    records = [json.loads(line) for line in shown.out.splitlines()]
    # What Loki's client says at the end comes after the last line that is sent.
    records = [record for record in records if not record["message"].startswith("tracker.loki")]
    sent = [one for one in sent if not one[2].startswith("tracker.loki")]
    assert len(records) == len(sent), "each once"
    assert [record["time"] for record in records] == sorted(record["time"] for record in records)
