from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from smolrun.comparison import selection
from smolrun.comparison.selection import of_sweep, select
from smolrun.errors import ConfigError
from smolrun.tracking.sweep_folder import SweepFolder, SweepJob, SweepRecord
from tests.comparison.runs import write_run

A, B = "20260131-142501-classicdp-gpt-aaaa", "20260131-142502-edp-gpt-bbbb"
SWEEP = "20260201-142501-algorithm-cccc"
FSDP, EDP = "algorithm=fsdp,seed=1", "algorithm=edp,seed=1"


@pytest.fixture
def outputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two runs, and a sweep of two jobs of which one has started."""
    monkeypatch.chdir(tmp_path)
    folder = Path("outputs")
    for name in (A, B):
        write_run(folder / name)
    a_sweep(folder / "sweeps" / SWEEP)
    return folder


def a_sweep(path: Path) -> SweepFolder:
    write_run(path / FSDP)
    sweep = SweepFolder(path)
    jobs = [
        SweepJob(name, [], {"algorithm": name[10:].partition(",")[0]}, cell=n)
        for n, name in enumerate((FSDP, EDP))
    ]
    sweep.write(SweepRecord(path.name, "0.1.0", "", ["algorithm=fsdp,edp"], "tokens_per_s", jobs))
    return sweep


def names(*args: str | list[str] | None, outputs: Path) -> list[str]:
    runs, sweep = (*args, None)[:2]
    assert sweep is None or isinstance(sweep, str)
    return [job.name for job in select(runs, sweep, outputs).jobs]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (f"{A},{B}", [A, B]),
        (f"[{B}, {A}]", [B, A]),
        ([A, B], [A, B]),
        ("aaaa,edp-gpt", [A, B]),
        (f"outputs/{A},'{B}'", [A, B]),
        (f"{SWEEP}/{FSDP},{A}", [FSDP, A]),  # a comma within a name
        (f"aaaa,cccc/{FSDP},bbbb", [A, FSDP, B]),
        (f"{A},{A},{B}", [A, B]),
        (A, [A]),
    ],
)
def test_runs_by_name(outputs: Path, text: str | list[str], found: list[str]):
    assert names(text, outputs=outputs) == found


def test_a_run_that_is_named_twice_is_said(outputs: Path):
    chosen = select(f"{A},aaaa", None, outputs)
    assert len(chosen.jobs) == 1 and "named twice" in chosen.notes[0]
    assert chosen.out == outputs


def test_sweeps(outputs: Path):
    for one in (select(None, None, outputs), select(SWEEP, None, outputs)):
        assert [job.name for job in one.jobs] == [FSDP, EDP]
        assert one.out == outputs / "sweeps" / SWEEP or one.out.samefile(outputs / "sweeps" / SWEEP)
        assert (one.metric, one.overrides) == ("tokens_per_s", ["algorithm=fsdp,edp"])
    assert names(None, "cccc", outputs=outputs) == [FSDP, EDP]
    assert names(f"{SWEEP},{A}", outputs=outputs) == [FSDP, EDP, A]


@pytest.mark.parametrize(
    ("typed", "metric"),
    [
        ("seed=1,2", None),
        ("sweep.metric=final_eval_loss", "final_eval_loss"),
        ("hydra/sweeper=optuna", "final_eval_loss"),
    ],
)
def test_the_default_metric_of_a_sweep_sorts_nothing(
    tmp_path: Path, typed: str, metric: str | None
):
    sweep = a_sweep(tmp_path / SWEEP)
    changed = {"metric": "final_eval_loss", "overrides": [typed]}
    sweep.write(msgspec.structs.replace(sweep.record(), **changed))
    assert of_sweep(sweep.path).metric == metric


def test_without_a_sweep_the_newest_runs(outputs: Path):
    (outputs / "sweeps" / SWEEP / "sweep.yaml").unlink()
    assert names(None, outputs=outputs) == [B, A]


@pytest.mark.parametrize(
    ("runs", "sweep", "text"),
    [
        ("nothing", None, "compare.runs = nothing: "),
        (f"{A},nothing", None, "compare.runs = nothing: "),
        ("2026", None, "compare.runs = 2026: 2 runs have"),
        ("", None, "compare.runs = "),
        ("\0", None, "compare.runs = "),
        ("x" * 5000, None, "compare.runs = x"),
        (None, "nothing", "compare.sweep = nothing: no such sweep"),
        (A, SWEEP, "only one of them"),
    ],
)
def test_a_name_of_nothing_is_an_error(
    outputs: Path, runs: str | None, sweep: str | None, text: str
):
    with pytest.raises(ConfigError) as error:
        select(runs, sweep, outputs)
    assert text in str(error.value)


def test_no_runs_at_all(tmp_path: Path):
    with pytest.raises(ConfigError, match="no runs below"):
        select(None, None, tmp_path / "outputs")


@pytest.mark.parametrize("text", ["", "jobs: 3", "a: &a [*a]", "\x00", "jobs: [{name: ../../x}]"])
def test_of_a_damaged_sweep_the_runs_in_its_folder(tmp_path: Path, text: str):
    sweep = a_sweep(tmp_path / SWEEP)
    sweep.file.write_text(text)
    found = of_sweep(sweep.path)
    assert [job.name for job in found.jobs] == [FSDP]
    assert "cannot be used" in found.notes[0]


def test_links_in_a_sweep_are_not_followed(tmp_path: Path):
    elsewhere = write_run(tmp_path / "elsewhere")
    sweep = a_sweep(tmp_path / SWEEP)
    (sweep.path / EDP).symlink_to(elsewhere.path)
    assert [job.name for job in of_sweep(sweep.path).jobs] == [FSDP]


def test_so_many_runs_and_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(selection, "MOST_RUNS", 1)
    found = of_sweep(a_sweep(tmp_path / SWEEP).path)
    assert len(found.jobs) == 1 and "first 1 of 2" in found.notes[0]
