"""What is drawn, by the text of the SVG; how it looks is a matter for eyes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from smolrun.comparison.cells import make_cells
from smolrun.comparison.plots import MOST_SERIES, Plot, draw_all, time_shares
from smolrun.comparison.run_figures import read_run
from smolrun.comparison.verdict import common_target
from tests.comparison.runs import config, events, job, write_run

PUSHES = [
    {"event": "push", "step": 0, "rank": n % 2, "age": n % 4, "samples": 8} for n in range(40)
]


def plots(tmp_path: Path, *runs: tuple[dict[str, Any], list[dict[str, Any]]]) -> dict[str, Plot]:
    made = [job(tmp_path / f"r{n}", config(**c), rows) for n, (c, rows) in enumerate(runs)]
    cells = make_cells([one for one, _ in made], [run for _, run in made])[1]
    return {plot.title: plot for plot in draw_all(cells, common_target(cells))}


def texts(plot: Plot) -> list[str]:
    return re.findall(r"<text[^>]*>([^<]*)</text>", plot.svg)


@pytest.mark.usefixtures("with_plots")
def test_every_plot(tmp_path: Path):
    edp = {"algorithm__name": "edp"}
    found = plots(tmp_path, ({}, events()), (edp, [*events(sent=0), *PUSHES]))
    assert list(found) == [
        "Loss over time",
        "Loss over samples",
        "Loss over bytes sent",
        "Throughput and efficiency",
        "Where each rank's time goes",
        "Memory per rank",
        "Staleness of gradients",
    ]
    assert found["Loss over time"].legend == [(0, "classicdp"), (1, "edp")]
    assert found["Loss over bytes sent"].legend == [(0, "classicdp")]  # the other sends nothing
    assert "1,000 (50 %)" in texts(found["Throughput and efficiency"])
    assert texts(found["Where each rank's time goes"]).count("50%") >= 4
    assert texts(found["Memory per rank"]).count("rank 1") == 2
    assert found["Staleness of gradients"].legend == [(1, "edp")]
    for plot in found.values():
        assert "var(--ink)" in plot.svg and "#01020" not in plot.svg and "#0000" not in plot.svg
        assert len(plot.svg) < 60_000


@pytest.mark.usefixtures("with_plots")
def test_of_many_rows_the_first_ones_are_drawn(tmp_path: Path):
    runs = [({"optimizer__lr": n / 100}, events(ranks=9)) for n in range(1, MOST_SERIES + 3)]
    found = plots(tmp_path, *runs)
    assert len(found["Loss over time"].legend) == MOST_SERIES
    names = texts(found["Memory per rank"])
    assert names.count("rank 3") == MOST_SERIES and "rank 8" not in names


def test_nothing_is_drawn_of_runs_without_metrics(tmp_path: Path):
    assert plots(tmp_path, ({}, [])) == {}


def test_without_lockstep_no_rank_waits_for_a_slower_one(tmp_path: Path):
    rows = events(steps=10)
    for row in rows:
        if row.get("rank") == 1:
            row.update(compute_s=0.7, wait_s=0.05)
    lockstep = read_run(write_run(tmp_path / "a", rows=rows))
    assert time_shares(lockstep, 0) == pytest.approx((0.5, 0.2, 0.05))
    assert time_shares(lockstep, 1) == pytest.approx((0.7, 0.0, 0.05))
    edp = read_run(write_run(tmp_path / "b", rows=[*rows, *PUSHES]))
    assert time_shares(edp, 0) == pytest.approx((0.5, 0.0, 0.25))
    alone = read_run(write_run(tmp_path / "c", rows=events(ranks=1)))
    assert time_shares(alone, 0) == pytest.approx((0.5, 0.0, 0.0))
    assert time_shares(alone, 1) is None
