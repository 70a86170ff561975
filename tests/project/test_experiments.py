"""conf/experiment/ and docs/experiments.md: every experiment is a valid sweep, and its table has
theory beside what the jobs measured."""

from __future__ import annotations

import csv
import json
from functools import cache
from pathlib import Path

import pytest

from docs import experiments
from smolrun.cli import choices, compose
from smolrun.cli.arguments import Arguments
from smolrun.cli.sweep import new_sweep
from smolrun.config import RunConfig, validate

PAGE = experiments.PAGE.read_text(encoding="utf-8")
COLUMNS = (
    *("final_train_loss", "final_eval_loss", "tokens_per_s", "wall_s", "bytes_sent"),
    "peak_memory_bytes",
)
MEGA = 1_000_000


@cache
def jobs(name: str) -> tuple[list[list[str]], list[RunConfig]]:
    """The overrides and the checked configuration of every job of an experiment."""
    arguments = Arguments([f"experiment={name}"])
    with compose.composing(arguments):
        cells = compose.jobs(arguments)
        return cells, [validate(compose.values(Arguments(cell))) for cell in cells]


def made(
    name: str, figures: list[dict[str, float]], summary: dict[str, object], broken: bool = False
) -> list[str]:
    """The lines of an experiment whose jobs had these figures."""
    cells, configs = jobs(name)
    sweep = new_sweep([f"experiment={name}"], cells, configs)
    planned = sweep.record.jobs
    rows = []
    for job, config, own in zip(planned, configs, figures, strict=True):
        whole = {"steps": config.training.steps, "parameters": MEGA, **summary}
        whole["versions"] = {"torch": "2"}
        whole["time"] = {"pipeline_bubble": own.pop("bubble", 0.0)}
        text = json.dumps(whole)
        (sweep.folder.path / job.name / "summary.json").write_text(text, encoding="utf-8")
        numbers = {"wall_s": 30.0, "final_eval_loss": 2.0, **own}
        rows.append([job.name, "done", *job.differs.values(), *map(numbers.get, COLUMNS)])
    rows.reverse()  # comparisons are sorted by what came out
    if broken:
        rows[0][1] = "failed"
    with (sweep.folder.path / "comparison.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([["job", "status", *planned[0].differs, *COLUMNS], *rows])
    return experiments.result(name, sweep.folder.path)


def cells_of(line: str) -> list[str]:
    return line.strip("| ").split(" | ")


@pytest.fixture(autouse=True)
def in_an_empty_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("staleness_stragglers", 3),
        ("quantization_links", 6),
        ("zero_memory", 4),
        ("pipeline_bubble", 5),
        ("unequal_speeds", 6),
    ],
)
def test_every_experiment_is_a_valid_sweep_of_one_size_of_batch(name: str, count: int) -> None:
    _, configs = jobs(name)
    assert len(configs) == count
    assert len({(config.training.steps, config.seed) for config in configs}) == 1
    emulated = [host.emulate for config in configs for host in config.cluster.hosts or []]
    assert all(emulated) and bool(emulated) == (name != "zero_memory")


def test_the_page_has_every_experiment_with_its_command_and_its_result() -> None:
    files = (choices.shipped_folder() / "experiment").glob("*.yaml")
    with_axes = {file.stem for file in files if "sweeper:" in file.read_text(encoding="utf-8")}
    assert set(experiments.EXPERIMENTS) == with_axes
    for name in with_axes:
        assert f"\n`smolrun -m experiment={name}`\n" in PAGE
        assert "\nnew\n<!-- end -->" in experiments.renewed(PAGE, name, ["new"])


def test_a_result_replaces_the_last_one_and_nothing_else() -> None:
    page = "a\n<!-- result of x -->\nold\n<!-- end -->\n<!-- result of y -->\n<!-- end -->\n"
    once = experiments.renewed(page, "x", ["| 1\\2 |"])
    assert once == page.replace("old", "| 1\\2 |") == experiments.renewed(once, "x", ["| 1\\2 |"])
    with pytest.raises(ValueError, match="result of z"):
        experiments.renewed(page, "z", [])


