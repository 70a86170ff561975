"""sweep.yaml and the states of jobs, read from files that others may have written."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import msgspec
import pytest

from smolrun.errors import SmolrunError
from smolrun.launch.delivery.run_folder import run_on_host
from smolrun.tracking.run_folder import RunFolder
from smolrun.tracking.sweep_folder import SweepFolder, SweepJob, SweepRecord, find_sweep

RECORD = SweepRecord("id", "0.1.0", "2026-01-31T22:05:01+00:00", ["seed=1,2"], "wall_s",
                     [SweepJob("seed=1", ["seed=1"], {"seed": "1"}, cell=0),
                      SweepJob("seed=2", ["seed=2"], {"seed": "2"}, cell=1)])  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> SweepFolder:
    path = tmp_path / "sweeps" / "20260131-220501-seed-3fa9"
    path.mkdir(parents=True)
    found = SweepFolder(path)
    found.write(RECORD)
    return found


def test_what_was_written_is_read(folder: SweepFolder, tmp_path: Path):
    assert folder.record() == RECORD
    assert find_sweep("3fa9", tmp_path) == folder
    assert find_sweep("nothing", tmp_path) is None


@pytest.mark.parametrize(
    "jobs",
    [
        [{"name": "../../elsewhere", "overrides": []}],
        [{"name": "a/b", "overrides": []}],
        [{"name": "..", "overrides": []}],
        [{"name": ".hidden", "overrides": []}],
        [{"name": "a\\b", "overrides": []}],
        [{"name": "x" * 101, "overrides": []}],
        [{"name": "a", "overrides": []}, {"name": "A", "overrides": []}],
        [{"name": "a", "overrides": [], "repeat": 1 << 60}],
        [{"name": "a", "overrides": "x"}],
        [{"name": f"a{n}", "overrides": []} for n in range(2001)],
        [],
        "x",
        None,
    ],
)
def test_jobs_that_are_none_are_refused(folder: SweepFolder, jobs: object):
    plain = msgspec.yaml.decode(folder.file.read_bytes())
    if isinstance(jobs, list):  # nothing else is wrong with them
        jobs = [{"differs": {}, "cell": 0, **job} for job in jobs]
    folder.file.write_bytes(msgspec.yaml.encode({**plain, "jobs": jobs}))
    with pytest.raises(SmolrunError, match=r"sweep\.yaml cannot be used"):
        folder.record()


@pytest.mark.parametrize("text", ["", "[1]", "a: &a [*a]", "{" * 10_000, "\0", "x" * (9 << 20)])
def test_a_file_that_is_no_sweep_is_refused(folder: SweepFolder, text: str):
    folder.file.write_text(text)
    with pytest.raises(SmolrunError, match=r"sweep\.yaml cannot be used"):
        folder.record()


def test_what_is_read_is_safe_to_print(folder: SweepFolder):
    plain = msgspec.yaml.decode(folder.file.read_bytes())
    plain["jobs"][0]["differs"] = {"a\x1b[2J": "b\nc"}
    folder.file.write_bytes(msgspec.yaml.encode(plain))
    assert folder.record().jobs[0].differs == {"a [2J": "b c"}


def test_the_state_of_a_job_is_in_its_files(folder: SweepFolder):
    job, run = RECORD.jobs[0], folder.job("seed=1")
    assert folder.look(job, is_alive=True).state == "waiting"
    run.path.mkdir()
    run.config.write_text("training: {steps: 9}\n")
    assert folder.look(job, is_alive=True).state == "waiting"
    run.driver_log.touch()
    assert folder.look(job, is_alive=True).state == "preparing"
    assert folder.look(job, is_alive=False).state == "stopped"  # the sweep was killed
    step = {"event": "step", "step": 3, "loss": 2.5, "tokens": 10, "time_s": 4.0}
    run.metrics.write_text(json.dumps(step) + "\n")
    view = folder.look(job, is_alive=True)
    assert (view.state, view.step, view.steps, view.loss) == ("running", 4, 9, 2.5)
    run.write_summary({"status": "failed", "reason": "x", "steps": 4, "wall_s": "soon"})
    view = folder.look(job, is_alive=True)
    assert (view.state, view.reason, view.step, view.wall_s) == ("failed", "x", 4, None)
    run.write_summary({"status": "serving"})
    assert folder.look(job, is_alive=True).state == "running"


def test_a_job_has_an_id_that_hosts_take(folder: SweepFolder, tmp_path: Path):
    other = SweepFolder(tmp_path / "sweeps" / "20260131-220501-seed-77c0")
    other.path.mkdir()
    other.write(RECORD)
    runs = [folder.job("seed=1"), folder.job("seed=2"), other.job("seed=1")]
    ids = [run.unique_id for run in runs]
    assert len(set(ids)) == 3
    for run in runs:  # as launch/delivery demands of a folder on a host
        assert run_on_host(SimpleNamespace(workdir="/w"), run.unique_id).startswith("/w/runs/2026")
    alone = tmp_path / "20260131-220501-single-gpt_tiny-3fa9"
    assert RunFolder(alone).unique_id == alone.name
