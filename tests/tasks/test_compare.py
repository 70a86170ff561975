"""task=compare, as a command."""

from __future__ import annotations

from pathlib import Path

import pytest

from smolrun.cli.run import run
from tests.cli.command import smolrun
from tests.comparison.runs import config, events, write_run

A, B = "20260131-142501-classicdp-gpt-aaaa", "20260131-142502-edp-gpt-bbbb"


@pytest.fixture
def two_runs(tmp_path: Path) -> Path:
    write_run(tmp_path / "outputs" / A)
    write_run(tmp_path / "outputs" / B, config(algorithm__name="edp"), events(step_s=2.0))
    return tmp_path


def test_the_command(two_runs: Path):
    done = smolrun(two_runs, "task=compare", f"runs=aaaa,{B}")
    assert done.code == 0, done
    assert done.error == "" and done.seen == "['import hydra']"  # no torch, nothing started
    assert "classicdp has the highest throughput, 1,000 tokens/s: 2.00x that of edp." in done.out
    assert done.out.splitlines()[-1].startswith("comparison: ")
    made = sorted(path.name for path in (two_runs / "outputs").glob("comparison.*"))
    assert made == ["comparison.csv", "comparison.html", "comparison.md"]
    assert "<figure>" in (two_runs / "outputs" / "comparison.html").read_text()


def test_a_name_of_nothing_ends_with_2(
    two_runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(two_runs)
    for wrong in ("runs=nothing", "compare.metric=speed", "compare.run=x"):
        assert run(["task=compare", wrong]) == 2
        assert "problem" in capsys.readouterr().err
    assert not list((two_runs / "outputs").glob("comparison.*"))


def test_a_place_that_cannot_be_written_is_named(
    two_runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(two_runs)
    (two_runs / "file").write_text("")
    assert run(["task=compare", "runs=aaaa", "out=file/x"]) == 2
    error = capsys.readouterr().err
    assert "cannot be written" in error and "compare.out" in error
    assert run(["task=compare", "runs=aaaa", "out=there"]) == 0
    assert (two_runs / "there" / "comparison.html").is_file()