def test_staleness_beside_the_simulation_of_the_same_chances() -> None:
    lines = made(
        "staleness_stragglers",
        [{"tokens_per_s": rate} for rate in (100.0, 120.0, 140.0)],
        {"world_size": 3},
    )
    rows = [cells_of(line) for line in lines[2:5]]
    assert [row[0] for row in rows] == ["0", "1", "4"]
    assert [row[3] for row in rows] == ["1.00", "1.20", "1.40"]
    theory = [float(row[2]) for row in rows]
    # No staleness gains more than the mean of the slowest rank over the mean of one rank.
    assert theory[0] == 1.0 < theory[1] < theory[2] < 2.084 / 1.4
    assert rows[0][1] == f"{24 * 64 / 100:.3f}"
    assert lines[-1].startswith("`smolrun -m experiment=staleness_stragglers`, 2")
    assert lines[-1].endswith("torch 2; 1.5 minutes.")


def test_bytes_of_quantized_gradients() -> None:
    steps, ranks = 30, 3
    sent = float(MEGA * steps * ranks)
    lines = made(
        "quantization_links",
        [{"tokens_per_s": 1536.0, "bytes_sent": sent}] * 6,
        {"world_size": ranks},
    )
    rows = [cells_of(line) for line in lines[2:8]]
    assert [row[0] for row in rows][::2] == ["25 Mbit/s", "100 Mbit/s", "1000 Mbit/s"]
    assert [row[1] for row in rows[:2]] == ["none", "int8"]
    assert [row[2] for row in rows[:2]] == ["5.33 MB", "1.35 MB"]
    assert {row[3] for row in rows} == {"1.00 MB"} and {row[5] for row in rows} == {"1.000"}
    # 5.33 MB are 42.7 Mbit; of 25 Mbit/s on the cable 23.9 are payload.
    assert [row[4] for row in rows[::2]] == ["1.784", "0.446", "0.045"]


def test_memory_of_the_stages() -> None:
    lines = made(
        "zero_memory",
        [{"peak_memory_bytes": peak * 1e6, "bytes_sent": 24e6} for peak in (50, 45, 42, 39)],
        {"world_size": 4},
    )
    rows = [cells_of(line) for line in lines[2:6]]
    assert [row[1] for row in rows] == ["16", "10", "7", "4"]
    assert [row[2] for row in rows] == ["0 MB", "6 MB", "9 MB", "12 MB"]
    assert [row[3] for row in rows] == ["0 MB", "5 MB", "8 MB", "11 MB"]
    assert [row[5] for row in rows] == ["6.00 MB", "6.00 MB", "6.00 MB", "9.00 MB"]
    assert {row[6] for row in rows} == {"1.00 MB"}


def test_bubbles() -> None:
    lines = made(
        "pipeline_bubble",
        [{"tokens_per_s": 100.0 + k, "bubble": 0.6 - k / 10} for k in range(5)],
        {"world_size": 3},
    )
    rows = [cells_of(line) for line in lines[2:7]]
    assert [row[1] for row in rows] == ["67%", "50%", "33%", "20%", "11%"]
    assert [row[2] for row in rows] == ["60%", "50%", "40%", "30%", "20%"]
    assert [row[3] for row in rows] == ["1.00", "1.50", "2.00", "2.40", "2.67"]
    assert rows[4][4] == "1.04"


def test_the_sum_of_unequal_speeds() -> None:
    lines = made("unequal_speeds", [{"tokens_per_s": 10.0}] * 6, {"world_size": 4})
    rows = [cells_of(line) for line in lines[2:8]]
    assert [row[:2] for row in rows[2:4]] == [["equal", "edp"], ["by speed", "classicdp"]]
    assert [row[2] for row in rows] == ["27%", "27%", "87%", "95%", "95%", "87%"]


def test_the_newest_sweep_that_changes_nothing_counts(tmp_path: Path) -> None:
    for number, more in enumerate([[], ["sweep.repeats=2"], ["seed=3"], []]):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "sweep.yaml").write_text(json.dumps({"overrides": ["experiment=x", *more]}))
        if number < 3:  # the last one has not ended
            (folder / "comparison.csv").touch()
    assert experiments.newest("x", tmp_path) == tmp_path / "1"
    assert experiments.newest("y", tmp_path) is None


def test_a_sweep_with_a_failed_job_is_no_result() -> None:
    figures = [{"tokens_per_s": 10.0} for _ in range(3)]
    with pytest.raises(ValueError, match="not all jobs are done"):
        made("staleness_stragglers", figures, {"world_size": 3}, broken=True)
