"""task=compare, as a command."""

from __future__ import annotations

from pathlib import Path

import pytest

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
    assert "classicdp has the highest throughput, 1,000 tokens/s: 2.00x that of edp;" in done.out
    assert done.out.splitlines()[-1].startswith("comparison: ")
    made = sorted(path.name for path in (two_runs / "outputs").glob("comparison.*"))
    assert made == ["comparison.csv", "comparison.html", "comparison.md"]
    assert "<figure>" in (two_runs / "outputs" / "comparison.html").read_text()


def test_a_name_of_nothing_and_a_key_that_is_none_end_with_2(two_runs: Path):
    for wrong in ("runs=nothing", "compare.metric=speed", "compare.run=x"):
        done = smolrun(two_runs, "task=compare", wrong)
        assert done.code == 2 and "problem" in done.error
    assert not list((two_runs / "outputs").glob("comparison.*"))


def test_a_place_that_cannot_be_written_is_named(two_runs: Path):
    (two_runs / "file").write_text("")
    done = smolrun(two_runs, "task=compare", "runs=aaaa", "out=file/x")
    assert done.code == 2
    assert "cannot be written" in done.error and "compare.out" in done.error
    assert smolrun(two_runs, "task=compare", "runs=aaaa", "out=there").code == 0
