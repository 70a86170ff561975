"""What is planned for each rank, and what is said of it at the start."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from smolrun.cli.compose import compose
from smolrun.config import ranks
from smolrun.driver import fleet
from smolrun.driver.preflight import start_notes
from smolrun.launch.control import Saving
from smolrun.launch.hosts import WorkerPlan
from tests.launch.test_control import START


@pytest.mark.parametrize(
    ("overrides", "is_noted"),
    [
        (["algorithm=edp", "cluster.ranks=2"], True),
        (["algorithm=edp", "cluster.ranks=2", "algorithm.server_trains=true"], False),
        (["algorithm=syncps", "cluster.ranks=2", "algorithm.server_trains=false"], True),
        (["algorithm=syncps", "cluster.ranks=2"], False),
        (["algorithm=classicdp", "cluster.ranks=2"], False),
    ],
)
def test_a_dedicated_server_is_noted(overrides: list[str], is_noted: bool) -> None:
    line = "rank 0 on local is the parameter server (algorithm.server_trains=false)"
    assert list(start_notes(compose(overrides))) == [line] * is_noted


@pytest.mark.parametrize(
    ("overrides", "threads"),
    [
        (["cluster.ranks=2"], [4, 4]),
        (["cluster.ranks=3"], [2, 2, 2]),
        (["cluster.hosts=[{name: a, ranks: 2}, {name: b, ranks: 2}]"], [2, 2, 2, 2]),
        (["cluster.ranks=16"], [1] * 16),
        (["cluster.ranks=2", "cluster.threads=7"], [7, 7]),
    ],
)
def test_ranks_of_one_machine_share_its_cores(
    monkeypatch: pytest.MonkeyPatch, overrides: list[str], threads: list[int]
) -> None:
    """Also where they are of several hosts without `ssh`."""
    monkeypatch.setattr(fleet, "usable_cores", lambda: 8)
    config = compose(overrides)
    assert [fleet.Fleet(config, {}).threads(rank) for rank in ranks(config)] == threads


def test_ranks_of_a_host_write_below_its_run_and_need_little_room() -> None:
    saving = Saving("/here/checkpoints", "t", every=5, keep=9, keep_best=True, resume="/here/x")
    hosts = fleet.Fleet(compose([]), {})
    ready: Any = SimpleNamespace(run="/w/runs/r", resume="/w/runs/r/resume/step-00000010")
    hosts._ready["mini1"] = ready
    assert hosts.saving("here", saving) == saving
    assert hosts.saving("mini1", saving) == Saving(
        "/w/runs/r/checkpoints",
        "t",
        every=5,
        keep=1,
        keep_best=False,
        resume="/w/runs/r/resume/step-00000010",
    )


@pytest.mark.parametrize(
    ("overrides", "is_low"),
    [
        ([], True),
        (["cluster.priority=normal"], False),
        (["task=bench"], False),
        (["task=doctor"], False),
        (["task=serve", "model.run=latest"], True),
    ],
)
def test_ranks_here_step_back_unless_they_measure(
    monkeypatch: pytest.MonkeyPatch, overrides: list[str], is_low: bool
) -> None:
    made: list[bool] = []
    monkeypatch.setattr(fleet, "LocalHost", lambda *, low_priority: made.append(low_priority))
    hosts = fleet.Fleet(compose(overrides), {})
    hosts.host_of(WorkerPlan(START, Path("log")))
    assert made == [is_low]
