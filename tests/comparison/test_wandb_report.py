"""The W&B report of a comparison: the same content, of runs that are in W&B, and never in the way.

Against the real wandb-workspaces package and a small server (fake_wandb.py) over real HTTP.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest

from smolrun.comparison import compare_sweep, wandb_report
from smolrun.comparison.compare import make_report
from smolrun.comparison.report import ComparisonReport
from smolrun.comparison.run_figures import read_run
from smolrun.comparison.selection import of_sweep
from smolrun.comparison.wandb_report import ReportOrder, order_for
from smolrun.tracking.run_folder import RunFolder
from smolrun.tracking.wandb import Status, write_status
from tests.tracking.fake_wandb import FakeWandb, Run, fake_wandb
from tests.waiting import until

SWEEP = "20260131-142501-lr-3fa9"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeWandb]:
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    with fake_wandb() as fake:
        for name, value in fake.environment().items():
            monkeypatch.setenv(name, value)
        fake.runs["x"] = Run(asked={"project": "smolrun"})
        yield fake


def make_sweep(outputs: Path, urls: list[str | None], group: str | None = SWEEP) -> Path:
    """A sweep whose jobs have this address in W&B."""
    folder = outputs / "sweeps" / SWEEP
    jobs = []
    for number, url in enumerate(urls):
        name = f"optimizer.lr={number + 1}e-3"
        job = RunFolder(folder / name)
        job.path.mkdir(parents=True)
        config = {"optimizer": {"lr": number}, "tracker": {"kind": "wandb", "group": group}}
        job.write_config(msgspec.yaml.encode(config).decode())
        steps = [
            {"event": "step", "step": step, "time_s": step, "loss": 3.0 - number, "tokens": 10}
            for step in range(20)
        ]
        job.metrics.write_text("\n".join(map(json.dumps, steps)) + "\n")
        job.write_summary({"status": "done", "final_eval_loss": 2.0 - number, "world_size": 2})
        if url is not None:
            write_status(job.path, Status(state="done", url=url))
        differs = {"optimizer.lr": f"{number + 1}e-3"}
        job_of = {"name": name, "overrides": [], "differs": differs, "repeat": 0, "cell": number}
        jobs.append(job_of)
    plan = {
        "id": SWEEP,
        "version": "0",
        "started": "",
        "overrides": [],
        "metric": "final_eval_loss",
    }
    (folder / "sweep.yaml").write_bytes(msgspec.yaml.encode({**plan, "jobs": jobs}))
    return folder


def order(folder: Path) -> ReportOrder | None:
    runs = [read_run(job.folder, job.name) for job in of_sweep(folder).jobs]
    return order_for(ComparisonReport("A sweep", "now", []), runs)


def urls(server: str, *ids: str) -> list[str | None]:
    return [f"{server}/me/smolrun/runs/{one}" for one in ids]


def test_the_report_has_what_the_local_one_has(server: FakeWandb, tmp_path: Path):
    folder = make_sweep(tmp_path, urls(server.url, "a", "b"))
    said: list[str] = []
    page = compare_sweep(folder, say=said.append)
    assert page == folder / "comparison.html"
    (saved,) = server.reports
    assert (saved["entityName"], saved["projectName"]) == ("me", "smolrun")
    assert saved["displayName"] == make_report(of_sweep(folder)).title
    blocks = json.loads(saved["spec"])["blocks"]
    (markdown,) = [block["content"] for block in blocks if block["type"] == "markdown-block"]
    local = (folder / "comparison.md").read_text()
    assert table(markdown) == table(local) != []
    (grid,) = [block["metadata"] for block in blocks if block["type"] == "panel-grid"]
    assert shown(grid) >= {"train/loss", "eval/loss", "rank0/wait_s", "rank1/memory_bytes"}
    (runs,) = grid["runSets"]
    assert (runs["name"], runs["project"]["name"]) == (SWEEP, "smolrun")
    assert SWEEP in json.dumps(runs["filters"])
    places = [
        (p["layout"]["x"], p["layout"]["y"]) for p in grid["panelBankSectionConfig"]["panels"]
    ]
    assert len(set(places)) == len(places), "no panel covers another"
    assert said[-1].startswith(f"W&B report: {server.url}/me/smolrun/reports/")


def table(markdown: str) -> list[str]:
    return [line for line in markdown.splitlines() if line.startswith("|")]


def shown(grid: dict[str, Any]) -> set[str]:
    panels = grid["panelBankSectionConfig"]["panels"]
    return {metric for panel in panels for metric in panel["config"].get("metrics") or ()}


@pytest.mark.parametrize(
    "fault",
    ["denied", *(pytest.param(fault, marks=pytest.mark.soak) for fault in ("slow", "garbage"))],
)
def test_a_server_that_is_broken_costs_one_sentence(fault: str, server: FakeWandb, tmp_path: Path):
    folder = make_sweep(tmp_path, urls(server.url, "a", "b"))
    server.fault = fault  # type: ignore[assignment]
    said: list[str] = []
    limit_s = 6.0 if fault == "slow" else 60.0
    wandb_report.publish(make_report(of_sweep(folder)), said.append, limit_s=limit_s)
    (line,) = said
    assert line.startswith("no W&B report: ")
    assert os.environ["WANDB_API_KEY"] not in line
    me = psutil.Process()
    until(lambda: not [child for child in me.children() if "wandb_report" in str(child.cmdline())])


def test_without_the_package_the_command_that_installs_it_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    folder = make_sweep(tmp_path, urls("http://w", "a"))
    monkeypatch.setattr(wandb_report, "find_spec", lambda name: None)
    said: list[str] = []
    compare_sweep(folder, say=said.append)
    assert said[-1] == "no W&B report: it needs pip install 'smolrun[reports]'"
    assert (folder / "comparison.html").is_file()


def test_runs_that_are_not_in_wandb_have_no_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(wandb_report, "_ask", None)
    folder = make_sweep(tmp_path, [None, None])
    write_status(folder / "optimizer.lr=1e-3", Status(state="done", path="wandb/offline-run-x"))
    said: list[str] = []
    compare_sweep(folder, say=said.append)
    assert not [line for line in said if "W&B" in line]


@pytest.mark.parametrize(
    "url",
    [
        "http://w/me/smolrun/sweeps/a",
        "http://w/me/../runs/a",
        "http://w/me/a%20b/runs/a",
        "http://w/me/x' or 1/runs/a",
        "http://w/me/smolrun/runs/a/b",
        "not an address",
        "http://[::1",
    ],
)
def test_an_address_that_cannot_be_one_is_none(url: str, tmp_path: Path):
    assert order(make_sweep(tmp_path, [url])) is None


@pytest.mark.parametrize("group", [None, "a'b", "x" * 200])
def test_without_a_common_group_the_runs_are_named(group: str | None, tmp_path: Path):
    folder = make_sweep(tmp_path, [*urls("http://w", "a", "b"), "http://w/me/other/runs/c"], group)
    found = order(folder)
    assert found is not None
    assert (found.entity, found.project) == ("me", "smolrun")
    assert (found.group, sorted(found.run_ids), found.num_ranks) == (None, ["a", "b"], 2)


def test_runs_of_a_group_are_chosen_by_it(tmp_path: Path):
    found = order(make_sweep(tmp_path, urls("http://w", "a", "b")))
    assert found is not None
    assert found.group == SWEEP
