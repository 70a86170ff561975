from __future__ import annotations

import json
from pathlib import Path

import pytest

from smolrun.cli.compose import compose
from smolrun.tasks import status
from tests.cli.command import smolrun
from tests.tracking.test_past_runs import a_run, write_steps


def test_the_command(tmp_path: Path):
    outputs = tmp_path / "outputs"
    done = a_run(outputs, "20260131-142501-done-aaaa")
    write_steps(done, *range(100))
    done.write_summary({"status": "done"})
    (done.checkpoints / "step-00000100").mkdir(parents=True)
    (done.checkpoints / "step-00000100" / "rank0-0.safetensors").write_bytes(b"x" * 12_345_678)
    running = a_run(outputs, "20260202-142501-running-aaaa", steps=1000)
    running.write_driver(steps=1000)
    write_steps(running, *range(10))
    running.become_latest()
    a_run(outputs, "20260201-142501-died-aaaa")
    ended = smolrun(tmp_path, "task=status")
    assert ended.code == 0, ended
    assert ended.error == ""
    assert ended.seen == "['import hydra']"  # no torch, nothing started
    head, *lines = [line.split("  ") for line in ended.out.splitlines()]
    cells = [[cell.strip() for cell in line if cell.strip()] for line in lines]
    assert [cell.strip() for cell in head if cell.strip()] == list(status.COLUMNS)
    assert cells[0][:6] == [running.run_id, "running", "10/1,000", "3.2500", "2,000", "0:08:15"]
    assert cells[1][:6] == ["20260201-142501-died-aaaa", "died", "-/100", "-", "-", "-"]
    assert cells[2][:6] == [done.run_id, "done", "100/100", "3.2500", "2,000", "-"]
    assert cells[2][-1] == "12.3 MB"


def test_no_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    monkeypatch.chdir(tmp_path)
    assert status.drive(compose()) == 0
    assert capsys.readouterr().out.startswith("no runs below ")
    assert list(tmp_path.iterdir()) == []


def test_many_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    monkeypatch.chdir(tmp_path)
    for number in range(23):
        a_run(tmp_path / "outputs", f"20260131-1425{number:02}-x-aaaa")
    assert status.drive(compose()) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 22
    assert lines[1].startswith("20260131-142522")
    assert lines[-1] == "and 3 older ones"


def test_json_has_all_runs_and_raw_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    monkeypatch.chdir(tmp_path)
    for number in range(23):
        a_run(tmp_path / "outputs", f"20260131-1425{number:02}-x-aaaa")
    assert status.drive(compose(["task=status", "status.format=json"])) == 0
    runs = json.loads(capsys.readouterr().out)
    assert len(runs) == 23
    assert runs[0]["run"] == "20260131-142522-x-aaaa"
    assert Path(runs[0]["path"]) == tmp_path / "outputs" / runs[0]["run"]
    assert (runs[0]["state"], runs[0]["step"], runs[0]["steps"]) == ("died", None, 100)
    assert isinstance(runs[0]["age_s"], float)


@pytest.mark.parametrize("columns", [140, 60, 20])
def test_a_narrow_terminal_loses_columns_but_never_a_name(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
    columns: int,
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", str(columns))
    a_run(tmp_path / "outputs")
    monkeypatch.setattr(status.sys.stdout, "isatty", lambda: True)
    assert status.drive(compose()) == 0
    head, row = capsys.readouterr().out.splitlines()[:2]
    assert row.startswith("20260131-142501-x-aaaa  ")
    assert ("checkpoints" in head) == (columns == 140)
    assert columns == 20 or max(len(head), len(row)) <= columns


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1 kB"),
        (999_999, "1 MB"),
        (1_234_567, "1.23 MB"),
        (5e11, "500 GB"),
        (2.5e15, "2,500.0 TB"),
    ],
)
def test_sizes(num_bytes: float, text: str):
    assert status.size(num_bytes) == text
